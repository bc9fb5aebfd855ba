"""ACT: one step against the reference, and all steps against Graves' equations."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import adaptcomp_ext as ac
from tests.helpers.tensors import (
    FLOATS,
    ROWS,
    Unchanged,
    assert_as_good_as_torch,
    assert_bitwise,
    generator,
    gradients,
    values,
)

STAGES = {"before min_steps": (1, 2, 8), "running": (3, 1, 8), "last": (8, 1, 8)}
THRESHOLD = 0.9


def block(rows, dtype, scalar, device, seed=0):
    """Logits and accumulated probabilities, none so near to the threshold that dtypes may disagree."""
    logits = values((rows,), dtype, device, seed)
    accumulated = (
        (torch.rand(rows, generator=generator(seed + 1), dtype=torch.float64) * 0.8).to(scalar).to(device)
    )
    close = (accumulated.double() + logits.double().sigmoid() - THRESHOLD).abs() < 1e-2
    return logits, torch.where(close, torch.zeros_like(accumulated), accumulated)


def step(logits, accumulated, stage, threshold=THRESHOLD):
    n, least, most = STAGES[stage]
    return ac.ops.act_step(logits, accumulated, step=n, min_steps=least, max_steps=most, threshold=threshold)


def reference_step(logits, accumulated, stage, threshold=THRESHOLD):
    return ac.reference.act_step(logits, accumulated, *STAGES[stage], threshold)


def check_against_reference(rows, dtype, scalar, stage, device):
    logits, accumulated = block(rows, dtype, scalar, device)
    with Unchanged(logits, accumulated):
        got = step(logits, accumulated, stage)
    same = reference_step(logits, accumulated, stage)
    exact = reference_step(logits.double(), accumulated.double(), stage)
    assert_bitwise(got.halt, exact[3])
    for name, g, s, e in zip(got._fields[:3], got, same, exact, strict=False):
        assert g.dtype == scalar, name
        assert_as_good_as_torch(g, s, e)


@pytest.mark.promise("formula", "own memory")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("scalar", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_the_reference_in_every_size(device, poison, dtype, scalar, stage):
    for rows in ROWS:
        check_against_reference(rows, dtype, scalar, stage, device)
    poison.check()


@pytest.mark.sanitizer
@pytest.mark.parametrize("rows", [0, 1, 33, 257])
def test_small_cases(device, rows):
    for dtype in (torch.float32, torch.bfloat16):
        check_against_reference(rows, dtype, torch.float32, "running", device)
    logits, accumulated = (t.requires_grad_() for t in block(rows, torch.float32, torch.float32, device))
    out = step(logits, accumulated, "running")
    torch.autograd.grad([out.weight, out.cost], [logits, accumulated], [torch.ones_like(out.weight)] * 2)


@pytest.mark.promise("gradient")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_match_autograd_through_the_reference(device, poison, dtype, stage):
    for rows in ROWS:
        logits, accumulated = (t.requires_grad_() for t in block(rows, dtype, torch.float32, device))
        wide = [t.detach().double().requires_grad_() for t in (logits, accumulated)]
        upstream = [values((rows,), torch.float32, device, seed=s) for s in (5, 6, 7)]
        got = torch.autograd.grad(step(logits, accumulated, stage)[:3], (logits, accumulated), upstream)
        exact = gradients(reference_step(*wide, stage)[:3], wide, upstream)
        same = gradients(reference_step(logits, accumulated, stage)[:3], (logits, accumulated), upstream)
        for g, s, e in zip(got, same, exact, strict=True):
            assert_as_good_as_torch(g, s, e, rounding=4.0, scale=1.0, computed_in=torch.float32)
    poison.check()


@pytest.mark.promise("second derivative")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_is_differentiable_twice(device, check, stage):
    leaves = [t.requires_grad_() for t in block(9, torch.float64, torch.float64, device)]
    assert check(lambda z, a: step(z, a, stage)[:3], leaves)


@pytest.mark.parametrize("used", range(3))
def test_each_output_has_its_own_gradient(device, used):
    leaves = [t.requires_grad_() for t in block(9, torch.float64, torch.float64, device)]
    assert gradcheck(lambda z, a: step(z, a, "running")[used], leaves)


@pytest.mark.promise("layout")
def test_non_contiguous_and_misaligned_arguments(device):
    logits, accumulated = block(66, torch.float32, torch.float32, device)
    for cut in (slice(None, None, 2), slice(1, None), slice(3, 40, 3)):
        got = step(logits[cut], accumulated[cut], "running")
        for g, w in zip(got, step(logits, accumulated, "running"), strict=True):
            assert_bitwise(g, w[cut].contiguous())
    g = step(logits[:1].expand(5), accumulated[:1].expand(5), "running").weight
    assert g.shape == (5,)
    assert bool((g == g[0]).all())


@pytest.mark.promise("row alone")
def test_a_row_alone_gives_the_bits_it_gives_in_a_batch(device):
    logits, accumulated = block(257, torch.float32, torch.float32, device)
    together = step(logits, accumulated, "running")
    order = torch.randperm(257, generator=generator(3)).to(device)
    for g, w in zip(step(logits[order], accumulated[order], "running"), together, strict=True):
        assert_bitwise(g, w[order])
    for i in (0, 1, 100, 256):
        for g, w in zip(step(logits[i : i + 1], accumulated[i : i + 1], "running"), together, strict=True):
            assert_bitwise(g, w[i : i + 1])


def test_saturated_logits_stay_finite(device):
    z = torch.tensor([-1e4, -88.0, 0.0, 88.0, 1e4], device=device, requires_grad=True)
    out = step(z, torch.zeros(5, device=device), "running")
    assert all(bool(t.isfinite().all()) for t in out[:3])
    assert out.halt.tolist() == [False, False, False, True, True]
    (g,) = torch.autograd.grad(out.weight.sum() + out.cost.sum(), z)
    assert bool(g.isfinite().all())


@pytest.mark.parametrize("stage", ["running", "last"])
@pytest.mark.parametrize("reference", [False, True])
def test_a_logit_of_minus_infinity_is_a_halting_probability_of_zero(device, stage, reference):
    z = torch.tensor([-math.inf, -math.inf], dtype=torch.float64, device=device, requires_grad=True)
    a = torch.tensor([0.0, 0.25], dtype=torch.float64, device=device, requires_grad=True)
    with ac.reference_kernels() if reference else contextlib.nullcontext():
        out = step(z, a, stage)
        g_z, g_a = torch.autograd.grad((out.weight * 2 + out.accumulated * 3 + out.cost * 5).sum(), (z, a))
    n = {"running": 3, "last": 8}[stage]
    weight = [1.0, 0.75] if stage == "last" else [0.0, 0.0]  # the remainder, where max_steps ends the row
    assert out.weight.tolist() == weight and out.accumulated.tolist() == [0.0, 0.25]
    assert out.cost.tolist() == [n + w for w in weight] if stage == "last" else [0.0, 0.0]
    assert not out.halt.any() or stage == "last"
    assert g_z.tolist() == [0.0, 0.0] and g_a.tolist() == ([-4.0, -4.0] if stage == "last" else [3.0, 3.0])


def test_a_nan_row_harms_no_neighbour(device):
    logits, accumulated = block(33, torch.float32, torch.float32, device)
    clean = step(logits, accumulated, "running")
    logits[7] = float("nan")
    others = torch.arange(33, device=device) != 7
    out = step(logits, accumulated, "running")
    assert out.weight[7].isnan()
    assert not out.halt[7]
    for g, w in zip(out, clean, strict=True):
        assert_bitwise(g[others], w[others])


def test_reaching_the_threshold_exactly_is_enough(device):
    out = step(
        torch.zeros(1, device=device), torch.full((1,), 0.25, device=device), "running", threshold=0.75
    )
    assert out.halt.item()
    assert out.weight.item() == 0.75


def test_max_steps_alone_takes_the_remainder_without_claiming_to_halt(device):
    out = step(torch.full((1,), -3.0, device=device), torch.full((1,), 0.25, device=device), "last")
    assert not out.halt.item()
    assert out.weight.item() == 0.75
    assert out.cost.item() == 8.75


# --- the steps put together ---------------------------------------------------------------------------------
MOST = 6


def rollout(logits, states, threshold=THRESHOLD, min_steps=1):
    """Return Σ wₙ sₙ, N + R, the weights [N, B] and each row's N, for logits [N, B] and states [N, B, D]."""
    batch = logits.shape[1]
    accumulated = torch.zeros(batch, dtype=logits.dtype, device=logits.device)
    active = torch.ones(batch, dtype=torch.bool, device=logits.device)
    output, cost = torch.zeros_like(states[0]), torch.zeros_like(accumulated)
    steps = torch.zeros(batch, dtype=torch.int64, device=logits.device)
    weights = []
    for n in range(1, MOST + 1):
        out = ac.ops.act_step(
            logits[n - 1], accumulated, step=n, min_steps=min_steps, max_steps=MOST, threshold=threshold
        )
        weight = torch.where(active, out.weight, 0)
        weights.append(weight)
        output = output + weight[:, None] * states[n - 1]
        cost = cost + torch.where(active, out.cost, 0)
        accumulated, steps = out.accumulated, steps + active
        active = active & ~out.halt
    return output, cost, torch.stack(weights), steps


