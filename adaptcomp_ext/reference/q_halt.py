"""Halting by values of halting and of going on, as in the hierarchical reasoning model (Wang et al. 2025)."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptcomp_ext.reference.philox import uniform


def q_halt_step(logits: Tensor) -> Tensor:
    """Return whether each row halts: of logits [n, 2] if the first is larger, of [n] if it is positive."""
    return logits[:, 0] > logits[:, 1] if logits.dim() == 2 else logits > 0


def q_halt_least(seed: int | Tensor, sample: Tensor, exploration: float | Tensor, max_steps: int) -> Tensor:
    """Return each sample's first step at which it may halt: with probability `exploration` from U{2…M}."""
    explores = uniform(seed, sample, 0) < exploration
    drawn = 2 + (uniform(seed, sample, 1 << 32).double() * (max_steps - 1)).long()
    return torch.where(explores & (max_steps > 1), drawn, 1)


def q_halt_targets(
    logits: Tensor, right: Tensor, following: Tensor | None = None, last: Tensor | None = None
) -> Tensor:
    """Return the targets of the logits [n, 2], or [n]; without `following` going on is its own target."""
    right = right.to(logits.dtype)
    if logits.dim() == 1:
        return right
    value = logits.detach()[:, 1]
    if following is not None:
        value = following.detach().amax(dim=1).to(logits.dtype)
        if last is not None:
            value = torch.where(last, following.detach()[:, 0].to(logits.dtype), value)
    return torch.stack([right, torch.sigmoid(value)], dim=1)
