"""The linear layer: its values, its gradients, and that a row's bits do not depend on its batch."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import adaptcomp_ext as ac
from adaptcomp_ext.ops.linear import linear_unchecked
from tests.helpers.tensors import (
    FLOATS,
    LAYOUTS,
    Unchanged,
    assert_as_good_as_torch,
    assert_bitwise,
    generator,
    laid_out,
    values,
)

SIZES = ((0, 3, 2), (1, 1, 1), (2, 5, 9), (17, 64, 33), (33, 7, 128), (40, 257, 16), (70, 16, 65))


def layer(inner, columns, dtype=torch.float32, device="cpu"):
    return values((columns, inner), dtype, device, 1), values((columns,), dtype, device, 2)


def check(x, weight, bias):
    with Unchanged(x, weight, *([] if bias is None else [bias])):
        got = ac.ops.linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    # A sum of products that cancel: the rounding is that of the terms.
    terms = F.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    assert got.is_contiguous() and got.shape == (*x.shape[:-1], weight.shape[0])
    same = F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    scale = float(terms.max()) if terms.numel() else 0.0
    assert_as_good_as_torch(
        got, F.linear(x, weight, bias) if x.dtype == torch.float64 else same, exact, 4.0, scale
    )


@pytest.mark.promise("formula", "own memory")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_torch_in_every_size(device, poison, dtype):
    for rows, inner, columns in SIZES:
        weight, bias = layer(inner, columns, dtype, device)
        check(values((rows, inner), dtype, device), weight, bias)
        check(values((rows, inner), dtype, device), weight, None)
    poison.check()


@pytest.mark.sanitizer
def test_small_cases(device):
    for rows, inner, columns in SIZES[:4]:
        check(values((rows, inner), torch.float32, device), *layer(inner, columns, device=device))


def test_any_number_of_dimensions(device):
    weight, bias = layer(5, 3, device=device)
    for shape in ((5,), (4, 5), (2, 3, 5), (2, 0, 5)):
        check(values(shape, device=device), weight, bias)


@pytest.mark.promise("layout")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(device, layout):
    x = laid_out(layout, 9, 6, torch.float32, device)
    weight = laid_out(layout, 7, 6, torch.float32, device, 1)
    bias = laid_out(layout, 7, 2, torch.float32, device, 2)[:, 0]
    assert_bitwise(
        ac.ops.linear(x, weight, bias),
        ac.ops.linear(x.contiguous(), weight.contiguous(), bias.contiguous()),
    )


@pytest.mark.promise("row alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_row_and_its_gradient_have_the_same_bits_in_any_batch(device, dtype):
    """Batches of every size, in which a row has other neighbours and another place."""
    weight, bias = layer(61, 37, dtype, device)
    x, upstream = values((70, 61), dtype, device), values((70, 37), dtype, device, 3)

    def run(select):
        row = x[select].requires_grad_()
        out = ac.ops.linear(row, weight, bias)
        return out.detach(), *torch.autograd.grad(out, row, upstream[select])

    together = run(torch.arange(70, device=device))
    for rows in range(1, 71, 1 if dtype == torch.float32 else 7):
        select = torch.randperm(70, generator=generator(rows))[:rows].to(device)
        for some, every in zip(run(select), together, strict=True):
            assert_bitwise(some, every[select])


@pytest.mark.promise("threads")
def test_threads_and_other_rows_change_no_bit(threads, instruction_set):
    """With each instruction set; between two of them the rounding may differ."""
    weight, bias = layer(33, 64)
    x = values((3000, 33))
    threads(1)
    one = ac.ops.linear(x, weight, bias)
    threads(2)
    assert_bitwise(ac.ops.linear(x, weight, bias), one)
    for row in (0, 1500, 2999):
        assert_bitwise(ac.ops.linear(x[row], weight, bias), one[row])


@pytest.mark.promise("gradient", "second derivative")
@pytest.mark.parametrize("transposed", [False, True])
def test_differentiable_twice(device, transposed):
    tensors = [
        values(s, torch.float64, device, i).requires_grad_() for i, s in enumerate(((3, 4), (4, 4), (4,)))
    ]

    def run(x, weight, bias):
        return linear_unchecked(x, weight, bias, transposed)

    torch.testing.assert_close(
        run(*tensors), tensors[0] @ (tensors[1] if transposed else tensors[1].T) + tensors[2]
    )
    assert gradcheck(run, tensors) and gradgradcheck(run, tensors)


@pytest.mark.promise("gradient")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_are_those_of_the_reference(device, dtype):
    tensors = [t.requires_grad_() for t in (values((9, 5), dtype, device), *layer(5, 3, dtype, device))]
    upstream = values((9, 3), dtype, device, 4)
    found = torch.autograd.grad(ac.ops.linear(*tensors), tensors, upstream)
    with ac.reference_kernels():
        expected = torch.autograd.grad(ac.ops.linear(*tensors), tensors, upstream)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, want)


@pytest.mark.promise("not finite")
def test_a_row_that_is_not_finite_harms_no_other(device):
    weight, bias = layer(5, 3, device=device)
    x = values((20, 5), device=device)
    expected = ac.ops.linear(x, weight, bias)
    x[3, 2], x[7, 0] = float("nan"), float("inf")
    got = ac.ops.linear(x, weight, bias)
    keep = torch.tensor([r not in (3, 7) for r in range(20)], device=device)
    assert_bitwise(got[keep], expected[keep])
    assert bool(got[3].isnan().all()) and not bool(got[7].isfinite().any())


def test_a_step_built_on_it_halts_alike_in_any_batch(device):
    """What the op is for: decisions of a learned step that do not depend on the other rows."""

    class Step(torch.nn.Linear):
        def forward(self, state):
            return torch.tanh(ac.ops.linear(state, self.weight, self.bias))

    class Head(torch.nn.Linear):
        def forward(self, state):
            return ac.ops.linear(state, self.weight, self.bias)

    torch.manual_seed(0)
    halt = ac.AdaptiveHalt(Step(24, 24), ac.ACT(Head(24, 1)), max_steps=8).to(device)
    x = values((40, 24), device=device)
    whole = halt(x)
    for rows in ([5], [39, 2], list(range(40))[::-1], list(range(7))):
        for got, want in zip(halt(x[rows])[:5], whole[:5], strict=True):
            assert_bitwise(got, want[rows])


X, W = torch.zeros(2, 3), torch.zeros(4, 3)
BAD = {
    "no tensor": (([1.0], W), TypeError, "x: expected a Tensor, got list"),
    "integers": ((X.long(), W), TypeError, "x: expected float32, float64"),
    "inner": ((torch.zeros(2, 4), W), ValueError, "x: expected shape .*3.*, got .*\\[2, 4\\]"),
    "scalar": ((torch.zeros(()), W), ValueError, "x: expected shape"),
    "vector": ((X, torch.zeros(3)), ValueError, "weight: expected shape \\[out, in\\]"),
    "no output": ((X, torch.zeros(0, 3)), ValueError, "weight: expected shape .* >= 1"),
    "bias": ((X, W, torch.zeros(3)), ValueError, "bias: expected shape \\[4\\]"),
    "dtypes": ((X, W.double()), TypeError, "weight: expected torch.float32, as x has it, got torch.float64"),
    "bias's dtype": ((X, W, torch.zeros(4).half()), TypeError, "bias: expected torch.float32"),
    "devices": ((X, W.to("meta")), ValueError, "weight: expected a tensor on cpu"),
}


@pytest.mark.promise("bad input")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=message):
        ac.ops.linear(*arguments)


def test_autocast_does_not_act_on_it():
    weight, bias = layer(5, 3)
    x = values((4, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert_bitwise(ac.ops.linear(x, weight, bias), ac.ops.linear(x.clone(), weight, bias))
        assert ac.ops.linear(x, weight, bias).dtype == torch.float32
