"""When compaction pays: the cost model behind ``compact="auto"``.

Leaving d halted rows in the block costs d times the work of one row at every further step; packing them away
costs a fixed overhead and the bytes moved, once. How many steps will follow is not known beforehand, so the
rule is the one for renting or buying skis: go on until what has been wasted reaches the price of packing,
then pack. It never wastes more than twice what the best schedule in hindsight would have. The rule stands in
csrc/halting/schedule.h.

The estimates are functions of shapes and parameter counts alone, never of a clock: the same call takes the
same decisions.
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
    """Prices in microseconds. The defaults are orders of magnitude on two cores of a server CPU; the rule needs no more."""

    packing: float = 1.0
    """Fixed price of packing: finding the holes."""
    per_tensor: float = 1.0
    """What each tensor adds to it: whose memory it is, and its new shape."""
    per_byte: float = 2e-5
    """Of a row moved, read and written."""
    per_flop: float = 1e-5
    """Of the step's arithmetic."""


DEFAULT = CostModel()


def schedule(
    weights: int | None, state: Sequence[Tensor], inputs: Sequence[Tensor], model: CostModel = DEFAULT
) -> _C.Schedule:
    """The schedule of one run: decides, step by step, how many halted rows make packing worth its price.

    Parameters
    ----------
    weights : int or None
        Of the step, from `count_weights`.
    state, inputs : sequence of Tensor
        One block of them.
    model : CostModel
        The prices.

    Returns
    -------
    Schedule
        ``least(rows)``: the number of halted rows from which on a block of `rows` should be packed after this
        step, more than `rows` where it never should. ``kept(halted)`` books a step that will run with so many
        halted rows left in the block, and ``packed()`` starts anew after packing.
    """
    prices = (model.packing, model.per_tensor, model.per_byte, model.per_flop)
    return _C.make_schedule(-1 if weights is None else weights, state, inputs, *prices)


def at_once() -> _C.Schedule:
    """A schedule that packs whenever a row has halted."""
    return _C.Schedule(0.0, 0.0, 1.0)


def never() -> _C.Schedule:
    """A schedule that never packs."""
    return _C.Schedule(math.inf, 0.0, 1.0)


def count_weights(step: Any) -> int | None:
    """Parameters that one call of the step uses; None where they cannot be seen, as in a plain function."""
    if not isinstance(step, nn.Module):
        return None
    weights = sum(p.numel() for p in step.parameters() if not is_lazy(p))
    return weights // len(step) if isinstance(step, nn.ModuleList) else weights


def flops_per_row(weights: int | None, state: Tensor) -> float:
    """Estimate of the step's arithmetic for one row: two operations per weight and position.

    Unknown weights count as one dense layer of the state's width.
    """
    flops: float = _C.flops_per_row(-1 if weights is None else weights, state)
    return flops
