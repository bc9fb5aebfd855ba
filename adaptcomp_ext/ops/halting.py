"""The halting step, which does all work between two calls of the user's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptcomp_ext import _C, reference
from adaptcomp_ext.ops import _halting_kernels
from adaptcomp_ext.ops._backend import is_differentiable, on_cuda, on_reference, place
from adaptcomp_ext.ops._halting_kernels import (
    ACT,
    ARGMAX,
    CONFIDENCE,
    CONVERGES,
    FIXED_STEPS,
    GIVEN,
    KERNELS,
    MAX_LEAVES,
    PONDER_SAMPLE,
    Q_HALT,
    RUNNING,
    ActNode,
    Fused,
    halt_step,
)
from adaptcomp_ext.ops._halting_node import HaltNode
from adaptcomp_ext.ops._halting_node import apply as apply_node
from adaptcomp_ext.ops._library import Function
from adaptcomp_ext.ops._transforms import check_gradients
from adaptcomp_ext.ops.compaction import gather_rows_kernel

__all__ = [
    "ACT",
    "ARGMAX",
    "CONFIDENCE",
    "CONVERGES",
    "FIXED_STEPS",
    "GIVEN",
    "KERNELS",
    "MAX_LEAVES",
    "PONDER_SAMPLE",
    "Q_HALT",
    "RUNNING",
    "ActNode",
    "EndedAndPacked",
    "Fused",
    "Plan",
    "Results",
    "Step",
    "apply_node",
    "block_gradient",
    "changes_in_place",
    "end_and_pack",
    "halt_rows",
    "pack_rows",
    "plan_packing",
]


# --- autograd -----------------------------------------------------------------------------------------------
class _Layout(NamedTuple):
    """The layout of the tensors and gradients of `_HaltRows`."""

    # With ACT, logits and carry come first, and the carry after the step is the last result.
    act: tuple[tuple[int, int, int], float] | None
    weighted: bool  # the weight comes first; never together with `act`
    readout: bool
    shared: bool  # the readout is the first leaf, and is not passed separately
    readout_dtype: torch.dtype | None
    sums: int
    increments: bool  # the increments of the sums are arguments; otherwise the kernel has computed them
    leaves: int
    carried: int


class _HaltRows(Function):
    """The halting step and its compaction as one node, so that the backward pass writes each gradient once.

    The kernels have already run. `forward` declares the tensors that they have `written` in place and
    `packed` from others; `fixed` are those of either that have no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layout: _Layout,
        saved: list[Tensor | None],
        written: list[Tensor],
        packed: list[Tensor],
        fixed: list[Tensor],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.layout = layout
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(*written)
        if fixed:
            ctx.mark_non_differentiable(*fixed)
        return (*written, *packed)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        check_gradients("AdaptiveHalt", grads)
        layout: _Layout = ctx.layout
        row, flag, where, logits, before, weight, readout = ctx.saved_tensors
        it = iter(grads)
        g_output = next(it) if layout.readout else None
        g_totals = [next(it) for _ in range(layout.sums)]
        g_results = [next(it) for _ in range(layout.leaves)]
        g_packed = list(it)
        first: list[Any] = []
        no_results = [None] * layout.carried
        if layout.act is None:
            # Under create_graph the gradient has to be differentiable in its turn: the reference is.
            backward = (
                reference.halt_rows_backward if torch.is_grad_enabled() else _halting_kernels.halt_backward
            )
            g_readout, g_weight, g_increments, g_leaves = backward(
                *(row, flag, where, weight, readout, g_output, [*g_results, *no_results], g_packed),
                *(g_totals, layout.readout_dtype, layout.shared),
            )
            if layout.weighted:
                first = [g_weight]
        else:
            g_next, g_increments = g_packed.pop(), []
            act_backward = (
                reference.act_halt_backward if torch.is_grad_enabled() else _halting_kernels.act_halt_backward
            )
            g_readout, g_logits, g_before, g_leaves = act_backward(
                *(
                    row,
                    flag,
                    where,
                    logits,
                    before,
                    weight,
                    readout,
                    g_output,
                    [*g_results, *no_results],
                    g_packed,
                ),
                *(
                    g_totals[0] if g_totals else None,
                    g_next,
                    layout.readout_dtype,
                    layout.shared,
                    *layout.act,
                ),
            )
            first = [g_logits.to(logits.dtype), g_before]
        return (
            *(None, None, None, None, None, *first),
            *([g_readout] if layout.readout and not layout.shared else []),
            *([g_output] if layout.readout else []),
            *(*(g_increments if layout.increments else ()), *g_totals),
            *(*g_leaves[: layout.leaves], *g_results),
            *g_leaves[layout.leaves :],
        )


