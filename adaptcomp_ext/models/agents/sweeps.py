"""A planner for grids whose map is known: sweeps of value iteration, as many as each row is given."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from adaptcomp_ext.nn import AdaptiveHalt, FixedSteps, route
from adaptcomp_ext.ops._checks import check_choice, check_int, check_tensor

__all__ = ["UNKNOWN", "sweep_plan", "value_sweep"]

UNKNOWN = -10_000
"""The value of a cell that no sweep has reached, and of a wall."""
GOAL = 20_000  # added on entering the goal: whatever the neighbours are worth, it then is cut back to 0


def value_sweep(value: Tensor, step: Tensor, count: int = 1) -> Tensor:
    """Sweeps of max-plus value iteration: every cell learns from its four neighbours.

    ::

        v'(s) = min( max( step(s) + max over neighbours n of v(n), UNKNOWN ), 0 )

    Parameters
    ----------
    value, step : Tensor
        int16 [n, H, W], contiguous, each maze with a rim of walls: v; −1 where a cell is free, `UNKNOWN`
        where there is a wall, 20,000 at the goal.
    count : int
        How many sweeps, at least 1.

    Returns
    -------
    Tensor
        int16 [n, H, W], new. The rim stays `UNKNOWN`.
    """
    # All mazes as one line of cells: a shift that runs from one into the next meets a rim on both sides.
    # Numbers of 16 bits, and one pass for each operation: measured, a quarter of the time that a padded batch
    # of floats takes. The views are made once: for few mazes they take longer than the passes.
    width = value.shape[2]
    count = check_int("count", count, 1)
    add = step.view(-1)[width:-width]
    lines = [torch.empty_like(value).view(-1) for _ in range(min(count, 2))]
    for line in lines:
        line[:width], line[-width:] = UNKNOWN, UNKNOWN
    views = [_around(line, width) for line in lines]
    _, *neighbours = _around(value.view(-1), width)
    for k in range(count):
        above, below, left, right = neighbours
        best, *neighbours = views[k % 2]
        torch.maximum(above, below, out=best)
        torch.maximum(best, left, out=best)
        torch.maximum(best, right, out=best)
        best.add_(add).clamp_(UNKNOWN, 0)
    return lines[(count - 1) % 2].view(value.shape)


def _around(line: Tensor, width: int) -> tuple[Tensor, ...]:
    """Every cell but those of the first and last row, and its neighbours above, below, left and right."""
    last = len(line) - width
    return (
        line[width:last],
        line[: last - width],
        line[2 * width :],
        line[width - 1 : last - 1],
        line[width + 1 : last + 1],
    )


def sweep_plan(
    walls: Tensor, position: Tensor, goal: Tensor, sweeps: Tensor, compact: bool | str = True
) -> Tensor:
    """What the four moves from `position` are worth after so many sweeps, each row having its own number.

    Parameters
    ----------
    walls : Tensor
        Bool or integer [B, S, S].
    position, goal : Tensor
        int64 [B, 2]: row and column.
    sweeps : Tensor
        int64 [B], at least 0. A row with 0 never reaches the planner; a row that has had its sweeps leaves
        it.
    compact : bool or "auto"
        As for `AdaptiveHalt`.

    Returns
    -------
    Tensor
        float32 [B, 4]: minus the steps from the neighbour up, right, down, left to the goal; `UNKNOWN` where
        that is a wall or the sweeps did not reach it. K sweeps reach the cells that are at most K steps from
        the goal.
    """
    batch, size = check_tensor("walls", walls).shape[0], walls.shape[-1]
    if walls.shape != (batch, size, size):
        raise ValueError(f"walls: expected shape [B, S, S], got {list(walls.shape)}")
    for name, place in (("position", position), ("goal", goal)):
        if check_tensor(name, place).shape != (batch, 2) or place.dtype != torch.int64:
            raise ValueError(
                f"{name}: expected int64 of shape [{batch}, 2], got {place.dtype} of shape {list(place.shape)}"
            )
    if check_tensor("sweeps", sweeps).shape != (batch,) or sweeps.dtype != torch.int64:
        raise ValueError(
            f"sweeps: expected int64 of shape [{batch}], got {sweeps.dtype} of shape {list(sweeps.shape)}"
        )
    check_choice("compact", compact, (True, False, "auto"))
    most = int(sweeps.max()) if batch else 0
    if batch and int(sweeps.min()) < 0:
        raise ValueError(f"sweeps: expected at least 0 for every row, got {int(sweeps.min())}")
    nothing = torch.full((batch, 4), float(UNKNOWN), device=walls.device)
    if most == 0:
        return nothing

    def plan(walls: Tensor, position: Tensor, goal: Tensor, sweeps: Tensor) -> Tensor:
        n = len(walls)
        # No row leaves between two of the numbers that occur: one step of the loop for each number, not for
        # each sweep. After as many sweeps as there are cells nothing changes.
        sweeps = sweeps.clamp(max=size * size)
        occurs = torch.bincount(sweeps) > 0
        levels = occurs.nonzero()[:, 0].tolist()
        more = iter([level - before for before, level in pairwise([0, *levels])])
        rows = torch.arange(n, device=walls.device)
        step = torch.full((n, size + 2, size + 2), UNKNOWN, dtype=torch.int16, device=walls.device)
        step[:, 1:-1, 1:-1] = walls.to(torch.int16).mul_(UNKNOWN + 1).sub_(1)
        step[rows, goal[:, 0] + 1, goal[:, 1] + 1] = GOAL
        start = torch.full_like(step, UNKNOWN)
        start[rows, goal[:, 0] + 1, goal[:, 1] + 1] = 0
        policy = FixedSteps(occurs.cumsum(0)[sweeps])
        halt = AdaptiveHalt(
            lambda value, step: value_sweep(value, step, next(more)),
            policy,
            max_steps=len(levels),
            compact=compact,
        )
        value = halt(start, step).output.view(n, -1)
        here = (position[:, 0] + 1) * (size + 2) + position[:, 1] + 1
        around = torch.tensor([-(size + 2), 1, size + 2, -1], device=walls.device)
        return value.gather(1, here[:, None] + around).float()

    called: Tensor = route(sweeps > 0, plan, walls, position, goal, sweeps, otherwise=nothing)
    return called
