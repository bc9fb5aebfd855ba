"""Gradients of fixed points: the implicit function theorem, row by row, against unrolling and differences."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import adaptcomp_ext as ac
from tests.nn.test_integration import process_group  # noqa: F401  (a fixture)

DIM = 4
GAINS = (0.0, 0.3, 0.6, 0.98, 0.5, 0.95, 0.1, 0.4)


class Contraction(nn.Module):
    """z ← u / (1 + |u|) with u = gain (a z + c reversed(z)) + x, whose operations are exact for a row."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.5, -0.4, 0.6, 0.7], dtype=dtype))
        self.c = nn.Parameter(torch.tensor([0.4, 0.5, -0.3, 0.2], dtype=dtype))
        self.rows = []

    def forward(self, z, x, gain):
        self.rows.append(len(z))
        u = gain * (self.a * z + self.c * z.flip(1)) + x
        return u / (1 + u.abs())


def rows(dtype=torch.float64, count=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = 0.01 * torch.randn(count, DIM, generator=g, dtype=torch.float64)
    gain = torch.tensor([GAINS[i % len(GAINS)] for i in range(count)], dtype=torch.float64)[:, None]
    v = torch.randn(count, DIM, generator=g, dtype=torch.float64)
    return x.to(dtype), gain.to(dtype), v.to(dtype)


def make(step, gradient="implicit", tol=1e-14, max_steps=3000, **options):
    return ac.AdaptiveHalt(step, ac.Convergence(tol, gradient=gradient), max_steps=max_steps, **options)


def solve(halt, x, gain, v, read=lambda result: result.output):
    """Return the result, and the gradients in x, a and c."""
    x = x.clone().requires_grad_()
    result = halt(torch.zeros_like(x), x, gain)
    return result, torch.autograd.grad((read(result) * v).sum(), [x, *halt.parameters()])


def close(got, expected, tol=1e-11):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def identical(a, b):
    return torch.equal(a, b)


# --- against unrolling and differences ----------------------------------------------------------------------
@pytest.mark.promise("gradient")
@pytest.mark.parametrize("compact", [True, False, "auto"])
def test_implicit_is_unrolled_at_convergence(compact):
    step = Contraction()
    unrolled, expected = solve(make(step, "unrolled"), *rows())
    result, got = solve(make(step, compact=compact), *rows())
    assert identical(result.output, unrolled.output) and identical(result.steps, unrolled.steps)
    assert identical(result.cost, unrolled.cost) and (result.status == ac.Status.HALTED).all()
    close(got, expected)


class Structured(nn.Module):
    """A state with a counter and two coupled tensors, and an input that may be missing."""

    def __init__(self):
        super().__init__()
        self.inner, self.mix = Contraction(), nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, state, x, extra):
        z = self.inner(state["z"] + self.mix * state["pair"][0][:, None], x["x"], x["gain"])
        w = torch.tanh(0.5 * z.mean(1) + 0.2 * state["pair"][0])
        return {"pair": (w, state["pair"][1] + 1), "z": z}


def test_structured_states_with_a_readout():
    step, readout = Structured(), nn.Linear(DIM, 2).double()
    x, gain, _ = rows()
    v = torch.randn(len(x), 2, dtype=torch.float64)
    found = []
    for gradient in ("unrolled", "implicit"):
        halt = make(step, gradient, min_steps=60, readout=lambda state: readout(state["z"]))
        given = x.clone().requires_grad_()
        start = torch.zeros(len(x), dtype=torch.float64, requires_grad=True)
        state = {"z": torch.zeros_like(x), "pair": (start, torch.zeros(len(x), dtype=torch.int64))}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the readout's parameters
            result = halt(state, {"x": given, "gain": gain}, None)
        loss = (result.output * v).sum() + result.state["pair"][0].square().sum()
        wanted = [given, start, *step.parameters(), *readout.parameters()]
        found.append((result, torch.autograd.grad(loss, wanted)))
    (unrolled, expected), (implicit, got) = found
    torch.testing.assert_close(implicit.output, unrolled.output, rtol=1e-14, atol=1e-14)
    assert identical(implicit.state["pair"][1], unrolled.steps)
    assert not got[1].any()  # the initial state
    close(got, expected, 1e-10)


