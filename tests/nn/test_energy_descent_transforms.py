"""Transforms and tracers of torch raise a message that names the way out."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import adaptcomp_ext as ac
from tests.nn.test_transforms import DIFFERENTIATION, RECORDING, X

A, B = torch.eye(3, dtype=torch.float64) * 1.5, torch.randn(6, 3, dtype=torch.float64)
NETWORK = ac.MLPEnergy(3, 3, 5).double()
ENERGIES = {
    "function": lambda y, c: ((y - c) ** 2 / 2).sum(1),
    "quadratic": ac.QuadraticEnergy(A),
    "network": NETWORK,
    "network by autograd": lambda y, c: NETWORK(y, c),
}


def descent(energy, gradient="unrolled", of="start"):
    descend = ac.EnergyDescent(energy, step_size=0.1, max_steps=4, tol=0.0, gradient=gradient)
    return (lambda x: descend(x, B).y) if of == "start" else (lambda x: descend(B, x).y)


@pytest.mark.covering(2)
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("of", ["start", "context"])
@pytest.mark.parametrize("energy", ["function", "quadratic", "network"])
@pytest.mark.parametrize("how", [*DIFFERENTIATION, *RECORDING])
def test_transforms_are_refused(how, energy, of, reference):
    transform = DIFFERENTIATION[how][0] if how in DIFFERENTIATION else RECORDING[how]
    with (
        ac.reference_kernels() if reference else contextlib.nullcontext(),
        pytest.raises(RuntimeError) as caught,
    ):
        transform(descent(ENERGIES[energy], of=of))
    text = " ".join(str(caught.value).split())
    assert "EnergyDescent does not support" in text
    assert any(
        way in text for way in ("call it", "use torch.autograd", "torch.compile without fullgraph=True")
    )


@pytest.mark.parametrize("gradient", ["unrolled", "stepwise", "implicit", "detached"])
@pytest.mark.parametrize("grad", [True, False])
def test_dual_numbers_are_refused_in_every_mode(gradient, grad):
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        given = forward_ad.make_dual(X, torch.ones_like(X))
        for energy in ENERGIES.values():
            with pytest.raises(RuntimeError, match="EnergyDescent does not support forward-mode"):
                descent(energy, gradient)(given)
        descent(ENERGIES["function"], gradient)(X)  # nothing to refuse


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("energy", ["step size", "function", "parameter in closed form"])
def test_a_tangent_that_does_not_come_with_the_points_is_noticed(energy, reference):
    with ac.reference_kernels() if reference else contextlib.nullcontext(), forward_ad.dual_level():
        number = forward_ad.make_dual(
            torch.tensor(0.2, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
        )
        descend = ac.EnergyDescent(
            lambda y: (y * y).sum(1), max_steps=2, step_size=number if energy == "step size" else 0.1
        )
        if energy == "function":
            descend.energy = lambda y: (number * y * y).sum(1)
        elif energy != "step size":
            descend.energy = ac.QuadraticEnergy(A, torch.zeros(3, dtype=torch.float64))
            descend.energy.A = forward_ad.make_dual(A, A)
        with pytest.raises(RuntimeError, match="EnergyDescent does not support forward-mode"):
            descend(X)


@pytest.mark.parametrize("energy", ENERGIES)
def test_backward_passes_in_batches_are_refused(energy):
    x = X.clone().requires_grad_()
    y = descent(ENERGIES[energy])(x)
    with pytest.raises(
        RuntimeError, match="The backward pass of EnergyDescent does not support batches of gradients"
    ):
        torch.autograd.grad(y, x, torch.ones(2, *y.shape, dtype=y.dtype), is_grads_batched=True)


class _Looks(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("energy", ENERGIES)
def test_modes_that_only_look_on_change_nothing(energy):
    function, x = descent(ENERGIES[energy]), X.clone().requires_grad_()
    want = function(x)
    (want_gradient,) = torch.autograd.grad(want.sum(), x)
    for mode in (
        _Looks(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
        torch.autograd.graph.save_on_cpu(),
        torch.autograd.detect_anomaly(check_nan=True),
    ):
        with mode:
            got = function(x)
            (gradient,) = torch.autograd.grad(got.sum(), x)
        assert torch.equal(got, want)
        torch.testing.assert_close(gradient, want_gradient)


def test_a_compiled_model_is_split_where_an_energy_reads_a_parameter_of_others():
    model = nn.Sequential(nn.Linear(3, 3).double())
    function = lambda x: descent(ENERGIES["function"])(model(x))  # noqa: E731
    with pytest.raises(
        RuntimeError, match=r"EnergyDescent does not support torch\.compile\(fullgraph=True\)"
    ):
        torch.compile(function, fullgraph=True, backend="eager")(X)
    torch.testing.assert_close(torch.compile(function, backend="eager")(X), function(X))


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("gradient", ["unrolled", "stepwise", "implicit", "detached"])
@pytest.mark.parametrize("energy", ["network", "network by autograd"])
def test_an_ensemble_by_vmap_is_refused(energy, gradient, grad, reference):
    """The energy's parameters, and no argument of the call, have the batch of vmap."""
    stacked = {name: p.detach().expand(2, *p.shape) for name, p in NETWORK.named_parameters()}
    descend = ac.EnergyDescent(ENERGIES["network"], step_size=0.1, max_steps=2, gradient=gradient)
    by_function = ac.EnergyDescent(
        lambda y, c: functional_call(NETWORK, given, (y, c)), max_steps=2, gradient=gradient
    )

    def run(parameters):
        nonlocal given
        given = parameters
        if energy == "network":
            return functional_call(descend, {f"energy.{name}": p for name, p in parameters.items()}, (X, B)).y
        return by_function(X, B).y

    given = {}
    with (
        torch.set_grad_enabled(grad),
        ac.reference_kernels() if reference else contextlib.nullcontext(),
        pytest.raises(
            RuntimeError, match=r"EnergyDescent does not support torch\.vmap.*: .* one sample after the other"
        ),
    ):
        torch.vmap(run)(stacked)


