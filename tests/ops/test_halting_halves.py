"""Every number of bfloat16 and float16 is read, rounded and judged by the halting step as torch does it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from adaptcomp_ext.ops import halting
from tests.helpers.halt_blocks import NONFINITE, RUNNING, Block, make_block
from tests.helpers.tensors import (
    assert_bitwise,
    bits,
    generator,
)

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
    # What torch.compile of torch 2.4 has compiled makes the process flush subnormals when it is loaded.
    torch.set_flush_denormal(False)
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
