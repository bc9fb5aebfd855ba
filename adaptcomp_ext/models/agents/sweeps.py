"""A planner for grids whose map is known: value iteration with a number of sweeps for each row."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from adaptcomp_ext.nn import AdaptiveHalt, FixedSteps, route
from adaptcomp_ext.ops._checks import check_choice, check_int, check_tensor

__all__ = ["UNKNOWN", "sweep_plan", "value_sweep"]

UNKNOWN = -10_000
"""The value of a wall, and of a cell that no sweep has reached."""
GOAL = 20_000  # added at the goal, so that its value is clamped to 0 whatever its neighbours' values are


def value_sweep(value: Tensor, step: Tensor, count: int = 1) -> Tensor:
    """Run sweeps of max-plus value iteration, in which every cell reads its four neighbours.

    ::

        v'(s) = min( max( step(s) + max over neighbours n of v(n), UNKNOWN ), 0 )

    Parameters
    ----------
    value, step : Tensor
        int16 [n, H, W], contiguous; each maze has a rim of walls. `value` is v; `step` is −1 in a free cell,
        `UNKNOWN` in a wall, 20,000 at the goal.
    count : int
        Number of sweeps, at least 1.

    Returns
    -------
    Tensor
        int16 [n, H, W], new; not differentiable. The rim stays `UNKNOWN`. Shapes and dtypes are not checked.
    """
    # All mazes form one line of cells; the rims separate them. 16-bit numbers and one pass per operation take
    # a quarter of the time of a padded batch of floats. The views are made once, because for few mazes making
    # them takes longer than the passes.
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
    """Return all cells except the first and last row, and their neighbours above, below, left and right."""
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
    """Compute the values of the four moves from `position` after each row's own number of sweeps.

    Parameters
    ----------
    walls : Tensor
        Bool or integer [B, S, S].
    position, goal : Tensor
        int64 [B, 2]: row and column.
    sweeps : Tensor
        int64 [B], at least 0. A row with 0 sweeps never enters the planner; the others halt after theirs.
    compact : bool or "auto"
        As for `AdaptiveHalt`.

    Returns
    -------
    Tensor
        float32 [B, 4]: minus the number of steps to the goal from the neighbour above, right, below, left;
        `UNKNOWN` for a wall and a cell that the sweeps did not reach. K sweeps reach the cells that are at
        most K steps from the goal. Not differentiable.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """
    batch, size = check_tensor("walls", walls).shape[0], walls.shape[-1]
    if walls.shape != (batch, size, size):
        raise ValueError(f"walls: expected shape [B, S, S], got {list(walls.shape)}")
    for name, cell in (("position", position), ("goal", goal)):
        if check_tensor(name, cell).shape != (batch, 2) or cell.dtype != torch.int64:
            raise ValueError(
                f"{name}: expected int64 of shape [{batch}, 2], got {cell.dtype} of shape {list(cell.shape)}"
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
        # Rows halt only at the numbers of sweeps that occur: the loop takes one step for each such number,
        # not for each sweep. More sweeps than there are cells change nothing.
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
            check_rows=False,  # each step uses up a number of sweeps
        )
        value = halt(start, step).output.view(n, -1)
        here = (position[:, 0] + 1) * (size + 2) + position[:, 1] + 1
        around = torch.tensor([-(size + 2), 1, size + 2, -1], device=walls.device)
        values: Tensor = value.gather(1, here[:, None] + around)
        return values.float()

    called: Tensor = route(sweeps > 0, plan, walls, position, goal, sweeps, otherwise=nothing)
    return called
