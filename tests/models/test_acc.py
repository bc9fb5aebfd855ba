from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adaptcomp_ext as ac
from adaptcomp_ext.models.acc import (
    ACC,
    AlwaysGate,
    BatchMeanGate,
    Effort,
    EntropyGate,
    Gate,
    KLGate,
    MarginGate,
    NeverGate,
    Objective,
    RandomGate,
    ValueGate,
    confidence_features,
    normalised_entropy,
)
from tests.helpers.science import seeds
from tests.helpers.tensors import generator, values

stats = pytest.importorskip("scipy.stats")

D = torch.float64
CLASSES = 4


class Counted(nn.Module):
    """A network that counts its rows."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.rows: list[int] = []

    def forward(self, x):
        self.rows.append(len(x))
        return self.net(x)


def mlp(hidden: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES))


def build(**options) -> ACC:
    torch.manual_seed(0)
    options = {"variational": False, "classes": CLASSES, **options}
    return ACC(nn.Identity(), mlp(), Counted(mlp(32)), **options).double()


# --- the gated answer ---------------------------------------------------------------------------------------
@pytest.mark.promise("no work")
@pytest.mark.parametrize("answer", ["control", "mixture"])
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_answers_like_masking_and_runs_only_what_is_called(answer: str, rate: float) -> None:
    acc = build(answer=answer, mixture=0.7).eval()
    x = values((50, 5), D)
    default, control = acc.both(x)
    acc.gate.calibrate(default, rate)
    acc.control.rows.clear()
    result = acc(x)
    called = normalised_entropy(default) > acc.gate.threshold
    assert torch.equal(result.called, called) and int(called.sum()) == round(50 * rate)
    assert acc.control.rows == ([int(called.sum())] if rate else [])
    both = 0.3 * default.softmax(1) + 0.7 * control.softmax(1) if answer == "mixture" else control.softmax(1)
    expected = torch.where(called[:, None], both, default.softmax(1))
    torch.testing.assert_close(result.output.exp(), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(result.output.exp().sum(1), torch.ones(50, dtype=D))
    torch.testing.assert_close(result.default, default, rtol=0, atol=0)
    torch.testing.assert_close(
        result.control, torch.where(called[:, None], control, default), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(result.score, normalised_entropy(default), rtol=0, atol=0)


def test_gradients_reach_both_through_the_gated_answer() -> None:
    acc = build()
    acc.gate.calibrate(acc.both(values((40, 5), D))[0], 0.5)
    x = values((40, 5), D).requires_grad_()
    acc(x).output.sum().backward()
    assert all(
        p.grad is not None and bool(p.grad.any())
        for name, p in acc.named_parameters()
        if not name.startswith("gate")
    )
    assert x.grad is not None and bool(x.grad.any(dim=1).all())


@pytest.mark.promise("row alone")
def test_a_row_is_the_same_in_any_batch() -> None:
    acc = build().eval()
    x = values((30, 5), D)
    acc.gate.calibrate(acc.both(x)[0], 0.4)
    whole = acc(x)
    alone = [acc(row[None]) for row in x]
    assert [bool(r.called) for r in alone] == whole.called.tolist()
    torch.testing.assert_close(torch.cat([r.output for r in alone]), whole.output, rtol=1e-12, atol=1e-12)


class Cropped(nn.Module):
    def __init__(self, wide: int) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(3, wide, batch_first=True), nn.Linear(wide, CLASSES)

    def forward(self, s):
        return self.head(self.cell(s["steps"], s["first"][None].contiguous())[0][:, -1])


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 6)

    def forward(self, x):
        return {"steps": x, "first": self.first(x[:, 0])}


def test_recurrent_and_convolutional_backbones() -> None:
    torch.manual_seed(0)
    acc = ACC(Sequences(), Cropped(6), Cropped(6), CLASSES)
    assert isinstance(acc.default.head, ac.VariationalDropout)
    x = torch.randn(7, 5, 3)
    acc.loss(x, torch.randint(0, CLASSES, (7,)), rows=100).total.backward()
    acc.eval()
    acc.gate.calibrate(acc.both(x)[0], 0.5)
    assert acc(x).output.shape == (7, CLASSES) and 0 < int(acc(x).called.sum()) < 7
    small = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, CLASSES))
    large = nn.Sequential(nn.Conv2d(1, 9, 3), nn.ReLU(), nn.Flatten(), nn.Linear(81, CLASSES))
    images = ACC(nn.Identity(), small, large, CLASSES, variational={"per": "unit"}).eval()
    assert images(torch.randn(3, 1, 5, 5)).output.shape == (3, CLASSES)
    assert images.default[0].per == "unit" and type(small[0]) is nn.Conv2d


@pytest.mark.promise("modules")
def test_lives_like_a_module() -> None:
    acc = build(objective=Objective(effort="value")).eval()
    x = values((20, 5), D)
    acc.gate.calibrate(acc.both(x)[0], 0.3)
    expected = acc(x).output
    again = pickle.loads(pickle.dumps(copy.deepcopy(acc)))
    torch.testing.assert_close(again(x).output, expected, rtol=0, atol=0)
    other = build(objective=Objective(effort="value")).eval()
    other.load_state_dict(acc.state_dict())  # the threshold is part of it
    assert float(other.gate.threshold) == float(acc.gate.threshold) != 0
    torch.testing.assert_close(other(x).output, expected, rtol=0, atol=0)
    half = build().float().eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert half(x.float()).output.dtype in (torch.bfloat16, torch.float32)


# --- the loss -----------------------------------------------------------------------------------------------
def reference(acc: ACC, x, y, objective: Objective, rows: int, share: float) -> torch.Tensor:
    """Compute the objective by its formula, row by row."""
    default, control = acc.both(x)
    first = [-default[i].log_softmax(0)[y[i]] for i in range(len(y))]
    second = [-control[i].log_softmax(0)[y[i]] for i in range(len(y))]
    mean = sum(float(v.detach()) for v in first) / len(y)
    total = torch.zeros((), dtype=D)
    for i in range(len(y)):
        weight = min(float(first[i].detach()) / mean, objective.need_cap) if objective.need else 1.0
        p = (control[i] / objective.temperature).softmax(0)
        p = p if objective.mutual else p.detach()
        q = (default[i] / objective.temperature).softmax(0)
        kl = (p * (p / q).log()).sum()
        total = (
            total
            + weight * second[i]
            + objective.hard * first[i]
            + objective.effort * objective.temperature**2 * kl
        )
    description = ac.nn.description_length(acc.default)
    return total / len(y) + share * objective.beta * description / rows


@pytest.mark.parametrize(
    "objective",
    [
        Objective(),
        Objective(need=False, temperature=1.0),
        Objective(effort=0.0, hard=0.25),
        Objective(effort=2.5, mutual=True, need_cap=1.5, beta=3.0),
    ],
)
def test_loss_is_the_formula(objective: Objective) -> None:
    torch.manual_seed(0)
    acc = (
        ACC(nn.Identity(), mlp(), mlp(16), CLASSES, objective=objective).double().eval()
    )  # in evaluation there is no noise
    x, y = values((9, 5), D), torch.randint(0, CLASSES, (9,), generator=generator(1))
    parts = acc.loss(x, y, rows=50, beta_factor=0.5)
    expected = reference(acc, x, y, objective, 50, 0.5)
    torch.testing.assert_close(parts.total, expected, rtol=1e-10, atol=1e-10)
    weights = [p for name, p in acc.named_parameters() if not name.startswith("gate")]
    ours = torch.autograd.grad(parts.total, weights, allow_unused=True)
    theirs = torch.autograd.grad(expected, weights, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    default, control = acc.both(x)
    torch.testing.assert_close(parts.default, F.cross_entropy(default, y))
    torch.testing.assert_close(parts.control, F.cross_entropy(control, y))
    assert not any(getattr(parts, name).requires_grad for name in parts._fields[1:])


def test_a_need_that_is_nothing_weighs_all_alike() -> None:
    from adaptcomp_ext.models.acc.loss import need_weights

    assert need_weights(torch.zeros(3), 20.0).tolist() == [1, 1, 1]
    torch.testing.assert_close(
        need_weights(torch.tensor([0.0, 1.0, 2.0]), 20.0), torch.tensor([0.0, 1.0, 2.0])
    )
    assert float(need_weights(torch.tensor([0.0] * 99 + [1.0]), 20.0).max()) == 20


def trained_prices(objective: str) -> tuple[float, float, torch.Tensor, torch.Tensor]:
    """Mean λ before and after training an effort network, and λ of rows where control helps and where not."""
    torch.manual_seed(0)
    effort = Effort(CLASSES, objective)
    sure = F.one_hot(torch.randint(0, CLASSES, (256,)), CLASSES) * 8.0
    default = torch.cat((sure, torch.randn(256, CLASSES) * 0.1))
    saved = torch.cat((torch.zeros(256), torch.full((256,), 1.5)))
    deviation = torch.cat((torch.full((256,), 0.01), torch.full((256,), 1.0)))
    optimizer = torch.optim.Adam(effort.parameters(), 0.02)
    prices = []
    for _ in range(300):
        cost, price = effort(default, deviation, saved)
        optimizer.zero_grad()
        cost.backward()
        optimizer.step()
        prices.append(float(price.mean()))
    _, price = effort(default, deviation, saved)
    return prices[0], prices[-1], price[256:], price[:256]


def test_the_literal_price_collapses() -> None:
    before, after, _, _ = trained_prices("literal")
    assert after < 0.1 * before


def test_the_value_price_is_low_where_control_helps() -> None:
    _, _, helped, idle = trained_prices("value")
    assert float(helped.max()) < float(idle.min())
    assert float(helped.mean()) == pytest.approx(1 / 2.5, abs=0.05)  # v = 1.5 nats
    assert float(idle.mean()) > 0.9


# --- gates --------------------------------------------------------------------------------------------------
def test_scores() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0], [1.0, 1.0, -50.0, -50.0]], dtype=D)
    entropy = EntropyGate().score(logits)
    torch.testing.assert_close(entropy, torch.tensor([1.0, 0.0, 0.5], dtype=D), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        MarginGate().score(logits), torch.tensor([1.0, 0.0, 1.0], dtype=D), rtol=0, atol=1e-12
    )
    x = values((6, CLASSES), D)
    p = x.softmax(1)
    torch.testing.assert_close(EntropyGate().score(x), -(p * p.log()).sum(1) / math.log(CLASSES))
    features = confidence_features(x)
    assert features.shape == (6, 4 + 3 + 2 * CLASSES)
    torch.testing.assert_close(features[:, 1], p.max(1).values)
    assert torch.autograd.gradcheck(confidence_features, [x.clone().requires_grad_()])


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.25, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_calibration(rate: float, rows: int) -> None:
    logits = values((rows, CLASSES), D)
    for gate in (EntropyGate(), MarginGate(), KLGate(CLASSES)):
        called = gate.calibrate(logits, rate)
        assert called == pytest.approx(round(rate * rows) / rows)
        assert float(gate(logits).double().mean()) == pytest.approx(called)


def test_ties_are_not_called_beyond_the_rate() -> None:
    logits = torch.cat((torch.zeros(6, CLASSES), torch.eye(CLASSES)[[0, 1]] * 9))
    gate = EntropyGate()
    assert gate.calibrate(logits, 0.5) == 0  # six rows are alike: four of them cannot be called alone
    assert gate.calibrate(logits, 0.8) == pytest.approx(6 / 8)


def test_a_score_that_is_no_number_calls() -> None:
    logits = torch.zeros(3, CLASSES)
    logits[1, 0] = math.nan
    gate = EntropyGate()
    gate.threshold.fill_(0.999)
    logits[2, 0] = 30
    assert gate(logits).tolist() == [True, True, False]


def test_fixed_and_random_gates() -> None:
    logits = values((4000, CLASSES))
    assert bool(AlwaysGate()(logits).all()) and not bool(NeverGate()(logits).any())
    assert AlwaysGate().calibrate(logits, 1.0) == 1 and NeverGate().calibrate(logits, 0.0) == 0
    with pytest.raises(ValueError, match=r"rate: expected 1, the only rate of AlwaysGate, got 0.5"):
        AlwaysGate().calibrate(logits, 0.5)
    gate = RandomGate()
    for rate in (0.0, 0.3, 1.0):
        torch.manual_seed(0)
        gate.calibrate(logits, rate)
        assert float(gate(logits).double().mean()) == pytest.approx(rate, abs=0.03)
    assert not torch.equal(gate.score(logits), gate.score(logits))


def test_batch_mean_is_one_decision() -> None:
    logits = values((200, CLASSES)) * torch.linspace(0.1, 6, 200)[:, None]
    gate = BatchMeanGate(EntropyGate(), 20)
    assert gate.calibrate(logits, 0.3) == pytest.approx(0.3)
    decisions = [gate(part) for part in logits.split(20)]
    assert all(len(set(d.tolist())) == 1 for d in decisions)
    assert [bool(d[0]) for d in decisions] == [True] * 3 + [False] * 7
    assert gate(logits[:0]).shape == (0,)


def known_value(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A habit that is right where it is confident and guesses elsewhere; control is always right."""
    torch.manual_seed(seed)
    targets = torch.randint(0, CLASSES, (rows,))
    sharpness = torch.rand(rows, 1) * 5
    default = sharpness * F.one_hot(targets, CLASSES) + torch.randn(rows, CLASSES)
    control = 7.0 * F.one_hot(targets, CLASSES) + 0.3 * torch.randn(rows, CLASSES)
    return default, control, targets, -sharpness[:, 0]


