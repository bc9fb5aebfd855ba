"""PonderNet: one step against the reference, the distribution of all steps, and the noise in evaluation."""

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

# step, min_steps, max_steps, log_prior, log_epsilon
STAGES = {
    "before min_steps": (1, 2, 8, -1.5, -math.inf),
    "running": (3, 1, 8, -1.5, -math.inf),
    "truncating": (3, 1, 8, -1.5, -1.0),
    "last": (8, 1, 8, -1.5, -math.inf),
}


def block(rows, dtype, scalar, device, seed=0):
    """Return logits and log survivals, none so near to truncation that rounding decides."""
    logits = values((rows,), dtype, device, seed)
    survival = (
        (-2 * torch.rand(rows, generator=generator(seed + 1), dtype=torch.float64)).to(scalar).to(device)
    )
    close = (survival.double() + torch.nn.functional.logsigmoid(-logits.double()) + 1).abs() < 1e-2
    return logits, torch.where(close, torch.full_like(survival, -3.0), survival)


def step(logits, log_survival, stage):
    n, least, most, log_prior, log_epsilon = STAGES[stage]
    return ac.ops.pondernet_step(
        logits,
        log_survival,
        step=n,
        min_steps=least,
        max_steps=most,
        log_prior=log_prior,
        log_epsilon=log_epsilon,
    )


def reference_step(logits, log_survival, stage):
    return ac.reference.pondernet_step(logits, log_survival, *STAGES[stage])


def check_against_reference(rows, dtype, scalar, stage, device):
    logits, survival = block(rows, dtype, scalar, device)
    with Unchanged(logits, survival):
        got = step(logits, survival, stage)
    same = reference_step(logits, survival, stage)
    exact = reference_step(logits.double(), survival.double(), stage)
    assert_bitwise(got.halt, exact[3])
    for g, s, e in zip(got[:3], same[:3], exact[:3], strict=True):
        assert g.dtype == scalar
        assert_as_good_as_torch(g, s, e, rounding=4.0, scale=1.0)


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
    leaves = [t.requires_grad_() for t in block(rows, torch.float32, torch.float32, device)]
    out = step(*leaves, "running")
    torch.autograd.grad([out.weight, out.cost], leaves, [torch.ones_like(out.weight)] * 2)


@pytest.mark.promise("gradient")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_match_autograd_through_the_reference(device, poison, dtype, stage):
    for rows in ROWS:
        leaves = [t.requires_grad_() for t in block(rows, dtype, torch.float32, device)]
        wide = [t.detach().double().requires_grad_() for t in leaves]
        upstream = [values((rows,), torch.float32, device, seed=s) for s in (5, 6, 7)]
        got = torch.autograd.grad(step(*leaves, stage)[:3], leaves, upstream)
        exact = gradients(reference_step(*wide, stage)[:3], wide, upstream)
        same = gradients(reference_step(*leaves, stage)[:3], leaves, upstream)
        for g, s, e in zip(got, same, exact, strict=True):
            assert_as_good_as_torch(g, s, e, rounding=8.0, scale=1.0, computed_in=torch.float32)
    poison.check()


@pytest.mark.promise("second derivative")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_is_differentiable_twice(device, check, stage):
    leaves = [t.requires_grad_() for t in block(9, torch.float64, torch.float64, device)]
    assert check(lambda z, q: step(z, q, stage)[:3], leaves)


@pytest.mark.parametrize("used", range(3))
def test_each_output_has_its_own_gradient(device, used):
    leaves = [t.requires_grad_() for t in block(9, torch.float64, torch.float64, device)]
    assert gradcheck(lambda z, q: step(z, q, "running")[used], leaves)


def test_non_contiguous_and_misaligned_arguments(device):
    logits, survival = block(66, torch.float32, torch.float32, device)
    for cut in (slice(None, None, 2), slice(1, None), slice(3, 40, 3)):
        for g, w in zip(
            step(logits[cut], survival[cut], "running"), step(logits, survival, "running"), strict=True
        ):
            assert_bitwise(g, w[cut].contiguous())


def test_a_row_alone_gives_the_bits_it_gives_in_a_batch(device):
    logits, survival = block(257, torch.float32, torch.float32, device)
    together = step(logits, survival, "truncating")
    order = torch.randperm(257, generator=generator(3)).to(device)
    for g, w in zip(step(logits[order], survival[order], "truncating"), together, strict=True):
        assert_bitwise(g, w[order])
    for i in (0, 1, 100, 256):
        for g, w in zip(step(logits[i : i + 1], survival[i : i + 1], "truncating"), together, strict=True):
            assert_bitwise(g, w[i : i + 1])


