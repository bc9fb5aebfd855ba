"""Calibration: many thresholds in one pass, the budget, the guarantee of a risk, and what is saved."""

from __future__ import annotations

import copy
import io
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import adaptcomp_ext as ac
from adaptcomp_ext.nn.calibration.bounds import certified, p_value, rows_needed
from tests.helpers.halting import Cell, Head

M = 9


class Approach(nn.Module):
    """Logits that grow towards x, slowly or fast."""

    def forward(self, state, x, rate):
        return state + rate * (x - state)


def batch(rows, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = 5 * torch.randn(rows, 4, generator=g)
    return torch.zeros(rows, 4), x, 0.05 + 0.5 * torch.rand(rows, 1, generator=g)


def batches(sizes=(40, 1, 24)):
    return [batch(n, seed) for seed, n in enumerate(sizes)]


POLICIES = {
    "confidence": lambda: ac.Confidence(0.6),
    "margin": lambda: ac.Confidence(0.6, "margin"),
    "entropy": lambda: ac.Confidence(0.6, "entropy"),
    "ahead": lambda: ac.Confidence(0.6, lookahead=1),
    "convergence": lambda: ac.Convergence(0.1),
    "patient": lambda: ac.Convergence(0.5, norm="absolute", patience=2),
    "act": lambda: ac.ACT(Head(bias=-0.5)),
    "announced": lambda: ac.Confidence(0.6, lookahead=1),
}


class Exits(nn.Module):
    """Three layers with a classifier each, of which the later ones see twice the features."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(3, 8), nn.Linear(8, 16), nn.Linear(16, 16)])
        self.heads = nn.ModuleList([nn.Linear(8, 4), nn.Linear(16, 4), nn.Linear(16, 4)])


def brute(halt, data, values):
    """Mean steps and outputs of each threshold, from a run of its own."""
    name, steps, outputs = halt.policy.calibrated.name, [], []
    halt = copy.deepcopy(halt).eval()
    for value in values:
        setattr(halt.policy, name, value)
        with torch.no_grad():
            results = [halt(*arguments) for arguments in data]
        steps.append(torch.cat([r.steps for r in results]).double().mean().item())
        outputs.append(torch.cat([r.output for r in results]))
    return steps, outputs


@pytest.mark.promise("calibration")
@pytest.mark.parametrize("min_steps", [1, 3])
@pytest.mark.parametrize("name", POLICIES)
def test_one_pass_finds_what_a_run_of_each_threshold_does(name, min_steps):
    halt = ac.AdaptiveHalt(Approach(), POLICIES[name](), max_steps=M, min_steps=min_steps)
    data = batches()
    data[0][1][3] = math.nan  # this row ends at its first step
    seen = []

    def metric(output, target):
        seen.append(output.clone())
        return output.nan_to_num(7.0).sum(1)

    curve = ac.compute_curve(halt, data, metric)
    steps, outputs = brute(halt, data, curve.threshold.tolist())
    np.testing.assert_array_equal(curve.mean_steps, steps)
    assert len(set(steps)) > 4
    want = [float(o.nan_to_num(7.0).sum(1).double().mean()) for o in outputs]
    np.testing.assert_allclose(curve.metric, want, rtol=1e-5)
    if name != "act":  # the outputs themselves, for the first batch: bitwise
        for got, expected in zip(seen, outputs, strict=False):
            assert torch.equal(got.nan_to_num(7.0), expected[:40].nan_to_num(7.0))


def test_a_head_for_each_exit_is_followed():
    exits = Exits()
    halt = ac.AdaptiveHalt(exits.layers, ac.Confidence(0.5), max_steps=3, readout=exits.heads)
    data = [torch.randn(50, 3), torch.randn(20, 3)]
    curve = ac.compute_curve(halt, data)
    assert curve.mean_steps.tolist() == brute(halt, [(x,) for x in data], curve.threshold.tolist())[0]
    assert len(set(curve.mean_steps)) > 4 and len(curve.fixed_metric) == 3 and curve.fixed_metric[2] == 1


def test_the_baseline_is_a_fixed_number_of_steps():
    halt = ac.AdaptiveHalt(Approach(), ac.Confidence(0.9), max_steps=M)
    data = [(arguments, arguments[1].argmax(1)) for arguments in batches()]
    curve = ac.compute_curve(halt, data, lambda output, target: output.sum(1), targets=True)
    assert curve.fixed_steps.tolist() == list(range(1, M + 1))
    for n in (1, 4, M):
        fixed = ac.AdaptiveHalt(Approach(), ac.FixedSteps(n), max_steps=M)
        want = torch.cat([fixed(*arguments).output.sum(1) for arguments, _ in data]).double().mean()
        assert curve.fixed_metric[n - 1] == pytest.approx(float(want), rel=1e-6)
    assert ac.compute_curve(ac.AdaptiveHalt(Cell(), ac.ACT(Head())), [cells()]).fixed_steps.size == 0


def cells(rows=8):
    return torch.zeros(rows, 4), torch.randn(rows, 4)


def test_a_curve_prints_and_plots():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    halt = ac.AdaptiveHalt(Approach(), ac.Confidence(0.9), max_steps=M)
    curve = ac.compute_curve(halt, batches())
    assert curve.name == "agreement" and curve.rows == 65 and curve.metric[0] == 1.0
    assert "mean steps" in str(curve) and len(str(curve).splitlines()) > 5
    axes = curve.plot()
    assert len(axes.lines) == 2 and axes.get_xlabel() == "mean steps per row"
    assert curve.plot(axes) is axes and len(axes.lines) == 4
    matplotlib.pyplot.close("all")


# --- a budget -----------------------------------------------------------------------------------------------
@pytest.mark.promise("calibration")
@pytest.mark.parametrize("budget", [4.0, 6.25])
@pytest.mark.parametrize("name", POLICIES)
def test_a_budget_is_met_from_below(name, budget):
    halt = ac.AdaptiveHalt(Approach(), POLICIES[name](), max_steps=M)
    data = batches((200, 100))
    report = ac.calibrate(halt, data, budget=budget, loss=lambda output, _: output[:, 0] * 0)
    assert report.met and report.mean_steps <= budget
    assert getattr(halt.policy, report.setting) == report.threshold
    steps, _ = brute(halt, data, [report.threshold])
    assert steps == [report.mean_steps]
    candidates = halt.policy.calibrated.candidates
    grid = [
        candidates[i] + (candidates[i + 1] - candidates[i]) * k / 3
        for i in range(len(candidates) - 1)
        for k in range(3)
    ]
    rival = max((s for s in brute(halt, data, grid)[0] if s <= budget), default=0.0)
    assert report.mean_steps >= rival - 0.005 * budget


def test_a_budget_that_cannot_be_met_gets_the_cheapest_threshold():
    halt = ac.AdaptiveHalt(Approach(), ac.Convergence(1e-3), max_steps=M)  # at least two steps
    report = ac.calibrate(halt, batches(), budget=1.5)
    assert not report.met and report.mean_steps == 2.0 and "NOT MET" in str(report)
    assert "the cheapest is set" in str(report)
    report = ac.calibrate(halt, batches(), budget=M + 1)  # more than anything takes
    assert report.met and report.threshold == 0.0 and halt.policy.tol == 0.0


def test_an_iterator_is_read_once():
    halt = ac.AdaptiveHalt(Approach(), ac.Confidence(0.9), max_steps=M)
    first = ac.calibrate(halt, batches(), budget=3.0)
    assert ac.calibrate(halt, iter(batches()), budget=3.0).threshold == first.threshold


# --- a risk -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rows", "errors", "alpha"), [(20, 0, 0.1), (50, 3, 0.1), (200, 1, 0.02), (9, 9, 0.5)]
)
def test_the_binomial_p_value_is_the_tail(rows, errors, alpha):
    a = Fraction(alpha)
    tail = sum(math.comb(rows, k) * a**k * (1 - a) ** (rows - k) for k in range(errors + 1))
    assert p_value(errors, rows, alpha, True) == pytest.approx(float(tail), rel=1e-9)


def test_the_other_p_value_is_that_of_hoeffding_and_bentkus():
    # exp(−n KL(0.05 ‖ 0.1)) and e P(Bin(100, 0.1) ≤ 5), from tables.
    hoeffding = math.exp(-100 * (0.05 * math.log(0.5) + 0.95 * math.log(0.95 / 0.9)))
    assert p_value(5.0, 100, 0.1, False) == pytest.approx(min(hoeffding, math.e * 0.0575769), rel=1e-5)
    assert p_value(4.5, 100, 0.1, False) <= p_value(5.0, 100, 0.1, False)
    assert p_value(10.0, 100, 0.1, False) == 1.0 == p_value(90.0, 100, 0.1, False)
    assert p_value(0, 0, 0.1, True) == 1.0


@pytest.mark.promise("calibration")
@pytest.mark.parametrize("binary", [True, False])
def test_p_values_are_at_most_u_with_probability_at_most_u(binary):
    g, alpha, rows, runs = torch.Generator().manual_seed(0), 0.1, 150, 1500
    losses = torch.rand(runs, rows, generator=g)
    losses = (losses < alpha).double() if binary else 2 * alpha * losses.double()
    p = torch.tensor([p_value(float(total), rows, alpha, binary) for total in losses.sum(1)])
    for u in (0.05, 0.2, 0.5):
        assert float((p <= u).double().mean()) <= u + 3 * math.sqrt(u * (1 - u) / runs)


def test_tests_go_on_until_the_first_that_fails():
    assert certified([0.01, 0.04, 0.2, 0.001], 0.05) == 2
    assert certified([], 0.05) == 0 == certified([0.5, 0.0], 0.05)
    assert rows_needed(0.02, 0.05) == 149
    assert p_value(0, 149, 0.02, True) <= 0.05 < p_value(0, 148, 0.02, True)


class Scripted(nn.Module):
    """Two class logits per step, from a script of confidences and of whether class 1, the label, has them."""

    def forward(self, state, confidence, right):
        step, _ = state
        c = confidence.gather(1, step[:, None])[:, 0]
        r = right.gather(1, step[:, None])[:, 0]
        high, low = c.log(), (1 - c).log()
        return step + 1, torch.stack([torch.where(r, low, high), torch.where(r, high, low)], 1)


GRID = [0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6]


def draw(rows, g):
    """Confidences that rise, and answers that are right about as often as their confidence says."""
    confidence = 0.55 + 0.44 * torch.rand(rows, 5, generator=g).sort(1).values
    right = torch.rand(rows, 1, generator=g) < confidence
    return confidence, right


def risks():
    """The risk at each threshold, of a large sample, by the definition."""
    confidence, right = draw(400_000, torch.Generator().manual_seed(99))
    for value in GRID:
        reached = confidence >= value
        last = torch.where(reached.any(1), reached.double().argmax(1), torch.tensor(4))
        yield float((~right.gather(1, last[:, None])).double().mean())


@pytest.mark.promise("calibration")
@pytest.mark.parametrize("binary", [True, False])
def test_the_risk_is_bounded_as_often_as_promised(binary):
    delta, rows, runs = 0.1, 250, 150
    true = list(risks())
    assert true == sorted(true)
    halt = ac.AdaptiveHalt(
        Scripted(), ac.Confidence(0.9), max_steps=5, readout=lambda state: state[1], check_rows=False
    )
    g = torch.Generator().manual_seed(int(binary))
    # A bound that the fourth threshold keeps and the fifth just exceeds.
    alpha = true[4] - 0.002 if binary else true[4] / 2 - 0.001
    good = sum(r * (1 if binary else 0.5) <= alpha for r in true)
    assert good == 4

    def loss(output, target):
        wrong = output.argmax(1) != target
        return wrong if binary else wrong * 0.5

    violations = useful = 0
    for _ in range(runs):
        confidence, right = draw(rows, g)
        start = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, 2)
        item = (start, confidence, right), torch.ones(rows, dtype=torch.int64)
        report = ac.calibrate(halt, [item], risk=(alpha, delta), loss=loss, targets=True, candidates=GRID)
        chosen = GRID.index(report.threshold)
        violations += report.met and chosen >= good
        useful += report.met and chosen > 0
    assert violations / runs <= delta + 3 * math.sqrt(delta * (1 - delta) / runs)
    assert useful / runs > (0.5 if binary else 0.3)


def test_a_risk_that_cannot_be_certified_gets_the_most_careful_threshold():
    halt = ac.AdaptiveHalt(Approach(), ac.Confidence(0.5), max_steps=M)
    report = ac.calibrate(halt, batches((100,)), risk=(0.02, 0.05))
    assert not report.met and halt.policy.threshold == 1.0 == report.threshold
    assert "At least 149 rows" in str(report) and "NOT MET" in str(report)
    report = ac.calibrate(halt, batches((100, 100)), risk=(0.02, 0.05))
    assert report.met and report.note == "" and report.loss <= 0.02
    assert report.mean_steps < M and (report.p_values[report.candidates >= report.threshold] <= 0.05).all()


# --- what the module keeps ----------------------------------------------------------------------------------
@pytest.mark.promise("calibration", "modules")
def test_the_threshold_is_saved_with_the_module():
    halt = ac.AdaptiveHalt(Cell(), ac.ACT(Head()), max_steps=M)
    before = halt.state_dict()
    assert "policy.threshold" not in before
    report = ac.calibrate(halt, [cells(64)], budget=2.0)
    saved = halt.state_dict()
    assert (
        saved.keys() == {*before, "policy.threshold"} and saved["policy.threshold"].item() == report.threshold
    )
    for copied in (copy.deepcopy(halt), pickle.loads(pickle.dumps(halt))):
        assert copied.policy.threshold == report.threshold and copied.state_dict().keys() == saved.keys()

    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    fresh = ac.AdaptiveHalt(Cell(seed=3), ac.ACT(Head()), max_steps=M)
    keys = fresh.load_state_dict(torch.load(file, weights_only=True))
    assert not keys.missing_keys and not keys.unexpected_keys
    assert fresh.policy.threshold == report.threshold and fresh.state_dict().keys() == saved.keys()
    arguments = cells()
    assert torch.equal(fresh(*arguments).steps, halt(*arguments).steps)

    halt.load_state_dict(before)  # a checkpoint from before: the threshold stays
    assert halt.policy.threshold == report.threshold
    halt.policy.threshold = 0.5  # an assignment counts
    assert halt.state_dict()["policy.threshold"].item() == 0.5
    with pytest.raises(RuntimeError, match="threshold: expected a number in"):
        fresh.load_state_dict({**saved, "policy.threshold": torch.tensor(2.0)})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        fresh.load_state_dict({**saved, "policy.measure": torch.tensor(2.0)})


def test_the_module_comes_out_as_it_went_in():
    policy = ac.Confidence(0.75)
    halt = ac.AdaptiveHalt(nn.Sequential(nn.Dropout(0.5)), policy, max_steps=3)
    halt.step[0].eval()
    modes = [m.training for m in halt.modules()]

    def fails(output, target):
        raise RuntimeError("no such target")

    with pytest.raises(RuntimeError, match="no such target"):
        ac.calibrate(halt, [torch.randn(4, 3)], budget=2.0, loss=fails)
    assert halt.policy is policy and policy.threshold == 0.75 and "threshold" not in policy.state_dict()
    assert modes == [m.training for m in halt.modules()]
    ac.compute_curve(halt, [torch.randn(4, 3)])
    assert policy.threshold == 0.75 and modes == [m.training for m in halt.modules()]


class Grown(ac.Policy):
    """Halts where the first number exceeds a limit; a policy of a user's."""

    def __init__(self, limit, inner=None):
        super().__init__()
        self.limit, self.inner = limit, nn.ModuleList(inner or [])

    def decide(self, view):
        halt = view.state[:, 0].abs() > self.limit
        for policy in self.inner:
            halt = halt | policy.decide(view).halt
        return ac.Decision(halt)


def test_policies_of_users_name_their_threshold():
    halt = ac.AdaptiveHalt(Approach(), Grown(1.0), max_steps=M)
    with pytest.raises(ValueError, match="policy: expected one with a threshold, got Grown"):
        ac.calibrate(halt, batches(), budget=4.0)
    with pytest.raises(ValueError, match="candidates: expected values for limit"):
        ac.calibrate(halt, batches(), budget=4.0, setting="limit")
    limits = [8.0, 4.0, 2.0, 1.0, 0.5]
    report = ac.calibrate(halt, batches(), budget=4.0, setting="limit", candidates=limits)
    assert (
        report.met and halt.policy.limit == report.threshold and halt.state_dict().keys() == {"policy.limit"}
    )

    halt = ac.AdaptiveHalt(Approach(), Grown(9.0, [ac.Confidence(0.9), ac.Confidence(0.9)]), max_steps=M)
    report = ac.calibrate(halt, batches(), budget=4.0, setting="inner.1.threshold")
    assert report.met and halt.policy.inner[1].threshold == report.threshold != 0.9
    assert halt.policy.inner[0].threshold == 0.9 and "policy.inner.1.threshold" in halt.state_dict()


BAD = [
    ({}, ValueError, "budget: expected either"),
    ({"budget": 2.0, "risk": (0.1, 0.1)}, ValueError, "budget: expected either"),
    ({"budget": 0.5}, ValueError, "budget: expected a mean number of steps"),
    ({"budget": "4"}, TypeError, "budget: expected a number"),
    ({"risk": 0.1}, TypeError, "risk: expected a pair"),
    ({"risk": (0.0, 0.1)}, ValueError, "risk: expected alpha in"),
    ({"risk": (0.1, 1.0)}, ValueError, "risk: expected delta in"),
    ({"budget": 2.0, "loss": 3}, TypeError, "loss: expected a callable"),
    ({"budget": 2.0, "targets": 1}, TypeError, "targets: expected a bool"),
    ({"budget": 2.0, "targets": True}, TypeError, r"loader: expected pairs \(arguments, target\)"),
    ({"budget": 2.0, "setting": 3}, TypeError, "setting: expected the name"),
    ({"budget": 2.0, "setting": "nothing"}, ValueError, "setting: expected the name of a threshold"),
    ({"budget": 2.0, "setting": "measure"}, TypeError, "setting: expected measure to be a number"),
    ({"budget": 2.0, "candidates": []}, TypeError, "candidates: expected at least one number"),
    ({"budget": 2.0, "candidates": [2.0]}, ValueError, r"threshold: expected a number in \(0, 1\]"),
    ({"budget": 2.0, "loss": lambda o, t: o}, ValueError, r"loss: expected one number per row, \[40\]"),
    (
        {"budget": 2.0, "loss": lambda o, t: o[:, 0] * 0 + 2},
        ValueError,
        r"loss: expected numbers in \[0, 1\]",
    ),
]


@pytest.mark.promise("bad input")
@pytest.mark.parametrize(("options", "error", "text"), BAD)
def test_bad_input_is_refused(options, error, text):
    halt = ac.AdaptiveHalt(Approach(), ac.Confidence(0.9), max_steps=M)
    with pytest.raises(error, match=text):
        ac.calibrate(halt, batches(), **options)
    assert halt.policy.threshold == 0.9


@pytest.mark.promise("bad input")
def test_bad_loaders_and_modules_are_refused():
    halt = ac.AdaptiveHalt(Approach(), ac.Confidence(0.9), max_steps=M)
    with pytest.raises(ValueError, match="loader: expected at least one row"):
        ac.calibrate(halt, [], budget=2.0)
    with pytest.raises(TypeError, match="loader: expected an iterable"):
        ac.calibrate(halt, 3, budget=2.0)
    with pytest.raises(TypeError, match="loader: expected the arguments of a call"):
        ac.calibrate(halt, [{"state": 1}], budget=2.0)
    with pytest.raises(TypeError, match="halt: expected an AdaptiveHalt"):
        ac.calibrate(nn.Linear(2, 2), batches(), budget=2.0)
    with pytest.raises(ValueError, match="expected one with a threshold, got FixedSteps"):
        ac.compute_curve(ac.AdaptiveHalt(Approach(), ac.FixedSteps(2)), batches())
    numbers = ac.AdaptiveHalt(lambda s: s * 0.5, ac.Convergence(0.1))
    with pytest.raises(TypeError, match="halt: expected outputs that are class logits"):
        ac.calibrate(numbers, [torch.ones(4)], budget=2.0)
