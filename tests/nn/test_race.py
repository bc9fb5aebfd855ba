"""Races: the first start that halts wins, with the bits it has alone, and the losers cost no further step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import adaptcomp_ext as ac
from tests.helpers.halting import Cell, Head

M = 7


class Script(ac.Policy):
    """Halts each row at a step of its own, from the last element of the state."""

    def decide(self, view):
        return ac.Decision(view.state[:, -1] <= view.step)


class Counting(nn.Module):
    """Adds x; the last element, the scripted step, stays. It notes the number of rows of each call."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def forward(self, state, x):
        self.rows.append(len(state))
        return torch.cat([state[:, :-1] * 0.5 + x, state[:, -1:]], 1)


@pytest.mark.promise("race", "no work")
@settings(max_examples=25, deadline=None)
@given(
    script=st.integers(1, 4).flatmap(
        lambda k: st.lists(st.lists(st.integers(1, M + 2), min_size=k, max_size=k), min_size=1, max_size=6)
    ),
    min_steps=st.integers(1, 3),
)
def test_the_first_start_that_halts_wins(script, min_steps):
    steps = torch.tensor(script)
    rows, starts = steps.shape
    state = torch.randn(rows, starts, 3)
    state[..., -1] = steps
    x = torch.randn(rows, 2)
    step = Counting()
    halt = ac.AdaptiveHalt(step, Script(), M, min_steps, compact=True, check_rows=False)
    with torch.no_grad():
        result, start = ac.race(halt, state, x, starts=starts)
    taken = steps.clamp(min=min_steps)
    first = taken.amin(1)
    want = [(taken[b] == first[b]).tolist().index(True) if first[b] <= M else 0 for b in range(rows)]
    assert start.tolist() == want
    assert result.steps.tolist() == first.clamp(max=M).tolist()
    # No start goes on after the winner of its row: not one step more than K times the winner's.
    running = [int((first >= n).sum()) * starts for n in range(1, M + 1)]
    assert step.rows == [n for n in running if n]
    alone = [halt(state[b, k][None], x[b : b + 1]) for b, k in enumerate(want)]
    for name in ("output", "state", "steps", "status", "cost"):
        assert torch.equal(getattr(result, name), torch.cat([getattr(a, name) for a in alone])), name


POLICIES = {
    "act": lambda: ac.ACT(Head(bias=-0.5)),
    "ponder": lambda: ac.PonderNet(Head()),
    "ponder_eval": lambda: ac.PonderNet(Head()).eval(),
    "confidence": lambda: ac.Confidence(0.4),
    "convergence": lambda: ac.Convergence(1.5),
    "announced": lambda: ac.Convergence(1.5, lookahead=1),
    "any": lambda: ac.AnyOf(ac.Convergence(1.0), ac.Confidence(0.6)),
}


@pytest.mark.promise("race")
@pytest.mark.parametrize("compact", [True, False, "auto"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_winner_has_the_bits_that_it_has_alone(name, compact):
    torch.manual_seed(0)
    rows, starts = 9, 3
    halt = ac.AdaptiveHalt(Cell(), POLICIES[name](), max_steps=M, compact=compact)
    halt.policy.train(name == "ponder")
    h, x = torch.randn(rows, starts, 4), torch.randn(rows, 4)
    result, start = ac.race(halt, h, x, starts=starts)
    assert len(set(start.tolist())) > 1 or name == "ponder"
    index = torch.arange(rows)
    alone = halt(h[index, start], x, sample_ids=index * starts + start)
    assert torch.equal(result.output, alone.output) and torch.equal(result.state, alone.state)
    assert torch.equal(result.steps, alone.steps) and torch.equal(result.cost, alone.cost)
    if result.trace is not None:
        assert all(map(torch.equal, result.trace, alone.trace))
    # Gradients reach the winners.
    parameters = list(halt.parameters())
    got = torch.autograd.grad(result.output.sum() + result.cost.sum(), parameters, allow_unused=True)
    want = torch.autograd.grad(alone.output.sum() + alone.cost.sum(), parameters, allow_unused=True)
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if w is not None:
            torch.testing.assert_close(g, w)


def test_a_start_that_is_not_finite_does_not_win():
    state = torch.tensor([[[1.0, 2.0], [1.0, 3.0]], [[1.0, 1.0], [1.0, 1.0]]])
    state[0, 0, 0] = state[1, :, 0] = torch.nan
    halt = ac.AdaptiveHalt(Counting(), Script(), M, check_rows=False)
    result, start = ac.race(halt, state, torch.ones(2, 1), starts=2)
    assert start.tolist() == [1, 0]
    assert [ac.Status(s).name for s in result.status.tolist()] == ["HALTED", "NONFINITE"]


def test_perturb_makes_the_starts():
    seen = []

    def perturb(state, start):
        seen.append((state.clone(), start.clone()))
        return state + start[:, None].float()

    halt = ac.AdaptiveHalt(Cell(), ac.Convergence(0.2), max_steps=M)
    h, x = torch.randn(4, 4), torch.randn(4, 4)
    first = ac.race(halt, h, x, starts=3, perturb=perturb)
    (state, start), *_ = seen
    assert start.tolist() == [0, 1, 2] * 4 and torch.equal(state, h.repeat_interleave(3, 0))
    states = (h[:, None] + torch.arange(3.0)[:, None]).expand(4, 3, 4)
    second = ac.race(halt, states, x, starts=3)
    assert torch.equal(first.start, second.start) and torch.equal(first.result.output, second.result.output)
    one = ac.race(halt, h[:, None], x, starts=1)
    assert torch.equal(one.result.output, halt(h, x).output) and not one.start.any()


def test_the_module_is_left_alone():
    policy = ac.Convergence(0.2)
    halt = ac.AdaptiveHalt(Cell(), policy, max_steps=M)
    h, x = torch.randn(4, 2, 4), torch.randn(4, 4)
    before = halt(h[:, 0], x)
    ac.race(halt, h, x, starts=2)
    assert halt.policy is policy and halt.check_rows
    assert torch.equal(halt(h[:, 0], x).output, before.output)
    with pytest.raises(ValueError, match="depend"):
        ac.race(ac.AdaptiveHalt(lambda s: s - s.mean(0), policy), h, starts=2)


def test_stages_that_change_the_shape():
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(3, 8), nn.Linear(8, 16), nn.Linear(16, 16)])
    heads = nn.ModuleList([nn.Linear(8, 4), nn.Linear(16, 4), nn.Linear(16, 4)])
    x = torch.randn(40, 3, 3)
    sure = heads[0](layers[0](x)).softmax(-1).amax((1, 2))  # of each row's best start at the first exit
    halt = ac.AdaptiveHalt(layers, ac.Confidence(sure.median().item()), max_steps=3, readout=heads)
    result, start = ac.race(halt, x, starts=3)
    alone = halt(x[torch.arange(40), start])
    assert len(set(result.steps.tolist())) > 1 and torch.equal(result.steps, alone.steps)
    torch.testing.assert_close(result.output, alone.output)
    for got, want in zip(result.state, alone.state, strict=True):
        torch.testing.assert_close(got, want)


