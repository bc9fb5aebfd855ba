"""The halting step: which rows end, what is added to the output, what is written to the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adaptcomp_ext.reference._broadcast import over
from adaptcomp_ext.reference.act import act_step, act_step_backward
from adaptcomp_ext.reference.compaction import gather_rows

PADDING, RUNNING, HALTED, MAX_STEPS, NONFINITE = -1, 0, 1, 2, 3


class Ended(NamedTuple):
    """The results after the step. `flag` has the status of each row of the block."""

    flag: Tensor
    output: Tensor | None
    results: list[Tensor]
    totals: list[Tensor]
    steps: Tensor
    status: Tensor


def finite_rows(t: Tensor) -> Tensor:
    """Return whether all elements of each row are finite."""
    return t.detach().isfinite().unsqueeze(-1).flatten(1).all(dim=1)


def logit_rows(t: Tensor, weight: Tensor | None) -> Tensor:
    """Return whether each row is valid class logits: −inf masks a class, and one class has to be left.

    A negative weight would turn −inf into +inf, so that its row cannot have a masked class.
    """
    rows = t.detach().unsqueeze(-1).flatten(1)
    masked = rows.isneginf()
    if weight is not None:
        masked = masked & ~(weight.detach()[:, None] < 0)
    return (rows.isfinite() | masked).all(dim=1) & (rows.isfinite().any(dim=1) | (rows.shape[1] == 0))


def weighted_term(w: Tensor, r: Tensor) -> Tensor:
    """Return w·r; 0 where w is 0, even if r is −inf. A term of −inf has no gradient in w."""
    masked = r.isneginf()
    term = torch.where(masked, w.detach() * r, w * r.masked_fill(masked, 0))
    return torch.where(w == 0, w * r.nan_to_num(0, 0, 0), term)


def halt_rows(
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
    step: int,
    min_steps: int,
    max_steps: int,
    tested: Tensor | None = None,
    read_leaf: int = -1,
) -> Ended:
    """End the rows that halt, reach `max_steps` or are not finite; no argument is changed.

    −inf is valid in the readout and in the leaf that is the readout, where it masks a class, and in a halting
    logit.
    """
    active = row >= 0
    finite = torch.ones_like(active)
    for i, leaf in enumerate(leaves):
        if leaf.is_floating_point():
            finite = finite & (logit_rows(leaf, weight) if i == read_leaf else finite_rows(leaf))
    if readout is not None and readout.is_floating_point():
        finite = finite & logit_rows(readout, weight)
    if weight is not None:
        finite = finite & weight.detach().isfinite()
    if tested is not None:
        finite = finite & (tested.detach().isfinite() | tested.detach().isneginf())
    flag = torch.where(halt & (step >= min_steps), HALTED, MAX_STEPS if step >= max_steps else RUNNING)
    flag = torch.where(finite, flag, NONFINITE)
    flag = torch.where(active, flag, PADDING).to(torch.int8)
    ended = flag > 0

    def without_gradient_where_not_finite(t: Tensor) -> Tensor:
        return torch.where(over(finite, t), t, t.detach())

    def finished(t: Tensor, into: Tensor) -> Tensor:
        return into.index_copy(0, row[ended], without_gradient_where_not_finite(t)[ended].to(into.dtype))

    if weight is not None and readout is not None and output is not None:
        w, r = without_gradient_where_not_finite(weight), without_gradient_where_not_finite(readout)
        term = weighted_term(over(w, r).to(output.dtype), r.to(output.dtype))
        output = output.index_add(0, row[active], term[active])
    elif readout is not None and output is not None:
        output = finished(readout, output)
    new_totals = [
        total.index_add(0, row[active], torch.where(finite, i, 0)[active])
        for i, total in zip(increments, totals, strict=True)
    ]
    new_results = [finished(leaf, result) for leaf, result in zip(leaves, results, strict=True)]
    new_steps = steps.index_fill(0, row[ended], step)
    new_status = status.index_copy(0, row[ended], flag[ended])
    return Ended(flag, output, new_results, new_totals, new_steps, new_status)


def plan_packing(flag: Tensor, row: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compact the rows whose flag is RUNNING, at most `rows` of them, into a block of `rows` rows.

    Return, for each row of the new block, the old row that it copies; for each old row, its place in the new
    block or -1; and for each row of the new block, its batch row. The running rows come first, in order.
    Copies of them, cyclically, fill the rest as padding. Where no row runs, all three are -1.
    """
    running = flag == RUNNING
    place = torch.where(running, running.cumsum(0) - 1, -1)
    from_here = running.nonzero()[:, 0]
    position = torch.arange(rows, device=row.device)
    if from_here.shape[0] == 0:
        return torch.full_like(position, -1), place, torch.full_like(position, PADDING)
    index = from_here[position % from_here.shape[0]]
    return index, place, torch.where(position < from_here.shape[0], row[index], PADDING)