def test_a_nan_row_harms_no_neighbour(device):
    logits, survival = block(33, torch.float32, torch.float32, device)
    clean = step(logits, survival, "running")
    logits[7] = math.nan
    others = torch.arange(33, device=device) != 7
    out = step(logits, survival, "running")
    assert out.weight[7].isnan()
    for g, w in zip(out, clean, strict=True):
        assert_bitwise(g[others], w[others])


# --- the distribution ---------------------------------------------------------------------------------------
MOST = 7


def log_geometric(prior, steps=MOST):
    weights = torch.tensor([prior * (1 - prior) ** n for n in range(steps)], dtype=torch.float64)
    return (weights / weights.sum()).log()


def distribution(logits, log_prior, min_steps=1, log_epsilon=-math.inf):
    """Return pₙ [M, B], KL [B] and the last step of each row, for logits [M, B]."""
    most, batch = logits.shape
    survival = torch.zeros(batch, dtype=logits.dtype, device=logits.device)
    active = torch.ones(batch, dtype=torch.bool, device=logits.device)
    weights, cost, steps = (
        [],
        torch.zeros_like(survival),
        torch.zeros(batch, dtype=torch.int64, device=logits.device),
    )
    for n in range(1, most + 1):
        out = ac.ops.pondernet_step(
            logits[n - 1],
            survival,
            step=n,
            min_steps=min_steps,
            max_steps=most,
            log_prior=float(log_prior[n - 1]),
            log_epsilon=log_epsilon,
        )
        weights.append(torch.where(active, out.weight, 0))
        cost = cost + torch.where(active, out.cost, 0)
        survival, steps = out.log_survival, steps + active
        active = active & ~out.halt
    return torch.stack(weights), cost, steps


def dense(logits):
    """Compute pₙ = λₙ Π(1 − λⱼ), with λ = 1 at the last step, by its definition."""
    hazard = logits.sigmoid()
    hazard = torch.cat([hazard[:-1], torch.ones_like(hazard[-1:])])
    before = torch.cat([torch.ones_like(hazard[:1]), (1 - hazard).cumprod(0)[:-1]])
    return hazard * before, before


@pytest.fixture
def logits(device):
    return values((MOST, 9), torch.float64, device, seed=4)


def test_the_weights_are_the_distribution_and_sum_to_one(logits):
    weights, _, steps = distribution(logits, log_geometric(0.2))
    torch.testing.assert_close(weights, dense(logits)[0])
    torch.testing.assert_close(weights.sum(0), torch.ones_like(weights[0]))
    assert bool((steps == MOST).all())


@pytest.mark.parametrize(
    "prior", [log_geometric(0.2), torch.full((MOST,), -math.log(MOST))], ids=["geometric", "uniform"]
)
def test_the_cost_is_the_divergence_from_the_renormalised_prior(logits, prior):
    assert prior.exp().sum().item() == pytest.approx(1)
    _, cost, _ = distribution(logits, prior)
    p = dense(logits)[0]
    torch.testing.assert_close(cost, (p * (p.log() - prior.to(p)[:, None])).sum(0))
    assert bool((cost >= 0).all())


def test_the_divergence_vanishes_where_the_distribution_is_the_prior(device):
    constant = torch.full((MOST, 1), math.log(0.2 / 0.8), dtype=torch.float64, device=device)
    constant[-1] = 0  # forced, so its logit does not matter
    p = distribution(constant, log_geometric(0.2))[0]
    _, cost, _ = distribution(constant, p[:, 0].log())
    assert cost.item() == pytest.approx(0, abs=1e-12)


def test_the_gradient_has_its_closed_form(logits):
    """Σ pₙ lₙ by λₙ: Q_{n−1} lₙ − (1/(1−λₙ)) Σ_{m>n} p_m l_m before the last step, zero at it."""
    losses = values((MOST, 9), torch.float64, logits.device, seed=5)
    z = logits.requires_grad_()
    p = distribution(z, log_geometric(0.2))[0]
    (g,) = torch.autograd.grad((p * losses).sum(), z)
    hazard, (p, before) = logits.detach().sigmoid(), dense(logits.detach())
    terms = p * losses
    later = terms.flip(0).cumsum(0).flip(0) - terms
    expected = (before * losses - later / (1 - hazard)) * hazard * (1 - hazard)
    expected[-1] = 0
    torch.testing.assert_close(g, expected)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_weights_and_cost_against_finite_differences(logits, epsilon):
    z = logits.requires_grad_()
    log_epsilon = math.log(epsilon) if epsilon else -math.inf

    def run(z):
        return distribution(z, log_geometric(0.2), log_epsilon=log_epsilon)[:2]

    assert gradcheck(run, (z,))
    assert gradgradcheck(run, (z,))


