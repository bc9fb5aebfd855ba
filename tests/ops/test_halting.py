"""The halting step, halt_rows and pack_rows, against the reference: values, gradients, untouched memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import adaptcomp_ext as ac
from adaptcomp_ext.ops import halting
from adaptcomp_ext.ops._backend import compute_dtype
from tests.helpers.tensors import (
    FLOATS,
    LAYOUTS,
    ROWS,
    WIDTHS,
    Unchanged,
    assert_as_good_as_torch,
    assert_bitwise,
    bits,
    generator,
    gradients,
    laid_out,
    mask,
    on_cuda,
    values,
)

PADDING, RUNNING, HALTED, MAX_STEPS, NONFINITE = -1, 0, 1, 2, 3
UNTOUCHED = 9
STAGES = {
    "before min_steps": (1, 2, 8),
    "running": (3, 1, 8),
    "last": (8, 1, 8),
    "far on": ((7 << 32) + 3, 1, 1 << 40),
}


@dataclass
class Block:
    """One step's arguments. `readout`: None, "leaf" (the first leaf itself) or a tensor of its own."""

    row: Tensor
    halt: Tensor
    leaves: list[Tensor]
    carried: list[Tensor]
    weight: Tensor | None
    readout: Tensor | str | None
    increments: list[Tensor]
    stage: str = "running"
    batch: int = 0

    def tensors(self):
        """Return the floating-point tensors, which `with_tensors` replaces."""
        apart = [t for t in (self.weight, self.readout) if isinstance(t, Tensor)]
        return [t for t in (*self.leaves, *self.carried, *apart, *self.increments) if t.is_floating_point()]

    def with_tensors(self, tensors):
        it = iter(tensors)

        def new(t):
            return next(it) if isinstance(t, Tensor) and t.is_floating_point() else t

        leaves, carried = [new(t) for t in self.leaves], [new(t) for t in self.carried]
        weight, readout = new(self.weight), new(self.readout)
        return replace(
            self,
            leaves=leaves,
            carried=carried,
            weight=weight,
            readout=readout,
            increments=[new(t) for t in self.increments],
        )

    def read(self):
        return self.leaves[0] if isinstance(self.readout, str) else self.readout

    def fresh_results(self):
        """Return results filled with numbers that rows which have not ended must keep."""
        readout, scalars = self.read(), [t for t in (self.weight, *self.increments) if t is not None]
        output = None
        if readout is not None:
            dtype = compute_dtype(readout.dtype) if self.weight is not None else readout.dtype
            output = readout.new_full((self.batch, *readout.shape[1:]), UNTOUCHED, dtype=dtype)
        return halting.Results(
            steps=torch.full((self.batch,), UNTOUCHED, device=self.row.device),
            status=torch.full((self.batch,), UNTOUCHED, dtype=torch.int8, device=self.row.device),
            leaves=[
                t.new_full((self.batch, *t.shape[1:]), UNTOUCHED, requires_grad=False) for t in self.leaves
            ],
            totals=[scalars[0].new_full((self.batch,), UNTOUCHED) for _ in self.increments],
            output=output,
        )

    def end(self):
        n, least, most = STAGES[self.stage]
        results = self.fresh_results()
        flag, running = halting.halt_rows(
            *(results, self.row, self.halt, self.leaves),
            **dict(step=n, min_steps=least, max_steps=most),
            **dict(weight=self.weight, readout=self.read(), increments=self.increments),
        )
        return results, flag, running

    def pack(self, results, flag, plan):
        return halting.pack_rows(
            *(results, self.row, flag, plan, self.leaves, self.carried),
            **dict(weight=self.weight, readout=self.read(), increments=self.increments),
        )

    def plan(self, flag, packing):
        running = int((flag == RUNNING).sum())
        if packing == "stay" or running == 0:
            return None
        return halting.plan_packing(flag, self.row, running if packing == "exact" else self.row.shape[0])

    def outputs(self, packing):
        """Return all floating-point results of the step and, of the new block, the running rows."""
        results, flag, _ = self.end()
        plan = self.plan(flag, packing)
        leaves, carried = self.pack(results, flag, plan)
        running = flag == RUNNING
        packed = [t[running] if plan is None else t[: int(running.sum())] for t in (*leaves, *carried)]
        out = [
            *results.leaves,
            *results.totals,
            *packed,
            *([] if results.output is None else [results.output]),
        ]
        return tuple(t for t in out if t.is_floating_point())