# Bypasses the part of torch.autograd.Function.apply for functorch, whose wrappers never get here.
_apply: Callable[..., Any] = super(torch.autograd.Function, _HaltRows).apply


def changes_in_place(error: RuntimeError) -> bool:
    """Whether torch raised the error because a tensor that a step's node has saved was changed in place."""
    return any(
        f"of {node.__name__} is a view and is being modified inplace" in str(error)
        for node in (_HaltRows, HaltNode)
    )


# --- the op -------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class Results:
    """The results of the rows so far. The tensors are [B, ...] and are written in place."""

    steps: Tensor
    status: Tensor
    leaves: list[Tensor]
    totals: list[Tensor] = field(default_factory=list)
    output: Tensor | None = None  # None: the first leaf is the output

    def block_gradient(self, rows: Tensor) -> None:
        """Detach these rows, which are not finite: a NaN of the loss in them would reach the parameters."""
        self.leaves = [block_gradient(t, rows) for t in self.leaves]
        self.totals = [block_gradient(t, rows) for t in self.totals]
        if self.output is not None:
            self.output = block_gradient(self.output, rows)


def block_gradient(tensor: Tensor, rows: Tensor) -> Tensor:
    """Return the tensor, detached in the rows where the bool [n] is true."""
    if not tensor.requires_grad:
        return tensor
    return torch.where(rows.view(-1, *(1 for _ in tensor.shape[1:])), tensor.detach(), tensor)


def halt_rows(
    results: Results,
    row: Tensor,
    halt: Tensor | Fused,
    leaves: Sequence[Tensor],
    *,
    step: int,
    min_steps: int,
    max_steps: int,
    weight: Tensor | None = None,
    readout: Tensor | None = None,
    increments: Sequence[Tensor] = (),
    running: Tensor | None = None,
    sample_ids: Tensor | None = None,
    tested: Tensor | None = None,
    carry: Tensor | None = None,
    weight_out: Tensor | None = None,
    read_leaf: int = -1,
    spent: Tensor | None = None,
) -> tuple[Tensor, int]:
    """End the rows of a block that halt, reach `max_steps` or are not finite; `pack_rows` is the second half.

    If a row ends, its step count, status, last state and (unless weighted) readout are written to `results`.
    At every step ``weight * readout`` is added to ``results.output`` and each increment to its total, except
    for the increments of a row that is not finite.

    Parameters
    ----------
    results : Results
        Written in place.
    row : Tensor
        int64 [n]: the batch row of each block row, -1 for padding.
    halt : Tensor or Fused
        bool [n]: the policy's decision, used from `min_steps` on; or a decision that the kernel takes.
    leaves : sequence of Tensor
        The state, each [n, ...]. Floating-point leaves and weights have to be finite. So has the readout,
        except for −inf, which masks a class: at least one class has to be left, and the weight must not be
        negative.
    weight, readout, increments : Tensor
        [n], [n, ...] and [n] each.
    running : Tensor, optional
        int64 scalar on the device, decreased by the rows that end (CUDA).
    sample_ids : Tensor, optional
        int64 [B], for PONDER_SAMPLE.
    tested : Tensor, optional
        [n]: the logits of `halt`, which have to be finite or −inf.
    carry, weight_out : Tensor, optional
        [n] in the scalar dtype, for ACT: the accumulated halting probability, updated in place; and the
        weights.
    read_leaf : int
        Index of the leaf that is the readout, and is tested like it; -1: none.
    spent : Tensor, optional
        [n]: the accumulated halting probability before the step; `carry` is then only written.

    Returns
    -------
    flag : Tensor
        int8 [n]: 0 for an active row, the `Status` of a row that has ended, -1 for padding.
    running : int
        Number of active rows; -1 on CUDA, where only the device knows it.

    Notes
    -----
    `pack_rows` attaches the gradient of both halves. Nothing is checked. The dispatcher is bypassed unless a
    graph is being compiled: for fifteen arguments it costs more than the kernel.
    """
    tensors = (weight, readout, results.output, list(leaves), results.leaves, list(increments))
    bounds = (step, min_steps, max_steps)
    if on_reference():
        given = halt.signal if isinstance(halt, Fused) else halt
        assert given is not None, "on the reference the policy has decided in Python"
        written = (results.totals, results.steps, results.status)
        ended = reference.halt_rows(row, given, *tensors, *written, *bounds, tested, read_leaf)
        results.output, results.leaves, results.totals = ended.output, ended.results, ended.totals
        results.steps, results.status = ended.steps, ended.status
        if running is not None:
            running -= (ended.flag > 0).sum()
        return ended.flag, int((ended.flag == RUNNING).sum()) if not on_cuda(row.device) else -1
    decision = halt if isinstance(halt, Fused) else Fused(GIVEN, halt)
    with torch.no_grad():
        buffers = (results.totals, results.steps, results.status, running)
        extra = (sample_ids, tested, carry, weight_out)
        done = halt_step(row, decision, *tensors, *buffers, *bounds, *extra, read_leaf=read_leaf, spent=spent)
        return done.flag, done.running