def test_finite_differences():
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 3, generator=g, dtype=torch.float64)
    weight = (0.8 * weight / torch.linalg.matrix_norm(weight, 2)).requires_grad_()
    x = torch.randn(5, 3, generator=g, dtype=torch.float64).requires_grad_()

    def fixed_point(x, weight):
        halt = make(lambda z, x: torch.tanh(z @ weight.T + x))
        return halt(torch.zeros_like(x), x).output

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.autograd.gradcheck(fixed_point, (x, weight))


def test_one_step_is_the_gradient_of_one_application():
    step, (x, gain, v) = Contraction(), rows()
    result, got = solve(make(step, "one_step"), x, gain, v)
    given, z = x.clone().requires_grad_(), result.output.detach()
    expected = torch.autograd.grad((step(z, given, gain) * v).sum(), [given, step.a, step.c])
    for a, b in zip(got, expected, strict=True):
        assert identical(a, b)


def test_a_tensor_that_travels_in_the_state_is_an_input():
    step, (x, gain, v) = Contraction(), rows()

    def carried(state):
        return step(*state), state[1], state[2]

    found = []
    for gradient in ("unrolled", "implicit", "one_step"):
        halt, given = make(carried, gradient), x.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = halt((torch.zeros_like(x), given, gain))
        loss = (result.output * v).sum() + (result.state[1] * v).sum()
        found.append(torch.autograd.grad(loss, [given, *step.parameters()]))
    close(found[1], found[0])
    _, (one, *_) = solve(make(step, "one_step"), x, gain, v)
    close([found[2][0]], [one + v])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes(dtype):
    _, expected = solve(make(Contraction()), *rows())
    step = Contraction().to(dtype)
    result, got = solve(make(step, tol=0.01 if dtype is torch.bfloat16 else 1e-6), *rows(dtype))
    assert result.output.dtype == dtype
    error = torch.finfo(dtype).eps * (40 if dtype is torch.bfloat16 else 400)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= error * b.norm()


# --- rows ---------------------------------------------------------------------------------------------------
@pytest.mark.promise("row alone", "with gradients")
@pytest.mark.parametrize("gradient", ["implicit", "one_step"])
def test_a_row_has_the_same_gradient_alone_and_in_any_batch(gradient):
    x, gain, v = rows(torch.float32, 21)
    halt = make(Contraction(torch.float32), gradient, tol=1e-6)
    _, (whole, *_) = solve(halt, x, gain, v)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(2))
    _, (mixed, *_) = solve(halt, x[order], gain[order], v[order])
    assert identical(mixed, whole[order])
    for i in (0, 3, 13):
        _, (alone, *_) = solve(halt, x[i : i + 1], gain[i : i + 1], v[i : i + 1])
        assert identical(alone[0], whole[i])


@pytest.mark.promise("no work")
def test_converged_rows_leave_in_the_backward_pass():
    step = Contraction()
    x, gain, v = rows(count=64)
    halt = make(step, tol=1e-10)
    given = x.clone().requires_grad_()
    result = halt(torch.zeros_like(x), given, gain)
    step.rows.clear()
    (result.output * v).sum().backward()
    assert step.rows and step.rows == sorted(step.rows, reverse=True)
    assert all(2 * b <= a for a, b in zip([64, *step.rows], step.rows, strict=False))
    assert sum(step.rows) < 64 and step.rows[-1] <= 8  # of the slow ones


def test_rows_without_a_gradient_cost_nothing():
    step = Contraction()
    x, gain, _ = rows(count=64)
    result = make(step)(torch.zeros_like(x), x.requires_grad_(), gain)
    step.rows.clear()
    result.output[3].sum().backward()
    assert step.rows == [1]
    assert x.grad[3].all() and not x.grad[:3].any() and not x.grad[4:].any()


