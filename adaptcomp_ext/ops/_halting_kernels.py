"""The calls of the halting kernels, and the raw op; see `halting`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptcomp_ext import _C
from adaptcomp_ext.ops._backend import place
from adaptcomp_ext.ops._library import register

MAX_LEAVES: int = _C.MAX_LEAVES
RUNNING: int = _C.STATUS["RUNNING"]
"""The flag of an active row. A positive flag is the Status of a row that has ended, -1 is padding."""

# The codes of csrc/halting/halting.h.
GIVEN, FIXED_STEPS, ACT, PONDER_SAMPLE, CONFIDENCE, Q_HALT = range(6)
CONVERGES = {"relative": 6, "absolute": 7, "kl": 8}
ARGMAX = 9


class Fused(NamedTuple):
    """A decision that the halting kernel takes."""

    policy: int
    signal: Tensor | None = None
    """GIVEN: bool [n]. FIXED_STEPS: int64 [B], or None for `parameter`. ACT, PONDER_SAMPLE: logits [n].
    Q_HALT: logits [n] or [n, 2]."""
    threshold: float = 0.0
    parameter: int = 0
    """FIXED_STEPS: the number of steps. PONDER_SAMPLE: the seed. CONFIDENCE: the measure. CONVERGES, ARGMAX:
    the patience."""
    carried: bool = False
    """Whether the kernel updates ``carry[0]``, [n] in the scalar dtype."""
    has_cost: bool = False
    head: Callable[[Any], Any] | None = None
    """ACT, PONDER_SAMPLE: returns the logits, one for each row of a state; Q_HALT: one or two."""


class ActNode(NamedTuple):
    """A decision of ACT that the kernel has taken, for its gradient. The tensors are [n]."""

    logits: Tensor
    before: Tensor
    """Accumulated halting probability before the step."""
    after: Tensor
    """Accumulated halting probability after the step."""
    weight: Tensor
    bounds: tuple[int, int, int]
    """step, min_steps, max_steps."""
    threshold: float

    @classmethod
    def of(cls, fused: Fused, carry: Tensor, bounds: tuple[int, int, int]) -> ActNode:
        """Allocate the node of one step, for the kernel to write."""
        assert fused.signal is not None, "the head's logits"
        after, weight = (torch.empty_like(carry, requires_grad=False) for _ in range(2))
        return cls(fused.signal, carry, after, weight, bounds, fused.threshold)


class Kernel(NamedTuple):
    """The form of a decision in the kernel: what it takes and leaves. The loops need to know nothing else."""

    has_head: bool = False
    has_signal: bool = False
    """It may take one int64 for each row of the batch."""
    carries: bool = False
    """It updates a number for each row, and adds up a cost."""
    reads_logits: bool = False
    """It reads the readout as class logits, also where the state itself is read."""
    parameters: tuple[int, ...] | None = None
    """The parameters that there are; None: any from 0 on."""
    logits: int = 1
    """The most logits that its head may give for each row."""
    compiled_only: bool = False
    """Only the compiled loop knows it: it takes several logits, or remembers the last readout."""
    node: Callable[[Fused, Tensor, tuple[int, int, int]], ActNode] | None = None
    """Makes the autograd node's part of a step, where the decision has a gradient."""


KERNELS = {
    FIXED_STEPS: Kernel(has_signal=True),
    ACT: Kernel(has_head=True, carries=True, node=ActNode.of),
    PONDER_SAMPLE: Kernel(has_head=True),
    CONFIDENCE: Kernel(reads_logits=True, parameters=(0, 1, 2)),
    Q_HALT: Kernel(has_head=True, logits=2, compiled_only=True),
    CONVERGES["relative"]: Kernel(compiled_only=True),
    CONVERGES["absolute"]: Kernel(compiled_only=True),
    CONVERGES["kl"]: Kernel(reads_logits=True, compiled_only=True),
    ARGMAX: Kernel(reads_logits=True, compiled_only=True),
}


class Stepped(NamedTuple):
    """The result of the halting kernel."""

    flag: Tensor
    """int8 [n]"""
    running: int
    """Number of active rows; -1 on CUDA, where only the device knows it."""
    where: Tensor | None
    """int64 [n], if compacted: the place of each row in the new block, or -1."""
    row: Tensor | None
    """int64 [running], if compacted: the batch row of each row of the new block."""
    packed: list[Tensor] | None


