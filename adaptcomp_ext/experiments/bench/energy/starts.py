"""Starting points from which each row stops after as many steps as it should.

A row's trajectory of plain descent crosses any level of its gradient's norm once, at some step K. Started N
steps before, at a point of that very trajectory, it stops after N steps. So the schedule of steps is exact,
and the energy is one like any other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["MARGIN", "starts"]

# How far the norms before and after must be from the tolerance, so that rounding does not decide.
MARGIN = 0.01


def starts(
    slope: Callable[[Tensor, Tensor], Tensor],
    y: Tensor,
    x: Tensor,
    wanted: Tensor,
    step_size: float,
    most: int,
) -> tuple[Tensor, Tensor, float]:
    """Choose a point for every wanted number of steps.

    Parameters
    ----------
    slope : callable
        ``slope(y, x)``, the gradients.
    y, x : Tensor
        Candidates, more than are wanted: some of them cross the tolerance too close to it.
    wanted : Tensor
        int64 [B], 1…most.
    step_size : float
        Of the descent.
    most : int
        M.

    Returns
    -------
    y0, x, tol : Tensor, Tensor, float
        [B, …] of both, and the tolerance on the gradient's norm.

    Raises
    ------
    ValueError
        If fewer candidates than wanted cross a common tolerance with a margin.
    """
    points, norms = [y], [torch.linalg.vector_norm(slope(y, x), dim=1)]
    for _ in range(3 * most):
        points.append(points[-1] - step_size * slope(points[-1], x))
        norms.append(torch.linalg.vector_norm(slope(points[-1], x), dim=1))
    path, norm = torch.stack(points, dim=1), torch.stack(norms, dim=1)
    tol = float(norm[:, most].quantile(0.1))
    below = norm <= tol
    crossing = below.to(torch.int8).argmax(dim=1)
    level = norm / tol
    before = level.gather(1, (crossing - 1).clamp(min=0)[:, None])[:, 0]
    fits = (
        below.any(dim=1)
        & (crossing >= most)
        & (before > 1 + MARGIN)
        & (level.gather(1, crossing[:, None])[:, 0] < 1 - MARGIN)
    )
    rows = fits.nonzero()[: wanted.shape[0], 0]
    if rows.shape[0] < wanted.shape[0]:
        raise ValueError(
            f"wanted: expected at most {rows.shape[0]} rows for so many candidates, got {wanted.shape[0]}"
        )
    return path[rows, crossing[rows] - wanted], x[rows].contiguous(), tol
