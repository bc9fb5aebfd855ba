"""Fused descents against the plain PyTorch reference: results, statuses, all gradients, row independence."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import adaptcomp_ext as ac
from tests.helpers.closed_forms import KINDS, OPTIONS, SHORT, contexts, energy, points, step_sizes
from tests.helpers.tensors import (
    Unchanged,
    assert_as_good_as_torch,
    assert_bitwise,
    generator,
    laid_out,
    values,
)

WIDE = dict(dim=17, width=35, context=6)
SIZES = [
    dict(dim=1, width=1, context=1),
    dict(dim=5, width=9, context=3),
    dict(dim=16, width=32, context=4),
    WIDE,
]


def descents(
    kind, rows, dtype, device, options, gradient="unrolled", keep_trace=True, size=None, spread=True
):
    """Return a function of a descent's tensors, and those: y0, step size, parameters, context."""
    size = size or SIZES[1]
    options = dict(options)
    module = energy(kind, dtype=dtype, device=device, **size)
    mean = options.pop("step_size")
    descend = ac.EnergyDescent(module, gradient=gradient, keep_trace=keep_trace, **options)
    alpha = (
        step_sizes(rows, mean, dtype, device) if spread else torch.tensor(mean, dtype=dtype, device=device)
    )
    y0 = points(rows, size["dim"], dtype, device)
    context = contexts(kind, rows, size["dim"], size["context"], dtype, device)
    parameters = dict(module.named_parameters())
    names = list(parameters)

    def function(y0, alpha, *tensors):
        given = dict(zip(names, tensors[: len(names)], strict=True))
        with _replaced(module, given):
            return descend(y0, *tensors[len(names) :], step_size=alpha)

    return function, [y0, alpha, *(p.detach() for p in parameters.values()), *context]


class _replaced:
    """Replace a module's parameters by other tensors."""

    def __init__(self, module, tensors):
        self.module, self.tensors = module, tensors

    def __enter__(self):
        self.before = dict(self.module._parameters)
        for name, tensor in self.tensors.items():
            self.module._parameters[name] = tensor

    def __exit__(self, *failure):
        self.module._parameters.update(self.before)


def loss(result, seed=9):
    total = 0.0
    outputs = (
        [result.y, result.energy] if result.trace is None else [result.y, result.energy, result.trace.outputs]
    )
    for i, t in enumerate(outputs):
        total = total + (t * values(t.shape, torch.float64, str(t.device), seed + i).to(t.dtype)).sum()
    return total