def make_block(
    rows,
    device,
    dtype=torch.float32,
    widths=(3, 17),
    weighted=False,
    readout="leaf",
    sums=1,
    pattern="random",
    padding=True,
    integers=True,
    seed=0,
    stage="running",
):
    scalar = torch.float64 if dtype == torch.float64 else torch.float32
    batch = rows + 3
    row = torch.randperm(batch, generator=generator(seed))[:rows]
    if padding and rows > 3:
        row[::5] = -1
    leaves = [values((rows, w), dtype, device, seed + i) for i, w in enumerate(widths)]
    if integers:
        leaves.append(values((rows, 2), torch.int64, device, seed))
    return Block(
        row=row.to(device),
        halt=mask(pattern, rows, device, seed),
        leaves=leaves,
        carried=[
            values((rows, 2), dtype, device, seed + 20),
            *([values((rows,), torch.int64, device)] if integers else []),
        ],
        weight=values((rows,), scalar, device, seed + 30) if weighted else None,
        readout=values((rows, 4), dtype, device, seed + 40) if readout == "apart" else readout,
        increments=[values((rows,), scalar, device, seed + 50 + i) for i in range(sums)],
        stage=stage,
        batch=batch,
    )


KINDS = {
    "state is the output": dict(readout=None),
    "state is the readout": dict(readout="leaf"),
    "readout apart": dict(readout="apart"),
    "weighted state": dict(readout="leaf", weighted=True),
    "weighted readout": dict(readout="apart", weighted=True),
    "two sums": dict(readout="apart", weighted=True, sums=2),
    "no sums": dict(readout=None, sums=0),
}


def check_against_reference(block):
    """Compare flags, steps, status and copies exactly, sums by the tolerance rule; return the flags."""
    with Unchanged(block.row, block.halt, *block.tensors()):
        got, flag, running = block.end()
    wide = block.with_tensors([t.double() for t in block.tensors()])
    with ac.reference_kernels():
        same, same_flag, _ = block.end()
        exact, *_ = wide.end()
    assert_bitwise(flag, same_flag)
    if not on_cuda(flag.device):
        assert running == int((flag == RUNNING).sum())
    for g, s in zip(
        (got.steps, got.status, *got.leaves), (same.steps, same.status, *same.leaves), strict=True
    ):
        assert_bitwise(g, s)
    for g, s, e in zip(got.totals, same.totals, exact.totals, strict=True):
        assert_as_good_as_torch(g, s, e)
    if got.output is not None and block.weight is None:
        assert_bitwise(got.output, same.output)
    elif got.output is not None:
        assert_as_good_as_torch(got.output, same.output, exact.output, scale=UNTOUCHED)
    return flag


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_the_reference_in_every_size(device, poison, dtype, kind):
    for rows in ROWS:
        check_against_reference(make_block(rows, device, dtype, **KINDS[kind]))
    for stage in STAGES:
        for pattern in ("all", "none", "alternating"):
            check_against_reference(
                make_block(33, device, dtype, pattern=pattern, stage=stage, **KINDS[kind])
            )
    poison.check()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_the_reference_in_every_width(device, dtype, weighted):
    for width in (0, *WIDTHS):
        check_against_reference(
            make_block(33, device, dtype, widths=(width, 1, 2 * width), weighted=weighted)
        )


@pytest.mark.sanitizer
@pytest.mark.parametrize("kind", ["state is the output", "readout apart", "weighted state", "two sums"])
@pytest.mark.parametrize("rows", [0, 1, 33, 257])
def test_small_cases(device, rows, kind):
    for dtype in (torch.float32, torch.bfloat16):
        block = make_block(rows, device, dtype, widths=(1, 7, 8), **KINDS[kind])
        check_against_reference(block)
        block = block.with_tensors([t.requires_grad_() for t in block.tensors()])
        out = block.outputs("padded")
        gradients(out, block.tensors(), [torch.ones_like(t) for t in out])