@dataclass(frozen=True, slots=True)
class Plan:
    """The index of a compaction."""

    index: Tensor
    """int64 [m]: the old block row that each new one copies: active rows in order, then padding."""
    place: Tensor
    """int64 [n]: the place of each old block row in the new block, or -1."""
    row: Tensor
    """int64 [m]: the batch row of each new block row, -1 for padding."""


def plan_packing(flag: Tensor, row: Tensor, rows: int) -> Plan:
    """Make the index that compacts the rows whose flag is 0, in order, into a block of `rows` rows.

    `rows` must be at least their number. The remaining rows of the block are copies of active ones, so that
    the step gets no value that no active row has. If no row is active the index is -1, for rows of zeros. It
    is one kernel call, for which the host does not wait.
    """
    if on_reference():
        return Plan(*reference.plan_packing(flag, row, rows))
    before = row.shape[0]
    whole = torch.empty(2 * rows + before, dtype=torch.int64, device=row.device)  # one allocation for all
    _C.plan_packing([flag, row, before, rows, whole, *place(row.device)])
    return Plan(*whole.split_with_sizes([rows, before, rows]))


def pack_rows(
    results: Results,
    row: Tensor,
    flag: Tensor,
    plan: Plan | None,
    leaves: Sequence[Tensor],
    carried: Sequence[Tensor],
    *,
    weight: Tensor | None = None,
    readout: Tensor | None = None,
    increments: Sequence[Tensor] = (),
    act: ActNode | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Compact the active rows, and attach the gradient of the complete step, after `halt_rows`.

    Parameters
    ----------
    results, row, leaves, weight, readout, increments
        The arguments of `halt_rows`.
    flag : Tensor
        Its result.
    plan : Plan or None
        The index of the compaction; None: no row moves.
    carried : sequence of Tensor
        Tensors that move with the state: inputs and the policy's carry, each [n, ...].
    act : ActNode, optional
        The decision, if the kernel has taken it by ACT. Its carry is moved and appended to `carried`.

    Returns
    -------
    leaves, carried : list of Tensor
        Each [m, ...].
    """
    index, where = (None, None) if plan is None else (plan.index, plan.place)
    if plan is not None:
        _C.check_blocks(leaves, row.shape[0], "step")
        _C.check_blocks(carried, row.shape[0], "inputs")
    if on_reference():
        moving = [*leaves, *carried]
        packed = moving if index is None else reference.gather_rows(moving, index)
        return packed[: len(leaves)], packed[len(leaves) :]
    moving = [*leaves, *carried, *([] if act is None else [act.after])]
    with torch.no_grad():
        moved = None if index is None else gather_rows_kernel(moving, index)
    return _attach(results, row, flag, where, moved, leaves, carried, weight, readout, increments, act)


def _attach(
    results: Results,
    row: Tensor,
    flag: Tensor,
    where: Tensor | None,
    packed: list[Tensor] | None,
    leaves: Sequence[Tensor],
    carried: Sequence[Tensor],
    weight: Tensor | None,
    readout: Tensor | None,
    increments: Sequence[Tensor],
    act: ActNode | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Attach the gradient to the kernels' results. `packed` None: no row moves."""
    after = None if act is None else act.after
    decided = [] if act is None else [act.logits, act.before]
    if not (
        torch.is_grad_enabled()
        and _any_requires_grad(leaves, carried, increments, decided, (weight, readout))
    ):
        out = packed if packed is not None else [*leaves, *carried, *(() if after is None else (after,))]
        return out[: len(leaves)], out[len(leaves) :]
    # Without a move the carried tensors bypass the node, so that their gradients need not be copied.
    staying: Sequence[Tensor] = ()
    if packed is None:
        staying, carried = carried, ()
        packed = [*leaves, *(() if after is None else (after,))]
    moving = [*leaves, *carried]
    shared = readout is not None and readout is leaves[0]
    layout = _Layout(
        act=None if act is None else (act.bounds, act.threshold),
        weighted=weight is not None,
        readout=readout is not None,
        shared=shared,
        readout_dtype=None if readout is None else readout.dtype,
        sums=len(results.totals),
        increments=len(increments) > 0,
        leaves=len(leaves),
        carried=len(carried),
    )
    written = [*results.totals, *results.leaves]
    apart = []
    if readout is not None and results.output is not None:
        written.insert(0, results.output)
        apart = [results.output] if shared else [readout, results.output]
    # Tensors without a gradient stay so: otherwise the step would compute gradients of inputs that need none.
    fixed = [t for t in results.leaves if not is_differentiable(t)]
    fixed += [t for t, source in zip(packed, moving, strict=False) if not source.requires_grad]
    before, logits, weights = (None, None, weight) if act is None else (act.before, act.logits, act.weight)
    saved = [row, flag, where, logits, before, weights, None if weights is None else readout]
    tensors = [
        *decided,
        *(() if weight is None else (weight,)),
        *apart,
        *increments,
        *results.totals,
        *leaves,
        *results.leaves,
    ]
    out = list(_apply(layout, saved, written, packed, fixed, *tensors, *carried))
    if apart:
        results.output = out.pop(0)
    results.totals, out = out[: layout.sums], out[layout.sums :]
    results.leaves, out = out[: len(leaves)], out[len(leaves) :]
    return out[: len(leaves)], [*staying, *out[len(leaves) :]]


def _any_requires_grad(*groups: Sequence[Tensor | None]) -> bool:
    for group in groups:
        for t in group:
            if t is not None and t.requires_grad:
                return True
    return False


@dataclass(slots=True)
class Step:
    """The arguments of `halt_rows` for one step, except for the decision and the tensors that move."""

    step: int
    min_steps: int
    max_steps: int
    weight: Tensor | None = None
    readout: Tensor | None = None
    increments: Sequence[Tensor] = ()
    sample_ids: Tensor | None = None
    tested: Tensor | None = None
    node: ActNode | None = None
    read_leaf: int = -1


class EndedAndPacked(NamedTuple):
    """A block after a step."""

    row: Tensor
    """int64: the batch row of each row of the block, -1 for a row that has ended and stayed."""
    running: int
    """Number of active rows; on CUDA, a bound. 0: the other fields are unchanged."""
    leaves: list[Tensor]
    carried: list[Tensor]


def end_and_pack(
    results: Results,
    row: Tensor,
    decision: Fused,
    leaves: list[Tensor],
    carried: list[Tensor],
    step: Step,
    least: int,
) -> EndedAndPacked:
    """Run `halt_rows` and `pack_rows` in one, by the kernels on the CPU.

    Rows that have ended leave the block if there are at least `least` of them; otherwise they stay.
    """
    act, rows = step.node, row.shape[0]
    moving = [*leaves, *carried]
    if act is not None:
        moving.append(act.after)
    done = _halting_kernels.halt_step(
        *(
            row,
            decision,
            step.weight,
            step.readout,
            results.output,
            leaves,
            results.leaves,
            step.increments,
            results.totals,
        ),
        *(
            results.steps,
            results.status,
            None,
            step.step,
            step.min_steps,
            step.max_steps,
            step.sample_ids,
            step.tested,
        ),
        carry=None if act is None else act.after,
        weight_out=None if act is None else act.weight,
        moving=moving,
        least=least,
        read_leaf=step.read_leaf,
        spent=None if act is None else act.before,
    )
    # Without an ended row and a sum, there is nothing for the gradient.
    if done.running < rows or rows == 0 or step.weight is not None or act is not None or step.increments:
        leaves, carried = _attach(
            *(results, row, done.flag, done.where, done.packed, leaves, carried),
            *(step.weight, step.readout, step.increments, act),
        )
    if done.row is not None:
        row = done.row
    elif 0 < done.running < rows:
        row = torch.where(done.flag == RUNNING, row, -1)
    return EndedAndPacked(row, done.running, leaves, carried)