# --- descents -----------------------------------------------------------------------------------------------
class Wells(nn.Module):
    """Two wells in each coordinate; the context tilts them. It notes the number of rows of each call."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.rows = []

    def forward(self, y, tilt):
        self.rows.append(len(y))
        return (self.scale * (y * y - 1).square() + tilt * y).sum(1)


@pytest.mark.promise("race", "no work")
@pytest.mark.parametrize("accept", ["always", "if_lower"])
@pytest.mark.parametrize("closed", [False, True])
def test_the_first_descent_that_converges_wins(closed, accept):
    torch.manual_seed(0)
    rows, starts = 6, 4
    energy = ac.MLPEnergy(dim_y=3, dim_context=3, hidden=8, ridge=1.0) if closed else Wells()
    options = {"step_size": 0.05, "max_steps": 60, "tol": 1e-4, "momentum": 0.3, "noise": 1e-4}
    descend = ac.EnergyDescent(energy, accept=accept, **options)
    y0, tilt = torch.randn(rows, starts, 3), 0.3 * torch.randn(rows, 3)
    with torch.no_grad():
        result, start = ac.race(descend, y0, tilt, starts=starts)
        calls = list(energy.rows) if not closed else []
        index = torch.arange(rows)
        every = descend(y0.flatten(0, 1), tilt.repeat_interleave(starts, 0))
        alone = descend(y0[index, start], tilt, sample_ids=index * starts + start)
    steps = every.steps.view(rows, starts)
    assert start.tolist() == [row.tolist().index(int(row.min())) for row in steps]
    assert result.steps.tolist() == steps.amin(1).tolist() and int(steps.max()) > int(steps.amin(1).max())
    for name in ("y", "energy", "steps", "status"):
        assert torch.equal(getattr(result, name), getattr(alone, name)), name
    if not closed:  # at the start and after each step
        evaluations = (result.steps + 1).sum().item() * starts
        assert sum(calls) == evaluations < int((every.steps + 1).sum())
    result, again = ac.race(descend, y0, tilt, starts=starts)  # with gradients
    assert torch.equal(again, start) and torch.equal(result.y, alone.y)
    result.y.sum().backward()
    assert all(p.grad is not None for p in energy.parameters() if p.requires_grad) or closed


def test_a_descent_that_none_finishes_goes_to_the_lowest_energy():
    descend = ac.EnergyDescent(Wells(), step_size=1e-3, max_steps=3, tol=0.0)
    y0 = torch.tensor([[[3.0], [1.1], [2.0]], [[torch.nan], [2.0], [torch.nan]], [[torch.nan]] * 3])
    result, start = ac.race(descend, y0, torch.zeros(3, 1), starts=3)
    assert start.tolist() == [1, 1, 0]
    assert result.status.tolist() == [ac.Status.MAX_STEPS, ac.Status.MAX_STEPS, ac.Status.NONFINITE]
    with ac.reference_kernels(), torch.no_grad():
        assert ac.race(descend, y0, torch.zeros(3, 1), starts=3).start.tolist() == [1, 1, 0]


@pytest.mark.promise("bad input")
def test_bad_input_is_refused():
    halt = ac.AdaptiveHalt(Cell(), ac.Convergence(0.2))
    h, x = torch.randn(4, 2, 4), torch.randn(4, 4)
    with pytest.raises(TypeError, match="halt: expected an AdaptiveHalt or EnergyDescent"):
        ac.race(nn.Linear(2, 2), h, x, starts=2)
    with pytest.raises(ValueError, match="starts: expected an int >= 1"):
        ac.race(halt, h, x, starts=0)
    with pytest.raises(
        ValueError, match=r"state: expected 3 starts of each row, \[B, 3, ...\], got shape \[4, 2, 4"
    ):
        ac.race(halt, h, x, starts=3)
    with pytest.raises(TypeError, match="perturb: expected a callable"):
        ac.race(halt, h[:, 0], x, starts=2, perturb=0.1)
    with pytest.raises(ValueError, match="perturb: expected 8 rows like all starts of the state"):
        ac.race(halt, h[:, 0], x, starts=2, perturb=lambda state, start: state[:4])
    with pytest.raises(ValueError, match=r"inputs\[0\]: expected 4 rows like the state"):
        ac.race(halt, h, x[:3], starts=2)
    assert ac.race(halt, h[:0], x[:0], starts=2).start.shape == (0,)