def test_rows_that_may_see_each_other_stay():
    step = Contraction()
    x, gain, v = rows()
    result = make(step, compact=False, check_rows=False)(torch.zeros_like(x), x.requires_grad_(), gain)
    step.rows.clear()
    (result.output * v).sum().backward()
    assert not step.rows


@pytest.mark.promise("not finite")
@pytest.mark.parametrize("gradient", ["implicit", "one_step"])
def test_a_row_that_is_not_finite_has_no_gradient_and_harms_no_other(gradient):
    x, gain, v = rows()
    halt = make(Contraction(), gradient, readout=nn.Linear(DIM, DIM).double())
    _, (clean, *_) = solve(halt, x, gain, v)
    x[2, 1] = float("nan")
    result, (got, *others) = solve(halt, x, gain, v)
    assert result.status[2] == ac.Status.NONFINITE and (result.status == ac.Status.HALTED).sum() == 7
    assert not got[2].any()
    others_rows = [i for i in range(8) if i != 2]
    torch.testing.assert_close(got[others_rows], clean[others_rows], rtol=1e-12, atol=1e-12)
    assert all(t.isfinite().all() for t in others)


def test_rows_that_do_not_converge_backwards_warn_and_keep_the_sum_up_to_the_smallest_term():
    x, gain, v = rows(torch.float32, 3)
    gain = torch.tensor([[0.5], [3.0], [0.9]])
    x[1] = 0.0  # z = 0 is a fixed point that is not stable: the series diverges, to overflow
    step = Contraction(torch.float32)
    halt = make(step, tol=1e-6)
    with pytest.warns(
        UserWarning, match="backward pass of 1 of 3 rows has not converged in max_steps = 3000"
    ):
        _, (got, *_) = solve(halt, x, gain, v)
    assert got.isfinite().all()
    _, (one, *_) = solve(make(step, "one_step"), x, gain, v)
    slopes = (got[1] / one[1]).abs()
    assert (slopes < 30).all()
    keep = [0, 2]
    _, (others, *_) = solve(halt, x[keep], gain[keep], v[keep])
    assert identical(got[keep], others)


def test_too_few_steps_truncate_the_series():
    x, gain, v = rows()
    halt = make(Contraction(), max_steps=20, tol=1e-12)
    with pytest.warns(UserWarning, match="5 of 8 rows has not converged in max_steps = 20"):
        result, (got, *_) = solve(halt, x, gain, v)
    assert result.status[3] == ac.Status.MAX_STEPS
    z, total, term = result.output[3:4].detach().requires_grad_(), v[3:4], v[3:4]
    after = halt.step(z, given := x[3:4].clone().requires_grad_(), gain[3:4])
    for _ in range(20):
        (term,) = torch.autograd.grad(after, z, term, retain_graph=True)
        total = total + term
    close([got[3:4]], torch.autograd.grad(after, given, total))


@pytest.mark.promise("small")
def test_an_empty_batch():
    halt = make(Contraction())
    _, got = solve(halt, *(t[:0] for t in rows()))
    assert got[0].shape == (0, DIM) and not any(t.any() for t in got)


# --- what a user does with the result -----------------------------------------------------------------------
def test_nothing_is_kept_of_the_steps():
    kept = []
    for max_steps in (5, 500):
        x, gain, _ = rows()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept[-1].append(t) or t, lambda t: t):
            kept.append([])
            make(Contraction(), max_steps=max_steps)(torch.zeros_like(x), x.requires_grad_(), gain)
    assert 0 < len(kept[0]) == len(kept[1])


