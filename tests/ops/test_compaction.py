"""Compaction is exact: compact, compact_padded and scatter_rows against plain indexing, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import adaptcomp_ext as ac
from tests.helpers.tensors import (
    DTYPES,
    FEW_ROWS,
    FLOATS,
    LAYOUTS,
    PATTERNS,
    ROWS,
    WIDTHS,
    Unchanged,
    assert_bitwise,
    laid_out,
    mask,
    values,
)


def expected_padded(keep, x):
    rows = x[keep]
    return torch.cat([rows, x.new_zeros((x.shape[0] - rows.shape[0], *x.shape[1:]))])


def check_all_three(keep, tensors):
    """Check all three ops on one mask."""
    size, kept = keep.shape[0], int(keep.sum())
    with Unchanged(keep, *tensors):
        rows, index = ac.ops.compact(keep, tensors)
        padded, padded_index, count = ac.ops.compact_padded(keep, tensors)
        back = ac.ops.scatter_rows(rows, index, size)
        padded_back = ac.ops.scatter_rows(padded, padded_index, size)
    assert_bitwise(index, keep.nonzero()[:, 0])
    assert_bitwise(padded_index[:kept], index)
    assert bool((padded_index[kept:] == -1).all())
    assert count.shape == ()
    assert int(count) == kept
    for x, r, p, b, pb in zip(tensors, rows, padded, back, padded_back, strict=True):
        assert r.is_contiguous()
        assert_bitwise(r, x[keep])
        assert_bitwise(p, expected_padded(keep, x))
        everywhere = torch.zeros_like(x, memory_format=torch.contiguous_format)
        everywhere[keep] = x[keep]
        assert_bitwise(b, everywhere)
        assert_bitwise(pb, everywhere)


@pytest.mark.promise("formula", "own memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_matches_indexing_in_every_size_and_writes_all_it_promises(device, poison, rows, dtype):
    tensors = [values((rows, width), dtype, device, seed=width) for width in WIDTHS]
    for pattern in PATTERNS:
        check_all_three(mask(pattern, rows, device), tensors)
    poison.check()


@pytest.mark.promise("small")
@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("rows", FEW_ROWS)
def test_small_cases(device, rows, dtype):
    check_all_three(
        mask("random", rows, device), [values((rows, width), dtype, device) for width in (1, 3, 8, 17)]
    )


@pytest.mark.promise("layout")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(device, poison, layout, dtype):
    for rows in (1, 33, 257):
        tensors = [laid_out(layout, rows, width, dtype, device, seed=width) for width in (1, 3, 8, 16, 17)]
        check_all_three(mask("random", rows, device), tensors)
    poison.check()


@pytest.mark.promise("layout")
@pytest.mark.sanitizer
def test_misaligned_rows(device):
    tensors = [laid_out("misaligned", 33, width, torch.bfloat16, device) for width in (1, 7, 8, 16)]
    check_all_three(mask("random", 33, device), tensors)


def test_mask_and_index_may_be_strided(device):
    keep, x = mask("random", 66, device)[::2], values((33, 5), device=device)
    check_all_three(keep, [x])
    index = torch.arange(20, device=device)[::2]
    (back,) = ac.ops.scatter_rows(x[:10], index, 20)
    assert_bitwise(back[::2].contiguous(), x[:10])


def test_every_rank_and_empty_rows_in_one_call(device):
    shapes = [(9,), (9, 1), (9, 2, 3), (9, 2, 2, 2, 2), (9, 0), (9, 3, 0)]
    check_all_three(mask("random", 9, device), [values(shape, device=device) for shape in shapes])


def test_many_tensors_of_different_dtypes_in_one_call(device):
    tensors = [values((65, 1 + i % 5), DTYPES[i % len(DTYPES)], device, seed=i) for i in range(70)]
    check_all_three(mask("random", 65, device), tensors)


def test_no_tensors_at_all(device):
    keep = mask("random", 10, device)
    rows, index = ac.ops.compact(keep, [])
    assert rows == ()
    assert_bitwise(index, keep.nonzero()[:, 0])
    assert ac.ops.scatter_rows([], index, 10) == ()


def test_a_single_tensor_needs_no_list(device):
    keep, x = mask("alternating", 10, device), values((10, 3), device=device)
    (rows,), index = ac.ops.compact(keep, x)
    assert_bitwise(rows, x[keep])
    assert torch.equal(ac.ops.scatter_rows(rows, index, 10)[0], x * keep[:, None])


def test_scatter_needs_no_order_and_leaves_negative_indices_out(device):
    x = values((5, 3), device=device)
    index = torch.tensor([6, -1, 0, 3, -7], device=device)
    (back,) = ac.ops.scatter_rows(x, index, 7)
    expected = torch.zeros(7, 3, device=device)
    expected[6], expected[0], expected[3] = x[0], x[2], x[3]
    assert_bitwise(back, expected)


def test_nan_payloads_and_negative_zeros_survive(device):
    words = torch.tensor([[0x7F800001], [-0x80000000], [0x7FFFFFFF], [-1]], dtype=torch.int32, device=device)
    x = words.view(torch.float32)
    check_all_three(mask("alternating", 4, device), [x])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_lazily_conjugated_and_negated_tensors(device, dtype):
    x = values((9, 2), dtype, device)
    keep = mask("random", 9, device)
    for lazy in (x.conj(), x.conj().imag):
        assert lazy.is_conj() or lazy.is_neg()
        (rows,), index = ac.ops.compact(keep, lazy)
        torch.testing.assert_close(rows, lazy[keep], rtol=0, atol=0)
        again = ac.ops.compaction.gather_rows_kernel([lazy], index)[0]  # the form that the halting loop calls
        torch.testing.assert_close(again, lazy[keep], rtol=0, atol=0)


@pytest.mark.promise("large")
def test_offsets_beyond_two_to_the_thirty_first(device):
    rows, width = (1 << 16) + 1, (1 << 15) + 8
    x = torch.empty((rows, width), dtype=torch.uint8, device=device)  # only its last row is ever touched
    x[-1] = 7
    keep = torch.zeros(rows, dtype=torch.bool, device=device)
    keep[-1] = True
    (row,), _ = ac.ops.compact(keep, x)
    assert row.shape == (1, width)
    assert bool((row == 7).all())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.booleans(), max_size=80),
    st.integers(0, 20),
    st.sampled_from([torch.float32, torch.int64, torch.bfloat16]),
)
def test_compact_then_scatter_keeps_exactly_the_kept_rows(keep, width, dtype):
    keep = torch.tensor(keep, dtype=torch.bool)
    check_all_three(keep, [values((keep.shape[0], width), dtype)])


def test_a_row_is_moved_alike_in_any_batch(device):
    x, keep = values((64, 17), device=device), mask("random", 64, device)
    (rows,), index = ac.ops.compact(keep, x)
    for j, i in enumerate(index.tolist()):
        (alone,), _ = ac.ops.compact(keep[i : i + 1], x[i : i + 1])
        assert_bitwise(alone[0], rows[j])


# --- gradients ----------------------------------------------------------------------------------------------
def gradient_cases(device):
    x = values((6, 3), torch.float64, device, seed=1).requires_grad_()
    y = values((6,), torch.float64, device, seed=2).requires_grad_()
    return mask("random", 6, device, seed=3), x, y


@pytest.mark.promise("second derivative")
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_compact_is_differentiable_twice(device, check):
    keep, x, y = gradient_cases(device)
    assert 0 < int(keep.sum()) < 6
    assert check(lambda *t: ac.ops.compact(keep, t)[0], (x, y))


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_compact_padded_is_differentiable_twice(device, check):
    keep, x, y = gradient_cases(device)
    assert check(lambda *t: ac.ops.compact_padded(keep, t)[0], (x, y))


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_scatter_rows_is_differentiable_twice(device, check):
    _, x, y = gradient_cases(device)
    index = torch.tensor([8, 0, -1, 3, 4, 2], device=device)
    assert check(lambda *t: ac.ops.scatter_rows(t, index, 9), (x, y))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_the_backward_pass_is_exact_in_every_dtype(device, poison, padded, dtype):
    x = values((33, 5), dtype, device).requires_grad_()
    keep = mask("random", 33, device)
    (rows,), *_ = (ac.ops.compact_padded if padded else ac.ops.compact)(keep, x)
    g = values(rows.shape, dtype, device, seed=5)
    (got,) = torch.autograd.grad(rows, x, g)
    expected = g.new_zeros((33, 5))
    expected[keep] = g[: int(keep.sum())]
    assert_bitwise(got, expected)
    poison.check()


def test_a_complex_tensor_has_a_gradient(device):
    keep = mask("random", 6, device, seed=3)
    z = values((6, 2), torch.complex128, device).requires_grad_()
    assert gradcheck(lambda t: ac.ops.compact(keep, t)[0], (z,))
    assert gradcheck(lambda t: ac.ops.scatter_rows(t, torch.arange(6, device=device), 8), (z,))


def test_integers_beside_floats_get_no_gradient(device):
    keep = mask("random", 6, device, seed=3)
    x, i = values((6, 2), device=device).requires_grad_(), torch.arange(6, device=device)
    (rows, ids), _ = ac.ops.compact(keep, [x, i])
    assert rows.requires_grad
    assert not ids.requires_grad
    rows.sum().backward()  # an expanded gradient
    assert_bitwise(x.grad, keep[:, None].expand(6, 2).float().contiguous())


def test_an_output_that_the_loss_does_not_use_costs_nothing(device):
    keep = mask("random", 6, device, seed=3)
    x, y = (values((6, 2), device=device, seed=s).requires_grad_() for s in (1, 2))
    (rows, _), _ = ac.ops.compact(keep, [x, y])
    g_x, g_y = torch.autograd.grad(rows.sum(), (x, y), allow_unused=True)
    assert g_x is not None
    assert g_y is None


@pytest.mark.parametrize("op", ["compact", "compact_padded"])
def test_the_reference_agrees(device, op):
    keep = mask("random", 33, device)
    tensors = [values((33, 5), dtype, device) for dtype in DTYPES]
    rows, *rest = getattr(ac.ops, op)(keep, tensors)
    with ac.reference_kernels():
        expected, *expected_rest = getattr(ac.ops, op)(keep, tensors)
        back = ac.ops.scatter_rows(expected, expected_rest[0], 33)
    for got, want in zip(
        (*rows, *rest, *ac.ops.scatter_rows(rows, rest[0], 33)),
        (*expected, *expected_rest, *back),
        strict=True,
    ):
        assert_bitwise(got, want)
