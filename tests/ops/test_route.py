"""Merging rows is exact: merge_rows and its adjoint against torch.where and plain indexing, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import adaptcomp_ext as ac
from adaptcomp_ext import _C
from tests.helpers.tensors import (
    DTYPES,
    FEW_ROWS,
    FLOATS,
    LAYOUTS,
    PATTERNS,
    WIDTHS,
    Unchanged,
    assert_bitwise,
    laid_out,
    mask,
    values,
)

ROWS = (0, 1, 7, 33, 1000)
FORMS = ("compact", "padded")


def named(chosen, form):
    """Return the index of the chosen rows, in the two forms that compaction gives."""
    index = chosen.nonzero()[:, 0]
    if form == "compact":
        return index
    return torch.nn.functional.pad(index, (0, chosen.shape[0] - index.shape[0]), value=-1)


def check(chosen, whole, otherwise, form="compact"):
    """Merge the chosen rows of `whole` into `otherwise`, and compare with indexing."""
    index = named(chosen, form)
    rows = [
        w[index.clamp(min=0)] if w.shape[0] else w[:0] for w in whole
    ]  # of a padded index the tail is anything
    with Unchanged(chosen, index, *rows, *otherwise):
        merged = ac.ops.merge_rows(rows, index, otherwise)
    for got, w, o in zip(merged, whole, otherwise, strict=True):
        expected = o.clone(memory_format=torch.contiguous_format)
        expected[chosen] = w[chosen]
        assert got.is_contiguous()
        assert_bitwise(got, expected)


@pytest.mark.promise("formula", "own memory")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_matches_indexing_in_every_size_and_writes_all_it_promises(device, poison, rows, dtype, form):
    whole = [values((rows, width), dtype, device, seed=width) for width in WIDTHS]
    otherwise = [values((rows, width), dtype, device, seed=100 + width) for width in WIDTHS]
    for pattern in PATTERNS:
        check(mask(pattern, rows, device), whole, otherwise, form)
    poison.check()


@pytest.mark.sanitizer
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("rows", FEW_ROWS)
def test_small_cases(device, rows, dtype, form):
    sides = [[values((rows, width), dtype, device, seed=s) for width in (1, 3, 8, 17)] for s in (1, 2)]
    check(mask("random", rows, device), *sides, form)


@pytest.mark.promise("layout")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(device, poison, layout, dtype):
    for size in (1, 33, 257):
        whole, otherwise = (
            [laid_out(layout, size, w, dtype, device, seed=s + w) for w in (1, 3, 8, 17)] for s in (0, 50)
        )
        chosen = mask("random", size, device)
        check(chosen, whole, otherwise)
        kept = int(chosen.sum())
        rows = [laid_out(layout, kept, w, dtype, device, seed=w) for w in (1, 3, 8, 17)]
        for r, got, o in zip(
            rows, ac.ops.merge_rows(rows, named(chosen, "compact"), otherwise), otherwise, strict=True
        ):
            expected = o.clone(memory_format=torch.contiguous_format)
            expected[chosen] = r
            assert_bitwise(got, expected)
    poison.check()


@pytest.mark.promise("layout")
@pytest.mark.sanitizer
def test_misaligned_rows(device):
    whole, otherwise = (
        [laid_out("misaligned", 33, w, torch.bfloat16, device, seed=s) for w in (1, 7, 8, 16)] for s in (1, 2)
    )
    check(mask("random", 33, device), whole, otherwise)


def test_every_rank_and_empty_rows_in_one_call(device):
    shapes = [(9,), (9, 1), (9, 2, 3), (9, 2, 2, 2, 2), (9, 0), (9, 3, 0)]
    whole, otherwise = ([values(shape, device=device, seed=s) for shape in shapes] for s in (1, 2))
    check(mask("random", 9, device), whole, otherwise)


def test_many_tensors_of_different_dtypes_in_one_call(device):
    whole, otherwise = (
        [values((65, 1 + i % 5), DTYPES[i % 8], device, seed=s + i) for i in range(70)] for s in (0, 100)
    )
    check(mask("random", 65, device), whole, otherwise)


def test_rows_wider_than_a_block_of_threads_moves_at_once(device):
    whole, otherwise = ([values((5, 5001), device=device, seed=s)] for s in (1, 2))
    check(mask("alternating", 5, device), whole, otherwise)


def test_no_tensors_and_a_single_tensor(device):
    index = torch.tensor([1], device=device)
    assert ac.ops.merge_rows([], index, []) == ()
    (got,) = ac.ops.merge_rows(torch.ones(1, 2, device=device), index, torch.zeros(3, 2, device=device))
    assert got.tolist() == [[0, 0], [1, 1], [0, 0]]


def test_the_index_may_be_strided(device):
    index = torch.tensor([0, 9, 3, 9, 4], device=device)[::2]
    rows, otherwise = values((3, 2), device=device), values((6, 2), device=device, seed=1)
    expected = otherwise.clone()
    expected[[0, 3, 4]] = rows
    assert_bitwise(ac.ops.merge_rows(rows, index, otherwise)[0], expected)


def test_lazily_conjugated_and_negated_tensors(device):
    x, o = values((9, 2), torch.complex64, device), values((9, 2), torch.complex64, device, seed=1)
    chosen = mask("random", 9, device)
    index = named(chosen, "compact")
    for view in (torch.Tensor.conj, lambda t: t.conj().imag):
        (got,) = ac.ops.merge_rows(view(x[chosen]), index, view(o))
        assert torch.equal(got, torch.where(chosen[:, None], view(x), view(o)))


@pytest.mark.promise("large")
@pytest.mark.slow
def test_offsets_beyond_two_to_the_thirty_first(device):
    size, width = (1 << 16) + 1, (1 << 15) + 8
    otherwise = torch.empty(size, width, dtype=torch.uint8, device=device)
    otherwise[-2] = 3
    row = torch.full((1, width), 7, dtype=torch.uint8, device=device)
    (got,) = ac.ops.merge_rows(row, torch.tensor([size - 1], device=device), otherwise)
    assert bool((got[-1] == 7).all())
    assert bool((got[-2] == 3).all())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.booleans(), max_size=80),
    st.integers(0, 20),
    st.sampled_from([torch.float32, torch.int64, torch.bfloat16]),
)
def test_any_mask(chosen, width, dtype):
    chosen = torch.tensor(chosen, dtype=torch.bool)
    whole, otherwise = ([values((chosen.shape[0], width), dtype, seed=s)] for s in (1, 2))
    for form in FORMS:
        check(chosen, whole, otherwise, form)


def test_what_compact_took_goes_back_where_it_was(device):
    keep, x = mask("random", 100, device), values((100, 5), device=device)
    (rows,), index = ac.ops.compact(keep, x)
    assert_bitwise(ac.ops.merge_rows(rows, index, torch.full_like(x, float("nan")))[0][keep], x[keep])
    (padded,), at, _ = ac.ops.compact_padded(keep, x)
    assert_bitwise(ac.ops.merge_rows(padded, at, x)[0], x)


@pytest.mark.promise("threads")
@pytest.mark.parametrize("count", [2, 3])
def test_one_thread_and_several_give_the_same_bits(threads, count):
    chosen = mask("random", 4096)
    x, o, g = (values((4096, 128), seed=s) for s in (1, 2, 3))
    found = []
    for n in (1, count):
        threads(n)
        rows, base = x[chosen].requires_grad_(), o.clone().requires_grad_()
        (out,) = ac.ops.merge_rows(rows, named(chosen, "compact"), base)
        found.append([out, *torch.autograd.grad(out, (rows, base), g)])
    for alone, together in zip(*found, strict=True):
        assert_bitwise(together, alone)


# --- gradients ----------------------------------------------------------------------------------------------
def gradient_cases(device, form):
    chosen = mask("random", 6, device, seed=3)
    index = named(chosen, form)
    rows = [
        values((index.shape[0], *tail), torch.float64, device, seed=i).requires_grad_()
        for i, tail in enumerate([(3,), ()])
    ]
    otherwise = [
        values((6, *tail), torch.float64, device, seed=9 + i).requires_grad_()
        for i, tail in enumerate([(3,), ()])
    ]
    return index, rows, otherwise


@pytest.mark.promise("second derivative")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("numerical", [gradcheck, gradgradcheck])
def test_differentiable_twice(device, numerical, form):
    index, rows, otherwise = gradient_cases(device, form)
    assert 0 < int((index >= 0).sum()) < 6
    assert numerical(lambda *t: ac.ops.merge_rows(t[:2], index, t[2:]), (*rows, *otherwise))
    assert numerical(lambda *t: ac.ops.merge_rows(t, index, [o.detach() for o in otherwise]), tuple(rows))
    assert numerical(lambda *t: ac.ops.merge_rows([r.detach() for r in rows], index, t), tuple(otherwise))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_backward_pass_is_exact_in_every_dtype_and_writes_all_it_promises(device, poison, dtype, form):
    for pattern in PATTERNS:
        chosen = mask(pattern, 33, device)
        index = named(chosen, form)
        rows = values((index.shape[0], 5), dtype, device).requires_grad_()
        otherwise = values((33, 5), dtype, device, seed=1).requires_grad_()
        (out,) = ac.ops.merge_rows(rows, index, otherwise)
        g = values((33, 5), dtype, device, seed=5)
        g_rows, g_otherwise = torch.autograd.grad(out, (rows, otherwise), g, retain_graph=True)
        kept = int(chosen.sum())
        assert_bitwise(g_rows[:kept], g[chosen])
        assert not bool(g_rows[kept:].any())
        assert_bitwise(g_otherwise, g.masked_fill(chosen[:, None], 0))
        (alone,) = torch.autograd.grad(out, otherwise, g)
        assert_bitwise(alone, g_otherwise)
    poison.check()


def test_a_nan_in_a_replaced_row_or_in_its_gradient_stays_there(device):
    chosen = mask("alternating", 7, device)
    otherwise = values((7, 3), device=device)
    otherwise[chosen] = float("nan")
    otherwise.requires_grad_()
    rows = values((3, 3), device=device, seed=1).requires_grad_()
    (out,) = ac.ops.merge_rows(rows, named(chosen, "compact"), otherwise)
    assert bool(out.isfinite().all())
    g = torch.ones(7, 3, device=device)
    g[chosen] = float("nan")
    g_rows, g_otherwise = torch.autograd.grad(out, (rows, otherwise), g)
    assert bool(g_rows.isnan().all()) and bool(g_otherwise.isfinite().all())


def test_integers_beside_floats_and_outputs_that_nobody_uses(device):
    index = torch.tensor([1, 4], device=device)
    x, y = (values((6, 2), device=device, seed=s).requires_grad_() for s in (1, 2))
    ids = torch.arange(6, device=device)
    rows = [torch.zeros(2, 2, device=device), torch.zeros(2, 2, device=device), ids[:2]]
    a, b, c = ac.ops.merge_rows(rows, index, [x, y, ids])
    assert a.requires_grad and b.requires_grad and not c.requires_grad
    g_x, g_y = torch.autograd.grad(a.sum(), (x, y), allow_unused=True)
    assert g_x[:, 0].tolist() == [1, 0, 1, 1, 0, 1]
    assert g_y is None


def test_a_complex_tensor_has_a_gradient(device):
    index = torch.tensor([0, 3], device=device)
    z, o = (values((n, 2), torch.complex128, device, seed=n).requires_grad_() for n in (2, 5))
    assert gradcheck(lambda *t: ac.ops.merge_rows(t[0], index, t[1]), (z, o))


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_agrees_forward_and_backward(device, form):
    chosen = mask("random", 33, device)
    index = named(chosen, form)
    rows = [values((index.shape[0], 5), dtype, device) for dtype in DTYPES]
    otherwise = [values((33, 5), dtype, device, seed=1) for dtype in DTYPES]
    got = ac.ops.merge_rows(rows, index, otherwise)
    with ac.reference_kernels():
        expected = ac.ops.merge_rows(rows, index, otherwise)
    for g, w in zip(got, expected, strict=True):
        assert_bitwise(g, w)
    grads = [t for t in otherwise if t.dtype.is_floating_point]
    kernel = torch.ops.adaptcomp.split_rows(grads, index, True)
    for g, w in zip(kernel, [t for side in ac.reference.split_rows(grads, index) for t in side], strict=True):
        assert_bitwise(g, w)


def test_gradients_of_the_reference_are_the_kernels(device):
    index, rows, otherwise = gradient_cases(device, "padded")

    def gradients():
        out = ac.ops.merge_rows(rows, index, otherwise)
        return torch.autograd.grad([t.square().sum() for t in out], [*rows, *otherwise])

    found = [gradients()]
    with ac.reference_kernels():
        found.append(gradients())
    for got, want in zip(*found, strict=True):
        assert_bitwise(got, want)


# --- torch.compile and CUDA ---------------------------------------------------------------------------------
def both_ways(x, o, keep):
    (rows,), index, _ = ac.ops.compact_padded(keep, x)
    return ac.ops.merge_rows([rows * 2], index, [o])[0]


@pytest.mark.promise("compile")
def test_compiles_into_one_graph_for_all_batch_sizes(device):
    torch._dynamo.reset()
    compiled = torch.compile(both_ways, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (5, 12, 33):
        keep = mask("random", size, device, seed=size)
        found = []
        for function in (both_ways, compiled):
            x, o = (values((size, 3), device=device, seed=s).requires_grad_() for s in (1, 2))
            out = function(x, o, keep)
            found.append([out, *torch.autograd.grad(out.square().sum(), (x, o))])
        for got, want in zip(*found, strict=True):
            assert_bitwise(got, want)


@pytest.mark.cuda
def test_never_waits_for_the_device_and_runs_in_a_graph():
    if not (ac.build_info()["cuda"] and torch.cuda.is_available()):
        pytest.skip("no CUDA device")
    keep = mask("random", 33, "cuda")
    x, o = (values((33, 3), device="cuda", seed=s).requires_grad_() for s in (1, 2))
    both_ways(x, o, keep)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = both_ways(x, o, keep)
        torch.autograd.grad(out.sum(), (x, o))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph, inputs = torch.cuda.CUDAGraph(), (x.detach(), o.detach(), keep)
    with torch.cuda.graph(graph):
        captured = both_ways(*inputs)
    keep.copy_(mask("alternating", 33, "cuda"))
    graph.replay()
    assert_bitwise(captured, torch.where(keep[:, None], x * 2, o).detach())


# --- bad input ----------------------------------------------------------------------------------------------
X, INDEX = torch.zeros(5, 3), torch.tensor([1, 3])


@pytest.mark.promise("bad input")
@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (
            TypeError,
            r"index: expected int64 of shape \[K\], got a tensor of shape \[2\], torch.int32",
            (X[:2], INDEX.int(), X),
        ),
        (TypeError, r"index: expected a Tensor, got list \[1, 3\]", (X[:2], [1, 3], X)),
        (
            ValueError,
            r"rows\[0\]: expected 2 rows in the first dimension, got shape \[3, 3\]",
            (X[:3], INDEX, X),
        ),
        (TypeError, r"rows: expected a Tensor or a sequence of Tensors, got int 3", (3, INDEX, X)),
        (TypeError, r"otherwise\[0\]: expected a Tensor, got int 3", (X[:2], INDEX, [3])),
        (ValueError, r"rows: expected 2 tensors like otherwise, got 1", ([X[:2]], INDEX, [X, X])),
        (
            ValueError,
            r"otherwise\[1\]: expected 5 rows in the first dimension",
            ([X[:2]] * 2, INDEX, [X, X[:4]]),
        ),
        (
            ValueError,
            r"otherwise\[0\]: expected 0 rows in the first dimension, got shape \[\]",
            (X[:2], INDEX, torch.tensor(1.0)),
        ),
        (
            TypeError,
            r"rows\[0\]: expected torch.float32 like otherwise\[0\], got torch.float64",
            (X[:2].double(), INDEX, X),
        ),
        (
            ValueError,
            r"rows\[0\]: expected shape \[K, 3\] like otherwise\[0\], got \[2, 2\]",
            (X[:2, :2], INDEX, X),
        ),
        (
            ValueError,
            r"index: expected at most 1 entries, the rows of otherwise, got 2",
            (X[:2], INDEX, X[:1]),
        ),
        (
            ValueError,
            r"index: expected distinct entries in ascending order, less than 3",
            (X[:2], INDEX, X[:3]),
        ),
        (ValueError, r"index: .* in ascending order, .* got tensor\(\[3, 1\]\)", (X[:2], INDEX.flip(0), X)),
        (ValueError, r"index: expected distinct entries", (X[:2], INDEX[:1].expand(2), X)),
        (
            ValueError,
            r"index: .* negative ones only at the end, got tensor\(\[-1,  3\]\)",
            (X[:2], torch.tensor([-1, 3]), X),
        ),
        (
            ValueError,
            r"otherwise\[0\]: expected a tensor on cpu, got one on meta",
            (X[:2], INDEX, X.to("meta")),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused_by_name(error, message, arguments):
    with pytest.raises(error, match=message):
        ac.ops.merge_rows(*arguments)


@pytest.mark.parametrize("index", [[3, 1], [2, 2], [-1, 0], [7, 1]])
def test_an_index_out_of_order_ends_the_kernel_and_writes_nothing_outside(poison, index):
    """A compiled graph cannot check the index: the result is undefined, but no error is raised."""
    rows, otherwise = values((2, 3)), values((5, 3), seed=1)
    _C.merge_rows([rows], [otherwise], torch.tensor(index), 5, _C.CPU, 0)
    _C.split_rows([otherwise], torch.tensor(index), 5, True, _C.CPU, 0)
    poison.check()


def test_in_order():
    def in_order(index, size):
        t = torch.tensor(index, dtype=torch.int64)
        return _C.in_order([t, t.shape[0], size])

    for good in ([], [0], [0, 1, 4], [-1], [2, -1, -1], [4, -1, -5]):
        assert in_order(good, 5), good
    for bad in ([5], [1, 1], [2, 1], [-1, 2], [0, -1, 1], [3, 7]):
        assert not in_order(bad, 5), bad
