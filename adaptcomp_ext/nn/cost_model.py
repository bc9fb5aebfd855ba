"""When compaction pays: the cost model behind ``compact="auto"``.

Leaving d halted rows in the block costs d times the work of one row at every further step; packing them away costs a fixed
overhead and the bytes moved, once. How many steps will follow is not known beforehand, so the rule is the one for renting or
buying skis: go on until what has been wasted reaches the price of packing, then pack. It never wastes more than twice what the
best schedule in hindsight would have.

The estimates are functions of shapes and parameter counts alone, never of a clock: the same call takes the same decisions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from adaptcomp_ext.ops._backend import row_size


@dataclass(frozen=True, slots=True)
class CostModel:
    """Prices in microseconds. The defaults are orders of magnitude on two cores of a server CPU; the rule needs no more."""

    packing: float = 6.0
    """Fixed price of packing: new views of every tensor."""
    per_tensor: float = 4.0
    """What each tensor adds to it."""
    per_byte: float = 2e-5
    """Of a row moved, read and written."""
    per_flop: float = 1e-5
    """Of the step's arithmetic."""


DEFAULT = CostModel()


class Schedule:
    """Decides, step by step, how many halted rows make packing worth its price.

    Parameters
    ----------
    weights : int or None
        Of the step, from `count_weights`.
    state, inputs : sequence of Tensor
        One block of them.
    """

    def __init__(
        self, weights: int | None, state: Sequence[Tensor], inputs: Sequence[Tensor], model: CostModel = DEFAULT
    ) -> None:
        row_bytes = 0
        for t in (*state, *inputs):
            row_bytes += row_size(t) * t.element_size()
        self._fixed = model.packing + model.per_tensor * (len(state) + len(inputs))
        self._move = model.per_byte * row_bytes
        self._row = model.per_flop * flops_per_row(weights, state[0]) + self._move
        self._wasted = 0.0

    def least(self, rows: int) -> int:
        """The number of halted rows from which on a block of `rows` should be packed after this step."""
        # Fewest d with  wasted + d * row >= fixed + (rows - d) * move.
        price = self._fixed + rows * self._move - self._wasted
        saved = self._row + self._move
        return max(1, math.ceil(price / saved)) if saved else rows + 1  # rows without elements: nothing to save

    def kept(self, halted: int) -> None:
        """Book a step that will run with `halted` rows left in the block."""
        self._wasted += halted * self._row

    def packed(self) -> None:
        """Start anew after packing."""
        self._wasted = 0.0


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
    width = state.shape[-1] if state.dim() > 1 else 1
    positions = row_size(state) / max(width, 1)
    return 2.0 * max(width * width if weights is None else weights, width) * positions