def test_a_step_in_place_and_results_that_are_written_to():
    step, (x, gain, v) = Contraction(), rows()

    def in_place(z, x, gain):
        return z.copy_(step(z.clone(), x, gain))

    _, expected = solve(make(step), x, gain, v)
    halt, given = make(in_place), x.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = halt(torch.zeros_like(x), given, gain)
    loss = (result.output * v).sum()
    with torch.no_grad():
        result.state.zero_()
    close(torch.autograd.grad(loss, [given, step.a, step.c]), expected)


def test_a_second_backward_pass_through_a_kept_graph():
    x, gain, v = rows()
    result = make(Contraction())(torch.zeros_like(x), x.requires_grad_(), gain)
    loss = (result.output * v).sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert identical(first, second)
    loss.backward()
    assert identical(x.grad, first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_second_derivatives_are_refused():
    halt, (x, gain, v) = make(Contraction()), rows()
    result = halt(torch.zeros_like(x), x.requires_grad_(), gain)
    (first,) = torch.autograd.grad((result.output * v).sum(), x, create_graph=True)
    close([first], [solve(halt, x.detach(), gain, v)[1][0]])
    with pytest.raises(NotImplementedError, match='"implicit" can be differentiated once; use "unrolled"'):
        first.sum().backward()


def test_without_anything_to_differentiate_the_result_has_no_graph():
    step = Contraction().requires_grad_(False)
    x, gain, _ = rows()
    for gradient in ("implicit", "one_step"):
        assert not make(step, gradient)(torch.zeros_like(x), x, gain).output.requires_grad
    readout = nn.Linear(DIM, 1).double()
    assert make(step, readout=readout)(torch.zeros_like(x), x, gain).output.requires_grad


def test_the_setting_may_change_between_calls():
    cell = ac.cells.MLP(DIM, 3, 8, residual=False)
    halt = ac.AdaptiveHalt(cell, ac.Convergence(1e-5), max_steps=100)
    with torch.no_grad():
        for p in cell.parameters():
            p.mul_(0.5)
    z, x = torch.zeros(6, DIM), torch.randn(6, 3)
    found = {}
    for gradient in ("unrolled", "one_step", "unrolled", "implicit"):
        halt.policy.gradient = gradient
        for _ in range(2):
            with torch.no_grad():
                inference = halt(z, x)
            result = halt(z, x)
            plan = halt.plan(z, x)
        assert plan.way == "kernel"
        torch.testing.assert_close(result.output, inference.output)
        found[gradient] = torch.autograd.grad(result.output.sum(), cell.weight_state)[0]
    torch.testing.assert_close(found["implicit"], found["unrolled"], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found["one_step"], found["unrolled"], rtol=1e-3, atol=1e-4)


# --- inside the rest of torch -------------------------------------------------------------------------------
class Around(nn.Module):
    """A model with layers before and after the run."""

    def __init__(self, gradient="implicit"):
        super().__init__()
        self.inside, self.outside = nn.Linear(5, DIM), nn.Linear(DIM, 2)
        self.start = nn.Linear(5, DIM)
        self.halt = make(Contraction(torch.float32), gradient, tol=1e-6)

    def forward(self, x, gain):
        return self.outside(self.halt(self.start(x), self.inside(x), gain).output)


def gradients(model, *given):
    return torch.autograd.grad(model(*given).square().sum(), list(model.parameters()))


@pytest.fixture
def given():
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(3)), rows(torch.float32)[1]


@pytest.mark.promise("compile")
@pytest.mark.parametrize("how", ["whole", "one graph", "step"])
def test_compiled(given, how):
    model = Around()
    expected = gradients(model, *given)
    if how != "step":
        backend = "eager" if how == "whole" else "aot_eager"
        model = torch.compile(model, backend=backend, fullgraph=how == "one graph")
    else:
        model.halt.step = torch.compile(model.halt.step, backend="aot_eager", dynamic=True)
    close(gradients(model, *given), expected, 1e-5)