def graves(h, states, threshold):
    """Evaluate the paper's equations for one row, in Python floats."""
    total, n = 0.0, 0
    while n < len(h) and total < threshold:
        total += h[n]
        n += 1
    remainder = 1 - sum(h[: n - 1])
    weights = [*h[: n - 1], remainder]
    return sum(w * s for w, s in zip(weights, states, strict=False)), n + remainder, weights, n


@pytest.fixture
def problem(device):
    logits = values((MOST, 12), torch.float64, device, seed=1) - 1
    states = values((MOST, 12, 3), torch.float64, device, seed=2)
    return logits, states


@pytest.mark.promise("formula")
def test_the_steps_add_up_to_graves_equations(problem):
    logits, states = problem
    output, cost, weights, steps = rollout(logits, states)
    assert len(steps.unique()) > 1
    for b in range(12):
        y, rho, w, n = graves(logits[:, b].sigmoid().tolist(), list(states[:, b].cpu()), THRESHOLD)
        torch.testing.assert_close(output[b].cpu(), y)
        assert cost[b].item() == pytest.approx(rho)
        assert steps[b].item() == n
        assert weights[:n, b].tolist() == pytest.approx(w)
    torch.testing.assert_close(weights.sum(0), torch.ones_like(cost))


def closed_form(logits, states, steps):
    """dy/dhₙ = sₙ − s_N before N and 0 at N; dρ/dhₙ = −1 before N and 0 at N; times dh/dz."""
    n = torch.arange(1, MOST + 1, device=logits.device)[:, None]
    before = (n < steps).to(logits.dtype)
    slope = logits.sigmoid() * (1 - logits.sigmoid()) * before
    last = states[steps - 1, torch.arange(steps.shape[0], device=logits.device)]
    return slope[..., None] * (states - last), -slope


