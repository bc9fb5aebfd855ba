"""Gradients of the halting step against autograd through the reference, and classes that are masked by −∞."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import adaptcomp_ext as ac
from adaptcomp_ext.ops import halting
from tests.helpers.halt_blocks import KINDS, NONFINITE, RUNNING, UNTOUCHED, check_gradients, make_block
from tests.helpers.tensors import (
    FLOATS,
    assert_bitwise,
    gradients,
    mask,
    values,
)


@pytest.mark.promise("gradient")
@pytest.mark.covering(2)
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


@pytest.mark.promise("second derivative")
@pytest.mark.covering(2)
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
