"""Lazy modules: an energy's get shapes at the first call; elsewhere an uninitialized parameter raises."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

import adaptcomp_ext as ac

Y0, X = torch.randn(2, 5, 3, dtype=torch.float64)
MESSAGE = "expected a tensor with data, got an uninitialized one of a lazy module"


class Lazy(nn.Module):
    """The layers, one of them lazy twice, have random weights from the first evaluation on."""

    def __init__(self):
        super().__init__()
        self.layer = nn.LazyLinear(4, dtype=torch.float64)
        self.last = nn.Sequential(nn.LazyLinear(1, dtype=torch.float64))

    def forward(self, y, x):
        return self.last(torch.tanh(self.layer(torch.cat([y, x], 1))))[:, 0] + (y * y).sum(1)


@pytest.mark.parametrize("accept", ["always", "if_lower"])
@pytest.mark.parametrize("gradient", ["unrolled", "stepwise", "implicit", "detached"])
@pytest.mark.parametrize("how", ["module", "closure"])
def test_an_energy_of_lazy_modules(how, gradient, accept):
    """The first call, which sets the shapes, gives the result of every later one."""
    module = Lazy()
    energy = module if how == "module" else lambda y, x: module(y, x)
    descend = ac.EnergyDescent(energy, max_steps=4, tol=0.05, gradient=gradient, accept=accept)
    results = []
    for _ in range(2):
        module.zero_grad()
        result = descend(Y0, X)
        (
            result.y.sum() + result.energy.sum()
        ).backward() if result.y.requires_grad else result.energy.sum().backward()
        results.append((result.y, result.energy, *(p.grad.clone() for p in module.parameters())))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert all(value.abs().sum() > 0 for value in results[0][2:-1])


def test_a_lazy_module_that_the_energy_does_not_use():
    module = Lazy()
    module.spare = nn.LazyLinear(2)
    descend = ac.EnergyDescent(module, max_steps=3, tol=0.0)
    result = descend(Y0, X)
    with torch.no_grad():
        want = copy.deepcopy(descend)(Y0, X).y
    torch.testing.assert_close(result.y, want, rtol=0, atol=0)
    result.y.sum().backward()
    assert module.layer.weight.grad.abs().sum() > 0


def assigned(energy, name):
    setattr(energy, name, UninitializedParameter(dtype=torch.float64))
    return energy


def square(y, *_):
    return (y * y).sum(1)


def own(*shape):
    return nn.Parameter(torch.ones(shape, dtype=torch.float64))


GIVEN = {
    "y0": lambda u: ac.EnergyDescent(square)(u),
    "context[0]": lambda u: ac.EnergyDescent(square)(Y0, u),
    "step_size": lambda u: ac.EnergyDescent(square, step_size=u),
    "noise": lambda u: ac.EnergyDescent(square, noise=u),
    "energy": lambda u: ac.EnergyDescent(lambda y: u)(Y0),
    "A": lambda u: ac.QuadraticEnergy(u),
    "b": lambda u: ac.QuadraticEnergy(torch.eye(3), u),
    "patterns": lambda u: ac.HopfieldEnergy(u, 1.0),
    "beta": lambda u: ac.HopfieldEnergy(torch.eye(3), u),
    "y": lambda u: ac.HopfieldEnergy(torch.eye(3), 1.0)(u),
    "context": lambda u: ac.MLPEnergy(3, 3, 4).double()(Y0, u),
    "state": lambda u: ac.AdaptiveHalt(torch.tanh, ac.FixedSteps(1))(u),
    "tensors[0]": lambda u: ac.route(torch.ones(5, dtype=torch.bool), torch.tanh, u, otherwise=Y0),
    "logits": lambda u: ac.ops.confidence(u),
}


@pytest.mark.parametrize("name", GIVEN)
def test_what_has_no_shape_is_refused_by_name(name):
    with pytest.raises(TypeError) as caught:
        GIVEN[name](UninitializedParameter())
    assert str(caught.value) == f"{name}: {MESSAGE}"


def test_integers_without_a_shape():
    ids = UninitializedBuffer(dtype=torch.int64)
    for name, call in {
        "sample_ids": lambda: ac.EnergyDescent(square)(Y0, sample_ids=ids),
        "n": lambda: ac.FixedSteps(ids),
    }.items():
        with pytest.raises(TypeError, match=rf"^{name}: "):
            call()
    with pytest.raises(TypeError, match=r"^sample_ids: "):
        ac.AdaptiveHalt(torch.tanh, ac.FixedSteps(1))(Y0, sample_ids=ids)


@pytest.mark.parametrize("descend", [False, True])
@pytest.mark.parametrize(
    ("make", "name"),
    [(lambda: ac.QuadraticEnergy(own(3, 3), own(3)), name) for name in ("A", "b")]
    + [(lambda: ac.HopfieldEnergy(own(2, 3), own(1)), name) for name in ("patterns", "beta")]
    + [
        (lambda: ac.MLPEnergy(3, 0, (4, 4)).double(), name)
        for name in ("weight_y", "bias1", "weight2", "bias2", "out", "out_bias")
    ],
)
def test_an_energys_own_tensor_without_a_shape(make, name, descend):
    energy = assigned(make(), name)
    with pytest.raises(TypeError) as caught:
        ac.EnergyDescent(energy)(Y0) if descend else energy(Y0)
    assert str(caught.value) == f"{name}: {MESSAGE}"
