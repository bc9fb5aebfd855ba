from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import adaptcomp_ext as ac
from adaptcomp_ext.models import LatentEnergyClassifier


def model(**options) -> LatentEnergyClassifier:
    torch.manual_seed(0)
    options = {"classes": 3, "dim_latent": 4, "hidden": 8, **options}
    return LatentEnergyClassifier(nn.Linear(6, 5), dim_context=5, **options)


def test_descends_logits_and_latent_from_zero() -> None:
    some, x = model(max_steps=4, tol=0.0).double(), torch.randn(5, 6, dtype=torch.float64)
    result = some(x)
    v, context = torch.zeros(5, 7, dtype=torch.float64), some.encoder(x)
    energy = some.energy(v, context)
    for _ in range(4):
        v = v.detach().requires_grad_()
        (slope,) = torch.autograd.grad(some.energy(v, context).sum(), v)
        v = v - some.step_size * slope
        new = some.energy(v, context)
        assert bool((new <= energy).all())  # so that nothing was rejected
        energy = new
    torch.testing.assert_close(result.y, v)
    torch.testing.assert_close(some.logits(result.y), result.y[:, :3], rtol=0, atol=0)
    assert result.steps.tolist() == [4] * 5


def test_rests_at_a_minimum() -> None:
    some, x = model(max_steps=500, tol=1e-7).double(), torch.randn(6, 6, dtype=torch.float64)
    with torch.no_grad():
        result = some(x)
    assert set(result.status.tolist()) == {ac.Status.HALTED}
    v = result.y.requires_grad_()
    (slope,) = torch.autograd.grad(some.energy(v, some.encoder(x)).sum(), v)
    assert float(slope.norm(dim=1).max()) < 1e-2


def test_starts_at_one_over_ridge() -> None:
    assert float(model().step_size.detach()) == 1.0
    assert float(model(ridge=4.0).step_size.detach()) == pytest.approx(0.25)


@pytest.mark.parametrize("mode", ["stepwise", "unrolled"])
def test_everything_learns(mode: str) -> None:
    some = model(max_steps=4, tol=0.0)
    some.descend.keep_trace, some.descend.gradient = True, mode
    result = some(torch.randn(5, 6), step_size=some.step_size * torch.linspace(0.5, 1, 5))
    some.logits(result.trace.outputs).square().sum().backward()
    for name, parameter in some.named_parameters():
        if name != "energy.out_bias":
            assert parameter.grad is not None and bool((parameter.grad != 0).any()), name


def test_no_latent_and_other_energies() -> None:
    assert model(dim_latent=0)(torch.randn(2, 6)).y.shape == (2, 3)
    assert model(hidden=(8, 4), activation="softplus")(torch.randn(2, 6)).y.shape == (2, 7)
    assert model()(torch.randn(0, 6)).y.shape == (0, 7)


def test_copies_and_state() -> None:
    some, x = model(), torch.randn(3, 6)
    with torch.no_grad():
        some.log_step_size.fill_(math.log(0.5))
        expected = some(x).y
        for other in (copy.deepcopy(some), pickle.loads(pickle.dumps(some))):
            torch.testing.assert_close(other(x).y, expected, rtol=0, atol=0)
        fresh = LatentEnergyClassifier(nn.Linear(6, 5), 5, classes=3, dim_latent=4, hidden=8)
        fresh.load_state_dict(some.state_dict())
        torch.testing.assert_close(fresh(x).y, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"encoder": abs}, TypeError, "encoder: expected an nn.Module, got builtin"),
        ({"classes": 0}, ValueError, "classes: expected an int >= 1, got 0"),
        ({"dim_latent": -1}, ValueError, "dim_latent: expected an int >= 0, got -1"),
        ({"dim_context": 0}, ValueError, "dim_context: expected an int >= 1, got 0"),
        ({"ridge": 0.0}, ValueError, "ridge: expected a number in"),
        ({"tol": -1.0}, ValueError, "tol: expected"),
    ],
)
def test_bad_input(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LatentEnergyClassifier(**{"encoder": nn.Identity(), "dim_context": 5, **options})
