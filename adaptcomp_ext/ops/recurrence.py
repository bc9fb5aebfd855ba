"""The kernel call that runs a recurrent cell until every row has halted, on the CPU."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from adaptcomp_ext import _C

# The codes of csrc/recurrence/recurrence.h.
CELLS = {"gru": 0, "lstm": 1, "mlp": 2}
GATES = {"gru": 3, "lstm": 4, "mlp": 1}


class Cell(NamedTuple):
    """A cell as the kernel takes it: contiguous tensors of one dtype, float32 or float64.

    Attributes
    ----------
    kind : str
        A key of `CELLS`.
    weight_ih, weight_hh, bias_ih, bias_hh : Tensor or None
        [gates, input], [gates, dim], [gates], [gates].
    weight2, bias2 : Tensor or None
        [dim, hidden] and [dim], of the MLP.
    activation : int
        The code of the MLP's activation.
    residual : bool
        Whether the MLP adds its state.
    """

    kind: str
    weight_ih: Tensor | None
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight2: Tensor | None = None
    bias2: Tensor | None = None
    activation: int = 0
    residual: bool = False


Linear = tuple[Tensor, "Tensor | None"]
"""Weight and bias of a layer."""


class Decision(NamedTuple):
    """The policy: its code, bounds and constants, and its numbers for each row."""

    policy: int
    min_steps: int
    max_steps: int
    threshold: float
    parameter: int
    signal: Tensor | None
    sample_ids: Tensor | None
    reads_state: bool  # whether the state is read as logits, in which minus infinity is valid


def recurrence(
    cell: Cell,
    state: list[Tensor],
    x: Tensor | None,
    decision: Decision,
    head: Linear | None,
    readout: Linear | None,
    output: Tensor | None,
    results: list[Tensor],
    cost: Tensor | None,
    steps: Tensor,
    status: Tensor,
) -> None:
    """Run every row until it has ended, and write output, results, cost, steps and status."""
    rows, dim = state[0].shape
    second, second_result = (state[1], results[1]) if len(state) == 2 else (None, None)
    _C.recurrence(
        [
            *(
                rows,
                0 if x is None else x.shape[1],
                dim,
                0 if cell.weight2 is None else cell.weight2.shape[1],
            ),
            *(state[0].itemsize == 8, CELLS[cell.kind], cell.activation, cell.residual),
            *(x, state[0], second, *cell[1:7]),
            *((None, None) if head is None else head),
            *((None, None, dim) if readout is None else (*readout, readout[0].shape[0])),
            *(output, results[0], second_result, cost),
            *(decision.policy, decision.min_steps, decision.max_steps, decision.parameter),
            *(decision.signal, decision.sample_ids, decision.reads_state, steps, status),
        ],
        decision.threshold,
    )
