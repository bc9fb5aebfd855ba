"""The halting kernels: argument lists, and the raw op. Private; see `halting`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptcomp_ext import _C
from adaptcomp_ext.ops._backend import dtype_code, leaf_extent, place, plain, pointer, row_size
from adaptcomp_ext.ops._library import register

MAX_LEAVES: int = _C.MAX_LEAVES
RUNNING = 0  # the flag of a row that goes on; positive flags are the Status it ended with, -1 is padding

# The codes of csrc/halting/halting.h.
GIVEN, FIXED_STEPS, ACT, PONDER_SAMPLE, CONFIDENCE = range(5)


class Fused(NamedTuple):
    """A decision that the halting kernel takes by itself, in the call that does everything else."""

    policy: int
    signal: Tensor | None = None
    """GIVEN: bool [n]. FIXED_STEPS: int64 [B], or None for `parameter`. ACT, PONDER_SAMPLE: logits [n]."""
    threshold: float = 0.0
    parameter: int = 0
    """FIXED_STEPS: the number. PONDER_SAMPLE: the seed. CONFIDENCE: the measure."""
    carried: bool = False
    """The kernel updates ``carry[0]``, [n] in the scalar dtype, in place."""
    has_cost: bool = False
    head: Callable[[Any], Any] | None = None
    """ACT, PONDER_SAMPLE: gives the logits, one per row of a state."""


class ActNode(NamedTuple):
    """A decision of ACT taken in the kernel, as the gradient needs it. The tensors are [n]."""

    logits: Tensor
    before: Tensor
    """The halting probability spent before the step."""
    after: Tensor
    """The same with this step."""
    weight: Tensor
    bounds: tuple[int, int, int]
    """step, min_steps, max_steps."""
    threshold: float


def leaf_arguments(block: Tensor, result: Tensor) -> tuple[int, int, int, int]:
    """One ``Leaf`` of the argument list."""
    size, code = leaf_extent(block)
    return block.data_ptr(), result.data_ptr(), size, code


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
) -> tuple[Tensor, int]:
    """The flags, and on the CPU the number of rows that go on."""
    rows = row.shape[0]
    flag = torch.empty_like(row, dtype=torch.int8)
    # Contiguous copies, where one is needed, live until the call returns.
    leaves = [t.contiguous() for t in leaves]
    signal = None if decision.signal is None else decision.signal.contiguous()
    weight = None if weight is None else weight.contiguous()
    readout = None if readout is None else readout.contiguous()
    increments = [t.contiguous() for t in increments]
    tested = None if tested is None else tested.contiguous()
    scalar = next((t for t in (weight, weight_out, *increments) if t is not None), None)
    arguments = [
        *(rows, row.data_ptr(), flag.data_ptr(), steps.data_ptr(), status.data_ptr()),
        *(scalar is not None and scalar.dtype == torch.float64, step, min_steps, max_steps),
        *(decision.policy, pointer(signal), 0 if signal is None else dtype_code(signal.dtype), decision.parameter),
        *(pointer(sample_ids), pointer(carry), pointer(weight)),
    ]
    if readout is not None and output is not None:
        arguments += leaf_arguments(readout, output)
    elif decision.policy == CONFIDENCE:  # the class logits are the state itself
        arguments += leaf_arguments(leaves[0], results[0])
    else:
        arguments += (0, 0, 0, 0)
    if decision.has_cost:
        arguments += (1, 0, totals[0].data_ptr())
    else:
        arguments.append(len(increments))
        for increment, total in zip(increments, totals, strict=True):
            arguments += (increment.data_ptr(), total.data_ptr())
    arguments.append(len(leaves))
    for leaf, result in zip(leaves, results, strict=True):
        arguments += leaf_arguments(leaf, result)
    # No retiring and no packing: the gradient needs `row` as it is, and packs out of place.
    arguments += (False, pointer(weight_out), pointer(tested), 0 if tested is None else dtype_code(tested.dtype))
    arguments += (0, rows + 1, pointer(running), *place(row.device))
    return flag, _C.halt_step(arguments, decision.threshold)


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
    flag, _ = halt_step(
        *(row, Fused(GIVEN, halt), weight, readout, output, leaves, results, increments, totals, steps, status, running),
        *(step, min_steps, max_steps),
    )
    for written in (output, *results, *totals, steps, status, running):
        if written is not None:  # the kernel wrote through raw pointers, which autograd does not see
            torch.autograd.graph.increment_version(written)
    return flag


_halt_rows = register(
    "halt_rows(Tensor row, Tensor halt, Tensor? weight, Tensor? readout, Tensor(a!)? output, Tensor[] leaves, "
    "Tensor(b!)[] results, Tensor[] increments, Tensor(c!)[] totals, Tensor(d!) steps, Tensor(e!) status, "
    "Tensor(f!)? running, int step, int min_steps, int max_steps) -> Tensor",
    _kernel,
    lambda row, *rest: torch.empty_like(row, dtype=torch.int8),
)


def halt_backward(
    row: Tensor,
    flag: Tensor,
    where: Tensor | None,
    weight: Tensor | None,
    readout: Tensor | None,
    g_output: Tensor | None,
    g_results: Sequence[Tensor | None],
    g_packed: Sequence[Tensor | None],
    g_totals: Sequence[Tensor],
    readout_dtype: torch.dtype,
    shared: bool,
    act: ActNode | None = None,
    g_next: Tensor | None = None,
    g_cost: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, list[Tensor], list[Tensor | None]]:
    """`reference.halt_rows_backward`; with `act`, the gradients of its logits and carry stand in the place of increments."""
    rows = row.shape[0]
    wide = any(t.dtype == torch.float64 for t in (weight, *g_totals) if t is not None)
    scalar = torch.float64 if wide else torch.float32
    g_output = None if g_output is None else g_output.contiguous()
    g_totals = [g.contiguous() for g in g_totals]
    g_increments = [g.new_empty((rows,)) for g in g_totals]
    g_readout = g_weight = None
    elements = code = 0
    if g_output is not None:
        g_readout = None if shared else g_output.new_empty((rows, *g_output.shape[1:]), dtype=readout_dtype)
        elements, code = row_size(g_output), dtype_code(readout_dtype)
        g_weight = None if weight is None or act is not None else row.new_empty((rows,), dtype=scalar)

    g_leaves: list[Tensor | None] = []
    table: list[tuple[int, int, int, int, int]] = []
    kept: list[Tensor] = []  # contiguous copies live until the call returns
    for i, (result, packed) in enumerate(zip(g_results, g_packed, strict=True)):
        given = [plain(g) for g in (result, packed) if g is not None]
        kept += given
        read = shared and i == 0 and g_output is not None
        if not (given or read):
            g_leaves.append(None)
            continue
        like = given[0] if given else g_output
        assert like is not None
        g_leaf = like.new_empty((rows, *like.shape[1:]), dtype=readout_dtype if read else like.dtype)
        g_leaves.append(g_leaf)
        sources = (0 if result is None else given[0].data_ptr(), 0 if packed is None else given[-1].data_ptr())
        table.append((*sources, g_leaf.data_ptr(), row_size(g_leaf), dtype_code(g_leaf.dtype)))

    tail = [0] * 10
    if act is not None:
        g_next, g_cost = (None if g is None else g.contiguous() for g in (g_next, g_cost))
        logits = act.logits.contiguous()
        g_increments = [torch.empty_like(act.before), torch.empty_like(act.before)]
        tail = [
            *(logits.data_ptr(), dtype_code(logits.dtype), act.before.data_ptr(), *act.bounds),
            *(pointer(g_next), pointer(g_cost), g_increments[0].data_ptr(), g_increments[1].data_ptr()),
        ]
    sums: list[int] = []
    if act is None:
        for g_total, g_increment in zip(g_totals, g_increments, strict=True):
            sums += (g_total.data_ptr(), g_increment.data_ptr())
    here = place(row.device)
    for start in range(0, max(len(table), 1), MAX_LEAVES):
        part = table[start : start + MAX_LEAVES]
        first = start == 0
        arguments = [rows, row.data_ptr(), flag.data_ptr(), pointer(where), wide]
        if first:
            arguments += (pointer(g_output), pointer(weight), pointer(readout), pointer(g_readout), pointer(g_weight))
            arguments += (elements, code, len(sums) // 2, *sums)
        else:
            arguments += (0, 0, 0, 0, 0, 0, 0, 0)
        arguments.append(len(part))
        for entry in part:
            arguments += entry
        arguments += tail if first else [0] * len(tail)
        _C.halt_backward([*arguments, *here], 0.0 if act is None else act.threshold)
    return g_readout, g_weight, g_increments, g_leaves


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
    readout_dtype: torch.dtype,
    shared: bool,
    bounds: tuple[int, int, int],
    threshold: float,
) -> tuple[Tensor | None, Tensor, Tensor, list[Tensor | None]]:
    act = ActNode(logits, before, before, weight, bounds, threshold)
    g_readout, _, (g_logits, g_before), g_leaves = halt_backward(
        *(row, flag, where, weight, readout, g_output, g_results, g_packed),
        *([], readout_dtype, shared, act, g_next, g_cost),
    )
    return g_readout, g_logits, g_before, g_leaves