def test_a_truncated_row_still_sums_to_one(logits):
    epsilon = 0.05
    weights, _, steps = distribution(logits + 1, log_geometric(0.2), log_epsilon=math.log(epsilon))
    torch.testing.assert_close(weights.sum(0), torch.ones_like(weights[0]))
    assert int(steps.min()) < MOST
    spent = dense(logits + 1)[0].cumsum(0)
    first = (spent[:-1] > 1 - epsilon).to(torch.int64)
    expected = torch.where(first.any(0), first.argmax(0) + 1, MOST)
    assert torch.equal(steps, expected)


def test_before_min_steps_the_hazard_is_zero(logits):
    weights, cost, _ = distribution(logits, [0.0, 0.0, *log_geometric(0.2, MOST - 2)], min_steps=3)
    assert bool((weights[:2] == 0).all())
    torch.testing.assert_close(weights[2:], dense(logits[2:])[0])
    torch.testing.assert_close(cost, distribution(logits[2:], log_geometric(0.2, MOST - 2))[1])


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, -1), (1, -1, 1), (-1, 1, -1)])
def test_log_space_is_stable_for_huge_logits(device, signs):
    z = torch.tensor([[80.0 * s] for s in signs] + [[0.0]], device=device, requires_grad=True)
    weights, cost, _ = distribution(z, log_geometric(0.2, 4))
    exact = distribution(z.detach().double(), log_geometric(0.2, 4))
    torch.testing.assert_close(weights.double(), exact[0], rtol=1e-5, atol=1e-37)
    torch.testing.assert_close(cost.double(), exact[1], rtol=1e-5, atol=1e-37)
    assert weights.sum().item() == pytest.approx(1)
    (g,) = torch.autograd.grad(weights.square().sum() + cost.sum(), z)
    assert bool(g.isfinite().all())


@pytest.mark.parametrize("reference", [False, True])
def test_a_logit_of_minus_infinity_is_a_hazard_of_zero(logits, reference):
    """With 0 log 0 = 0 these steps add nothing to the distribution and the divergence."""
    free = logits.detach().clone().requires_grad_()
    closed = torch.zeros_like(logits, dtype=torch.bool)
    closed[[0, 3]] = closed[5, ::2] = True
    masked = free.masked_fill(closed, -math.inf)
    with ac.reference_kernels() if reference else contextlib.nullcontext():
        weights, cost, _ = distribution(masked, log_geometric(0.2))
        (g,) = torch.autograd.grad(weights.square().sum() + cost.sum(), free)
        near, near_cost, _ = distribution(free.masked_fill(closed, -1e4), log_geometric(0.2))
        (g_near,) = torch.autograd.grad(near.square().sum() + near_cost.sum(), free)
    assert bool((weights[closed] == 0).all())
    torch.testing.assert_close(weights, near)
    torch.testing.assert_close(cost, near_cost)
    torch.testing.assert_close(g, g_near)


def test_a_certain_hazard_keeps_its_survival_in_log_space(device):
    out = step(torch.tensor([80.0, -80.0], device=device), torch.zeros(2, device=device), "running")
    assert out.log_survival[0].item() == pytest.approx(
        -80
    )  # log(1 − sigmoid(80)) is minus infinity in float32
    assert out.weight[1].item() == pytest.approx(math.exp(-80), rel=1e-5)


# --- the mistakes of public code ----------------------------------------------------------------------------
def test_mistake_a_reversed_divergence(logits):
    _, cost, _ = distribution(logits, log_geometric(0.2))
    p, prior = dense(logits)[0], log_geometric(0.2).to(logits)[:, None]
    assert not torch.allclose(cost, (prior.exp() * (prior - p.log())).sum(0), rtol=1e-2)