def with_gradients(function, tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    result = function(*leaves)
    grads = torch.autograd.grad(loss(result), leaves, allow_unused=True)
    return result, [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]


def same_fate(got, expected):
    assert torch.equal(got.steps, expected.steps)
    assert torch.equal(got.status, expected.status)
    assert torch.equal(got.trace.row, expected.trace.row)
    assert torch.equal(got.trace.step, expected.trace.step)
    assert torch.equal(got.trace.weights, expected.trace.weights)


@pytest.mark.parametrize("kind", KINDS)
def test_energies_in_closed_form_run_as_a_whole(monkeypatch, kind):
    monkeypatch.setattr("adaptcomp_ext.nn.descent.energy_descent.run_kernels", None)
    function, tensors = descents(kind, 3, torch.float32, "cpu", OPTIONS["all"])
    with_gradients(function, tensors)


@pytest.mark.promise("formula")
@pytest.mark.covering(2)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_reference_in_double(device, poison, kind, option):
    for size in SIZES:
        function, tensors = descents(kind, 21, torch.float64, device, OPTIONS[option], size=size)
        with Unchanged(*tensors):
            got, grads = with_gradients(function, tensors)
        with ac.reference_kernels():
            expected, exact = with_gradients(function, tensors)
        same_fate(got, expected)
        ours, theirs = ((r.y, r.energy, r.trace.outputs, *g) for r, g in ((got, grads), (expected, exact)))
        for g, e in zip(ours, theirs, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-10)
    poison.check()


@pytest.mark.promise("formula")
@pytest.mark.covering(2)
@pytest.mark.parametrize("option", ["plain", "momentum", "clip", "noise"])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_as_good_as_torch(device, kind, option):
    function, tensors = descents(kind, 67, torch.float32, device, OPTIONS[option], size=WIDE)
    got, grads = with_gradients(function, tensors)
    assert got.y.dtype == got.energy.dtype == torch.float32
    with ac.reference_kernels():
        same, same_grads = with_gradients(function, tensors)
        exact_function, _ = descents(kind, 67, torch.float64, device, OPTIONS[option], size=WIDE)
        exact, exact_grads = with_gradients(exact_function, [t.double() for t in tensors])
    # Sums of many terms: their rounding is that of the largest.
    for g, s, e in [
        (got.y, same.y, exact.y),
        (got.energy, same.energy, exact.energy),
        *zip(grads, same_grads, exact_grads, strict=True),
    ]:
        assert_as_good_as_torch(g, s, e, rounding=4.0, scale=e.abs().max().item())


@pytest.mark.promise("accumulation")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", SHORT)
def test_half_precision_is_rounded_once(device, kind, dtype):
    function, tensors = descents(kind, 19, dtype, device, OPTIONS["plain"])
    got, grads = with_gradients(function, tensors)
    exact_function, _ = descents(kind, 19, torch.float32, device, OPTIONS["plain"])
    exact, exact_grads = with_gradients(exact_function, [t.float() for t in tensors])
    assert got.y.dtype == got.trace.outputs.dtype == dtype and got.energy.dtype == torch.float32
    assert_bitwise(got.y, exact.y.to(dtype))
    for g, e in zip(grads, exact_grads, strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g.float(), e, rtol=2e-2, atol=2e-2 * e.abs().max().item())


@pytest.mark.promise("formula")
@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set(instruction_set, kind, dtype):
    assert ac.build_info()["instruction_set"] == instruction_set
    for option in ("plain", "clip and momentum", "clamp"):
        for size in (SIZES[1], WIDE):
            function, tensors = descents(kind, 21, dtype, "cpu", OPTIONS[option], size=size)
            got, grads = with_gradients(function, tensors)
            with ac.reference_kernels():
                exact_function, _ = descents(kind, 21, torch.float64, "cpu", OPTIONS[option], size=size)
                exact, exact_grads = with_gradients(exact_function, [t.double() for t in tensors])
            tolerance = 1e-9 if dtype == torch.float64 else 2e-5
            for g, e in zip((got.y, got.energy, *grads), (exact.y, exact.energy, *exact_grads), strict=True):
                torch.testing.assert_close(
                    g.double(), e, rtol=tolerance, atol=tolerance * e.detach().abs().max().item()
                )


@pytest.mark.promise("row alone")
@pytest.mark.parametrize("kind", ["mlp-softplus", "deep-gelu", "hopfield"])
def test_rows_alone_in_every_instruction_set(instruction_set, kind):
    module = energy(kind, dtype=torch.float32, **WIDE)
    descend = ac.EnergyDescent(module, 0.2, max_steps=9, tol=1e-2)
    given = [
        points(13, WIDE["dim"], torch.float32),
        *contexts(kind, 13, WIDE["dim"], WIDE["context"], torch.float32),
    ]
    whole = descend(*given)
    for row in (0, 6, 12):
        assert_bitwise(descend(*(t[row : row + 1] for t in given)).y, whole.y[row : row + 1])


@pytest.mark.promise("gradient")
@pytest.mark.covering(2)
@pytest.mark.parametrize("gradient", ["unrolled", ("truncated", 2), "stepwise", "detached"], ids=str)
@pytest.mark.parametrize("kind", SHORT)
@pytest.mark.parametrize("option", ["plain", "energy", "clip and momentum", "all"])
def test_gradient_modes_match_the_reference(device, kind, option, gradient):
    function, tensors = descents(kind, 21, torch.float64, device, OPTIONS[option], gradient)
    got, grads = with_gradients(function, tensors)
    with ac.reference_kernels():
        expected, exact = with_gradients(function, tensors)
    same_fate(got, expected)
    for g, e in zip(grads, exact, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("kind", SHORT)
def test_gradients_where_no_slot_of_a_tile_is_empty(device, poison, kind, rows):
    """On CUDA a power of two fills the slots of every block, the last one included."""
    function, tensors = descents(kind, rows, torch.float64, device, OPTIONS["plain"])
    _, grads = with_gradients(function, tensors)
    with ac.reference_kernels():
        _, exact = with_gradients(function, tensors)
    for g, e in zip(grads, exact, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-10)
    poison.check()


@pytest.mark.promise("gradient")
@pytest.mark.covering(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", ["plain", "clip and momentum", "noise", "clamp"])
def test_gradcheck_in_every_argument(kind, option):
    size = dict(dim=3, width=4, context=2)
    function, tensors = descents(
        kind, 3, torch.float64, "cpu", {**OPTIONS[option], "max_steps": 3}, size=size
    )

    def outputs(*inputs):
        result = function(*inputs)
        return result.y, result.energy, result.trace.outputs

    assert gradcheck(outputs, [t.requires_grad_() for t in tensors])


@pytest.mark.promise("second derivative")
@pytest.mark.parametrize("kind", SHORT)
@pytest.mark.parametrize("option", ["plain", "momentum", "all"])
def test_gradgradcheck(kind, option):
    size = dict(dim=2, width=3, context=1)
    function, tensors = descents(
        kind, 2, torch.float64, "cpu", {**OPTIONS[option], "max_steps": 2}, size=size
    )
    assert gradgradcheck(lambda *t: function(*t)[:2], [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize("kind", ["mlp-softplus", "quadratic", "linear rows"])
def test_implicit_is_unrolled_at_convergence(device, kind):
    module = energy(kind, device=device)
    y0 = points(9, device=device)
    leaves = [*module.parameters(), *(c.requires_grad_() for c in contexts(kind, 9, device=device))]
    context = leaves[len(list(module.parameters())) :]
    grads = {}
    for gradient in ("implicit", "unrolled"):
        descend = ac.EnergyDescent(module, 0.3, max_steps=4000, tol=1e-13, stop="gradient", gradient=gradient)
        result = descend(y0, *context)
        assert bool((result.status == ac.Status.HALTED).all())
        grads[gradient] = torch.autograd.grad(loss(result), leaves)
    for g, e in zip(grads["implicit"], grads["unrolled"], strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-8)


def test_gradient_of_sigma_and_of_a_shared_step_size():
    module = energy("mlp-tanh")
    sigma, alpha = (torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in (0.3, 0.1))
    descend = ac.EnergyDescent(module, max_steps=4, tol=0.0)
    y0, (x,) = points(5), contexts("mlp-tanh", 5)

    def function(sigma, alpha):
        descend.noise = sigma
        return descend(y0, x, step_size=alpha).y

    assert gradcheck(function, [sigma, alpha])


@pytest.mark.promise("row alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", ["energy", "all", "backtracking"])
def test_a_row_is_bitwise_the_same_alone_and_in_any_order(device, kind, option, dtype):
    rows = 45  # two tiles and a half
    module = energy(kind, dtype=dtype, device=device, **WIDE)
    options = dict(OPTIONS[option])
    alpha = step_sizes(rows, options.pop("step_size"), dtype, device)
    descend = ac.EnergyDescent(module, **options)
    y0 = points(rows, WIDE["dim"], dtype, device)
    context = contexts(kind, rows, WIDE["dim"], WIDE["context"], dtype, device)
    ids = torch.arange(rows, device=device)
    with torch.no_grad():
        whole = descend(y0, *context, step_size=alpha, sample_ids=ids)
        order = torch.randperm(rows, generator=generator(3)).to(device)
        shuffled = descend(
            y0[order], *(c[order] for c in context), step_size=alpha[order], sample_ids=ids[order]
        )
        for name in ("y", "energy", "steps", "status"):
            assert_bitwise(getattr(shuffled, name), getattr(whole, name)[order])
        for row in (0, 7, 44):
            alone = descend(
                *(t[row : row + 1] for t in (y0, *context)),
                step_size=alpha[row : row + 1],
                sample_ids=ids[row : row + 1],
            )
            for name in ("y", "energy", "steps", "status"):
                assert_bitwise(getattr(alone, name), getattr(whole, name)[row : row + 1])


@pytest.mark.promise("row alone")
@pytest.mark.parametrize("kind", ["mlp-gelu", "deep-tanh", "hopfield", "linear rows"])
def test_the_rows_gradients_do_not_depend_on_their_neighbours(device, kind):
    rows = 37
    module = energy(kind, dtype=torch.float32, device=device, **WIDE)
    descend = ac.EnergyDescent(module, step_size=0.2, max_steps=12, tol=1e-2)
    context = contexts(kind, rows, WIDE["dim"], WIDE["context"], torch.float32, device)
    weight = values((rows, WIDE["dim"]), device=device, seed=4)

    def gradients(select):
        tensors = [
            t[select].requires_grad_() for t in (points(rows, WIDE["dim"], torch.float32, device), *context)
        ]
        return torch.autograd.grad((descend(*tensors).y * weight[select]).sum(), tensors)

    together = gradients(slice(None))
    for row in (0, 20, 36):
        for alone, of_all in zip(gradients(slice(row, row + 1)), together, strict=True):
            assert_bitwise(alone, of_all[row : row + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_context_counts_row_by_row(instruction_set, threads, n_threads, dtype):
    """Batches of every size, in which a row has other neighbours and another place; forward and backward."""
    threads(n_threads)
    dim, inner, width = 5, 61, 37
    module = energy("mlp-silu", dim, width, inner, dtype=dtype)
    descend = ac.EnergyDescent(module, step_size=0.1, max_steps=3, tol=0.0)
    y0, (x,) = points(70, dim, dtype), contexts("mlp-silu", 70, dim, inner, dtype)
    weight = values((70, dim), dtype, seed=4)

    def run(select):
        tensors = [y0[select].requires_grad_(), x[select].requires_grad_()]
        result = descend(*tensors)
        return [result.y, result.energy, *torch.autograd.grad((result.y * weight[select]).sum(), tensors)]

    together = run(torch.arange(70))
    for rows in range(1, 71, 1 if dtype == torch.float32 else 7):
        select = torch.randperm(70, generator=generator(rows))[:rows]
        for some, every in zip(run(select), together, strict=True):
            assert_bitwise(some, every[select])
    many = torch.arange(70).repeat(40)  # shared out among the threads
    for some, every in zip(run(many), together, strict=True):
        assert_bitwise(some, every[many])


@pytest.mark.promise("threads")
@pytest.mark.parametrize("kind", SHORT)
def test_threads_change_no_row(threads, kind):
    module = energy(kind, dtype=torch.float32, dim=32, width=64, context=24)
    y0, context = points(300, 32, torch.float32), contexts(kind, 300, 32, 24, torch.float32)
    descend = ac.EnergyDescent(module, step_size=0.2, max_steps=200, tol=1e-3)
    results = []
    for n in (1, 2, 3):
        threads(n)
        start = y0.clone().requires_grad_()
        result = descend(start, *context)
        (g,) = torch.autograd.grad(result.y.sum(), start)
        results.append((result, g))
    for result, g in results[1:]:
        for a, b in zip((*result[:4], g), (*results[0][0][:4], results[0][1]), strict=True):
            assert_bitwise(a, b)


@pytest.mark.promise("not finite")
@pytest.mark.parametrize("kind", SHORT)
def test_a_row_that_is_not_finite_ends_alone(device, kind):
    rows, bad = 20, 6
    module = energy(kind, context=0, dtype=torch.float32, device=device)
    context = contexts(kind, rows, context=0, dtype=torch.float32, device=device)
    descend = ac.EnergyDescent(module, step_size=0.1, max_steps=5, tol=0.0)
    y0 = points(rows, dtype=torch.float32, device=device)
    clean = descend(y0, *context)
    poisoned = y0.clone()
    poisoned[bad, 2] = math.nan
    start = poisoned.clone().requires_grad_()
    result = descend(start, *context)
    others = torch.arange(rows, device=device) != bad
    for name in ("y", "energy", "steps", "status"):
        assert_bitwise(getattr(result, name)[others], getattr(clean, name)[others])
    assert result.status[bad] == ac.Status.NONFINITE and result.steps[bad] == 0
    assert_bitwise(result.y[bad], poisoned[bad])
    grads = torch.autograd.grad(result.y[others].sum(), [start, *module.parameters()])
    assert all(bool(g.isfinite().all()) for g in grads)


def test_a_row_that_diverges_keeps_its_last_finite_point(device):
    module = ac.QuadraticEnergy(torch.eye(3, device=device) * 4, torch.zeros(3, device=device))
    y0 = values((5, 3), device=device, seed=1)
    sizes = torch.tensor([0.1, 0.1, 1e9, 0.1, 0.2], device=device)
    y0.requires_grad_()
    result = ac.EnergyDescent(module, max_steps=40, tol=0.0, keep_trace=True)(y0, step_size=sizes)
    assert result.status.tolist() == [2, 2, 3, 2, 2]
    assert bool(result.y.isfinite().all()) and bool(result.energy.isfinite().all())
    steps = int(result.steps[2])
    assert 1 < steps < 40
    own = result.trace.outputs[result.trace.row == 2]
    assert_bitwise(own[-1], own[-2])  # the last step was not taken
    (g,) = torch.autograd.grad(result.y[[0, 1, 3, 4]].sum(), y0)
    assert bool(g.isfinite().all())


@pytest.mark.promise("layout")
@pytest.mark.parametrize("layout", ["transposed", "strided", "misaligned", "expanded"])
def test_layouts(device, layout):
    module = energy("mlp-silu", dtype=torch.float32, device=device)
    y0, x = laid_out(layout, 13, 5, torch.float32, device), laid_out(layout, 13, 3, torch.float32, device, 1)
    descend = ac.EnergyDescent(module, max_steps=4, tol=0.0)
    got, expected = descend(y0, x), descend(y0.contiguous(), x.contiguous())
    assert_bitwise(got.y, expected.y)


@pytest.mark.promise("small")
@pytest.mark.sanitizer
@pytest.mark.parametrize("kind", SHORT)
@pytest.mark.parametrize("rows", [0, 1, 2, 15, 16, 17])
def test_sizes_and_one_step(device, kind, rows):
    function, tensors = descents(
        kind, rows, torch.float64, device, {"step_size": 0.3, "max_steps": 1, "tol": 0.0}
    )
    got, grads = with_gradients(function, tensors)
    with ac.reference_kernels():
        expected, exact = with_gradients(function, tensors)
    assert got.steps.tolist() == [1] * rows
    torch.testing.assert_close(got.y, expected.y)
    for g, e in zip(grads, exact, strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("kind", SHORT)
def test_tolerance_zero_runs_to_the_end(device, kind):
    module = energy(kind, device=device)
    y0, context = points(6, device=device), contexts(kind, 6, device=device)
    result = ac.EnergyDescent(module, step_size=1e-30, max_steps=7, tol=0.0)(y0, *context)
    assert result.steps.tolist() == [7] * 6 and result.status.tolist() == [ac.Status.MAX_STEPS] * 6


@pytest.mark.promise("seed")
def test_noise_is_of_the_sample_and_the_step(device):
    module = energy("mlp-silu", device=device)
    descend = ac.EnergyDescent(module, noise=0.5, max_steps=3, tol=0.0, seed=4)
    y0, (x,) = points(8, device=device), contexts("mlp-silu", 8, device=device)
    y0, x = y0[:1].expand_as(y0), x[:1].expand_as(x)
    result = descend(y0, x)
    assert len({tuple(row) for row in result.y.tolist()}) == 8
    again = descend(y0[:3], x[:3], sample_ids=torch.tensor([5, 2, 5], device=device))
    assert_bitwise(again.y, result.y[[5, 2, 5]])
    other = descend(y0, x, seed=5)
    assert not bool((other.y == result.y).any())
    generic = ac.EnergyDescent(lambda y, x: module(y, x), noise=0.5, max_steps=3, tol=0.0, seed=4)(y0, x)
    torch.testing.assert_close(generic.y, result.y, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10_000),
    step_size=st.floats(0.01, 20.0),
    momentum=st.sampled_from([0.0, 0.6]),
    noise=st.sampled_from([0.0, 0.3]),
    backtracking=st.sampled_from([None, 0.5]),
)
def test_a_row_accepted_if_lower_never_rises(kind, seed, step_size, momentum, noise, backtracking):
    module = energy(kind, seed=seed)
    descend = ac.EnergyDescent(
        module,
        step_size=step_size,
        accept="if_lower",
        max_steps=10,
        tol=0.0,
        momentum=momentum,
        noise=noise,
        backtracking=backtracking,
        keep_trace=True,
        seed=seed,
    )
    y0, context = points(6, seed=seed + 1), contexts(kind, 6, seed=seed + 2)
    with torch.no_grad():
        result = descend(y0, *context)
        before = module(y0, *context)
        for step in range(1, int(result.steps.max()) + 1):
            at = result.trace.step == step
            rows = result.trace.row[at]
            now = before.clone()
            now[rows] = module(result.trace.outputs[at], *(c[rows] for c in context))
            assert bool((now <= before + 1e-12 * before.abs().clamp(min=1)).all())
            before = now
        torch.testing.assert_close(result.energy, before)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    option=st.sampled_from(["plain", "momentum", "clip", "clip and momentum", "clamp", "noise"]),
    rows=st.integers(1, 40),
    dim=st.integers(1, 20),
    width=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_random_energies_match_the_reference(kind, option, rows, dim, width, seed):
    module = energy(kind, dim, width, 2, seed=seed)
    descend = ac.EnergyDescent(module, **OPTIONS[option])
    y0, context = points(rows, dim, seed=seed), contexts(kind, rows, dim, 2, seed=seed + 1)
    got = descend(y0, *context)
    with ac.reference_kernels():
        expected = descend(y0, *context)
    # None of these options lets a row end by a comparison, which might go either way within rounding.
    assert torch.equal(got.steps, expected.steps) and torch.equal(got.status, expected.status)
    torch.testing.assert_close(got.y, expected.y, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(got.energy, expected.energy, rtol=1e-7, atol=1e-8)


def test_training_keeps_the_points_and_nothing_else():
    """The backward pass keeps B·dim numbers per step, and the B factors of the step size."""
    module = energy("mlp-silu", dtype=torch.float32, dim=32, width=128, context=4)
    y0, context = points(64, 32, torch.float32), contexts("mlp-silu", 64, 32, 4, torch.float32)

    def held(steps):
        sizes = []

        def pack(t):
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            result = ac.EnergyDescent(module, max_steps=steps, tol=0.0)(y0, *context)
        work = result.y.grad_fn.work
        return sum(sizes) + work._run.path.numel() + work._run.scale.numel()

    assert held(40) - held(20) == 20 * 64 * (32 + 1)
