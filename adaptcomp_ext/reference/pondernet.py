"""One step of PonderNet (Banino et al. 2021), in log space."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from adaptcomp_ext.reference.act import is_logit, passing_back_where_logit


def pondernet_step(
    logits: Tensor,
    log_survival: Tensor,
    step: int,
    min_steps: int,
    max_steps: int,
    log_prior: float,
    log_epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return halting probability, log survival, this step's term of KL(p ‖ prior), and whether it is last."""
    if step < min_steps:  # the hazard is zero by definition
        zero = torch.zeros_like(log_survival)
        return zero, log_survival.clone(), zero.clone(), torch.zeros_like(log_survival, dtype=torch.bool)
    z = passing_back_where_logit(logits).to(log_survival.dtype)
    # Detached, because zero times NaN would be NaN in the backward pass.
    log_survival = torch.where(is_logit(logits), log_survival, log_survival.detach())
    after = log_survival + logsigmoid(-z)
    last = after < log_epsilon if step < max_steps else torch.ones_like(after, dtype=torch.bool)
    log_p = torch.where(last, log_survival, log_survival + logsigmoid(z))
    p = log_p.exp()
    return p, after, p * (log_p.masked_fill(p == 0, log_prior) - log_prior), last  # 0 log 0 = 0


def pondernet_step_backward(
    logits: Tensor,
    log_survival: Tensor,
    g_weight: Tensor | None,
    g_log_survival: Tensor | None,
    g_cost: Tensor | None,
    step: int,
    min_steps: int,
    max_steps: int,
    log_prior: float,
    log_epsilon: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradients in the logits and in the log survival before the step."""
    zero = torch.zeros_like(log_survival)
    g_weight, g_log_survival, g_cost = (zero if g is None else g for g in (g_weight, g_log_survival, g_cost))
    if step < min_steps:
        return zero, g_log_survival.clone()
    sound = is_logit(logits)
    z = torch.where(sound, logits, 0).to(log_survival.dtype)
    hazard = torch.sigmoid(z)
    last = (log_survival + logsigmoid(-z) < log_epsilon) | (step >= max_steps)
    log_p = torch.where(last, log_survival, log_survival + logsigmoid(z))
    p = log_p.exp()
    g_log_p = p * (g_weight + g_cost * (log_p.masked_fill(p == 0, log_prior) - log_prior + 1))
    g_logits = torch.where(last, zero, g_log_p * (1 - hazard)) - hazard * g_log_survival
    return torch.where(sound, g_logits, zero), torch.where(sound, g_log_p, zero) + g_log_survival