def halt_rows_backward(
    row: Tensor,
    flag: Tensor,
    place: Tensor | None,
    weight: Tensor | None,
    readout: Tensor | None,
    g_output: Tensor | None,
    g_results: Sequence[Tensor | None],
    g_packed: Sequence[Tensor | None],
    g_totals: Sequence[Tensor | None],
    readout_dtype: torch.dtype | None,
    shared: bool,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Return the gradients in readout, weight, increments and leaves of the halting step and its compaction.

    If `shared`, the readout is the first leaf, and its gradient is added there.
    """
    running = flag == RUNNING
    ended = (flag == HALTED) | (flag == MAX_STEPS)
    live = running | ended
    if place is None:
        place = torch.arange(row.shape[0], device=row.device)
    from_results = torch.where(ended, row, -1)
    from_batch = torch.where(live, row, -1)
    from_packed = torch.where(running, place, -1)

    def pick(t: Tensor, index: Tensor) -> Tensor:
        return gather_rows([t], index)[0]

    g_leaves: list[Tensor | None] = []
    for result, packed in zip(g_results, g_packed, strict=True):
        parts = [pick(g, i) for g, i in ((result, from_results), (packed, from_packed)) if g is not None]
        g_leaves.append(sum(parts[1:], parts[0]) if parts else None)

    g_readout = g_weight = None
    if g_output is not None and weight is not None and readout is not None:
        g = pick(g_output, from_batch)
        g_readout = (over(weight, g).to(g.dtype) * g).to(readout.dtype)
        g_readout = torch.where(over(live, g_readout), g_readout, torch.zeros_like(g_readout))
        slope = readout.masked_fill(readout.isneginf(), 0)
        g_weight = (g * slope.to(g.dtype)).unsqueeze(-1).flatten(1).sum(dim=1).to(weight.dtype)
        g_weight = torch.where(live, g_weight, torch.zeros_like(g_weight))
    elif g_output is not None:
        g_readout = pick(g_output, from_results).to(readout_dtype)
    if shared and g_readout is not None:
        g_leaves[0] = g_readout if g_leaves[0] is None else g_leaves[0] + g_readout
        g_readout = None
    g_increments = [None if g is None else pick(g, from_batch) for g in g_totals]
    return g_readout, g_weight, g_increments, g_leaves


def act_halt_backward(
    row: Tensor,
    flag: Tensor,
    place: Tensor | None,
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
    """Return the gradients in readout, logits, accumulated probability and leaves of ACT's halting step."""
    live = (flag == RUNNING) | (flag == HALTED) | (flag == MAX_STEPS)
    logits = torch.where(live, logits, torch.zeros_like(logits))
    weight = act_step(logits, before, *bounds, threshold)[0]
    g_readout, g_weight, g_increments, g_leaves = halt_rows_backward(
        *(row, flag, place, weight, readout, g_output, g_results, g_packed),
        *([] if g_cost is None else [g_cost], readout_dtype, shared),
    )
    if g_next is not None:
        where = torch.arange(row.shape[0], device=row.device) if place is None else place
        g_next = gather_rows([g_next], torch.where(flag == RUNNING, where, -1))[0]
    g_increment = g_increments[0] if g_increments else None
    g_logits, g_before = act_step_backward(logits, before, g_weight, g_next, g_increment, *bounds, threshold)
    return g_readout, torch.where(live, g_logits, 0.0), torch.where(live, g_before, 0.0), g_leaves
