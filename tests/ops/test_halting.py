"""The halting step, halt_rows and pack_rows, against the reference: values, and untouched memory."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import adaptcomp_ext as ac
from adaptcomp_ext.ops import halting
from tests.helpers.halt_blocks import (
    HALTED,
    KINDS,
    MAX_STEPS,
    NONFINITE,
    PADDING,
    RUNNING,
    STAGES,
    UNTOUCHED,
    Block,
    check_against_reference,
    check_gradients,
    gradients_of_everything,
    make_block,
)
from tests.helpers.tensors import (
    FLOATS,
    LAYOUTS,
    ROWS,
    WIDTHS,
    Unchanged,
    assert_bitwise,
    generator,
    gradients,
    laid_out,
    mask,
    values,
)


@pytest.mark.promise("formula", "own memory")
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


@pytest.mark.promise("small")
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


@pytest.mark.promise("layout")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_memory_layout(device, dtype, layout):
    for weighted in (False, True):
        block = make_block(33, device, dtype, weighted=weighted, readout="apart")
        block.leaves = [laid_out(layout, 33, w, dtype, device, seed=w) for w in (1, 8, 17)]
        block.readout = laid_out(layout, 33, 16, dtype, device)
        check_against_reference(block)


@pytest.mark.promise("status")
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


@pytest.mark.promise("not finite")
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


@pytest.mark.promise("row alone")
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
    kinds = values((rows,), torch.int64).remainder(5)  # the statuses of descents included
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


@pytest.mark.promise("large")
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
