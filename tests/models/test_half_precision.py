"""Models in float16 and bfloat16: small differences are computed in float32, and nothing overflows."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaptcomp_ext.models.acc import (
    ACC,
    EntropyGate,
    KLGate,
    MarginGate,
    Objective,
    ValueGate,
    confidence_features,
)
from adaptcomp_ext.models.acc.features import kl_divergence
from adaptcomp_ext.models.agents import (
    DepthGate,
    DepthPlanner,
    PlanGate,
    Planner,
    PlanningAgent,
    WorldModel,
    divergence,
)
from adaptcomp_ext.models.energy import LatentEnergyClassifier
from tests.helpers.tensors import values

D = torch.float64
CLASSES = 4
HALVES = [torch.float16, torch.bfloat16]
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)


def finite_gradients(module: nn.Module) -> bool:
    return all(p.grad is None or bool(p.grad.isfinite().all()) for p in module.parameters())


# --- ACC ----------------------------------------------------------------------------------------------------
@pytest.mark.promise("accumulation")
@halves
def test_scores_are_those_of_the_same_logits_in_float32(dtype: torch.dtype) -> None:
    logits = (values((50, CLASSES)) * torch.linspace(0.1, 30, 50)[:, None]).to(dtype)
    exact = logits.double()
    for score in (EntropyGate().score, MarginGate().score, KLGate(CLASSES).score, confidence_features):
        got = score(logits)
        assert got.dtype == torch.float32
        assert torch.equal(got, score(logits.float()))
    p = exact.softmax(1)
    entropy = -(p * p.log()).sum(1) / math.log(CLASSES)
    torch.testing.assert_close(EntropyGate().score(logits).double(), entropy, rtol=1e-5, atol=1e-7)


@halves
def test_a_divergence_far_below_the_rounding_of_one(dtype: torch.dtype) -> None:
    logits = values((50, CLASSES)).to(dtype)
    other = logits * 1.02
    got = kl_divergence(other, logits, 4.0)
    p, q = (t.double().div(4).softmax(1) for t in (other, logits))
    exact = (p * (p / q).log()).sum(1)
    assert float(exact.median()) < 1e-5
    torch.testing.assert_close(got.double(), exact, rtol=0.05, atol=2e-7)


@pytest.mark.parametrize("effort", [1.0, "value", "literal"])
@pytest.mark.parametrize("how", ["half", "autocast"])
@halves
def test_loss_and_gradients(dtype: torch.dtype, how: str, effort: float | str) -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(5, n), nn.Tanh(), nn.Linear(n, CLASSES)) for n in (8, 16)]
    acc = ACC(
        nn.Identity(),
        *nets,
        classes=CLASSES,
        variational=False,
        objective=Objective(effort=effort, mutual=True),
    ).to(dtype)
    exact = copy.deepcopy(acc).double()
    x, y = values((16, 5)).to(dtype), torch.arange(16) % CLASSES
    want = exact.loss(x.double(), y, rows=16)
    if how == "autocast":
        acc, x = acc.float(), x.float()
    with torch.autocast("cpu", dtype, enabled=how == "autocast"):
        got = acc.loss(x, y, rows=16)
    for name in ("total", "default", "control", "distill", "effort"):
        part = getattr(got, name)
        assert part.dtype == torch.float32
        assert float(part.detach()) == pytest.approx(
            float(getattr(want, name).detach()), rel=8 * torch.finfo(dtype).eps
        )
    got.total.backward()
    want.total.backward()
    assert finite_gradients(acc)
    for p, q in zip(
        (*acc.default.parameters(), *acc.control.parameters()),
        (*exact.default.parameters(), *exact.control.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(
            p.grad.double(), q.grad, rtol=0, atol=16 * torch.finfo(dtype).eps * float(q.grad.abs().max())
        )


@halves
def test_a_threshold_is_not_rounded(dtype: torch.dtype) -> None:
    logits = values((200, CLASSES))
    gate = EntropyGate()
    assert gate.calibrate(logits, 0.3) == pytest.approx(0.3)
    called = gate(logits)
    threshold = float(gate.threshold)
    for module in (gate.to(dtype), copy.deepcopy(gate).to(dtype), nn.Sequential(gate).to(dtype)[0]):
        assert module.threshold.dtype == D and float(module.threshold) == threshold
        assert torch.equal(module(logits), called)
    again = EntropyGate().to(dtype)
    again.load_state_dict(gate.state_dict())
    assert float(again.threshold) == threshold
    assert gate.calibrate(logits.to(dtype), 0.25) == pytest.approx(0.25)


@pytest.mark.parametrize("kind", [ValueGate, KLGate])
@halves
def test_learned_gates(dtype: torch.dtype, kind: type) -> None:
    torch.manual_seed(0)
    default = (
        torch.rand(600, 1) * 5 * F.one_hot(torch.arange(600) % CLASSES, CLASSES) + torch.randn(600, CLASSES)
    ).to(dtype)
    default[:, 3] = -math.inf  # a feature that is constant: its least deviation would be zero in float16
    control, y = (default * 2).to(dtype), torch.arange(600) % 3
    gate, exact = kind(CLASSES).to(dtype), kind(CLASSES)
    gate.fit(default, control, y)
    exact.fit(default.float(), control.float(), y)
    assert next(gate.net.parameters()).dtype == dtype and gate.deviation.dtype == torch.float32
    torch.testing.assert_close(
        gate.score(default), exact.score(default.float()), rtol=32 * torch.finfo(dtype).eps, atol=1e-3
    )


# --- agents -------------------------------------------------------------------------------------------------
def narrowed(how: str, dtype: torch.dtype, module: nn.Module, *tensors: torch.Tensor):
    """Convert module and tensors to half precision, or leave them to autocast."""
    if how == "autocast":
        return (copy.deepcopy(module), *tensors)
    return (copy.deepcopy(module).to(dtype), *(t.to(dtype) for t in tensors))


def world(scale: float = 1.0) -> WorldModel:
    torch.manual_seed(0)
    model = WorldModel(6, 2, latent=16, hidden=32, variational=False)
    for p in model.parameters():
        p.data.mul_(scale)
    return model


@pytest.mark.parametrize("how", ["half", "autocast"])
@halves
def test_the_latent_is_a_distribution_wherever_its_units_are(dtype: torch.dtype, how: str) -> None:
    """In float16 exp(15) overflows, and exp(−15) is too small to divide by."""
    model = world()
    x = (
        torch.tensor([[15.0, 14.0, *[0.0] * 6], [-15.0] * 8, [40.0, *[-40.0] * 7]])
        .repeat(1, 2)
        .requires_grad_()
    )
    simplex, narrow = narrowed(how, dtype, model.simplex, x)
    with torch.autocast("cpu", dtype, enabled=how == "autocast"):
        got = simplex(narrow)
    want = x.detach().clamp(-15, 15).unflatten(1, (2, 8)).softmax(2).flatten(1)
    torch.testing.assert_close(got.float(), want, rtol=0, atol=torch.finfo(dtype).eps)
    got.float().square().sum().backward()
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("how", ["half", "autocast"])
@halves
def test_the_log_probability_of_an_action_at_the_end_of_its_range(dtype: torch.dtype, how: str) -> None:
    """tanh(6) is 1 in half precision, where the logarithm's slope at the floor is infinite."""
    habit, z = narrowed(how, dtype, world().habit, torch.rand(64, 16))
    with torch.no_grad():
        habit.out.bias[:2] = torch.tensor([6.0, -6.0])
        habit.out.bias[2:] = -20.0  # the least deviation
    with torch.autocast("cpu", dtype, enabled=how == "autocast"):
        move = habit(z)
    assert move.log_prob.dtype == torch.float32
    raw, log_std = move.raw.detach().double(), move.log_std.detach().double()
    # The density of tanh at ±6 and a normal's with its own noise: within three deviations of e⁻⁴.
    peak = -log_std - 0.5 * math.log(2 * math.pi) - (1 - raw.tanh().square() + 1e-6).log()
    assert bool((move.log_prob.double() - peak.sum(1)).abs().max() < 12)
    move.log_prob.sum().backward()
    assert finite_gradients(habit)