@pytest.mark.promise("gradient")
def test_the_gradient_of_output_and_ponder_cost_has_its_closed_form(problem):
    logits, states = problem
    z = logits.requires_grad_()
    output, cost, _, steps = rollout(z, states)
    d_output, d_cost = closed_form(logits.detach(), states, steps)
    for k in range(3):
        (g,) = torch.autograd.grad(output[:, k].sum(), z, retain_graph=True)
        torch.testing.assert_close(g, d_output[..., k])
    (g,) = torch.autograd.grad(cost.sum(), z)
    torch.testing.assert_close(g, d_cost)


def test_output_and_ponder_cost_against_finite_differences(problem):
    logits, states = problem
    assert gradcheck(lambda z, s: rollout(z, s)[:2], (logits.requires_grad_(), states.requires_grad_()))
    assert gradgradcheck(lambda z, s: rollout(z, s)[:2], (logits, states))


def test_with_min_steps_the_early_probabilities_count_as_zero(problem):
    logits, states = problem
    output, cost, weights, steps = rollout(logits, states, min_steps=3)
    assert int(steps.min()) >= 3
    assert bool((weights[:2] == 0).all())
    masked = torch.cat([torch.full_like(logits[:2], -math.inf), logits[2:]])
    for got, want in zip((output, cost, weights, steps), rollout(masked, states), strict=True):
        torch.testing.assert_close(got, want)


# --- the mistakes of public code ----------------------------------------------------------------------------
def constant(h, device):
    logits = torch.full((MOST, 1), math.log(h / (1 - h)), dtype=torch.float64, device=device)
    return logits, torch.arange(1.0, MOST + 1, dtype=torch.float64, device=device)[:, None, None]


def test_mistake_adding_h_twice_before_the_comparison(device):
    *_, steps = rollout(*constant(0.3, device), threshold=0.99)
    assert steps.item() == 4  # 0.3 · 3 = 0.9; added twice it would halt at the third step


def test_mistake_a_detached_remainder(device):
    logits, states = constant(0.3, device)
    output, *_ = rollout(logits.requires_grad_(), states)
    (g,) = torch.autograd.grad(output.sum(), logits)
    # sₙ − s_N is negative here; without the gradient of R it would be sₙ, positive.
    assert bool((g[:2] < 0).all())


def test_mistake_the_last_probability_in_the_ponder_gradient(device):
    logits, states = constant(0.3, device)
    _, cost, _, steps = rollout(logits.requires_grad_(), states)
    (g,) = torch.autograd.grad(cost.sum(), logits)
    assert g[steps.item() - 1].item() == 0
    assert bool((g[: steps.item() - 1] < 0).all())


def test_mistake_a_mean_or_a_recursive_blend_for_the_weighted_sum(device):
    logits, states = constant(0.3, device)
    output, _, _, steps = rollout(logits, states, threshold=0.99)
    n = steps.item()
    weights = [0.3, 0.3, 0.3, 0.1]
    assert output.item() == pytest.approx(sum(w * s for w, s in zip(weights, (1, 2, 3, 4), strict=True)))
    blend = 0.0
    for w, s in zip(weights, (1, 2, 3, 4), strict=True):
        blend = blend * (1 - w) + s * w
    assert output.item() != pytest.approx(blend)
    assert output.item() != pytest.approx(sum(range(1, n + 1)) / n)
