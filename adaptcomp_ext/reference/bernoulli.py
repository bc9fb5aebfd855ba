"""One step of sampled halting, as an action with a log-probability (REINFORCE)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from adaptcomp_ext.reference.act import is_logit, passing_back_where_logit
from adaptcomp_ext.reference.philox import uniform


def bernoulli_step(
    logits: Tensor, sample: Tensor | None, seed: int | Tensor, step: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each row's action, and whether it is to halt.

    The probability of halting is sigmoid(logit). Without `sample`, a row's number is its place.
    """
    scalar = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z = passing_back_where_logit(logits).to(scalar)
    if sample is None:
        sample = torch.arange(logits.shape[0], device=logits.device)
    halt = uniform(seed, sample, step).to(scalar) < torch.sigmoid(z.detach())
    return torch.where(halt, logsigmoid(z), logsigmoid(-z)), halt


def bernoulli_step_backward(logits: Tensor, halt: Tensor, g_log_prob: Tensor) -> Tensor:
    """Return the gradient in the logits: 1 − λ for an action to halt, −λ for one to go on."""
    sound = is_logit(logits)
    hazard = torch.sigmoid(torch.where(sound, logits, 0).to(g_log_prob.dtype))
    return torch.where(sound, g_log_prob * (halt.to(hazard.dtype) - hazard), 0.0)
