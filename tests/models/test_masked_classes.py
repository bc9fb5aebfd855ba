"""Classes masked by logits of −∞: the models' results are those without these classes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaptcomp_ext.models.acc import (
    ACC,
    BatchMeanGate,
    EntropyGate,
    KLGate,
    MarginGate,
    Objective,
    ValueGate,
    confidence_features,
    normalised_entropy,
)
from adaptcomp_ext.models.acc.features import kl_divergence, margin
from adaptcomp_ext.models.acc.loss import need_weights
from tests.helpers.tensors import values

D = torch.float64
INF = math.inf
CLASSES, LEFT = 5, [0, 1, 2]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Masked(nn.Linear):
    """Return logits of five classes, the last two of which are masked."""

    def forward(self, x):
        return torch.cat([super().forward(x)[:, LEFT], x.new_full((len(x), 2), -INF)], 1)


class Fewer(Masked):
    """Return the logits without the masked classes."""

    def forward(self, x):
        return super().forward(x)[:, LEFT]


def build(kind: type, seed: int = 0, **options) -> ACC:
    torch.manual_seed(seed)
    classes = CLASSES if kind is Masked else len(LEFT)
    return ACC(
        nn.Identity(), kind(4, CLASSES), kind(4, CLASSES), classes=classes, variational=False, **options
    ).double()


def weights(acc: ACC) -> list[nn.Parameter]:
    return [*acc.default.parameters(), *acc.control.parameters()]


def masked(logits: torch.Tensor) -> torch.Tensor:
    return torch.cat([logits, logits.new_full((len(logits), 2), -INF)], 1)


# --- scores -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scores_of_masked_logits(dtype: torch.dtype) -> None:
    logits = torch.tensor(
        [[2.0, 1.0, 0.0, -INF, -INF], [1.0, -INF, -INF, -INF, -INF], [3.0, 3.0, -INF, -INF, -INF]],
        dtype=dtype,
    )
    p = [math.exp(k) / (1 + math.e + math.e**2) for k in (2, 1, 0)]
    entropy = [-sum(q * math.log(q) for q in p) / math.log(5), 0.0, math.log(2) / math.log(5)]
    assert EntropyGate().score(logits).tolist() == pytest.approx(entropy, abs=1e-6)
    assert BatchMeanGate(EntropyGate(), 3).score(logits).tolist() == pytest.approx(
        [sum(entropy) / 3] * 3, abs=1e-6
    )
    assert MarginGate().score(logits).tolist() == pytest.approx([1 - p[0] + p[1], 0.0, 1.0], abs=1e-6)
    gate = EntropyGate()
    assert gate.calibrate(logits, 1 / 3) == pytest.approx(1 / 3)
    assert gate(logits).tolist() == [True, False, False]


@pytest.mark.parametrize("score", [normalised_entropy, margin, confidence_features])
def test_gradients_of_scores(score) -> None:
    logits = masked(values((6, 3), D)).requires_grad_()
    fewer = logits.detach()[:, LEFT].clone().requires_grad_()
    got, want = score(logits), score(fewer)
    if score is normalised_entropy:
        want = want * math.log(3) / math.log(5)
    if (
        score is confidence_features
    ):  # all but the entropy; then the logits less their mean, and the probabilities
        assert bool((got[:, [10, 11, 15, 16]] == 0).all())
        got, want = got[:, [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14]], want[:, 1:]
    torch.testing.assert_close(got, want)
    upstream = values(got.shape, D, seed=1)
    (g,) = torch.autograd.grad(got, logits, upstream)
    (g_want,) = torch.autograd.grad(want, fewer, upstream)
    torch.testing.assert_close(g[:, LEFT], g_want)
    assert not g[:, 3:].any()


@pytest.mark.parametrize("fill", [-INF, torch.finfo(torch.float32).min, -1e9])
def test_features_are_numbers_however_a_class_is_masked(fill: float) -> None:
    logits = values((6, CLASSES))
    logits[:, 3:] = fill
    logits[0, 1:] = fill  # one class left
    features = confidence_features(logits)
    assert bool(features.isfinite().all()) and float(features.abs().max()) < 200
    logits[:, 3:] = -INF
    logits[0, 1:] = -INF
    torch.testing.assert_close(features, confidence_features(logits))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergence_over_one_mask(temperature: float) -> None:
    p, q = (values((6, 3), D, seed=seed) for seed in (1, 2))
    masks = [masked(t).requires_grad_() for t in (p, q)]
    p, q = (t.requires_grad_() for t in (p, q))
    a, b = (p / temperature).softmax(1), (q / temperature).softmax(1)
    want = (a * (a / b).log()).sum(1)
    got = kl_divergence(*masks, temperature)
    torch.testing.assert_close(got, want)
    for g, e in zip(
        torch.autograd.grad(got.sum(), masks), torch.autograd.grad(want.sum(), (p, q)), strict=True
    ):
        torch.testing.assert_close(g[:, LEFT], e)
        assert not g[:, 3:].any()


def test_divergence_over_two_masks() -> None:
    """KL is finite where p masks more classes than q, infinite where q masks a class of p."""
    wide, narrow = torch.tensor([[0.0, 1.0, 2.0]], dtype=D), torch.tensor([[0.0, 1.0, -INF]], dtype=D)
    wide.requires_grad_()
    got = kl_divergence(narrow, wide)
    p, q = narrow.softmax(1)[0, :2], wide.softmax(1)[0, :2]
    torch.testing.assert_close(got[0], (p * (p / q).log()).sum())
    (g,) = torch.autograd.grad(got.sum(), wide)
    torch.testing.assert_close(g, wide.detach().softmax(1) - narrow.softmax(1))
    narrow.requires_grad_()
    got = kl_divergence(wide.detach(), narrow)
    assert got.tolist() == [INF]
    assert bool(torch.autograd.grad(got.sum(), narrow)[0].isfinite().all())


# --- the answer and the loss --------------------------------------------------------------------------------
@pytest.mark.parametrize("answer", ["control", "mixture"])
def test_answers(answer: str) -> None:
    acc, fewer = (build(kind, answer=answer, mixture=0.3) for kind in (Masked, Fewer))
    x = values((30, 4), D)
    for model in (acc, fewer):
        model.gate.calibrate(model.both(x)[0], 0.4)
    result, want = acc(x), fewer(x)
    assert torch.equal(result.called, want.called) and int(result.called.sum()) == 12
    assert bool((result.output[:, 3:] == -INF).all())
    torch.testing.assert_close(result.output[:, LEFT], want.output)
    y = torch.arange(30) % 3
    got, want = (
        torch.autograd.grad(F.nll_loss(r.output, y), weights(m)) for r, m in ((result, acc), (want, fewer))
    )
    for g, e in zip(got, want, strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("need", [True, False])
@pytest.mark.parametrize("mutual", [True, False])
@pytest.mark.parametrize("effort", [1.0, 0.0, "value", "literal"])
def test_loss(effort: float | str, mutual: bool, need: bool) -> None:
    objective = Objective(effort=effort, mutual=mutual, need=need)
    acc, fewer = (build(kind, objective=objective) for kind in (Masked, Fewer))
    x, y = values((12, 4), D), torch.arange(12) % 3
    got, want = (model.loss(x, y, rows=12) for model in (acc, fewer))
    for name in ("default", "control", "distill"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name))
    got.total.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in acc.parameters())
    assert all(bool(p.grad.any()) for p in weights(acc))
    if isinstance(effort, str):  # whose network sees more features
        return
    torch.testing.assert_close(got.total, want.total)
    want.total.backward()
    for p, q in zip(weights(acc), weights(fewer), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


class OtherMask(nn.Linear):
    """A network that masks the first class instead of the last two."""

    def forward(self, x):
        return torch.cat([x.new_full((len(x), 1), -INF), super().forward(x)[:, 1:]], 1)


def test_loss_where_the_masks_differ() -> None:
    """The divergence is infinite; with weight 0 the other terms remain."""
    x, y = values((12, 4), D), torch.arange(12) % 2 + 1
    for effort, total in ((1.0, INF), (0.0, None)):
        acc = build(Masked, objective=Objective(effort=effort))
        acc.control = OtherMask(4, CLASSES).double()
        loss = acc.loss(x, y, rows=12)
        assert float(loss.distill) == INF
        if total is None:
            default, control = acc.both(x)
            first, second = (F.cross_entropy(t, y, reduction="none") for t in (default, control))
            weight = (first / first.mean()).detach().clamp(max=20)
            torch.testing.assert_close(loss.total, (weight * second).mean() + first.mean())
        else:
            assert float(loss.total.detach()) == total
        loss.total.backward()
        assert all(bool(p.grad.isfinite().all()) for p in acc.parameters() if p.grad is not None)


def test_a_label_that_is_masked_makes_the_loss_infinite_and_spoils_no_gradient() -> None:
    assert need_weights(torch.tensor([1.0, INF, 0.0]), 20.0).tolist() == [0.0, 20.0, 0.0]
    x, y = values((12, 4), D), torch.full((12,), 4)
    for effort in (1.0, "value"):
        acc = build(Masked, objective=Objective(effort=effort))
        loss = acc.loss(x, y, rows=12)
        assert float(loss.total.detach()) == float(loss.default) == INF
        loss.total.backward()
        assert all(bool(p.grad.isfinite().all()) for p in acc.parameters() if p.grad is not None)


# --- learned gates ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [ValueGate, KLGate])
def test_learned_gates_find_the_value_of_control_behind_a_mask(kind: type) -> None:
    torch.manual_seed(0)
    targets = torch.randint(0, 3, (1200,))
    sharpness = torch.rand(1200, 1) * 5
    default = masked(sharpness * F.one_hot(targets, 3) + torch.randn(1200, 3))
    control = masked(7.0 * F.one_hot(targets, 3) + 0.3 * torch.randn(1200, 3))
    gate = kind(CLASSES)
    gate.fit(default[:600], control[:600], targets[:600])
    score = gate.score(default[600:]).detach()
    assert bool(score.isfinite().all())
    sure, unsure = (score[sharpness[600:, 0] > 4].mean(), score[sharpness[600:, 0] < 1].mean())
    assert float(unsure) > 3 * float(sure)
    assert gate.calibrate(default[600:], 0.25) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("label", r"targets: expected classes that are not masked, got 4 in row 2"),
        (
            "default",
            r"default: expected logits, of which -inf masks a class but not all, got \[-inf.* in row 1",
        ),
        (
            "control",
            r"control: expected logits, of which -inf masks a class but not all, got \[nan.* in row 1",
        ),
    ],
)
def test_what_no_gate_can_be_fitted_on(spoil: str, message: str) -> None:
    default, control, targets = (
        masked(values((8, 3))),
        masked(values((8, 3), seed=1)),
        torch.zeros(8, dtype=torch.int64),
    )
    if spoil == "label":
        targets[2] = 4
    elif spoil == "default":
        default[1] = -INF
    else:
        control[1, 0] = math.nan
    with pytest.raises(ValueError, match=message):
        ValueGate(CLASSES).fit(default, control, targets)


@pytest.mark.parametrize("gate", [EntropyGate(), BatchMeanGate(EntropyGate(), 2)])
def test_no_threshold_comes_of_rows_without_a_score(gate) -> None:
    logits = masked(values((8, 3)))
    logits[5] = -INF
    with pytest.raises(ValueError, match="logits: expected rows with a score, got NaN in row 5"):
        gate.calibrate(logits, 0.5)
