"""lookahead=1: what a policy says at step n ends the row after step n + 1."""

from __future__ import annotations

import pytest
import torch

import adaptcomp_ext as ac
from tests.helpers.halting import COMPACT, HALTED, MAX_STEPS, MODES, Head, identical, make, mode

NAMES = ["max_prob", "relative", "absolute", "fixed_int", "fixed_tensor", "q_halt", "budget"]


def steps_later(first, min_steps, max_steps):
    """Return the step after the first one at which the policy says halt and min_steps allows it."""
    says = [n for n in first if n + 1 >= min_steps and n < max_steps]
    return (says[0] + 1, HALTED) if says else (max_steps, MAX_STEPS)


@pytest.mark.promise("formula")
@pytest.mark.parametrize("min_steps", [1, 4])
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_rows_end_one_step_after_what_the_policy_says(name, how, min_steps, device):
    rows, most = 9, 7
    step, policy, h, x = make(name, rows, device=device, requires_grad=how != "no_grad")
    said = [[] for _ in range(rows)]  # the steps at which the policy says halt, if rows run to the end

    class Ask(ac.Policy):
        def begin(self, run):
            return policy.begin(run)

        def decide(self, view):
            decision = policy.decide(view)
            for r in decision.halt.nonzero()[:, 0].tolist():
                said[int(view.row[r])].append(view.step)
            return decision._replace(halt=torch.zeros_like(decision.halt))

    ac.AdaptiveHalt(step, Ask(), most)(h, x)
    policy.lookahead = 1
    if name == "q_halt":  # exploration speaks of the step at which a row ends
        policy.exploration = 0.0
        said = [[] for _ in range(rows)]
        policy.lookahead = 0
        ac.AdaptiveHalt(step, Ask(), most)(h, x)
        policy.lookahead = 1
    results = []
    for compact in COMPACT:
        with mode(how):
            results.append(ac.AdaptiveHalt(step, policy, most, min_steps, compact=compact)(h, x))
    want = [steps_later(s, min_steps, most) for s in said]
    for result in results:
        assert list(zip(result.steps.tolist(), result.status.tolist(), strict=True)) == want
        assert identical(result.output, results[0].output)
        last = ac.AdaptiveHalt(step, ac.FixedSteps(result.steps), most)(h, x)
        assert identical(result.output, last.output)  # the readout after that step


def test_exploration_bounds_the_step_at_which_a_row_ends(device):
    h = torch.zeros(500, 1, device=device)
    now, later = (
        ac.AdaptiveHalt(lambda h: h, ac.QHalt(lambda h: h[:, 0] + 1, 0.5, 3, lookahead), 6)(h).steps
        for lookahead in (0, 1)
    )
    assert torch.equal(later, now.clamp(min=2))


@pytest.mark.promise("bad input")
def test_weighted_and_traced_policies_refuse_it_by_name():
    for policy in (ac.ACT(Head()), ac.PonderNet(Head()), ac.PonderNet(Head()).eval()):
        with pytest.raises(ValueError, match=f"lookahead: expected 0 for {type(policy).__name__}"):
            policy.lookahead = 1
        assert policy.lookahead == 0

    class Mine(ac.Policy):
        weighted = True

        def decide(self, view):
            return ac.Decision(view.row >= 0, weight=view.readout[:, 0])

    mine = Mine()
    mine.lookahead = 1
    with pytest.raises(ValueError, match="lookahead: expected 0 for Mine"):
        ac.AdaptiveHalt(lambda h: h, mine, 3)(torch.ones(2, 2))


@pytest.mark.promise("bad input")
@pytest.mark.parametrize("value", [2, -1, True, 1.0, "1", None])
def test_other_values_are_refused(value):
    for make_one in (
        lambda: ac.Confidence(0.5, lookahead=value),
        lambda: ac.Convergence(0.5, lookahead=value),
        lambda: ac.FixedSteps(3, lookahead=value),
        lambda: ac.Bernoulli(Head(), lookahead=value),
        lambda: ac.QHalt(Head(), lookahead=value),
    ):
        with pytest.raises((TypeError, ValueError), match=r"^lookahead: expected"):
            make_one()


def test_a_known_loop_gives_way_to_a_lookahead():
    halt = ac.AdaptiveHalt(lambda h: h * 2, ac.FixedSteps(2), 6)
    h = torch.ones(3, 2)
    with torch.no_grad():
        assert halt(h).steps.tolist() == halt(h).steps.tolist() == [2] * 3
        halt.policy.lookahead = 1
        assert halt(h).steps.tolist() == [3] * 3 and halt(h).output.tolist() == [[8.0, 8.0]] * 3
        halt.policy.lookahead = 0
        assert halt(h).steps.tolist() == [2] * 3


def test_a_cell_of_the_package_runs_in_the_loop():
    halt = ac.AdaptiveHalt(ac.cells.GRU(3, 4), ac.Convergence(1e9, lookahead=1), 6)
    x = torch.randn(5, 3)
    assert halt(torch.zeros(5, 4), x).steps.tolist() == [3] * 5
    assert "looks ahead" in halt.plan(torch.zeros(5, 4), x).why
