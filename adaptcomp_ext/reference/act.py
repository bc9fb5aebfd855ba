"""One step of adaptive computation time (Graves 2016)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def is_logit(logits: Tensor) -> Tensor:
    """Return where the logits are neither NaN nor +inf; −inf is a halting probability of 0."""
    return logits < math.inf


def passing_back_where_logit(logits: Tensor) -> Tensor:
    """Return the logits, detached where they are NaN or +inf: such a row ends and passes no gradient back."""
    return torch.where(is_logit(logits), logits, logits.detach())


def act_step(
    logits: Tensor,
    accumulated: Tensor,
    step: int | Tensor,
    min_steps: int,
    max_steps: int,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return weight, accumulated halting probability, ponder cost, and whether the threshold is reached.

    The step may be an int64 tensor [n] of steps that are not before `min_steps`.
    """
    if isinstance(step, int) and step < min_steps:  # the probability of halting is zero by definition
        zero = torch.zeros_like(accumulated)
        return zero, accumulated.clone(), zero.clone(), torch.zeros_like(accumulated, dtype=torch.bool)
    h = torch.sigmoid(passing_back_where_logit(logits).to(accumulated.dtype))
    total = accumulated + h
    reached = total >= threshold
    last = reached | (step >= max_steps)
    remainder = 1 - accumulated
    weight = torch.where(last, remainder, h)
    cost = torch.where(last, step + remainder, torch.zeros_like(h))
    return weight, total, cost, reached


def act_step_backward(
    logits: Tensor,
    accumulated: Tensor,
    g_weight: Tensor | None,
    g_accumulated: Tensor | None,
    g_cost: Tensor | None,
    step: int,
    min_steps: int,
    max_steps: int,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradients in the logits and in the accumulated probability. N counts as a constant."""
    zero = torch.zeros_like(accumulated)
    g_weight, g_accumulated, g_cost = (zero if g is None else g for g in (g_weight, g_accumulated, g_cost))
    if step < min_steps:
        return zero, g_accumulated.clone()
    sound = is_logit(logits)
    h = torch.sigmoid(torch.where(sound, logits, 0).to(accumulated.dtype))
    last = (accumulated + h >= threshold) | (step >= max_steps)
    g_logits = (g_accumulated + torch.where(last, zero, g_weight)) * h * (1 - h)
    g_before = g_accumulated - torch.where(last, g_weight + g_cost, zero)
    return torch.where(sound, g_logits, zero), torch.where(sound, g_before, g_accumulated)
