"""The loops one writes around an energy: all steps, all rows until the last one has stopped, and with a graph of it all."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .functions import Energy

__all__ = ["Advance", "Outcome", "autograd_slope", "descend", "masked_advance", "masked_descend", "unrolled"]

Advance = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


class Outcome(NamedTuple):
    """What every contender returns: y [B, D]; steps int64 [B], None where every row takes all; and the energy of y, [B]."""

    y: Tensor
    steps: Tensor | None
    energy: Tensor | None = None


def autograd_slope(energy: Energy, y: Tensor, *context: Tensor) -> Tensor:
    """Return the gradient at y by autograd."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        (slope,) = torch.autograd.grad(energy(y, *context).sum(), y)
    return slope


def descend(energy: Energy, y: Tensor, context: tuple[Tensor, ...], step_size: float, steps: int) -> Tensor:
    """Take all steps with autograd's gradients."""
    for _ in range(steps):
        y = y - step_size * autograd_slope(energy, y, *context)
    return y


def masked_advance(slope: Callable[[Tensor], Tensor], step_size: float, tol: float) -> Advance:
    """Return a step of all rows that moves those that are active, and says which of them go on."""

    def advance(y: Tensor, g: Tensor, active: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y = torch.where(active[:, None], y - step_size * g, y)
        steps = steps + active
        g = slope(y)
        return y, g, active & (torch.linalg.vector_norm(g, dim=1) > tol), steps

    return advance


def masked_descend(advance: Advance, y: Tensor, g: Tensor, most: int) -> Outcome:
    """Run all rows until the last one has stopped, from y and the gradient there."""
    active = torch.ones(y.shape[0], dtype=torch.bool, device=y.device)
    steps = torch.zeros(y.shape[0], dtype=torch.int64, device=y.device)
    for _ in range(most):
        y, g, active, steps = advance(y, g, active, steps)
        if not active.any():
            break
    return Outcome(y, steps)


def unrolled(energy: Energy, y: Tensor, context: tuple[Tensor, ...], step_size: float, steps: int) -> Tensor:
    """Take all steps and keep the graph of all of them."""
    y = y if y.requires_grad else y.detach().requires_grad_()
    for _ in range(steps):
        (slope,) = torch.autograd.grad(energy(y, *context).sum(), y, create_graph=True)
        y = y - step_size * slope
    return y
