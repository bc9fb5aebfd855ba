"""Transforms and tracers of torch: right on the reference; on the kernels a message names the way out."""

import contextlib
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import adaptcomp_ext as ac

torch.manual_seed(0)
X = torch.randn(6, 3, dtype=torch.float64)
N = torch.tensor([1, 4, 2, 3, 3, 4])
CELL, HEAD = nn.Linear(3, 3).double(), nn.Linear(3, 1).double()
FIXED, ACT = ac.FixedSteps(N), ac.ACT(HEAD)
PONDER, STILL = ac.PonderNet(HEAD), ac.Convergence(0.3)
POLICIES = {"fixed": FIXED, "act": ACT, "ponder": PONDER, "still": STILL}


def halting(policy, step=lambda h, x: torch.tanh(CELL(h) + x), **options):
    module = ac.AdaptiveHalt(step, policy, max_steps=6, **options)
    return lambda x: module(torch.zeros_like(x), x).output


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def trace(function):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(function, (X,), check_trace=False)


def dual(function):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(X, torch.ones_like(X)))).tangent


def fake(function):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return function(mode.from_tensor(X))


def jvp(function):
    return torch.autograd.functional.jvp(function, X, torch.ones_like(X))[1]


def vjp(function):
    return torch.autograd.functional.vjp(function, X, torch.ones_like(X))[1]


def jacobian(function):
    return torch.autograd.functional.jacobian(function, X)


# Differentiation, which the reference can do; each with the same by ordinary backward passes.
DIFFERENTIATION = {
    "grad": (lambda f: torch.func.grad(lambda x: f(x).sum())(X), vjp),
    "vjp": (lambda f: torch.func.vjp(f, X)[1](torch.ones_like(X))[0], vjp),
    "jvp": (lambda f: torch.func.jvp(f, (X,), (torch.ones_like(X),))[1], jvp),
    "jacrev": (lambda f: torch.func.jacrev(f)(X), jacobian),
    "jacfwd": (lambda f: torch.func.jacfwd(f)(X), jacobian),
    "dual numbers": (dual, jvp),
    "functionalize": (lambda f: torch.func.functionalize(f)(X), lambda f: f(X)),
}
RECORDING = {
    "jit.trace": trace,
    "make_fx real": lambda f: make_fx(f, tracing_mode="real")(X),
    "make_fx fake": lambda f: make_fx(f, tracing_mode="fake")(X),
    "make_fx symbolic": lambda f: make_fx(f, tracing_mode="symbolic")(X),
    "make_fx before dispatch": lambda f: make_fx(f, tracing_mode="real", pre_dispatch=True)(X),
    "strict export": lambda f: torch.export.export(Model(f), (X,), strict=True),
    "fake tensors": fake,
    "vmap": lambda f: torch.vmap(f)(X.expand(2, *X.shape)),
}


@pytest.mark.promise("transforms")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("how", DIFFERENTIATION)
def test_differentiation_is_refused_on_the_kernels_and_right_on_the_reference(how, policy, grad):
    function = halting(POLICIES[policy])
    transform, ordinary = DIFFERENTIATION[how]
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(RuntimeError, match=r"^AdaptiveHalt does not support .*reference_kernels\(\)"),
    ):
        transform(function)
    want = ordinary(function)
    with torch.set_grad_enabled(grad or how in ("grad", "vjp", "jacrev")), ac.reference_kernels():
        torch.testing.assert_close(transform(function), want)


@pytest.mark.promise("transforms")
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("policy", ["fixed", "ponder"])
@pytest.mark.parametrize("how", RECORDING)
def test_recording_and_batching_are_refused(how, policy, reference):
    with (
        ac.reference_kernels() if reference else contextlib.nullcontext(),
        pytest.raises(RuntimeError) as caught,
    ):
        RECORDING[how](halting(POLICIES[policy]))
    text = " ".join(str(caught.value).split())
    assert "AdaptiveHalt does not support" in text
    assert "call it" in text or "torch.compile without fullgraph=True" in text


@pytest.mark.promise("transforms")
def test_a_graph_of_one_piece_is_refused():
    function = halting(FIXED)
    with pytest.raises(RuntimeError, match=r"AdaptiveHalt does not support torch\.compile\(fullgraph=True\)"):
        torch.compile(function, fullgraph=True, backend="eager")(X)
    torch.testing.assert_close(torch.compile(function, backend="eager")(X), function(X))


SCRIPTED = {
    "AdaptiveHalt": ac.AdaptiveHalt(nn.Linear(3, 3), ac.FixedSteps(2)),
    "EnergyDescent": ac.EnergyDescent(nn.Linear(3, 1)),
    "MLPEnergy": ac.MLPEnergy(3, 3, 4),
    "HopfieldEnergy": ac.HopfieldEnergy(torch.eye(3), 1.0),
    "QuadraticEnergy": ac.QuadraticEnergy(torch.eye(3)),
    "VariationalDropout": ac.VariationalDropout(nn.Linear(3, 3)),
    "PonderNet": PONDER,
}


