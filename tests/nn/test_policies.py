"""Every policy against a dense, masked loop: all results, the trace, the gradients, and the promises."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import adaptcomp_ext as ac
from adaptcomp_ext.nn.halting.policies.pondernet import _hazard
from tests.helpers.halting import (
    COMPACT,
    DIM,
    HALTED,
    MAX_STEPS,
    MODES,
    POLICIES,
    WITH_HEAD,
    check,
    close,
    dense,
    identical,
    leaves,
    make,
    mode,
    philox,
    philox4x32,
    scaled,
    tree_arguments,
)

pytestmark = pytest.mark.usefixtures("block_size")


@pytest.mark.promise("formula")
@pytest.mark.covering(2)
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("form", ["tensor", "tuple", "nested"])
@pytest.mark.parametrize("name", POLICIES)
def test_equals_the_dense_loop(name, form, how, device):
    step, policy, h, x = make(name, 9, form, device=device, requires_grad=how != "no_grad")
    state, inputs = tree_arguments(form, h, x)
    for compact in COMPACT:
        with mode(how):
            result = ac.AdaptiveHalt(step, policy, max_steps=6, compact=compact)(state, *inputs)
        check(result, dense(step, policy, state, *inputs, max_steps=6))
    assert len(result.steps.unique()) > 1 or name in ("ponder", "fixed_int")


@pytest.mark.covering(2)
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("name", POLICIES)
def test_readout_min_steps_and_head_of_width_one(name, how, device):
    step, policy, h, x = make(name, 8, "tuple", device=device, seed=3, wide=True)
    state, inputs = tree_arguments("tuple", h, x)
    for compact in COMPACT:
        halt = ac.AdaptiveHalt(step, policy, max_steps=5, min_steps=3, readout=scaled, compact=compact)
        with mode(how):
            result = halt(state, *inputs)
        check(result, dense(step, policy, state, *inputs, max_steps=5, min_steps=3, readout=scaled))
        assert int(result.steps.min()) >= 3
        assert result.output.shape == (8, 3)


@pytest.mark.promise("formula")
@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("name", POLICIES)
def test_dtypes(name, how, dtype, device):
    step, policy, h, x = make(name, 9, dtype=dtype, device=device, seed=1, requires_grad=how != "no_grad")
    with mode(how):
        result = ac.AdaptiveHalt(step, policy, max_steps=5)(h, x)
    expected = dense(step, policy, h, x, max_steps=5)
    check(result, expected, torch.float32 if dtype != torch.float64 else None)
    assert result.output.dtype == dtype
    assert result.cost.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.promise("accumulation")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weighted_sum_is_accumulated_in_float32(dtype, device):
    """Two hundred weights, most of them below the resolution of half precision at one."""
    h = torch.full((2, 3), 1.0, dtype=dtype, device=device)
    policy = ac.PonderNet(lambda s: torch.full_like(s[:, 0], -6, dtype=torch.float32))
    assert bool((ac.AdaptiveHalt(lambda h: h * 1, policy, 200)(h).output == 1).all())


@pytest.mark.promise("gradient")
@pytest.mark.covering(2)
@pytest.mark.parametrize("how", ["grad", "reference"])
@pytest.mark.parametrize("compact", COMPACT)
@pytest.mark.parametrize("name", POLICIES)
def test_gradients_equal_those_of_the_dense_loop(name, compact, how, device):
    def gradients(run):
        step, policy, h, x = make(name, 8, "tuple", torch.float64, device, seed=2, requires_grad=True)
        state, inputs = tree_arguments("tuple", h, x)
        result = run(step, policy, state, *inputs)
        loss = (result.output**2).sum() + result.cost.sum() * 0.3 + (leaves(result.state)[2] ** 2).sum()
        if result.log_prob is not None:
            loss = loss + (result.log_prob**2).sum()
        if result.trace is not None:
            loss = loss + (result.trace[0].sum(1) * result.trace[1]).sum()
        loss.backward()
        return [t.grad for t in (h, x, *step.parameters(), *policy.parameters())]

    with mode(how):
        got = gradients(lambda s, p, *a: ac.AdaptiveHalt(s, p, 6, compact=compact)(*a))
    want = gradients(lambda s, p, *a: dense(s, p, *a, max_steps=6))
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None) or not (g if g is not None else w).any()
        if g is not None and w is not None:
            torch.testing.assert_close(g, w, atol=1e-10, rtol=1e-9)


# --- finite differences -------------------------------------------------------------------------------------
def differentiable(policy_of, max_steps, readout=None, with_trace=False):
    """Return AdaptiveHalt as a function of the state, an input and the parameters, in float64."""

    def run(h, x, a, c, k):
        policy = policy_of(lambda h: h[:, 0] * k[0] + h[:, 1] * k[1] - 1)
        halt = ac.AdaptiveHalt(
            lambda h, x: torch.tanh(h * a + h.flip(1) * c + x), policy, max_steps, readout=readout
        )
        result = halt(h, x)
        extra = (result.trace.outputs, result.trace.weights) if with_trace else ()
        return (result.output, result.state, result.cost, *extra)

    g = torch.Generator().manual_seed(4)
    shapes = [(4, 3), (4, 3), (3,), (3,), (2,)]
    return run, [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]


def square(h):
    return h[:, :2] ** 2


CASES = {
    "act": (lambda head: ac.ACT(head, 0.8), 5, None, False),
    "act_readout": (lambda head: ac.ACT(head, 0.8), 4, square, False),
    "ponder": (lambda head: ac.PonderNet(head, 0.3), 4, None, True),
    "ponder_uniform_truncated": (lambda head: ac.PonderNet(head, "uniform", epsilon=0.3), 5, square, True),
    "fixed": (lambda head: ac.FixedSteps(torch.tensor([1, 3, 2, 4])), 4, None, False),
}


@pytest.mark.promise("gradient")
@pytest.mark.parametrize("case", CASES)
def test_gradients_by_finite_differences(case):
    run, arguments = differentiable(*CASES[case])
    assert gradcheck(run, arguments)


@pytest.mark.promise("second derivative")
@pytest.mark.parametrize("case", CASES)
def test_second_derivatives_by_finite_differences(case):
    run, arguments = differentiable(*CASES[case])
    assert gradgradcheck(run, arguments)


def test_act_gradient_in_the_halting_probability_has_the_closed_form(device):
    """dy/dh_n = s_n - s_N and d(cost)/dh_n = -1 for n < N; both zero at N."""
    logits = torch.tensor([[-1.0, -0.5, 0.2, 3.0]], dtype=torch.float64, device=device).requires_grad_()
    states = torch.randn(4, 1, 3, dtype=torch.float64, device=device)
    start = (torch.zeros(1, dtype=torch.int64, device=device), states[0])
    policy = ac.ACT(lambda s: logits[:, int(s[0]) - 1], 0.99)
    halt = ac.AdaptiveHalt(lambda s: (s[0] + 1, states[int(s[0])]), policy, 4, readout=lambda s: s[1])
    result = halt(start)
    h = torch.sigmoid(logits.detach())[0]
    last = int(result.steps)
    slope = h * (1 - h)
    for k in range(3):
        (g,) = torch.autograd.grad(result.output[0, k], logits, retain_graph=True)
        want = [
            float((states[n, 0, k] - states[last - 1, 0, k]) * slope[n]) if n < last - 1 else 0.0
            for n in range(4)
        ]
        assert torch.allclose(g[0], torch.tensor(want, dtype=torch.float64, device=device))
    (g,) = torch.autograd.grad(result.cost[0], logits)
    want = [float(-slope[n]) if n < last - 1 else 0.0 for n in range(4)]
    assert torch.allclose(g[0], torch.tensor(want, dtype=torch.float64, device=device))


# --- ACT ----------------------------------------------------------------------------------------------------
def test_act_weights_sum_to_one_and_cost_is_steps_plus_remainder(device):
    step, policy, h, x = make("act", 50, device=device)
    one = ac.AdaptiveHalt(step, policy, 9, readout=lambda h: torch.ones_like(h[:, :1]))(h, x)
    assert torch.allclose(one.output, torch.ones_like(one.output), atol=1e-6)
    remainder = one.cost - one.steps
    assert bool(((remainder > 0) & (remainder <= 1)).all())


def test_act_is_the_same_in_evaluation(device):
    step, policy, h, x = make("act", 20, device=device)
    halt = ac.AdaptiveHalt(step, policy, 9)
    a, b = halt.train()(h, x), halt.eval()(h, x)
    assert identical(a.output, b.output) and identical(a.cost, b.cost)


@pytest.mark.promise("status")
def test_a_row_that_runs_out_of_steps_says_so(device):
    h = torch.randn(3, DIM, device=device)
    for policy in (ac.ACT(lambda h: h[:, 0] * 0 - 9), ac.Confidence(1.0), ac.FixedSteps(99)):
        result = ac.AdaptiveHalt(lambda h: h * 0.5, policy, 4)(h)
        assert result.steps.tolist() == [4] * 3 and result.status.tolist() == [MAX_STEPS] * 3
    assert ac.AdaptiveHalt(lambda h: h, ac.FixedSteps(4), 4)(h).status.tolist() == [HALTED] * 3


# --- PonderNet ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.4])
@pytest.mark.parametrize("prior", [0.2, "uniform"])
def test_ponder_distribution_sums_to_one_and_kl_is_not_negative(prior, epsilon, device):
    step, policy, h, x = make("ponder", 30, device=device, prior=prior, epsilon=epsilon)
    result = ac.AdaptiveHalt(step, policy, 12, min_steps=2)(h, x)
    total = torch.zeros(30, device=device).index_add(0, result.trace.row, result.trace.weights)
    assert torch.allclose(total, torch.ones_like(total), atol=1e-5)
    assert float(result.cost.detach().min()) >= -1e-5
    assert result.trace.row.shape[0] == int(result.steps.sum())
    check(result, dense(step, policy, h, x, max_steps=12, min_steps=2))
    if epsilon:
        assert int(result.steps.min()) < 12


@pytest.mark.parametrize("prior", [0.2, "uniform"])
def test_ponder_kl_vanishes_where_the_distribution_is_the_prior(prior, device):
    m = 6
    n = torch.arange(m, dtype=torch.float64)
    p = torch.softmax(n * (0.0 if prior == "uniform" else torch.log1p(torch.tensor(-0.2)).item()), 0)
    hazard = p / p.flip(0).cumsum(0).flip(0)
    policy = ac.PonderNet(lambda k: torch.logit(hazard.to(device)[k[:, 0].long() - 1], eps=1e-9), prior)
    result = ac.AdaptiveHalt(lambda k: k + 1, policy, m)(
        torch.zeros(3, 1, dtype=torch.float64, device=device)
    )
    assert torch.allclose(result.cost, torch.zeros_like(result.cost), atol=1e-9)
    assert torch.allclose(result.output[:, 0], ((n + 1) * p).sum().to(device), atol=1e-9)


def test_ponder_output_is_the_expectation_over_its_trace(device):
    step, policy, h, x = make("ponder", 11, device=device, epsilon=0.2)
    result = ac.AdaptiveHalt(step, policy, 9)(h, x)
    weighted = result.trace.outputs * result.trace.weights[:, None]
    close(torch.zeros_like(result.output).index_add(0, result.trace.row, weighted), result.output)


def test_ponder_loss_per_step_has_the_gradient_of_the_dense_computation(device):
    """Compare the sum of p_n * loss_n over the trace with that of rows that all run to the end."""

    def gradients(run):
        step, policy, h, x = make(
            "ponder", 8, dtype=torch.float64, device=device, requires_grad=True, epsilon=0.1
        )
        target = torch.arange(8, device=device) % DIM
        outputs, weights, row, _ = run(step, policy, h, x).trace
        loss = torch.nn.functional.cross_entropy(outputs, target[row], reduction="none")
        (loss * weights).sum().backward()
        return [t.grad for t in (h, x, *step.parameters(), *policy.parameters())]

    got = gradients(lambda s, p, *a: ac.AdaptiveHalt(s, p, 7)(*a))
    want = gradients(lambda s, p, *a: dense(s, p, *a, max_steps=7))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-11, rtol=1e-9)


def test_ponder_halts_by_its_hazard_at_inference(device):
    """A hazard of 0.2 over 20 steps has (1 - 0.8**20) / 0.2 = 4.94 on average. Halting with p_n has 9.4."""
    rows, hazard = 20000, torch.logit(torch.tensor(0.2))
    policy = ac.PonderNet(lambda h: h[:, 0] * 0 + hazard.to(h.device)).eval()
    result = ac.AdaptiveHalt(lambda h: h, policy, 20)(torch.zeros(rows, 1, device=device))
    expected = (1 - 0.8**20) / 0.2
    assert float(result.steps.double().mean()) == pytest.approx(expected, abs=0.15)


def test_philox_of_the_tests_gives_the_published_vectors():
    assert philox4x32([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox4x32([2**32 - 1] * 4, [2**32 - 1] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    assert philox4x32(*pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.promise("seed")
@pytest.mark.parametrize("how", MODES)
def test_ponder_draws_depend_on_seed_sample_and_step_alone(how, device):
    ids = torch.tensor([3, 2**40 + 7, 0, 3, 11, 2**62], device=device)
    hazard = 0.3
    policy = ac.PonderNet(lambda h: torch.logit(h[:, 0] * 0 + hazard), seed=2**35 + 1).eval()
    with mode(how):
        steps = ac.AdaptiveHalt(lambda h: h, policy, 9)(
            torch.zeros(6, 1, device=device), sample_ids=ids
        ).steps
    want = [next((n for n in range(1, 9) if philox(2**35 + 1, i, n) < hazard), 9) for i in ids.tolist()]
    assert steps.tolist() == want
    assert steps[0] == steps[3]


@pytest.mark.promise("seed", "row alone")
@pytest.mark.parametrize("compact", COMPACT)
@pytest.mark.parametrize("how", ["grad", "no_grad"])
def test_permuting_rows_and_their_ids_permutes_the_result(how, compact, device):
    step, policy, h, x = make("ponder_eval", 25, device=device)
    halt = ac.AdaptiveHalt(step, policy, 9, compact=compact)
    ids = torch.arange(25, device=device) * 17 + 5
    order = torch.randperm(25, generator=torch.Generator().manual_seed(0)).to(device)
    with mode(how):
        a, b = halt(h, x, sample_ids=ids), halt(h[order], x[order], sample_ids=ids[order])
    assert identical(a.steps[order], b.steps) and identical(a.output[order], b.output)


@pytest.mark.promise("row alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_hazard_is_one_number_wherever_its_row_stands(dtype):
    """A policy that samples outside of the kernels compares its draw with this."""
    for logit in torch.randn(50, dtype=dtype):
        for rows in (1, 17, 18, 31, 33, 47, 63, 64):
            assert _hazard(logit.repeat(rows)).unique().numel() == 1
            assert torch.equal(_hazard(logit.repeat(rows))[:1], _hazard(logit[None]))
    far = torch.tensor([-2000.0, -20.0, 0.0, 20.0, 2000.0], dtype=dtype)
    torch.testing.assert_close(_hazard(far), torch.sigmoid(far))


@pytest.mark.promise("seed")
def test_seeds_differ_and_repeat(device):
    h = torch.zeros(200, 1, device=device)

    def steps(seed):
        return ac.AdaptiveHalt(lambda h: h, ac.PonderNet(lambda h: h[:, 0], seed=seed).eval(), 9)(h).steps

    assert torch.equal(steps(1), steps(1)) and not torch.equal(steps(1), steps(2))
    state = torch.get_rng_state()
    steps(1)
    assert torch.equal(state, torch.get_rng_state())  # torch's own generator is left alone


# --- Confidence, FixedSteps, and users' own -----------------------------------------------------------------
@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy"])
def test_certain_logits_exit_at_once_and_uniform_ones_never(measure, device):
    logits = torch.tensor([[900.0, 0.0, -900.0], [0.0, 0.0, 0.0]], device=device)
    result = ac.AdaptiveHalt(lambda h: h, ac.Confidence(0.99, measure), 3)(logits)
    assert result.steps.tolist() == [1, 3] and result.status.tolist() == [HALTED, MAX_STEPS]


def test_confidence_exits_at_exactly_the_threshold(device):
    result = ac.AdaptiveHalt(lambda h: h * 2, ac.Confidence(0.5, "max_prob"), 3)(
        torch.zeros(2, 2, device=device)
    )
    assert result.steps.tolist() == [1, 1]


def test_convergence_waits_for_its_patience(device):
    # The row moves by 1 at every step but those listed.
    pauses = {0: (2, 4, 5), 1: (2, 3), 2: ()}
    script = torch.ones(3, 9, device=device)
    for row, steps in pauses.items():
        script[row, list(steps)] = 0.0
    state = torch.cat([torch.zeros(3, 2, device=device), script], 1)  # count, value, script

    def step(s):
        n = int(s[0, 0])
        return torch.cat([s[:, :1] + 1, s[:, 1:2] + s[:, 2 + n : 3 + n], s[:, 2:]], 1)

    def run(patience):
        policy = ac.Convergence(0.5, "absolute", patience)
        return ac.AdaptiveHalt(step, policy, 9, readout=lambda s: s[:, 1])(state).steps.tolist()

    assert run(1) == [3, 3, 9]
    assert run(2) == [6, 4, 9]
    assert run(3) == [9, 9, 9]


def test_convergence_of_a_fixed_point_iteration(device):
    x = torch.tensor([0.1, 0.5, 0.9], device=device, dtype=torch.float64)
    result = ac.AdaptiveHalt(lambda z, x: torch.cos(x * z), ac.Convergence(1e-9), 200)(torch.ones_like(x), x)
    assert bool((result.status == ac.Status.HALTED).all())
    torch.testing.assert_close(result.output, torch.cos(x * result.output), rtol=1e-8, atol=1e-8)
    assert result.steps.tolist() == sorted(result.steps.tolist()) and result.steps[0] < result.steps[2]


@pytest.mark.parametrize(
    "name", [n for n in POLICIES if n not in ("act", "ponder", "budget", "weighted_budget")]
)
def test_cost_without_one_of_its_own_is_the_number_of_steps(name, device):
    step, policy, h, x = make(name, 9, device=device)
    result = ac.AdaptiveHalt(step, policy, 5)(h, x)
    assert torch.equal(result.cost, result.steps.float()) and not result.cost.requires_grad


def test_log_prob_of_a_policy_is_differentiable(device):
    step, policy, h, x = make("budget", 9, device=device)
    result = ac.AdaptiveHalt(step, policy, 6)(h, x)
    (g,) = torch.autograd.grad(result.log_prob.sum(), policy.head.bias)
    assert float(g) == pytest.approx(0.25 * float(result.steps.sum()), rel=1e-5)


def test_policy_sees_matching_rows_of_everything(device):
    """A view's state, previous, carry and row have the same rows, compacted or not."""
    seen = []

    class Watch(ac.Policy):
        def begin(self, run):
            return (torch.arange(run.batch, device=run.device),)

        def decide(self, view):
            live = view.row >= 0
            assert torch.equal(view.carry[0][live], view.row[live])
            assert torch.equal(view.state[live, 0].long(), view.row[live])
            assert torch.equal(view.previous[live, 1] + 1, view.state[live, 1])
            seen.append(view.step)
            return ac.Decision(halt=view.row % 4 < view.step, carry=view.carry)

    rows = torch.arange(12.0, device=device)
    state = torch.stack([rows, torch.zeros(12, device=device)], 1)
    for compact in COMPACT:
        for how in ("grad", "no_grad"):
            with mode(how):
                # With a longer lag the host calls once more, before it knows that no row is left.
                halt = ac.AdaptiveHalt(
                    lambda s: s + rows.new_tensor([0.0, 1.0]), Watch(), 8, compact=compact, lag=1
                )
                result = halt(state)
            assert torch.equal(result.steps, torch.arange(12, device=device) % 4 + 1)
    assert max(seen) == 4


@pytest.mark.parametrize("name", WITH_HEAD)
def test_policies_show_their_options(name):
    assert ("threshold=0.9" if name == "act" else "prior=0.2") in repr(make(name)[1])
    assert "measure='margin'" in repr(ac.Confidence(0.5, "margin")) and "n=3" in repr(ac.FixedSteps(3))