@pytest.mark.parametrize("readout", ["leaf", "apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_take_a_whole_block_of_threads(device, poison, dtype, readout):
    """A row of more than 4,096 bytes has several warps, which exchange sums in shared memory."""
    for width in (2049, 2400):
        block = make_block(7, device, dtype, widths=(width, 3), weighted=True, readout=readout)
        if readout == "apart":
            block.readout = values((7, width), dtype, device, 5)
        check_against_reference(block)
        check_gradients(block, "padded", scale=100.0)  # a weight's is a sum over the row
        block.leaves[0][2, width - 1] = math.inf
        assert (block.end()[1] == NONFINITE).tolist() == [i == 2 for i in range(7)]
    poison.check()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_memory_layout(device, dtype, layout):
    for weighted in (False, True):
        block = make_block(33, device, dtype, weighted=weighted, readout="apart")
        block.leaves = [laid_out(layout, 33, w, dtype, device, seed=w) for w in (1, 8, 17)]
        block.readout = laid_out(layout, 33, 16, dtype, device)
        check_against_reference(block)


def test_who_ends_and_why(device):
    block = make_block(6, device, padding=False, pattern="none")
    block.halt[1] = block.halt[2] = True
    block.leaves[1][2, 3], block.leaves[0][4, 0], block.row[5] = math.nan, math.inf, -1
    for stage, expected in {
        "before min_steps": [RUNNING, RUNNING, NONFINITE, RUNNING, NONFINITE, PADDING],
        "running": [RUNNING, HALTED, NONFINITE, RUNNING, NONFINITE, PADDING],
        "last": [MAX_STEPS, HALTED, NONFINITE, MAX_STEPS, NONFINITE, PADDING],
    }.items():
        results, flag, _ = replace(block, stage=stage).end()
        assert flag.tolist() == expected
        for i, f in enumerate(expected):
            if f != PADDING:
                r = block.row[i]
                ended = f != RUNNING
                assert results.status[r] == (f if ended else UNTOUCHED)
                assert results.steps[r] == (STAGES[stage][0] if ended else UNTOUCHED)


def test_rows_that_go_on_and_rows_of_other_blocks_are_left_untouched(device):
    block = make_block(33, device, readout="apart")
    results, flag, _ = block.end()
    ended = torch.zeros(block.batch, dtype=torch.bool, device=device)
    ended[block.row[flag > 0]] = True
    for t in (*results.leaves, results.output, results.steps, results.status):
        assert bool((t[~ended] == UNTOUCHED).all())
    stepped = torch.zeros_like(ended)
    stepped[block.row[block.row >= 0]] = True
    assert bool((results.totals[0][~stepped] == UNTOUCHED).all())


@pytest.mark.parametrize("where", ["leaf", "readout", "weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_non_finite_row_ends_and_harms_no_neighbour(device, weighted, value, where):
    if where == "weight" and not weighted:
        pytest.skip("has no weight")
    block = make_block(33, device, weighted=weighted, readout="apart", padding=False)
    clean, clean_flag, _ = block.end()
    target = {"leaf": block.leaves[1], "readout": block.readout, "weight": block.weight}[where]
    target[7, ...] = value
    results, flag, _ = block.end()
    assert flag[7] == NONFINITE
    assert results.status[block.row[7]] == NONFINITE
    others, other_rows = torch.arange(33) != 7, torch.arange(block.batch) != int(block.row[7])
    assert_bitwise(flag[others], clean_flag[others])
    pairs = zip(
        (*results.leaves, *results.totals, results.output),
        (*clean.leaves, *clean.totals, clean.output),
        strict=True,
    )
    for got, want in pairs:
        assert_bitwise(got[other_rows], want[other_rows])


@pytest.mark.parametrize("width", [1, 7, 8, 33, 257, 1100])
def test_an_element_that_is_not_finite_ends_its_row_wherever_it_is(device, width):
    for at in {0, width // 2, width - 1}:
        block = make_block(9, device, widths=(2, width), padding=False, pattern="none")
        block.leaves[1][4, at] = math.nan
        assert block.end()[1].tolist() == [NONFINITE if i == 4 else RUNNING for i in range(9)]


def test_a_row_alone_gives_the_bits_it_gives_in_a_block(device):
    block = make_block(
        64, device, widths=(17, 64), weighted=True, readout="leaf", integers=False, padding=False
    )
    block = block.with_tensors([t.requires_grad_() for t in block.tensors()])
    results, flag, _ = block.end()
    together = (results, gradients_of_everything(block))
    for i in (0, 5, 63):
        alone = Block(
            *(block.row[i : i + 1], block.halt[i : i + 1]),
            *(
                [t.detach()[i : i + 1].requires_grad_() for t in group]
                for group in (block.leaves, block.carried)
            ),
            block.weight.detach()[i : i + 1].requires_grad_(),
            "leaf",
            [t.detach()[i : i + 1].requires_grad_() for t in block.increments],
            batch=block.batch,
        )
        results, alone_flag, _ = alone.end()
        r = int(block.row[i])
        assert alone_flag[0] == flag[i]
        for got, want in zip(
            (results.output, *results.leaves), (together[0].output, *together[0].leaves), strict=True
        ):
            assert_bitwise(got[r], want[r])
        for got, want in zip(gradients_of_everything(alone), together[1], strict=True):
            assert_bitwise(got, want[i : i + 1])


def gradients_of_everything(block):
    """If all blocks have the same gradient in a result, it is the row's own, rounded to the batch row."""
    out = block.outputs("stay")
    return gradients(out, block.tensors(), [torch.full_like(t, 0.3) for t in out])


# --- packing ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("pattern", ["none", "alternating", "random"])
def test_packing_keeps_the_running_rows_in_order(device, rows, pattern):
    block = make_block(rows, device, pattern=pattern)
    results, flag, _ = block.end()
    going_on = flag == RUNNING
    running = int(going_on.sum())
    if running == 0:
        return
    for packing in ("exact", "padded"):
        plan = block.plan(flag, packing)
        leaves, carried = block.pack(results, flag, plan)
        for got, source in zip((*leaves, *carried), (*block.leaves, *block.carried), strict=True):
            assert_bitwise(got[:running], source[going_on])
        assert_bitwise(plan.row[:running], block.row[going_on])
        assert bool((plan.row[running:] == -1).all())
        assert bool((plan.place[~going_on] == -1).all())
        assert plan.place[going_on].tolist() == list(range(running))


@pytest.mark.sanitizer
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 255, 257, 4095, 4096, 4097, 9000])
@pytest.mark.parametrize("pattern", ["none", "all", "alternating", "random", "first", "last", "last tile"])
def test_the_plan_is_the_references(device, poison, pattern, rows):
    """Tiles of 4,096 rows and words of 16 flags; blocks of the smallest size and many times larger ones."""
    i = torch.arange(rows)
    ended = {
        "first": i > 0,
        "last": i < rows - 1,
        "last tile": i < 4096,
    }.get(pattern, mask(pattern, rows) if pattern in ("none", "all", "alternating", "random") else None)
    kinds = values((rows,), torch.int64).remainder(4)
    flag = torch.where(ended, torch.where(kinds == 0, PADDING, kinds), RUNNING).to(torch.int8).to(device)
    row = torch.randperm(rows + 5, generator=generator(rows))[:rows].to(device)
    running = int((flag == RUNNING).sum())
    spare = torch.empty(rows + 1, dtype=torch.int8, device=device)
    misaligned = spare[1:].copy_(flag)
    for size in {running, min(rows, running + 1), (running + rows) // 2, rows}:
        for f in (flag, misaligned):
            with Unchanged(f, row):
                plan = halting.plan_packing(f, row, size)
            with ac.reference_kernels():
                want = halting.plan_packing(f, row, size)
            for got, expected in zip(
                (plan.index, plan.place, plan.row), (want.index, want.place, want.row), strict=True
            ):
                assert_bitwise(got, expected)
    poison.check()


def test_the_plan_of_a_small_block(device):
    """The example of csrc/halting/halting.h."""
    flag, row = (
        torch.tensor([0, 1, 0, -1, 0], dtype=torch.int8, device=device),
        torch.tensor([7, 2, 5, -1, 3], device=device),
    )
    plan = halting.plan_packing(flag, row, 5)
    assert plan.index.tolist() == [0, 2, 4, 0, 2]
    assert plan.row.tolist() == [7, 5, 3, -1, -1]
    assert plan.place.tolist() == [0, -1, 1, -1, 2]
    with ac.reference_kernels():
        assert (
            halting.plan_packing(flag, row, 3).index.tolist()
            == halting.plan_packing(flag, row, 5).index[:3].tolist()
        )


def test_padding_holds_copies_of_running_rows(device):
    block = make_block(10, device, padding=False)
    results, flag, _ = block.end()
    running = int((flag == RUNNING).sum())
    assert 1 < running < 10
    leaves, _ = block.pack(results, flag, block.plan(flag, "padded"))
    for t in leaves:
        for j in range(running, 10):
            assert_bitwise(t[j], t[j % running])


def test_offsets_beyond_two_to_the_thirty_first(device):
    rows, width = (1 << 16) + 1, (1 << 15) + 8
    block = make_block(rows, device, widths=(1,), integers=False, sums=0, pattern="none", padding=False)
    block.row = torch.arange(rows, device=device)
    block.halt[-1] = True
    block.batch = rows
    big = torch.empty((rows, width), dtype=torch.uint8, device=device)  # only its last row is ever touched
    big[-1] = 7
    block.leaves.append(big)
    n, least, most = STAGES["running"]
    result = torch.empty_like(big)
    results = halting.Results(
        steps=torch.zeros(rows, dtype=torch.int64, device=device),
        status=torch.zeros(rows, dtype=torch.int8, device=device),
        leaves=[torch.zeros_like(block.leaves[0]), result],
    )
    halting.halt_rows(results, block.row, block.halt, block.leaves, step=n, min_steps=least, max_steps=most)
    assert bool((result[-1] == 7).all())
    assert results.status.sum() == HALTED


# --- gradients ----------------------------------------------------------------------------------------------
def check_gradients(block, packing, scale=1.0):
    """Compare with autograd through the reference, by the tolerance rule."""
    block = block.with_tensors([t.detach().requires_grad_() for t in block.tensors()])
    wide = block.with_tensors([t.detach().double().requires_grad_() for t in block.tensors()])
    out = block.outputs(packing)
    upstream = [values(t.shape, t.dtype, out[0].device, seed=i) for i, t in enumerate(out)]
    got = gradients(out, block.tensors(), upstream)
    with ac.reference_kernels():
        same = gradients(block.outputs(packing), block.tensors(), upstream)
        exact = gradients(wide.outputs(packing), wide.tensors(), upstream)
    for g, s, e in zip(got, same, exact, strict=True):
        assert_as_good_as_torch(g, s, e, rounding=4.0, scale=scale)


@pytest.mark.parametrize("packing", ["stay", "exact", "padded"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_match_autograd_through_the_reference(device, poison, dtype, kind, packing):
    for rows in (1, 33, 257):
        block = make_block(rows, device, dtype, widths=(3, 17), seed=rows, **KINDS[kind])
        if rows == 33:
            block.leaves[1][7, 0] = math.nan
        check_gradients(block, packing)
    poison.check()


@pytest.mark.parametrize("packing", ["stay", "exact", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_is_differentiable_twice(device, kind, packing):
    block = make_block(5, device, torch.float64, widths=(2, 1), seed=3, **KINDS[kind])
    tensors = [t.requires_grad_() for t in block.tensors()]

    def run(*tensors):
        return block.with_tensors(tensors).outputs(packing)

    assert gradcheck(run, tensors)
    assert gradgradcheck(run, tensors)


def test_the_reference_backward_pass_is_the_kernels(device):
    """With create_graph=True the reference replaces the kernel: both give the same gradient."""
    block = make_block(33, device, torch.float64, weighted=True, readout="apart", sums=2)
    block = block.with_tensors([t.requires_grad_() for t in block.tensors()])
    out = block.outputs("padded")
    upstream = [values(t.shape, t.dtype, device, seed=i) for i, t in enumerate(out)]
    once = torch.autograd.grad(out, block.tensors(), upstream, retain_graph=True)
    again = torch.autograd.grad(out, block.tensors(), upstream, create_graph=True)
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(a, b)


def test_more_leaves_than_one_backward_call_takes(device):
    count = halting.MAX_LEAVES
    block = make_block(9, device, torch.float64, widths=(2,) * count, weighted=True, integers=False)
    block.carried = [values((9, 1), torch.float64, device, seed=i) for i in range(count + 5)]
    block = block.with_tensors([t.requires_grad_() for t in block.tensors()])
    out = block.outputs("padded")
    upstream = [values(t.shape, t.dtype, device, seed=i) for i, t in enumerate(out)]
    with ac.reference_kernels():
        expected = gradients(block.outputs("padded"), block.tensors(), upstream)
    for g, e in zip(gradients(out, block.tensors(), upstream), expected, strict=True):
        torch.testing.assert_close(g, e)


def test_rows_that_end_non_finite_have_gradient_zero(device):
    block = make_block(9, device, torch.float64, weighted=True, readout="apart", padding=False)
    block.leaves[0][4, 0] = math.nan
    block = block.with_tensors([t.requires_grad_() for t in block.tensors()])
    out = block.outputs("padded")
    for g in gradients(out, block.tensors()[:2], [torch.ones_like(t) for t in out]):
        assert bool((g[4] == 0).all())
        assert bool(g.isfinite().all())


# --- masked classes -----------------------------------------------------------------------------------------
def make_masked(rows, width, weighted, dtype, device):
    """Make rows that mask classes, all but one; see `test_minus_infinity_masks_a_class_of_the_readout`."""
    block = make_block(
        rows, device, dtype, weighted=weighted, readout="apart", padding=False, pattern="none", integers=False
    )
    block.readout = values((rows, width), dtype, device, seed=7)
    block.readout[mask("random", rows * width, device, seed=1).view(rows, width)] = -math.inf
    block.readout[0] = 1
    block.readout[1] = -math.inf
    block.readout[2, -1], block.readout[3, 0] = math.inf, math.nan
    if weighted:
        block.weight = block.weight.abs()
        block.weight[::4], block.weight[5:9] = 0.0, -block.weight[5:9]
    return block


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("width", [1, 2, 7, 8, 33, 64, 257, 2049])
def test_minus_infinity_masks_a_class_of_the_readout(device, width, dtype, weighted):
    """−inf ends no row that has a class left, unless its weight is negative; NaN and +inf end a row."""
    block = make_masked(33, width, weighted, dtype, device)
    readout = block.readout
    masked = readout == -math.inf
    sound = (readout.isfinite() | masked).all(1) & ~masked.all(1)
    if weighted:
        sound &= ~(masked.any(1) & (block.weight < 0))
    assert sound[0] and not sound[1:4].any() and (width == 1 or bool((sound & masked.any(1)).any()))
    with ac.reference_kernels():
        same, same_flag, _ = block.end()
    with_gradient = block.with_tensors([t.requires_grad_() for t in block.tensors()])
    results, flag, _ = with_gradient.end()
    assert_bitwise(flag, torch.where(sound, RUNNING, NONFINITE).to(torch.int8))
    assert_bitwise(flag, same_flag)
    if not weighted:
        assert_bitwise(results.output, same.output)
        return
    torch.testing.assert_close(results.output, same.output, equal_nan=True)
    weight = block.weight.to(results.output.dtype)[:, None]
    added = torch.where(weight == 0, 0, weight * readout.to(weight.dtype))
    keep = sound.nonzero()[:, 0]
    assert_bitwise(results.output[block.row[keep]], UNTOUCHED + added[keep])

    with_gradient.pack(results, flag, None)
    upstream = values(results.output.shape, results.output.dtype, device, seed=3)
    g_weight, g_readout = torch.autograd.grad(
        results.output, (with_gradient.weight, with_gradient.readout), upstream
    )
    g = torch.where(sound[:, None], upstream[block.row], 0)
    assert_bitwise(g_readout, torch.where(sound[:, None], weight * g, 0).to(dtype))
    unmasked = torch.where(masked | ~sound[:, None], 0, readout)
    torch.testing.assert_close(
        g_weight, (g.double() * unmasked.double()).sum(1).to(g_weight.dtype), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_masks_of_the_readout_have_the_gradients_of_the_reference(device, weighted):
    block = make_masked(33, 7, weighted, torch.float64, device)
    block = block.with_tensors([t.requires_grad_() for t in block.tensors()])
    out = block.outputs("padded")
    upstream = [
        torch.where(t.detach().isfinite(), values(t.shape, t.dtype, device, seed=i), 0)
        for i, t in enumerate(out)
    ]
    with ac.reference_kernels():
        expected = gradients(block.outputs("padded"), block.tensors(), upstream)
    for g, e in zip(gradients(out, block.tensors(), upstream), expected, strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("where", ["leaf", "readout"])
@pytest.mark.parametrize("shared", [0, 1])
def test_the_leaf_that_is_the_readout_is_masked_like_it(device, shared, where):
    """No other leaf may hold −inf; without `read_leaf` none may."""
    block = make_block(9, device, readout=None, sums=0, padding=False, pattern="none", integers=False)
    block.leaves[shared][2, 0] = block.leaves[1 - shared][3, 0] = -math.inf
    block.leaves[shared][4] = -math.inf
    if where == "readout":
        block.readout = block.leaves[shared]
    for weighted in (False, True) if where == "readout" else (False,):
        block.weight = torch.ones(9, device=device) if weighted else None
        for read_leaf, bad in ((shared, [3, 4]), (-1, [2, 3, 4])):
            options = dict(
                step=1,
                min_steps=1,
                max_steps=4,
                weight=block.weight,
                readout=block.readout,
                read_leaf=read_leaf,
            )
            flag, _ = halting.halt_rows(block.fresh_results(), block.row, block.halt, block.leaves, **options)
            with ac.reference_kernels():
                same, _ = halting.halt_rows(
                    block.fresh_results(), block.row, block.halt, block.leaves, **options
                )
            assert (flag == NONFINITE).nonzero()[:, 0].tolist() == bad
            assert_bitwise(flag, same)


# --- decisions that the kernel takes ------------------------------------------------------------------------
def decide(block, decision, **options):
    n, least, most = STAGES[block.stage]
    flag, _ = halting.halt_rows(
        block.fresh_results(),
        block.row,
        decision,
        block.leaves,
        step=n,
        min_steps=least,
        max_steps=most,
        **options,
    )
    return flag


@pytest.mark.sanitizer
@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy"])
def test_the_kernels_confidence_is_the_ops(device, measure):
    for dtype in (torch.float32, torch.bfloat16):
        block = make_block(257, device, dtype, readout=None, sums=0)
        code = ("max_prob", "margin", "entropy").index(measure)
        halt = ac.ops.confidence(block.leaves[0], measure) >= 0.4
        assert 0 < int(halt.sum()) < 257
        flag = decide(block, halting.Fused(halting.CONFIDENCE, threshold=0.4, parameter=code))
        assert_bitwise(flag, decide(block, halt))


@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy"])
@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_the_kernel_takes_no_short_cut_past_a_threshold(device, scale, classes, measure):
    """The thresholds are the confidence of one row and its neighbouring floats."""
    block = make_block(33, device, widths=(classes,), readout=None, sums=0, padding=False, integers=False)
    block.leaves[0].mul_(scale)
    code = ("max_prob", "margin", "entropy").index(measure)
    confidence = ac.ops.confidence(block.leaves[0], measure)
    for i in range(33):
        for direction in (0.0, 2.0, -2.0):
            towards = confidence[i] + direction
            threshold = torch.nextafter(confidence[i], towards).item()
            flag = decide(block, halting.Fused(halting.CONFIDENCE, threshold=threshold, parameter=code))
            assert_bitwise(flag, decide(block, confidence >= threshold))


@pytest.mark.sanitizer
def test_the_kernels_fixed_steps(device):
    block = make_block(257, device, readout=None, sums=0)
    number = torch.randint(1, 8, (block.batch,), generator=generator(1)).to(device)
    expected = decide(block, number[block.row.clamp(min=0)] <= STAGES["running"][0])
    assert_bitwise(decide(block, halting.Fused(halting.FIXED_STEPS, number)), expected)
    for n in (3, 4):
        expected = decide(block, torch.full_like(block.halt, n <= 3))
        assert_bitwise(decide(block, halting.Fused(halting.FIXED_STEPS, parameter=n)), expected)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_kernels_sampling(device, dtype):
    block = make_block(257, device, readout=None, sums=0)
    logits = values((257,), dtype, device, seed=9)
    sample = torch.randint(-(1 << 62), 1 << 62, (block.batch,), generator=generator(1)).to(device)
    for block.stage in ("running", "far on"):
        draw = ac.reference.uniform(5, sample[block.row.clamp(min=0)], STAGES[block.stage][0])
        expected = decide(block, draw < logits.float().sigmoid())
        flag = decide(block, halting.Fused(halting.PONDER_SAMPLE, logits, parameter=5), sample_ids=sample)
        assert_bitwise(flag, expected)


# --- half-width numbers, all of them ------------------------------------------------------------------------
HALVES = (torch.bfloat16, torch.float16)


def every_pattern(dtype, device):
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)


def assert_same_numbers(got, expected):
    """Compare bitwise; all NaNs are equal."""
    assert_bitwise(got.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert_bitwise(got[number], expected[number])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_is_read_exactly(device, dtype):
    x = every_pattern(dtype, device).view(256, 256)
    results = halting.Results(
        steps=torch.zeros(256, dtype=torch.int64, device=device),
        status=torch.zeros(256, dtype=torch.int8, device=device),
        leaves=[],
        output=torch.full((256, 256), -0.0, device=device),
    )
    row, halt = torch.arange(256, device=device), torch.zeros(256, dtype=torch.bool, device=device)
    halting.halt_rows(
        results,
        row,
        halt,
        [],
        step=1,
        min_steps=1,
        max_steps=2,
        weight=torch.ones(256, device=device),
        readout=x,
    )
    assert_same_numbers(results.output, x.float())


def test_half_precision_subnormals_survive_a_processor_that_flushes_its_own():
    x = torch.arange(1024, dtype=torch.int16).view(torch.float16).view(4, 256)
    expected = x.float()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals to zero")
    try:
        block = replace(make_block(4, "cpu", readout=None, sums=0, padding=False), leaves=[x], carried=[])
        block.weight, block.readout, block.halt = torch.ones(4), x, torch.zeros(4, dtype=torch.bool)
        results = block.fresh_results()
        results.output.zero_()
        step = {"step": 1, "min_steps": 1, "max_steps": 2}
        halting.halt_rows(results, block.row, block.halt, [x], weight=block.weight, readout=x, **step)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(results.output[block.row], expected)


def floats_around(dtype):
    """Every half as a float, the midpoint to the next one, that midpoint's neighbours, and other floats."""
    x = every_pattern(dtype, "cpu")
    finite = x[x.isfinite()].double().sort().values
    middle = ((finite[1:] + finite[:-1]) / 2).float()
    limit = torch.tensor(torch.finfo(dtype).max, dtype=torch.float64)
    step = limit - torch.finfo(dtype).max * (1 - torch.finfo(dtype).eps / 2)
    edge = torch.stack([limit + step * k for k in (0.25, 0.5, 0.75, 1, 2)]).float()
    arbitrary = (
        torch.randint(-(1 << 31), 1 << 31, (1 << 16,), generator=generator(1))
        .to(torch.int32)
        .view(torch.float32)
    )
    infinite = torch.tensor([math.inf])
    around = [torch.nextafter(middle, infinite), torch.nextafter(middle, -infinite)]
    every = torch.cat(
        [x.float(), middle, *around, edge, -edge, arbitrary, torch.tensor([math.inf, -math.inf, math.nan])]
    )
    return torch.nn.functional.pad(every, (0, -every.numel() % 512))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_is_written_rounded_to_nearest_even(device, dtype):
    g = floats_around(dtype).to(device).view(-1, 512)
    rows = g.shape[0]
    row = torch.arange(rows, device=device)
    flag = torch.zeros(rows, dtype=torch.int8, device=device)
    readout, weight = torch.zeros(rows, 512, dtype=dtype, device=device), torch.ones(rows, device=device)
    got, *_ = halting._halting_kernels.halt_backward(
        row, flag, None, weight, readout, g, [], [], [], dtype, False
    )
    assert_same_numbers(got, g.to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_is_known_to_be_finite_or_not(device, dtype):
    x = every_pattern(dtype, device).view(-1, 1)
    block = Block(
        torch.arange(1 << 16, device=device),
        torch.zeros(1 << 16, dtype=torch.bool, device=device),
        [x],
        [],
        None,
        None,
        [],
    )
    block.batch = 1 << 16
    results, flag, _ = block.end()
    assert_bitwise(flag == NONFINITE, ~x[:, 0].isfinite())
    ended = flag > 0
    assert torch.equal(
        bits(results.leaves[0][ended]), bits(x[ended])
    )  # a row that ends is copied as it is, NaN and all


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_is_known_to_be_a_logit_or_not(device, dtype):
    x = every_pattern(dtype, device).view(-1, 1)
    x = torch.cat([x, torch.zeros_like(x)], 1)
    block = Block(
        *(
            torch.arange(1 << 16, device=device),
            torch.zeros(1 << 16, dtype=torch.bool, device=device),
            [torch.zeros_like(x)],
            [],
        ),
        *(None, x, []),
    )
    block.batch = 1 << 16
    _, flag, _ = block.end()
    assert_bitwise(flag == RUNNING, x[:, 0] < math.inf)
