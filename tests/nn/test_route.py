"""route against masking, forward and backward: the same bits, work on K rows, no influence of other rows."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import adaptcomp_ext as ac
from tests.helpers.tensors import (
    FLOATS,
    LAYOUTS,
    PATTERNS,
    SYNCHRONISED,
    Unchanged,
    assert_bitwise,
    laid_out,
    mask,
    values,
)

SIZES = (0, 1, 7, 33, 1000)


class Branch(nn.Module):
    """An elementwise branch, whose rows have the same bits in any batch; it records its numbers of rows."""

    def __init__(self, dtype=torch.float32, device="cpu", width=3):
        super().__init__()
        self.a = nn.Parameter(values((width,), dtype, device, seed=11))
        self.seen: list[int] = []

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        self.seen.append(x.shape[0])
        y = x * self.a + z.square()
        return y / (1 + y.abs())


def masked(chosen, branch, x, z, otherwise):
    return torch.where(chosen[:, None], branch(x, z), otherwise)


def case(size, dtype=torch.float32, device="cpu", width=3):
    x, z, otherwise = (values((size, width), dtype, device, seed=s).requires_grad_() for s in (1, 2, 3))
    return Branch(dtype, device, width), x, z, otherwise


def gradients(out, upstream, *wanted):
    """Return gradients, with zeros for inputs without one, as where the branch was not called."""
    found = (
        torch.autograd.grad(out, wanted, upstream, allow_unused=True)
        if out.requires_grad
        else [None] * len(wanted)
    )
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]


@pytest.mark.promise("formula", "gradient")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_the_bits_of_masking_forward_and_backward(device, poison, size, dtype):
    for pattern in PATTERNS:
        chosen = mask(pattern, size, device)
        branch, x, z, otherwise = case(size, dtype, device)
        with Unchanged(chosen, x, z, otherwise):
            got = ac.route(chosen, branch, x, z, otherwise=otherwise)
            kept = int(chosen.sum())
            assert branch.seen == ([kept] if kept else [])  # exactly K rows, and no call for none
            want = masked(chosen, branch, x, z, otherwise)
            assert_bitwise(got, want)
            g = values((size, 3), dtype, device, seed=5)
            for found, expected in zip(
                *(gradients(out, g, x, z, otherwise) for out in (got, want)), strict=True
            ):
                torch.testing.assert_close(found, expected, rtol=0, atol=0)  # but for the sign of zeros
    if size:
        poison.check()


def test_the_gradient_of_a_weight_is_the_masked_one(device):
    for pattern in ("alternating", "random", "all"):
        chosen = mask(pattern, 33, device)
        branch, x, z, otherwise = case(33, torch.float64, device)
        g = values((33, 3), torch.float64, device, seed=5)
        found = [
            gradients(out, g, branch.a)
            for out in (
                ac.route(chosen, branch, x, z, otherwise=otherwise),
                masked(chosen, branch, x, z, otherwise),
            )
        ]
        torch.testing.assert_close(*found, rtol=1e-13, atol=1e-13)


@pytest.mark.promise("second derivative")
@pytest.mark.parametrize("numerical", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_differentiable_twice(device, numerical, pattern):
    chosen = mask(pattern, 5, device, seed=1)
    branch, x, z, otherwise = case(5, torch.float64, device)

    def call(x, z, otherwise, a):
        return ac.route(
            chosen,
            lambda p, q: torch.func.functional_call(branch, {"a": a}, (p, q)),
            x,
            z,
            otherwise=otherwise,
        )

    assert numerical(call, (x, z, otherwise, branch.a))


def test_otherwise_may_come_last(device):
    chosen = mask("random", 7, device)
    branch, x, z, otherwise = case(7, device=device)
    assert_bitwise(
        ac.route(chosen, branch, x, z, otherwise), ac.route(chosen, branch, x, z, otherwise=otherwise)
    )


class Pair(NamedTuple):
    logits: Tensor
    label: Tensor


def test_any_pytrees(device):
    chosen = mask("random", 9, device)
    x, h = values((9, 2), device=device), values((9, 4), torch.float64, device)
    ids = torch.arange(9, device=device)
    otherwise = {
        "p": Pair(values((9, 2), device=device, seed=4), torch.zeros_like(ids)),
        "h": [values((9, 4, 1), torch.float64, device)],
    }

    def branch(state, identity):
        x, (h,) = state["x"], state["h"]
        return {"p": Pair(x * 2, identity + 1), "h": [h[:, :, None] - 1]}

    got = ac.route(chosen, branch, {"x": x, "h": (h,)}, ids, otherwise=otherwise)
    assert type(got["p"]) is Pair
    assert_bitwise(got["p"].logits, torch.where(chosen[:, None], x * 2, otherwise["p"].logits))
    assert_bitwise(got["p"].label, torch.where(chosen, ids + 1, 0))
    assert_bitwise(got["h"][0], torch.where(chosen[:, None, None], h[:, :, None] - 1, otherwise["h"][0]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16], ids=str)
def test_results_of_any_dtype(device, dtype):
    chosen = mask("random", 33, device)
    new, old = values((33, 3), dtype, device, seed=1), values((33, 3), dtype, device, seed=2)
    assert_bitwise(ac.route(chosen, lambda x: x, new, otherwise=old), torch.where(chosen[:, None], new, old))


@pytest.mark.promise("layout")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(device, layout):
    for pattern in PATTERNS:
        chosen = mask(pattern, 66, device)[::2]
        x, z, otherwise = (laid_out(layout, 33, 4, torch.float32, device, seed=s) for s in (1, 2, 3))
        branch = Branch(device=device, width=4)
        assert_bitwise(
            ac.route(chosen, branch, x, z, otherwise=otherwise).contiguous(),
            masked(chosen, branch, x, z, otherwise).contiguous(),
        )


@pytest.mark.promise("row alone")
def test_a_row_does_not_see_its_neighbours(device):
    chosen = mask("random", 33, device)
    branch, x, z, otherwise = case(33, device=device)
    together = ac.route(chosen, branch, x, z, otherwise=otherwise)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0)).to(device)
    shuffled = ac.route(chosen[order], branch, x[order], z[order], otherwise=otherwise[order])
    assert_bitwise(shuffled, together[order])
    for i in range(33):
        one = slice(i, i + 1)
        assert_bitwise(ac.route(chosen[one], branch, x[one], z[one], otherwise=otherwise[one]), together[one])


@pytest.mark.promise("not finite")
def test_a_nan_in_a_row_that_is_not_used_reaches_nothing(device):
    chosen = mask("alternating", 7, device)
    branch, x, z, otherwise = case(7, device=device)
    with torch.no_grad():
        x[~chosen], z[~chosen], otherwise[chosen] = float("nan"), float("inf"), float("nan")
    out = ac.route(chosen, branch, x, z, otherwise=otherwise)
    assert bool(out.isfinite().all())
    for g in torch.autograd.grad(out.square().sum(), (x, z, otherwise, branch.a)):
        assert bool(g.isfinite().all())
    (through,) = torch.autograd.grad(masked(chosen, branch, x, z, otherwise).sum(), branch.a)
    assert not bool(through.isfinite().all())  # which masking does not keep out


@pytest.mark.promise("small")
def test_no_row_chosen(device):
    branch, x, z, otherwise = case(5, device=device)
    out = ac.route(torch.zeros(5, dtype=torch.bool, device=device), branch, x, z, otherwise=otherwise)
    assert branch.seen == []
    assert_bitwise(out, otherwise)
    assert out.data_ptr() != otherwise.data_ptr()
    out.sum().backward()
    assert branch.a.grad is None and x.grad is None
    assert bool((otherwise.grad == 1).all())


def test_every_row_chosen_copies_nothing(device):
    branch, x, z, otherwise = case(5, device=device)
    got = []

    def watching(x, z):
        got.extend((x, z))
        return branch(x, z)

    out = ac.route(torch.ones(5, dtype=torch.bool, device=device), watching, x, z, otherwise=otherwise)
    assert got[0] is x and got[1] is z
    assert out.data_ptr() not in {t.data_ptr() for t in (x, z, otherwise)}
    out.sum().backward()
    assert otherwise.grad is None
    assert x.grad is not None and branch.a.grad is not None


def test_a_partial_result_is_nobodys_memory(device):
    chosen = mask("alternating", 5, device)
    x, otherwise = values((5, 3), device=device), values((5, 3), device=device, seed=1)
    with Unchanged(x, otherwise):
        ac.route(chosen, lambda x: x, x, otherwise=otherwise).zero_()


def test_no_graph_where_none_is_wanted(device):
    chosen = mask("alternating", 5, device)
    branch, x, z, otherwise = case(5, device=device)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert not ac.route(chosen, branch, x, z, otherwise=otherwise).requires_grad


def test_routes_within_routes(device):
    """The branch routes again, which makes three kinds of rows."""
    kind = torch.arange(30, device=device) % 3
    x = values((30, 4), torch.float64, device).requires_grad_()

    def expensive(x, kind):
        return ac.route(kind == 2, lambda y: y.sin(), x, otherwise=x.exp())

    got = ac.route(kind > 0, expensive, x, kind, otherwise=x.cos())
    which = kind[:, None]
    want = torch.where(which == 0, x.cos(), torch.where(which == 1, x.exp(), x.sin()))
    assert_bitwise(got, want)
    (a,), (b,) = torch.autograd.grad(got.sum(), x), torch.autograd.grad(want.sum(), x)
    torch.testing.assert_close(a, b, rtol=1e-15, atol=0)


def test_the_reference_agrees(device):
    branch, x, z, otherwise = case(33, device=device)
    chosen = mask("random", 33, device)

    def results():
        out = ac.route(chosen, branch, x, z, otherwise=otherwise)
        return [out, *torch.autograd.grad(out.sum(), (x, z, otherwise))]

    found = [results()]
    with ac.reference_kernels():
        found.append(results())
    for got, want in zip(*found, strict=True):
        assert_bitwise(got, want)


@pytest.mark.promise("autocast")
@pytest.mark.parametrize("pattern", ["random", "all"])
def test_autocast_converts_to_the_dtype_of_otherwise(device, pattern):
    chosen = mask(pattern, 9, device)
    layer = nn.Linear(4, 3, device=device)
    x, otherwise = values((9, 4), device=device).requires_grad_(), values((9, 3), device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = ac.route(chosen, layer, x, otherwise=otherwise)
        assert out.dtype == torch.float32
        assert torch.equal(out[chosen], layer(x[chosen]).float())
        assert ac.route(chosen, layer, x, otherwise=otherwise.bfloat16()).dtype == torch.bfloat16
        with pytest.raises(
            TypeError, match=r"branch: expected a result of torch.int64 like otherwise, got torch.bfloat16"
        ):
            ac.route(chosen, layer, x, otherwise=otherwise.long())
    out.sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    with pytest.raises(
        TypeError, match=r"branch: expected a result of torch.float64 like otherwise, got torch.float32"
    ):
        ac.route(chosen, layer, x, otherwise=otherwise.double())


@pytest.mark.cuda
def test_waits_for_the_device_once():
    if not (ac.build_info()["cuda"] and torch.cuda.is_available()):
        pytest.skip("no CUDA device")
    chosen = mask("random", 33, "cuda")
    branch, x, z, otherwise = case(33, device="cuda")
    ac.route(chosen, branch, x, z, otherwise=otherwise).sum().backward()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            ac.route(chosen, branch, x, z, otherwise=otherwise).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum(SYNCHRONISED in str(w.message) for w in log) == 1


# --- bad input ----------------------------------------------------------------------------------------------
M, X, Y = torch.tensor([True, False, True, False, True]), torch.zeros(5, 3), torch.zeros(5, 2)


def untouched(*_):
    raise AssertionError("the branch ran before the arguments were checked")


@pytest.mark.promise("bad input")
@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"mask: expected a Tensor, got list \[True\]", ([True], untouched, X, Y)),
        (TypeError, r"mask: expected dtype torch.bool, got torch.int64", (M.long(), untouched, X, Y)),
        (ValueError, r"mask: expected shape \[B\], got \[5, 1\]", (M[:, None], untouched, X, Y)),
        (ValueError, r"mask: expected a tensor with data, got one on meta", (M.to("meta"), untouched, X, Y)),
        (TypeError, r"branch: expected a callable, got int 3", (M, 3, X, Y)),
        (TypeError, r"otherwise: expected a Tensor or a pytree of Tensors, got nothing", (M, untouched)),
        (
            TypeError,
            r"tensors: expected at least one Tensor or pytree of Tensors, got none",
            (M, untouched, Y),
        ),
        (TypeError, r"tensors\[1\]: expected a Tensor, got int 3", (M, untouched, X, 3, Y)),
        (
            ValueError,
            r"tensors\[0\]: expected 5 rows like the mask, got shape \[4, 3\]",
            (M, untouched, X[:4], Y),
        ),
        (
            ValueError,
            r"tensors\[0\] \(leaf 1\): expected 5 rows like the mask",
            (M, untouched, (X, X[:4]), Y),
        ),
        (
            ValueError,
            r"tensors\[0\]: expected a tensor with data, got one on meta",
            (M, untouched, X.to("meta"), Y),
        ),
        (ValueError, r"tensors\[0\]: expected a batch dimension first", (M, untouched, torch.tensor(1.0), Y)),
        (
            ValueError,
            r"otherwise: expected 5 rows like the mask, got shape \[6, 2\]",
            (M, untouched, X, torch.zeros(6, 2)),
        ),
        (TypeError, r"otherwise: expected a Tensor, got str 'no'", (M, untouched, X, "no")),
        (
            TypeError,
            r"branch: expected a result with the structure of otherwise",
            (M, lambda x: (x, x), X, X),
        ),
        (
            TypeError,
            r"branch \(leaf 1\): expected a Tensor as result, got int 3",
            (M, lambda x: (x, 3), X, (X, X)),
        ),
        (TypeError, r"branch: expected a Tensor as result, got int 3", (M, lambda x: 3, X, X)),
        (
            ValueError,
            r"branch: expected a result of shape \[3, 2\] like otherwise, got \[3, 3\]",
            (M, lambda x: x, X, Y),
        ),
        (
            ValueError,
            r"branch: expected a result of shape \[3, 3\] like otherwise, got \[5, 3\]",
            (M, lambda x: X, X, X),
        ),
        (
            ValueError,
            r"branch: expected a result on cpu like otherwise, got one on meta",
            (M, lambda x: x.to("meta"), X, X),
        ),
        (
            TypeError,
            r"branch: expected a result of torch.float32 like otherwise, got torch.float64",
            (M, lambda x: x.double(), X, X),
        ),
        (
            TypeError,
            r"branch: expected a dense result, got layout torch.sparse_coo",
            (M, lambda x: x.to_sparse(), X, X),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused_by_name(error, message, arguments):
    with pytest.raises(error, match=message):
        ac.route(*arguments)


@pytest.mark.promise("compile")
def test_a_compiled_model_is_split_where_the_rows_are_counted(recwarn):
    """A split graph compiles the branch too; fullgraph=True raises."""
    layer, graphs = nn.Linear(3, 3).double(), []

    def backend(module, inputs):
        graphs.append({str(node.target) for node in module.graph.nodes})
        return module

    def function(x):
        return ac.route(x[:, 0] > 0, layer, x * 2, otherwise=x) + 1

    batches = [torch.randn(6, 3, dtype=torch.float64) for _ in range(3)]
    batches += [batches[0].abs(), -batches[0].abs()]
    compiled = torch.compile(function, backend=backend)
    for x in batches:
        torch.testing.assert_close(compiled(x), function(x))
    assert any("gather_rows" in str(graph) and "linear" in str(graph) for graph in graphs)
    assert not [w for w in recwarn if "_C" in str(w.message)]
    with pytest.raises(RuntimeError, match=r"route does not support torch\.compile\(fullgraph=True\)"):
        torch.compile(function, backend="eager", fullgraph=True)(batches[0])