@pytest.mark.parametrize("kind", [ValueGate, KLGate])
@pytest.mark.parametrize("seed", range(seeds(3)))
def test_learned_gates_find_the_value_of_control(kind: type, seed: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    gate = kind(CLASSES)
    default, control, targets, _ = known_value(2000, seed)
    history = gate.fit(default, control, targets, seed=seed)
    assert history[-1] < history[0]
    default, control, targets, value = known_value(2000, seed + 10)
    score = gate.score(default).detach()
    assert bool((score >= 0).all())
    assert stats.spearmanr(score, value).statistic > 0.6
    saved = F.cross_entropy(default, targets, reduction="none") - F.cross_entropy(
        control, targets, reduction="none"
    )
    assert float(score.mean()) == pytest.approx(float(saved.clamp(-5, 5).mean()), rel=0.25)  # in nats
    if kind is ValueGate:
        gate.calibrate(default, 0.2)
        assert gate.price == float(gate.threshold) > 0


def test_fitting_is_reproducible_and_leaves_the_random_state_alone() -> None:
    default, control, targets, _ = known_value(300, 0)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    gates = [ValueGate(CLASSES), ValueGate(CLASSES)]
    torch.manual_seed(5)
    for gate in gates:
        gate.fit(default, control, targets, seed=3)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(gates[0].score(default), gates[1].score(default))
    gates[1].fit(default, control, targets, seed=4)
    assert not torch.equal(gates[0].score(default), gates[1].score(default))


class Own(Gate):
    def score(self, logits):
        return logits[:, 0]


def test_a_gate_of_ones_own() -> None:
    acc = build(gate=Own()).eval()
    x = values((20, 5), D)
    acc.gate.threshold.fill_(0.1)
    result = acc(x)
    assert torch.equal(result.called, result.default[:, 0] > 0.1)
    with pytest.raises(NotImplementedError):
        Gate()(torch.zeros(1, 2))


# --- bad input ----------------------------------------------------------------------------------------------
@pytest.mark.promise("bad input")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ACC(3, mlp(), mlp()), TypeError, "encoder: expected an nn.Module"),
        (lambda: ACC(nn.Identity(), None, mlp()), TypeError, "default: expected an nn.Module"),
        (lambda: ACC(nn.Identity(), mlp(), len), TypeError, "control: expected an nn.Module"),
        (lambda: build(gate=mlp()), TypeError, "gate: expected a Gate"),
        (lambda: build(variational="yes"), TypeError, "variational: expected a bool or a mapping"),
        (lambda: build(objective={}), TypeError, "objective: expected an Objective"),
        (lambda: build(answer="both"), ValueError, "answer: expected one of"),
        (lambda: build(mixture=1.5), ValueError, "mixture: expected a number in"),
        (lambda: build(classes=1), ValueError, "classes: expected an int >= 2"),
        (lambda: build(classes=5)(values((3, 5), D)), ValueError, "default: expected class logits of shape"),
        (
            lambda: build().loss(values((3, 5), D), torch.zeros(3, dtype=D), rows=3),
            ValueError,
            "targets: expected int64",
        ),
        (
            lambda: build().loss(values((3, 5), D), torch.zeros(3).long(), rows=0),
            ValueError,
            "rows: expected an int >= 1",
        ),
        (
            lambda: build().loss(values((3, 5), D), torch.zeros(3).long(), rows=3, beta_factor=2.0),
            ValueError,
            "beta_factor: expected a number in",
        ),
        (lambda: Objective(effort="free"), ValueError, "effort: expected a number or one of"),
        (lambda: Objective(effort=-1.0), ValueError, "effort: expected a number in"),
        (lambda: Objective(temperature=0.0), ValueError, "temperature: expected a number in"),
        (lambda: Objective(need=1), TypeError, "need: expected a bool"),
        (lambda: Objective(need_cap=0.5), ValueError, "need_cap: expected a number in"),
        (lambda: Effort(4, "price"), ValueError, "objective: expected one of"),
        (
            lambda: EntropyGate().calibrate(torch.zeros(0, 3), 0.5),
            ValueError,
            "logits: expected at least one row",
        ),
        (lambda: EntropyGate().calibrate(torch.zeros(4, 3), 1.5), ValueError, "rate: expected a number in"),
        (lambda: EntropyGate()(torch.zeros(4)), ValueError, "logits: expected class logits"),
        (lambda: BatchMeanGate(len, 3), TypeError, "gate: expected a Gate"),
        (
            lambda: ValueGate(4)(torch.zeros(2, 3)),
            ValueError,
            r"logits: expected class logits of shape \[n, 4\]",
        ),
        (
            lambda: ValueGate(3).fit(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1).long()),
            ValueError,
            "default: expected at least 2 rows",
        ),
        (
            lambda: ValueGate(3).fit(torch.zeros(4, 3), torch.zeros(3, 3), torch.zeros(4).long()),
            ValueError,
            "control: expected 4 rows",
        ),
        (
            lambda: ValueGate(3).fit(torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4)),
            ValueError,
            "targets: expected int64",
        ),
    ],
)
def test_bad_input(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
