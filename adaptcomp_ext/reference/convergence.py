"""Whether a readout stands still from one step to the next."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def stands_still(now: Tensor, last: Tensor, criterion: str, tolerance: float) -> Tensor:
    """Return whether each row of the readout, [n, K], stands still.

    "relative": ‖now − last‖ ≤ tol ‖now‖; "absolute": ‖now − last‖ ≤ tol; "kl": KL(softmax(now) ‖
    softmax(last)) ≤ tol. A class that is −inf in both has not moved, and is left out of ‖now‖.
    """
    wide = torch.float64 if now.dtype == torch.float64 else torch.float32
    now, last = now.detach().to(wide), last.detach().to(wide)
    masked = now.isneginf()
    if criterion == "kl":
        log_p, log_q = torch.log_softmax(now, 1), torch.log_softmax(last, 1)
        terms = log_p.exp() * (log_p - log_q)
        divergence: Tensor = torch.where(masked, 0.0, terms).sum(1)
        return divergence <= tolerance
    difference = torch.where(masked & last.isneginf(), 0.0, now - last)
    change: Tensor = torch.linalg.vector_norm(difference, dim=1)
    if criterion == "absolute":
        return change <= tolerance
    size: Tensor = torch.linalg.vector_norm(now.masked_fill(masked, 0.0), dim=1)
    return (change <= tolerance * size) & (size < math.inf)


def convergence_step(now: Tensor, last: Tensor, still: Tensor, criterion: str, tolerance: float) -> Tensor:
    """Return each row's number of consecutive steps without a change; `still` −1: it has no last step."""
    same = stands_still(now, last, criterion, tolerance) & (still >= 0)
    return torch.where(same, still + 1, 0)
