"""The cost model of ``compact="auto"``: it decides when compaction pays.

d halted rows in the block cost d times the work of a row at every further step; compaction costs a fixed
overhead and the bytes moved, once. The number of further steps is unknown, as in the ski rental problem, and
so is the rule: wait until the waste reaches the price of compaction, then compact. It wastes at most twice as
much as the best schedule in hindsight. csrc/halting/schedule.h implements it.

The estimates depend on shapes and parameter counts only, not on a clock: the same call makes the same
decisions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from adaptcomp_ext import _C


@dataclass(frozen=True, slots=True)
class CostModel:
    """Prices in microseconds. The defaults are orders of magnitude for two cores of a server CPU."""

    packing: float = 1.0
    """Fixed price of a compaction."""
    per_tensor: float = 1.0
    """Further price for each tensor: checking who holds its memory, and changing its shape."""
    per_byte: float = 2e-5
    """Price of a byte of a moved row, which is read and written."""
    per_flop: float = 1e-5
    """Price of one operation of the step's arithmetic."""


DEFAULT = CostModel()


def schedule(
    weights: int | None, state: Sequence[Tensor], inputs: Sequence[Tensor], model: CostModel = DEFAULT
) -> _C.Schedule:
    """Make the schedule of a run, which decides after each step whether to compact.

    Parameters
    ----------
    weights : int or None
        The step's number of weights, from `count_weights`.
    state, inputs : sequence of Tensor
        The tensors of a block.
    model : CostModel
        The prices.

    Returns
    -------
    Schedule
        ``least(rows)``: the least number of halted rows with which a block of `rows` should be compacted
        after this step; more than `rows`: never. ``kept(halted)`` records a step that will run with `halted`
        halted rows in the block, and ``packed()`` a compaction.
    """
    prices = (model.packing, model.per_tensor, model.per_byte, model.per_flop)
    return _C.make_schedule(-1 if weights is None else weights, state, inputs, *prices)


def at_once() -> _C.Schedule:
    """Make a schedule that compacts whenever a row has halted."""
    return _C.Schedule(0.0, 0.0, 1.0)


def never() -> _C.Schedule:
    """Make a schedule that never compacts."""
    return _C.Schedule(math.inf, 0.0, 1.0)


def count_weights(step: Any) -> int | None:
    """Count the parameters that one call of the step uses; None if unknown, as for a plain function."""
    if not isinstance(step, nn.Module):
        return None
    weights = sum(p.numel() for p in step.parameters() if not is_lazy(p))
    return weights // len(step) if isinstance(step, nn.ModuleList) else weights


def flops_per_row(weights: int | None, state: Tensor) -> float:
    """Estimate the step's arithmetic for one row: two operations per weight and position.

    Unknown weights are taken for one dense layer of the state's width.
    """
    flops: float = _C.flops_per_row(-1 if weights is None else weights, state)
    return flops