@pytest.mark.parametrize("prior", [0.2, "uniform"])
@pytest.mark.parametrize("min_steps", [1, 3])
def test_mistake_a_prior_that_is_not_renormalised(device, prior, min_steps):
    torch.manual_seed(0)
    head = torch.nn.Linear(3, 1, dtype=torch.float64, device=device)
    halt = ac.AdaptiveHalt(
        lambda s: s + 0.1, ac.PonderNet(head, prior=prior), max_steps=MOST, min_steps=min_steps
    )
    x = values((5, 3), torch.float64, device)
    z = torch.stack([head(x + 0.1 * n)[:, 0] for n in range(min_steps, MOST + 1)])
    steps = MOST - min_steps + 1
    expected = log_geometric(0.2, steps) if prior == 0.2 else torch.full((steps,), -math.log(steps))
    p = dense(z)[0]
    torch.testing.assert_close(halt(x).cost, (p * (p.log() - expected.to(p)[:, None])).sum(0))


def sampled_steps(hazard, rows, most, seed, device):
    z = math.log(hazard / (1 - hazard))
    halt = ac.AdaptiveHalt(
        lambda s: s + 1, ac.PonderNet(lambda s: s * 0 + z, seed=seed).eval(), max_steps=most
    )
    with torch.no_grad():
        return halt(torch.zeros(rows, device=device)).steps


def test_mistake_the_probability_in_the_place_of_the_hazard(device):
    steps = sampled_steps(0.2, 8192, 20, 1, device).double()
    assert steps.mean().item() == pytest.approx(
        (1 - 0.8**20) / 0.2, abs=0.15
    )  # 4.9; with pₙ as the hazard it is 9.4


# --- noise --------------------------------------------------------------------------------------------------
def signed(word):
    return word - (1 << 64) if word >> 63 else word


# The known answers of the Random123 distribution: key, counter and the first word that comes out.
@pytest.mark.parametrize(
    ("seed", "sample", "step", "word"),
    [
        (0, 0, 0, 0x6627E8D5),
        (0xFFFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF, 0x408F276D),
        (0x299F31D0A4093822, 0x85A308D3243F6A88, 0x0370734413198A2E, 0xD16CFE09),
    ],
)
def test_philox_gives_the_published_answers(device, seed, sample, step, word):
    got = ac.reference.uniform(seed, torch.tensor([signed(sample)], device=device), step)
    assert got.item() == (word >> 8) / 2**24


def test_uniform_is_uniform_and_independent_over_samples_steps_and_seeds(device):
    sample = torch.arange(1 << 16, device=device)
    draws = torch.stack(
        [ac.reference.uniform(seed, sample, n) for seed, n in ((0, 1), (0, 2), (1, 1), (1 << 40, 1))]
    ).cpu()
    assert bool(((draws >= 0) & (draws < 1)).all())
    for u in draws:
        counts = torch.histc(u, 64, 0, 1).double()
        chi_squared = ((counts - 1024) ** 2 / 1024).sum().item()
        assert chi_squared < 63 + 5 * math.sqrt(2 * 63)
    correlation = torch.corrcoef(draws) - torch.eye(4)
    assert correlation.abs().max().item() < 5 / 256
    assert torch.corrcoef(torch.stack([draws[0, :-1], draws[0, 1:]]))[0, 1].abs().item() < 5 / 256


def expected_steps(seed, sample, hazard, most):
    draws = torch.stack([ac.reference.uniform(seed, sample, n) for n in range(1, most + 1)])
    halts = draws < hazard
    halts[-1] = True
    return halts.to(torch.int64).argmax(0) + 1


@pytest.mark.sanitizer
@pytest.mark.parametrize("seed", [0, 7, 0xFFFFFFFF, 1 << 32, (1 << 63) - 1])
def test_the_kernel_draws_what_the_reference_draws(device, seed):
    steps = sampled_steps(0.25, 300, 9, seed, device)
    hazard = torch.sigmoid(torch.tensor(math.log(0.25 / 0.75)))
    assert torch.equal(steps.cpu(), expected_steps(seed, torch.arange(300), hazard, 9))


def test_the_draws_follow_the_sample_and_not_its_place_in_the_batch(device):
    order = torch.randperm(300, generator=generator(5)).to(device)
    halt = ac.AdaptiveHalt(lambda s: s + 1, ac.PonderNet(lambda s: s * 0 - 1.0, seed=3).eval(), max_steps=9)
    with torch.no_grad():
        x = torch.zeros(300, device=device)
        assert torch.equal(halt(x, sample_ids=order).steps, halt(x).steps[order])
        with ac.reference_kernels():
            assert torch.equal(halt(x, sample_ids=order).steps, halt(x).steps[order])