@halves
def test_a_divergence_of_narrow_normals(dtype: torch.dtype) -> None:
    """The squared ratio of standard deviations overflows in float16."""
    mean, std = torch.full((3, 2), 0.96, dtype=dtype), torch.full((3, 2), 2.0, dtype=dtype)
    raw, log_std = torch.zeros(3, 2, dtype=dtype), torch.full((3, 2), -4.0, dtype=dtype)
    got = divergence(mean, std, raw, log_std)
    want = divergence(mean.double(), std.double(), raw.double(), log_std.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


@halves
def test_planning(dtype: torch.dtype) -> None:
    model = world(3.0)
    planner = Planner(model.to(dtype), samples=32, elites=8, habits=4, iterations=3, temperature=0.001)
    z = model.encode(10 * values((5, 6)).to(dtype)).detach()
    plan = planner.plan(z)
    assert bool(plan.mean.isfinite().all()) and plan.mean.dtype == dtype
    assert bool((plan.std >= 0.04).all()) and plan.first.dtype == plan.habit.dtype == torch.float32
    gains = DepthPlanner(planner, (1, 2), 1).gains(z)
    gate = DepthGate(16, 2, (1, 2)).to(dtype)
    log_std = model.habit.parameters_of(z)[1].detach()
    assert all(math.isfinite(loss) for loss in gate.fit(z, log_std, gains, epochs=2))
    assert next(gate.net.parameters()).dtype == dtype and bool(gate.gains(z, log_std).isfinite().all())


@pytest.mark.parametrize("how", ["half", "autocast"])
@halves
def test_the_agent(dtype: torch.dtype, how: str) -> None:
    agent = PlanningAgent(world(3.0), PlanGate(16, 2), samples=32, elites=8, habits=4, iterations=3)
    observation = 10 * values((5, 6))
    agent, narrow = narrowed(how, dtype, agent, observation)
    with torch.autocast("cpu", dtype, enabled=how == "autocast"):
        act = agent.act(narrow, explore=True)
    assert bool(act.called.all())
    for t in act:
        assert bool(t.isfinite().all())


@halves
def test_the_plan_gate_learns_its_scale(dtype: torch.dtype) -> None:
    """An update by a hundredth of the difference is smaller than the rounding of the mean."""
    gate, exact = PlanGate(4, 2).to(dtype), PlanGate(4, 2)
    latent, log_std = 1 + values((64, 4)).to(dtype) / 100, values((64, 2)).to(dtype)
    glance = torch.linspace(0, 0.01, 64).to(dtype)
    for _ in range(300):
        loss = gate.loss(latent, log_std, glance, glance / 2, glance)
        exact.loss(latent.float(), log_std.float(), glance.float(), glance.float() / 2, glance.float())
    torch.testing.assert_close(gate.middle, exact.middle)
    torch.testing.assert_close(gate.variance, exact.variance)
    loss.backward()
    assert finite_gradients(gate)
    with pytest.raises(ValueError, match="scores: expected numbers, got NaN at 1"):
        gate.calibrate("value", torch.tensor([0.0, math.nan]), 0.5)


# --- energies -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["half", "autocast"])
@halves
def test_the_energy_classifier(dtype: torch.dtype, how: str) -> None:
    torch.manual_seed(0)
    model = LatentEnergyClassifier(nn.Linear(6, 8), 8, classes=3, dim_latent=4, hidden=16)
    x = values((5, 6))
    want = model(x)
    model, narrow = narrowed(how, dtype, model, x)
    with torch.autocast("cpu", dtype, enabled=how == "autocast"):
        got = model(narrow)
    assert set(got.status.tolist()) == {1}
    torch.testing.assert_close(got.y.float(), want.y, rtol=0, atol=4 * torch.finfo(dtype).eps)
    F.cross_entropy(model.logits(got.y).float(), torch.zeros(5, dtype=torch.int64)).backward()
    assert finite_gradients(model) and bool(model.encoder.weight.grad.any())
