"""Bernoulli and QHalt beyond the dense loop: the policy gradient, exploration, the loss, seeds."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn

import adaptcomp_ext as ac
from tests.helpers.halting import HALTED, MAX_STEPS, MODES, NONFINITE, identical, make, mode, philox


def start(rows, device="cpu", dtype=torch.float64):
    """Return a state (step, row)."""
    at = torch.arange(rows, dtype=dtype, device=device)
    return torch.stack([torch.zeros_like(at), at], 1)


class Counting(nn.Module):
    """Count the steps of a state (step, row)."""

    def forward(self, state):
        return state + state.new_tensor([1.0, 0.0])


# --- Bernoulli ----------------------------------------------------------------------------------------------
def expected_gradient(z, reward, min_steps, lookahead):
    """The gradient of the expected reward by enumeration of all actions: it knows no log-probability."""
    z = z.clone().requires_grad_()
    hazard, m = torch.sigmoid(z), len(z)
    total = 0.0
    going = torch.ones((), dtype=z.dtype)
    for n in range(1, m + 1):
        ends = n + lookahead
        if ends >= m:
            break
        if ends < min_steps:
            continue
        total = total + going * hazard[n - 1] * reward[ends - 1]
        going = going * (1 - hazard[n - 1])
    total = total + going * reward[m - 1]
    return torch.autograd.grad(total, z)[0]


@pytest.mark.promise("formula", "gradient")
@pytest.mark.parametrize(("min_steps", "lookahead"), [(1, 0), (3, 0), (1, 1), (3, 1)])
def test_policy_gradient_equals_that_of_the_enumerated_expectation(min_steps, lookahead):
    """Every row has one of all sequences of actions, and its probability as a weight."""
    m = 5
    z = torch.tensor([0.3, -1.0, 0.8, -0.2, 0.5], dtype=torch.float64)
    reward = torch.tensor([0.2, 1.5, -0.7, 2.0, -1.0], dtype=torch.float64)
    want = expected_gradient(z, reward, min_steps, lookahead)
    # Seeds whose draws give each sequence, found by trying.
    wanted = [n for n in range(1, m + 1) if n >= min_steps]
    found = {}
    for seed in itertools.count():
        policy = ac.Bernoulli(lambda k: z[k[:, 0].long() - 1], seed=seed, lookahead=lookahead)
        halt = ac.AdaptiveHalt(Counting(), policy, m, min_steps, check_rows=False)
        found.setdefault(int(halt(start(1)).steps), seed)
        if set(found) >= set(wanted if not lookahead else [n for n in wanted if n >= 2]):
            break
    gradient = torch.zeros_like(z)
    total = 0.0
    for steps, seed in found.items():
        logits = z.clone().requires_grad_()
        policy = ac.Bernoulli(lambda k, z=logits: z[k[:, 0].long() - 1], seed=seed, lookahead=lookahead)
        result = ac.AdaptiveHalt(Counting(), policy, m, min_steps, check_rows=False)(start(1))
        probability = math.exp(float(result.log_prob.detach()))
        total += probability
        (g,) = torch.autograd.grad(result.log_prob.sum(), logits, allow_unused=True)
        gradient += probability * reward[steps - 1] * (torch.zeros_like(z) if g is None else g)
    assert total == pytest.approx(1.0, abs=1e-12)  # the probabilities of all sequences of actions
    torch.testing.assert_close(gradient, want, atol=1e-12, rtol=1e-10)


def test_sampled_policy_gradient_is_unbiased():
    """The mean over many rows comes near to the gradient of the expectation."""
    rows, m = 40_000, 4
    z = torch.tensor([-0.5, 0.4, -1.0, 3.0], dtype=torch.float64)
    reward = torch.tensor([1.0, -1.0, 2.0, 0.5], dtype=torch.float64)
    logits = z.clone().requires_grad_()
    halt = ac.AdaptiveHalt(Counting(), ac.Bernoulli(lambda k: logits[k[:, 0].long() - 1], seed=1), m)
    result = halt(torch.zeros(rows, 2, dtype=torch.float64))
    (g,) = torch.autograd.grad((result.log_prob * reward[result.steps - 1]).mean(), logits)
    torch.testing.assert_close(g, expected_gradient(z, reward, 1, 0), atol=0.02, rtol=0.0)
    assert float(g[3]) == 0.0  # at the last step there is no action


def test_a_row_that_is_forced_to_end_says_max_steps(device):
    head = lambda h: torch.full_like(h[:, 0], 9.0)  # noqa: E731
    result = ac.AdaptiveHalt(lambda h: h, ac.Bernoulli(head), 3, min_steps=3)(torch.ones(4, 2, device=device))
    assert result.steps.tolist() == [3] * 4 and result.status.tolist() == [MAX_STEPS] * 4
    assert not result.log_prob.any()


@pytest.mark.promise("not finite")
@pytest.mark.parametrize("how", MODES)
def test_a_row_that_is_not_finite_keeps_the_log_probability_of_its_steps(how, device):
    z = torch.tensor([[-1.0, -2.0, -1.0], [-9.0, math.nan, -1.0], [-1.0, -2.0, -math.inf]], device=device).T
    z.requires_grad_(how != "no_grad")
    step, head = Counting(), lambda k: z[k[:, 0].long() - 1, k[:, 1].long()]
    policy = ac.Bernoulli(head, seed=0)
    with mode(how):
        result = ac.AdaptiveHalt(step, policy, 3, check_rows=False)(start(3, device, torch.float32))
    assert int(result.status[1]) == NONFINITE and int(result.steps[1]) == 2
    torch.testing.assert_close(
        result.log_prob[1].detach(), torch.nn.functional.logsigmoid(torch.tensor(9.0, device=device))
    )
    assert bool(result.log_prob.isfinite().all())
    if how != "no_grad":
        (g,) = torch.autograd.grad(result.log_prob.sum(), z)
        assert bool(g.isfinite().all()) and float(g[1, 1]) == 0.0


# --- seeds --------------------------------------------------------------------------------------------------
SAMPLED = {
    "bernoulli": lambda head, **o: ac.Bernoulli(head, **o),
    "q_halt": lambda head, **o: ac.QHalt(head, exploration=0.6, **o),
}


@pytest.mark.promise("seed")
@pytest.mark.parametrize("name", SAMPLED)
def test_without_a_seed_each_call_draws_one_from_torchs_generator(name, device):
    h = torch.zeros(200, 1, device=device)
    halt = ac.AdaptiveHalt(lambda h: h, SAMPLED[name](lambda h: h[:, 0] + 0.5), 9)

    def steps(seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        return halt(h).steps

    first = steps(0)
    assert not torch.equal(first, steps()) and torch.equal(first, steps(0))
    halt.policy.seed = 7
    before = torch.get_rng_state()
    assert torch.equal(steps(), steps()) and torch.equal(before, torch.get_rng_state())


@pytest.mark.promise("seed")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", SAMPLED)
def test_a_checkpoint_draws_the_same_again(name, reentrant):
    torch.manual_seed(0)
    head, x = nn.Linear(3, 1), torch.randn(30, 3, requires_grad=True)
    halt = ac.AdaptiveHalt(nn.Tanh(), SAMPLED[name](head), 9)

    def run(x):
        result = halt(x)
        return result.output if result.log_prob is None else result.output * result.log_prob[:, None]

    grads = []
    for wrapped in (run, lambda x: torch.utils.checkpoint.checkpoint(run, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        x.grad = None
        wrapped(x).sum().backward()
        grads.append(x.grad)
    assert identical(*grads)


@pytest.mark.promise("seed", "row alone")
@pytest.mark.parametrize("name", ["bernoulli", "q_halt"])
def test_draws_follow_the_sample(name, device):
    step, policy, h, x = make(name, 25, device=device)
    halt = ac.AdaptiveHalt(step, policy, 9)
    ids = torch.arange(25, device=device) * 17 + 2**40
    order = torch.randperm(25, generator=torch.Generator().manual_seed(0)).to(device)
    a, b = halt(h, x, sample_ids=ids), halt(h[order], x[order], sample_ids=ids[order])
    assert identical(a.steps[order], b.steps) and identical(a.output[order], b.output)
    alone = [halt(h[i : i + 1], x[i : i + 1], sample_ids=ids[i : i + 1]) for i in range(25)]
    assert a.steps.tolist() == [int(r.steps) for r in alone]
    if name == "bernoulli":
        assert identical(a.log_prob, torch.cat([r.log_prob for r in alone]))


@pytest.mark.promise("modules")
@pytest.mark.parametrize("name", ["bernoulli", "q_halt"])
def test_copies(name):
    step, policy, h, x = make(name, 8)
    halt = ac.AdaptiveHalt(step, policy, 9)
    want = halt(h, x)
    for other in (copy.deepcopy(halt), pickle.loads(pickle.dumps(halt))):
        assert torch.equal(other(h, x).steps, want.steps)
    step, policy, _, _ = make(name, 8, seed=5)
    other = ac.AdaptiveHalt(step, policy, 9)
    other.load_state_dict(halt.state_dict())
    assert torch.equal(other(h, x).steps, want.steps)


# --- QHalt --------------------------------------------------------------------------------------------------
def test_one_logit_halts_where_it_is_positive(device):
    z = torch.tensor([-1.0, 0.0, 1e-30, 2.0], device=device)
    for wide in (False, True):
        policy = ac.QHalt(lambda h, wide=wide: h[:, :1] if wide else h[:, 0]).eval()
        result = ac.AdaptiveHalt(lambda h: h, policy, 3)(z[:, None])
        assert result.steps.tolist() == [3, 3, 1, 1]
        assert result.status.tolist() == [MAX_STEPS, MAX_STEPS, HALTED, HALTED]


def test_equal_values_go_on_and_minus_infinity_is_valid(device):
    inf = math.inf
    q = [[1, 1], [1, 0], [-inf, -inf], [0, -inf], [-inf, 0], [inf, 0], [0, inf], [math.nan, 0]]
    policy = ac.QHalt(lambda h: h[:, 1:])
    policy.eval()
    q = torch.tensor(q, device=device)
    halt = ac.AdaptiveHalt(lambda h: h * 1, policy, 2, readout=lambda h: h[:, :1], check_rows=False)

    class Lookup(nn.Module):
        def forward(self, h):
            return q[h[:, 0].long()]

    halt.policy.head = Lookup()
    result = halt(torch.arange(8.0, device=device)[:, None])
    assert result.steps.tolist() == [2, 1, 2, 1, 2, 1, 1, 1]
    assert result.status.tolist() == [2, 1, 2, 1, 2, 3, 3, 3]


@pytest.mark.promise("formula")
def test_exploration_draws_a_first_step_for_each_row(device):
    rows, m = 20_000, 6
    h = torch.zeros(rows, 1, device=device)
    policy = ac.QHalt(lambda h: h[:, 0] + 1, exploration=0.3, seed=11)
    halt = ac.AdaptiveHalt(lambda h: h, policy, m)
    steps = halt(h).steps
    share = torch.bincount(steps, minlength=m + 1)[1:].double() / rows
    want = torch.full((m,), 0.3 / (m - 1), dtype=torch.float64, device=device)
    want[0] = 0.7
    torch.testing.assert_close(share, want, atol=0.012, rtol=0.0)
    for i in range(20):  # the draws are those of Philox
        explores, at = philox(11, i, 0) < 0.3, philox(11, i, 2**32)
        assert int(steps[i]) == (2 + int(at * (m - 1)) if explores else 1)
    assert set(halt.eval()(h).steps.tolist()) == {1}
    halt.train()
    halt.policy.exploration = 0.0
    assert set(halt(h).steps.tolist()) == {1}
    halt.policy.exploration, halt.max_steps = 1.0, 1
    assert set(halt(h).steps.tolist()) == {1}


def traced(q, steps, status=None):
    """A result with a trace whose outputs are the logits q[row][step - 1]."""
    at = [(n, r) for n in range(1, max(steps) + 1) for r in range(len(steps)) if steps[r] >= n]
    outputs = torch.stack([torch.tensor(q[r][n - 1], dtype=torch.float64) for n, r in at]).requires_grad_()
    row, step = torch.tensor([r for _, r in at]), torch.tensor([n for n, _ in at])
    trace = ac.Trace(outputs, torch.ones(len(at)), row, step)
    state = torch.zeros(len(steps), 1)
    status = torch.tensor(status or [HALTED] * len(steps), dtype=torch.int8)
    return ac.HaltResult(state, state, torch.tensor(steps), state[:, 0], status, trace, None), at


def entropy(logit, target):
    p = 1 / (1 + math.exp(-logit))
    return -target * math.log(p) - (1 - target) * math.log(1 - p)


@pytest.mark.promise("formula")
@pytest.mark.parametrize("with_following", [True, False])
def test_loss_against_the_formula(with_following):
    q = [[(0.1, 0.7), (0.4, -0.3), (1.2, 0.2)], [(-0.5, 0.6)], [(0.3, 0.1), (0.9, -0.4)]]
    after = [(0.25, 2.0), (-1.0, -0.7), (0.8, 1.1)]
    result, at = traced(q, [3, 1, 2])
    right = [(n + r) % 2 == 0 for n, r in at]
    policy = ac.QHalt(lambda q: q)
    following = torch.tensor(after) if with_following else None
    loss = policy.loss(result, torch.tensor(right), following=following, max_steps=3)
    want = []
    for (n, r), ok in zip(at, right, strict=True):
        halt, go = q[r][n - 1]
        later = q[r][n] if n < len(q[r]) else after[r]
        value = later[0] if n == 3 else max(later)
        if n == len(q[r]) and not with_following:
            value = go
        want.append(entropy(halt, float(ok)) + entropy(go, 1 / (1 + math.exp(-value))))
    torch.testing.assert_close(loss, torch.tensor(want, dtype=torch.float64))
    (g,) = torch.autograd.grad(loss.sum(), result.trace.outputs)
    ends = torch.tensor([n == len(q[r]) for n, r in at])
    assert bool((g[:, 1] == 0).any()) != with_following and (with_following or not g[ends, 1].any())


def test_loss_of_one_logit_and_of_a_row_that_is_not_finite():
    q = [[(0.1,), (math.nan,)], [(-0.5,), (2.0,)]]
    result, _ = traced(q, [2, 2], [NONFINITE, HALTED])
    right = torch.tensor([True, False, True, True])
    loss = ac.QHalt(lambda q: q).loss(result, right)
    want = [entropy(0.1, 1.0), entropy(-0.5, 0.0), 0.0, entropy(2.0, 1.0)]
    torch.testing.assert_close(loss, torch.tensor(want, dtype=torch.float64))
    (g,) = torch.autograd.grad(loss.sum(), result.trace.outputs)
    assert bool(g.isfinite().all()) and float(g[2]) == 0.0
    given = ac.QHalt(lambda q: q * 0).loss(result, right, logits=result.trace.outputs[:, 0])
    torch.testing.assert_close(given, loss)


@pytest.mark.promise("bad input")
def test_bad_input_of_the_loss():
    result, _ = traced([[(0.1, 0.2)], [(0.1, 0.2)]], [1, 1])
    right, policy = torch.tensor([True, False]), ac.QHalt(lambda q: q)
    with pytest.raises(ValueError, match="result: expected one with a trace"):
        policy.loss(result._replace(trace=None), right)
    with pytest.raises(ValueError, match=r"logits: expected shape \[2, 2\]"):
        policy.loss(result, right, logits=torch.zeros(3, 2))
    with pytest.raises(TypeError, match="right: expected a bool"):
        policy.loss(result, right.float())
    with pytest.raises(ValueError, match=r"following: expected shape \[2, 2\]"):
        policy.loss(result, right, following=torch.zeros(2), max_steps=3)
    with pytest.raises(ValueError, match="max_steps: expected that of the AdaptiveHalt"):
        policy.loss(result, right, following=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="following: expected None for a head with one logit"):
        policy.loss(result, right, logits=torch.zeros(2), following=torch.zeros(2, 2))


@pytest.mark.promise("bad input")
@pytest.mark.parametrize("columns", [0, 3])
def test_a_head_with_another_number_of_logits_is_refused(columns):
    halt = ac.AdaptiveHalt(lambda h: h, ac.QHalt(lambda h: h[:, :columns]), 3)
    with pytest.raises(ValueError, match=r"head: expected 2 logits per row, shape \[5, 2\]"):
        halt(torch.zeros(5, 4))