@pytest.mark.promise("compile")
def test_a_compiled_step_whose_graph_can_be_walked_once(given, monkeypatch):
    """Inductor makes such graphs of some steps; what it raises is raised here without a compiler."""
    model = Around()
    expected = gradients(model, *given)

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.clone()

        @staticmethod
        def backward(ctx, gradient):
            if torch._C._autograd._get_current_graph_task_keep_graph():
                raise RuntimeError(
                    "compiled with non-empty donated buffers which requires retain_graph=False"
                )
            return gradient

    call = Contraction.forward
    monkeypatch.setattr(Contraction, "forward", lambda self, *given: Once.apply(call(self, *given)))
    close(gradients(model, *given), expected, 1e-6)


@pytest.mark.promise("distributed")
def test_distributed_data_parallel(given, process_group):  # noqa: F811
    for gradient in ("implicit", "one_step"):
        model = Around(gradient)
        parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        for each in (model, parallel):
            each(*given).square().sum().backward()
        for a, b in zip(model.parameters(), parallel.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_functional_call_takes_the_parameters_that_it_is_given(given):
    model = Around()
    other = {n: (0.7 * p.detach()).requires_grad_() for n, p in model.named_parameters()}
    loss = functional_call(model, other, given).square().sum()
    got = torch.autograd.grad(loss, list(other.values()))
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for p in changed.parameters():
            p.mul_(0.7)
    close(got, gradients(changed, *given), 1e-6)


@pytest.mark.promise("transforms")
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", ["grad", "jvp", "forward"])
def test_transforms_are_refused_with_the_way_out(name, reference):
    step, (x, gain, v) = Contraction(), rows()
    halt = make(step)

    def run(x):
        return (halt(torch.zeros_like(x), x, gain).output * v).sum()

    def forward(x):
        with torch.autograd.forward_ad.dual_level():
            run(torch.autograd.forward_ad.make_dual(x, x))

    transform = {
        "grad": torch.func.grad(run),
        "jvp": lambda x: torch.func.jvp(run, (x,), (x,)),
        "forward": forward,
    }
    kernels = ac.reference_kernels() if reference else contextlib.nullcontext()
    with (
        kernels,
        pytest.raises(RuntimeError, match=r"AdaptiveHalt.* does not support .*: use torch.autograd"),
    ):
        transform[name](x)


def test_batches_of_gradients_are_refused():
    x, gain, _ = rows()
    output = make(Contraction())(torch.zeros_like(x), x.requires_grad_(), gain).output
    with pytest.raises(RuntimeError, match="does not support batches of gradients"):
        torch.autograd.grad(output, x, torch.ones(2, *output.shape).double(), is_grads_batched=True)


def test_on_the_reference():
    step = Contraction()
    _, expected = solve(make(step), *rows())
    with ac.reference_kernels():
        _, got = solve(make(step), *rows())
    close(got, expected)


@pytest.mark.promise("checkpoint")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(given, reentrant):
    model, (x, gain) = Around(), given
    expected = gradients(model, x, gain)
    loss = checkpoint(model, x.requires_grad_(), gain, use_reentrant=reentrant).square().sum()
    loss.backward()
    close([p.grad for p in model.parameters()], expected, 1e-6)


@pytest.mark.promise("autocast")
def test_autocast():
    step = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    with torch.no_grad():
        step[0].weight.mul_(0.5)
    seen = []

    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.step = step

        def forward(self, z, x):
            inner = self.step[0](z)
            seen.append(inner.dtype)
            return torch.tanh(inner.float() + x)

    x = torch.randn(16, 8)
    found = []
    for gradient in ("unrolled", "implicit"):
        halt, given = make(Cell(), gradient, tol=1e-3, max_steps=100), x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            result = halt(torch.zeros_like(x), given)
        assert result.output.dtype == torch.float32
        found.append(torch.autograd.grad(result.output[0].sum(), given)[0])  # the step is applied again
    assert set(seen) == {torch.bfloat16}
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.02)


