"""AnyOf and AllOf: which step, whose carry, and the costs and log-probabilities of all members."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch

import adaptcomp_ext as ac
from tests.helpers.halting import COMPACT, HALTED, MAX_STEPS, MODES, NONFINITE, Head, identical, make, mode

M = 8
MEMBERS = ["max_prob", "relative", "absolute", "fixed_int", "fixed_tensor", "bernoulli", "q_halt", "budget"]


class Ask(ac.Policy):
    """Write down at which steps a policy halts which rows, of rows that all run to the end."""

    def __init__(self, policy, rows):
        super().__init__()
        self.policy = policy
        self.says = torch.zeros(M + 1, rows, dtype=torch.bool)

    @property
    def reads_logits(self):
        return self.policy.reads_logits

    def begin(self, run):
        return self.policy.begin(run)

    def decide(self, view):
        decision = self.policy.decide(view)
        self.says[view.step, view.row[view.row >= 0].cpu()] = decision.halt[view.row >= 0].cpu()
        return decision._replace(halt=torch.zeros_like(decision.halt))


class Never(ac.Policy):
    """Halt no row."""

    def decide(self, view):
        return ac.Decision(torch.zeros_like(view.row, dtype=torch.bool))


def says(policy, step, h, x):
    ask = Ask(policy, h.shape[0])
    with torch.no_grad():
        ac.AdaptiveHalt(step, ask, M)(h, x)
    return ask.says


def first(said, min_steps):
    """Return step and status of each row."""
    ends = []
    for row in said.T.tolist():
        steps = [n for n, halts in enumerate(row) if halts and n >= min_steps]
        ends.append((steps[0], HALTED) if steps else (M, MAX_STEPS))
    return ends


def pairs():
    return [pytest.param(a, b, id=f"{a}-{b}") for a, b in itertools.pairwise([*MEMBERS, MEMBERS[0]])]


@pytest.mark.promise("formula", "compaction")
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize(("one", "other"), pairs())
def test_rows_end_at_the_first_step_that_any_or_all_say(one, other, how, device):
    rows = 11
    step, a, h, x = make(one, rows, device=device, requires_grad=how != "no_grad")
    b = make(other, rows, device=device, seed=1)[1]
    a_says, b_says = says(a, step, h, x), says(b, step, h, x)
    for cls, said in ((ac.AnyOf, a_says | b_says), (ac.AllOf, a_says & b_says)):
        for min_steps, compact in ((1, True), (1, False), (4, "auto")):
            halt = ac.AdaptiveHalt(step, cls(a, b), M, min_steps, compact=compact)
            with mode(how):
                result = halt(h, x)
            ends = list(zip(result.steps.tolist(), result.status.tolist(), strict=True))
            if one == "bernoulli" or other == "bernoulli":  # which has no action at the last step
                ends = [e for e in ends if e[0] < M]
                assert ends == [e for e in first(said, min_steps) if e[0] < M]
            else:
                assert ends == first(said, min_steps)
            same = ac.AdaptiveHalt(step, ac.FixedSteps(result.steps), M)(h, x)
            assert identical(result.output, same.output)


def test_nested_combinations(device):
    rows = 12
    step, a, h, x = make("max_prob", rows, device=device)
    b, c, d = (make(name, rows, device=device)[1] for name in ("relative", "fixed_tensor", "budget"))
    said = [says(p, step, h, x) for p in (a, b, c, d)]
    policy = ac.AllOf(ac.AnyOf(a, ac.AllOf(b, d)), c)
    want = first((said[0] | (said[1] & said[3])) & said[2], 1)
    for compact in COMPACT:
        result = ac.AdaptiveHalt(step, policy, M, compact=compact)(h, x)
        assert list(zip(result.steps.tolist(), result.status.tolist(), strict=True)) == want


def test_a_member_that_said_so_before_does_not_count(device):
    class At(ac.Policy):
        def __init__(self, *steps):
            super().__init__()
            self.steps = steps

        def decide(self, view):
            return ac.Decision(torch.full_like(view.row, view.step in self.steps, dtype=torch.bool))

    h = torch.zeros(3, 2, device=device)

    def steps(policy):
        return ac.AdaptiveHalt(lambda h: h, policy, 7)(h).steps.tolist()

    assert steps(ac.AllOf(At(2, 5), At(3, 5))) == [5] * 3
    assert steps(ac.AllOf(At(2), At(3))) == [7] * 3
    assert steps(ac.AllOf(At(2), ac.FixedSteps(2))) == [2] * 3
    assert steps(ac.AnyOf(At(6), At(4, 5))) == [4] * 3
    assert steps(ac.AnyOf(ac.FixedSteps(5, lookahead=1), ac.FixedSteps(7))) == [6] * 3
    assert steps(ac.AllOf(ac.FixedSteps(2), ac.FixedSteps(3), lookahead=1)) == [4] * 3


@pytest.mark.promise("gradient")
@pytest.mark.parametrize("how", MODES)
def test_costs_and_log_probabilities_are_sums(how, device):
    rows = 9
    step, budget, h, x = make("budget", rows, device=device, requires_grad=how != "no_grad")
    one, two = (ac.Bernoulli(Head(device=device, bias=-3.0), seed=seed) for seed in (1, 2))
    budget.limit = 4.0
    with mode(how):
        result = ac.AdaptiveHalt(step, ac.AnyOf(budget, one, two, ac.FixedSteps(6)), M)(h, x)
        same = ac.FixedSteps(result.steps)
        alone = [
            ac.AdaptiveHalt(step, ac.AnyOf(ac.AllOf(p, Never()), same), M)(h, x) for p in (budget, one, two)
        ]
    assert len(result.steps.unique()) > 2 and all(torch.equal(r.steps, result.steps) for r in alone)
    torch.testing.assert_close(result.cost, alone[0].cost)
    torch.testing.assert_close(result.log_prob, sum(r.log_prob for r in alone))
    plain = ac.AdaptiveHalt(step, ac.AnyOf(ac.FixedSteps(6), ac.Confidence(0.4)), M)(h, x)
    assert plain.log_prob is None and torch.equal(plain.cost, plain.steps.float())
    if how != "no_grad":
        (g,) = torch.autograd.grad(result.log_prob.sum(), one.head.bias)
        assert float(g.abs()) > 0


@pytest.mark.promise("not finite")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_members_logit_that_is_not_finite_ends_its_row(value, device):
    h = torch.zeros(3, 2, device=device)
    h[1, 0] = value
    h[:, 1] = torch.arange(3.0)

    class Look(torch.nn.Module):
        def forward(self, state):
            return torch.where(state == 1, value, -9.0)

    for member in (ac.Bernoulli(Look(), seed=0), ac.QHalt(Look()).eval()):
        halt = ac.AdaptiveHalt(lambda k: k * 1, ac.AnyOf(ac.QHalt(lambda k: k * 0.0 - 5.0), member), 3)
        result = halt(torch.arange(3.0, device=device))
        end = (3, MAX_STEPS) if value == -torch.inf else (1, NONFINITE)
        assert (int(result.steps[1]), int(result.status[1])) == end
        assert result.steps[0] == 3 and result.steps[2] == 3


@pytest.mark.promise("row alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_row_is_the_same_alone_and_in_any_batch(dtype, device):
    step, a, h, x = make("relative", 13, dtype=dtype, device=device)
    b, c = (make(name, 13, dtype=dtype, device=device)[1] for name in ("bernoulli", "max_prob"))
    halt = ac.AdaptiveHalt(step, ac.AnyOf(ac.AllOf(a, c), b), M)
    ids = torch.arange(13, device=device) * 3 + 1
    whole = halt(h, x, sample_ids=ids)
    for chosen in ([5], [12, 0], list(range(13))[::-1]):
        for halt.compact in COMPACT:
            some = halt(h[chosen], x[chosen], sample_ids=ids[chosen])
            for got, want in zip(some, whole, strict=True):
                assert got is want is None or identical(got, want[chosen])


@pytest.mark.promise("modules")
def test_copies_and_state():
    step, a, h, x = make("bernoulli", 8)
    policy = ac.AnyOf(a, ac.AllOf(ac.FixedSteps(torch.arange(8) + 2), ac.Confidence(0.4)))
    halt = ac.AdaptiveHalt(step, policy, M)
    want = halt(h, x).steps
    for other in (copy.deepcopy(halt), pickle.loads(pickle.dumps(halt))):
        assert torch.equal(other(h, x).steps, want)
    assert {"policies.0.head.k", "policies.0.head.bias", "policies.1.policies.0.n"} == set(
        policy.state_dict()
    )
    assert "Confidence(threshold=0.4" in repr(policy)


@pytest.mark.promise("bad input")
def test_weighted_members_are_refused_by_name():
    with pytest.raises(ValueError, match="got ACT in training mode at 1"):
        ac.AnyOf(ac.FixedSteps(2), ac.ACT(Head()))
    with pytest.raises(ValueError, match="got PonderNet in training mode at 0"):
        ac.AllOf(ac.PonderNet(Head()))
    policy = ac.AnyOf(ac.PonderNet(Head()).eval(), ac.FixedSteps(2))
    step, _, h, x = make("fixed_int", 5)
    halt = ac.AdaptiveHalt(step, policy, 4).eval()
    assert int(halt(h, x).steps.max()) <= 2
    with pytest.raises(ValueError, match="got PonderNet in training mode at 0"):
        halt.train()(h, x)


@pytest.mark.promise("bad input")
@pytest.mark.parametrize("cls", [ac.AnyOf, ac.AllOf])
def test_bad_input(cls):
    with pytest.raises(ValueError, match="policies: expected at least one policy, got none"):
        cls()
    with pytest.raises(
        TypeError, match=r"policies: expected policies, each an argument of its own, got list"
    ):
        cls([ac.FixedSteps(1), ac.FixedSteps(2)])
    with pytest.raises(TypeError, match=r"policies: expected policies, .* at 1"):
        cls(ac.FixedSteps(1), torch.nn.Tanh())
    policy = cls(ac.FixedSteps(1))
    policy.policies[0] = torch.nn.Tanh()
    with pytest.raises(TypeError, match=r"policies: expected an adaptcomp_ext.Policy, got Tanh"):
        ac.AdaptiveHalt(lambda h: h, policy, 3)(torch.ones(2, 2))
    with pytest.raises(ValueError, match="readout: Confidence expects class logits"):
        ac.AdaptiveHalt(lambda h: h, cls(ac.FixedSteps(1), ac.Confidence(0.5)), 3)(torch.ones(2))


def test_minus_infinity_masks_a_class_where_a_member_reads_logits(device):
    logits = torch.tensor([[2.0, 0.0, -torch.inf], [-torch.inf, 0.1, 0.0]], device=device)
    result = ac.AdaptiveHalt(lambda h: h, ac.AnyOf(ac.Confidence(0.8), ac.FixedSteps(3)), 4)(logits)
    assert result.steps.tolist() == [1, 3] and result.status.tolist() == [HALTED, HALTED]


@pytest.mark.promise("rows apart", "held")
def test_the_heads_of_members_are_checked():
    class Mixing(torch.nn.Module):
        def forward(self, state):
            return state.mean(1) - state.mean()

    h = torch.randn(5, 3)
    policy = ac.AnyOf(ac.FixedSteps(2), ac.AllOf(ac.Bernoulli(Mixing())))
    with pytest.raises(ValueError, match="head: expected each row's result to depend on that row alone"):
        ac.AdaptiveHalt(torch.tanh, policy, 3)(h)
    outside = torch.nn.Linear(3, 1)
    policy = ac.AnyOf(ac.FixedSteps(2), ac.Bernoulli(lambda h: outside(h)))
    with pytest.warns(UserWarning, match="head is a plain function that uses parameters"):
        ac.AdaptiveHalt(torch.tanh, policy, 3)(h)