@pytest.mark.promise("transforms")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", SCRIPTED)
def test_scripting_is_refused(name):
    module = SCRIPTED[name]
    for model in (module, nn.Sequential(nn.Identity(), module)):
        with pytest.raises(
            RuntimeError, match=rf"^{name} does not support torch\.jit\.script: .* use torch\.compile"
        ):
            torch.jit.script(model)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("where", ["step", "readout", "head", "policy"])
def test_a_tangent_that_only_the_users_functions_bring_is_noticed(where, grad):
    """A parameter has a tangent, as in a Hessian-vector product in the weights."""
    weight = torch.randn(3, 3, dtype=torch.float64)

    def uses(s):
        return torch.tanh(functional_call(CELL, {"weight": weight}, (s,)))

    step = uses if where == "step" else torch.tanh
    readout = uses if where == "readout" else None
    policy = ac.ACT(lambda s: uses(s)[:, 0]) if where == "head" else FIXED
    if where == "policy":
        policy = ac.PonderNet(lambda s: uses(s)[:, 0])
    halt = ac.AdaptiveHalt(step, policy, 6, readout=readout)
    tangent = torch.ones_like(weight)
    plain = weight

    def run(w):
        nonlocal weight
        weight = w
        return halt(X).output

    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        run(plain)  # nothing to refuse
        given = forward_ad.make_dual(plain, tangent)
        with pytest.raises(RuntimeError, match=r"does not support forward-mode differentiation"):
            run(given)
        with ac.reference_kernels():
            got = forward_ad.unpack_dual(run(given)).tangent
    with ac.reference_kernels():
        want = torch.autograd.functional.jvp(run, plain, tangent)[1]
    torch.testing.assert_close(got, want)


def test_a_batch_that_only_the_step_brings_is_noticed():
    scale = torch.ones(2, dtype=torch.float64)
    with pytest.raises(
        RuntimeError,
        match=r"AdaptiveHalt does not support torch\.vmap, and step returned a tensor with a batch",
    ):
        torch.vmap(lambda c: halting(FIXED, lambda h, x: h + c * x)(X))(scale)
    # What has no batch is as it is outside.
    for policy in POLICIES.values():
        function = halting(policy)
        with torch.no_grad():
            got = torch.vmap(lambda c, function=function: c * function(X))(scale)
        torch.testing.assert_close(got, function(X).expand(2, *X.shape))
        with pytest.raises(RuntimeError, match=r"step returned a tensor with a batch or a gradient"):
            torch.vmap(lambda c, function=function: c * function(X))(scale)


@pytest.mark.parametrize("policy", POLICIES)
def test_modes_that_only_look_on_change_nothing(policy):
    function = halting(POLICIES[policy])
    want = function(X)
    with FlopCounterMode(display=False) as counter:
        got = function(X)
    assert counter.get_total_flops() > 0
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    with torch.autograd.profiler.profile(), torch.autograd.detect_anomaly(check_nan=True):
        got = function(X)
        got.sum().backward()
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        got = function(X)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_scripted_budget_is_not_looked_at_where_it_has_no_values():
    with FakeTensorMode(), pytest.raises(RuntimeError, match=r"^FixedSteps does not support FakeTensorMode"):
        ac.FixedSteps(torch.ones(3, dtype=torch.int64))
    with ac.reference_kernels():  # a budget of plain numbers may be made under a derivative
        got = torch.func.grad(lambda x: halting(ac.FixedSteps(N))(x).sum())(X)
    torch.testing.assert_close(got, vjp(halting(FIXED)))
    with pytest.raises(RuntimeError, match=r"^AdaptiveHalt does not support torch\.func\.grad"):
        torch.func.grad(lambda x: halting(ac.FixedSteps(N))(x).sum())(X)


@pytest.mark.promise("transforms")
@pytest.mark.parametrize("policy", ["act", "still"])
def test_a_batch_of_gradients_is_refused(policy):
    """The block is so large that the kernels run the backward pass."""
    x = torch.randn(64, 4096, dtype=torch.float64)
    cell = lambda h, x: torch.tanh(h + x)  # noqa: E731
    choose = ac.ACT(lambda h: h[:, 0]) if policy == "act" else ac.Convergence(0.3)
    function = halting(choose, cell)
    with pytest.raises(
        RuntimeError, match=r"^The backward pass of AdaptiveHalt does not support batches of gradients"
    ):
        torch.autograd.functional.jacobian(lambda x: function(x)[:2, 0], x, vectorize=True)


def test_a_gradient_with_a_tangent_is_refused():
    """Forward mode over a backward pass would drop the tangent of the loss's gradient."""
    x = X.clone().requires_grad_()
    out = halting(ACT)(x)
    with forward_ad.dual_level():
        slope = forward_ad.make_dual(torch.ones_like(X), torch.ones_like(X))
        with pytest.raises(
            RuntimeError, match=r"backward pass of AdaptiveHalt does not support forward-mode"
        ):
            torch.autograd.grad(out, x, slope)