@pytest.mark.promise("modules")
def test_copies_and_older_pickles():
    policy = ac.Convergence(1e-3, gradient="implicit")
    assert copy.deepcopy(policy).gradient == pickle.loads(pickle.dumps(policy)).gradient == "implicit"
    assert "gradient='implicit'" in repr(policy) and "gradient" not in repr(ac.Convergence(1e-3))
    older = ac.Convergence(1e-3)
    del older.__dict__["gradient"]
    assert pickle.loads(pickle.dumps(older)).gradient == "unrolled"


# --- bad input ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", ["exact", None, True])
def test_the_gradient_is_one_of_three(value):
    with pytest.raises((TypeError, ValueError), match="gradient: expected"):
        ac.Convergence(1e-3, gradient=value)
    policy = ac.Convergence(1e-3)
    with pytest.raises((TypeError, ValueError), match="gradient: expected"):
        policy.gradient = value


def _numbered(z, x, gain, n):
    return z * 0.5 / n


REFUSED = {
    "layers": (
        lambda: make(nn.ModuleList([Contraction(), Contraction()])),
        ValueError,
        "step: .*got a ModuleList",
    ),
    "number": (lambda: make(_numbered), ValueError, "step: .*with a parameter n"),
    "exits": (
        lambda: make(Contraction(), max_steps=1, readout=nn.ModuleList([nn.Linear(DIM, 2).double()])),
        ValueError,
        "readout: .*got a ModuleList",
    ),
    "trace": (lambda: make(Contraction(), keep_trace=True), ValueError, "keep_trace: expected False"),
}


@pytest.mark.parametrize("gradient", ["implicit", "one_step"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_fixed_point_is_refused_before_the_first_step(name, gradient):
    build, error, message = REFUSED[name]
    halt = build()
    halt.policy.gradient = gradient
    x, gain, _ = rows()
    with pytest.raises(error, match=message):
        halt(torch.zeros_like(x), x, gain)
    if name != "number":
        with torch.no_grad():
            halt(torch.zeros_like(x), x, gain)


@pytest.mark.parametrize("combination", [ac.AnyOf, ac.AllOf])
def test_combinations_have_no_fixed_point(combination):
    with pytest.raises(ValueError, match=r'policies: expected Convergence\(gradient="unrolled"\)'):
        combination(ac.Convergence(1e-3, gradient="implicit"), ac.FixedSteps(3))


def test_a_race_has_no_fixed_points_to_differentiate():
    halt, (x, gain, _) = make(Contraction()), rows()
    starts = torch.zeros(len(x), 2, DIM, dtype=torch.float64)
    with pytest.raises(ValueError, match=r'halt: expected Convergence\(gradient="unrolled"\) for a race'):
        ac.race(halt, starts, x, gain, starts=2)
    with torch.no_grad():
        result, _ = ac.race(halt, starts, x, gain, starts=2)
    assert (result.status == ac.Status.HALTED).all()


def test_random_steps_are_refused():
    step, dropout = Contraction(), nn.Dropout(0.5)
    halt = make(lambda z, x, gain: dropout(step(z, x, gain)), max_steps=3)
    x, gain, _ = rows()
    with pytest.raises(RuntimeError, match=r'step: .*"implicit", got a step that draws random numbers'):
        halt(torch.zeros_like(x), x.requires_grad_(), gain)
    dropout.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert halt(torch.zeros_like(x), x, gain).output.requires_grad


def test_a_step_that_has_changed_before_the_backward_pass():
    step, (x, gain, v) = Contraction(), rows()
    result = make(step)(torch.zeros_like(x), x.requires_grad_(), gain)
    with torch.no_grad():
        step.a.add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (result.output * v).sum().backward()

    shift = torch.zeros(DIM, dtype=torch.float64)
    shifted = make(lambda z, x, gain: step(z, x, gain) + shift)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = shifted(torch.zeros_like(x), x, gain)
    expected = torch.autograd.grad((result.output * v).sum(), x, retain_graph=True)
    shift.add_(0.1)
    close(torch.autograd.grad((result.output * v).sum(), x), expected)