@pytest.mark.parametrize("gradient", ["unrolled", ("truncated", 1), "stepwise", "implicit", "detached"])
def test_an_energy_that_can_be_differentiated_only_once_says_so(gradient):
    network = nn.Sequential(nn.Linear(3, 1), nn.Tanh(), nn.Flatten(0)).double()
    results = {}
    for backend in ("eager", "aot_eager"):
        compiled = torch.compile(network, backend=backend)
        descend = ac.EnergyDescent(compiled, max_steps=2, tol=0.0, gradient=gradient)
        with torch.no_grad():
            results[backend] = descend(X)
    torch.testing.assert_close(results["aot_eager"].y, results["eager"].y)
    if gradient == "detached":
        descend(X).energy.sum().backward()
        assert all(p.grad is not None for p in network.parameters())
        return
    with pytest.raises(
        RuntimeError, match=r'^energy: expected one that torch can differentiate twice.*backend="eager"'
    ):
        descend(X).y.sum().backward()


CLOSED = {
    "network": (NETWORK, (X, B)),
    "quadratic": (ac.QuadraticEnergy(nn.Parameter(A)), (X, B)),
    "quadratic of buffers": (ac.QuadraticEnergy(A.clone(), B[0].clone()), (X,)),
    "quadratic transposed": (ac.QuadraticEnergy(torch.randn(3, 3, dtype=torch.float64).T), (X, B)),
    "hopfield": (
        ac.HopfieldEnergy(nn.Parameter(B.clone()), nn.Parameter(torch.ones(1, dtype=torch.float64))),
        (X,),
    ),
    "hopfield of buffers": (ac.HopfieldEnergy(B.clone(), 2.0), (X,)),
}


@pytest.mark.parametrize("name", CLOSED)
def test_energies_in_closed_form_are_compiled_and_exported_whole(name):
    torch.compiler.reset()  # all have one forward, of which torch compiles only so many
    energy, given = CLOSED[name]
    want = energy(*given)
    for call in (energy, lambda *given: energy(*given)):
        torch.testing.assert_close(torch.compile(call, backend="eager", fullgraph=True)(*given), want)
    for strict in (True, False):
        torch.testing.assert_close(torch.export.export(energy, given, strict=strict).module()(*given), want)