def halt_step(
    row: Tensor,
    decision: Fused,
    weight: Tensor | None,
    readout: Tensor | None,
    output: Tensor | None,
    leaves: Sequence[Tensor],
    results: Sequence[Tensor],
    increments: Sequence[Tensor],
    totals: Sequence[Tensor],
    steps: Tensor,
    status: Tensor,
    running: Tensor | None,
    step: int,
    min_steps: int,
    max_steps: int,
    sample_ids: Tensor | None = None,
    tested: Tensor | None = None,
    carry: Tensor | None = None,
    weight_out: Tensor | None = None,
    moving: Sequence[Tensor] = (),
    least: int | None = None,
    read_leaf: int = -1,
    spent: Tensor | None = None,
) -> Stepped:
    """End the rows that halt; on the CPU compact the others if at least `least` have ended (None: never)."""
    flag = torch.empty_like(row, dtype=torch.int8)
    scalars = (sample_ids, carry, weight, weight_out, tested)
    tensors = (row, flag, steps, status, running, *scalars, decision.signal, readout, output, spent)
    least = row.shape[0] + 1 if least is None else least
    integers = [
        step,
        min_steps,
        max_steps,
        decision.policy,
        decision.parameter,
        decision.has_cost,
        read_leaf,
        least,
    ]
    integers += place(row.device)
    return Stepped(
        flag,
        *_C.halt_rows(tensors, leaves, results, increments, totals, moving, integers, decision.threshold),
    )


def _kernel(
    row: Tensor,
    halt: Tensor,
    weight: Tensor | None,
    readout: Tensor | None,
    output: Tensor | None,
    leaves: Sequence[Tensor],
    results: Sequence[Tensor],
    increments: Sequence[Tensor],
    totals: Sequence[Tensor],
    steps: Tensor,
    status: Tensor,
    running: Tensor | None,
    step: int,
    min_steps: int,
    max_steps: int,
) -> Tensor:
    flag = halt_step(
        *(
            row,
            Fused(GIVEN, halt),
            weight,
            readout,
            output,
            leaves,
            results,
            increments,
            totals,
            steps,
            status,
            running,
        ),
        *(step, min_steps, max_steps),
    ).flag
    for written in (output, *results, *totals, steps, status, running):
        if written is not None:  # autograd does not see the kernel's writes through raw pointers
            torch.autograd.graph.increment_version(written)
    return flag


_halt_rows = register(
    "halt_rows(Tensor row, Tensor halt, Tensor? weight, Tensor? readout, Tensor(a!)? output, "
    "Tensor[] leaves, Tensor(b!)[] results, Tensor[] increments, Tensor(c!)[] totals, Tensor(d!) steps, "
    "Tensor(e!) status, Tensor(f!)? running, int step, int min_steps, int max_steps) -> Tensor",
    _kernel,
    lambda row, *rest: torch.empty_like(row, dtype=torch.int8),
)


Gradients = tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]


def halt_backward(
    row: Tensor,
    flag: Tensor,
    where: Tensor | None,
    weight: Tensor | None,
    readout: Tensor | None,
    g_output: Tensor | None,
    g_results: Sequence[Tensor | None],
    g_packed: Sequence[Tensor | None],
    g_totals: Sequence[Tensor | None],
    readout_dtype: torch.dtype | None,
    shared: bool,
) -> Gradients:
    """`reference.halt_rows_backward`."""
    tensors = (row, flag, where, weight, readout, g_output)
    integers = [0, 0, 0, *place(row.device)]
    return _C.halt_backward(tensors, g_results, g_packed, g_totals, readout_dtype, shared, integers, 0.0)


def act_halt_backward(
    row: Tensor,
    flag: Tensor,
    where: Tensor | None,
    logits: Tensor,
    before: Tensor,
    weight: Tensor,
    readout: Tensor,
    g_output: Tensor | None,
    g_results: Sequence[Tensor | None],
    g_packed: Sequence[Tensor | None],
    g_cost: Tensor | None,
    g_next: Tensor | None,
    readout_dtype: torch.dtype | None,
    shared: bool,
    bounds: tuple[int, int, int],
    threshold: float,
) -> tuple[Tensor | None, Tensor, Tensor, list[Tensor | None]]:
    """`reference.act_halt_backward`."""
    tensors = (row, flag, where, weight, readout, g_output, logits, before, g_next, g_cost)
    g_readout, _, (g_logits, g_before), g_leaves = _C.halt_backward(
        *(tensors, g_results, g_packed, (), readout_dtype, shared, [*bounds, *place(row.device)], threshold)
    )
    return g_readout, g_logits, g_before, g_leaves
