"""Every gate, calibrated to call rates, on the same logits: who is called, and how good the answers are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import adaptcomp_ext as ac
from adaptcomp_ext.models import acc

from ..data import Condition, StroopMNIST
from ..device import here, seeded
from ..runs import mcnemar
from ..vision import accuracy

__all__ = [
    "BATCH",
    "GATES",
    "RATES",
    "RIVALS",
    "Stream",
    "build_gates",
    "call_by_truth",
    "held_out",
    "read_test",
    "survey",
]

RATES = (0.05, 0.1, 0.2, 0.3, 0.4)
GATES = ("value", "kl", "entropy", "margin", "random", "batch-mean")
"""The gates that have a rate; "always" and "never" have none."""
RIVALS = ("value", "entropy")
"""The gates whose numbers of calls the gate that knows the truth is given."""
BATCH = 256
MIXED = "mixed"


class Stream(NamedTuple):
    """Items that both networks have read: digits and inks, int64 [N], and the logits of each, [N, C]."""

    digits: Tensor
    inks: Tensor
    default: Tensor
    control: Tensor

    def part(self, chosen: Tensor | slice) -> Stream:
        """Return some of the items."""
        return Stream(*(field[chosen] for field in self))


@torch.no_grad()
def _read(model: ac.models.ACC, images: Tensor, digits: Tensor, inks: Tensor, batch: int = 500) -> Stream:
    default, control = zip(*(model.both(here(part)) for part in images.split(batch)), strict=True)
    return Stream(here(digits), here(inks), torch.cat(default), torch.cat(control))


def read_test(model: ac.models.ACC, data: StroopMNIST) -> dict[str, Stream]:
    """Read the test digits in each condition; and "mixed": half of them congruent, the others incongruent."""
    streams = {}
    for condition in Condition:
        images, inks = data.recoloured(condition)
        streams[condition.name.lower()] = _read(model, images, data.digits, inks)
    return {**streams, MIXED: _mixed(streams["congruent"], streams["incongruent"], seed=0)}


def _mixed(congruent: Stream, incongruent: Stream, seed: int) -> Stream:
    order = torch.randperm(len(congruent.digits), generator=seeded(seed))
    half = len(order) // 2
    pairs = zip(congruent.part(order[:half]), incongruent.part(order[half:]), strict=True)
    again = torch.randperm(len(order), generator=seeded(seed + 1))
    return Stream(*map(torch.cat, pairs)).part(again)


def held_out(model: ac.models.ACC, data: StroopMNIST) -> tuple[Stream, Stream, Stream]:
    """Read held-out items for fitting and for calibrating, and the latter's digits as a mixed stream.

    The first two are coloured as in training, and have no digit in common.
    """
    half = len(data) // 2
    as_trained = _read(model, data.images, data.digits, data.inks)
    sides = []
    for condition in (Condition.CONGRUENT, Condition.INCONGRUENT):
        images, inks = data.recoloured(condition, seed=1)
        sides.append(_read(model, images[half:], data.digits[half:], inks[half:]))
    fitting, calibrating = as_trained.part(slice(0, half)), as_trained.part(slice(half, None))
    return fitting, calibrating, _mixed(sides[0], sides[1], seed=2)


def build_gates(fitting: Stream, seed: int) -> dict[str, acc.Gate]:
    """Build all gates by name, the learned ones fitted."""
    classes = fitting.default.shape[1]
    learned = {"value": acc.ValueGate(classes), "kl": acc.KLGate(classes)}
    for gate in learned.values():
        gate.fit(fitting.default, fitting.control, fitting.digits, seed=seed)
    return {
        **learned,
        "entropy": acc.EntropyGate(),
        "margin": acc.MarginGate(),
        "random": acc.RandomGate(),
        "batch-mean": acc.BatchMeanGate(acc.EntropyGate(), BATCH),
        "always": acc.AlwaysGate(),
        "never": acc.NeverGate(),
    }


def _called(gate: acc.Gate, stream: Stream) -> Tensor:
    batches = stream.default.split(gate.batch) if isinstance(gate, acc.BatchMeanGate) else [stream.default]
    return torch.cat([gate(part) for part in batches])


def _answers(called: Tensor, stream: Stream) -> dict[str, Tensor]:
    """The answers: "control" is π₂'s alone where it ran."""
    default, control = stream.default.softmax(1), stream.control.softmax(1)
    return {
        "control": torch.where(called[:, None], stream.control, stream.default),
        "mixture": torch.where(called[:, None], default + control, default),
    }


def _judge(called: Tensor, stream: Stream, mixed: bool) -> dict[str, float]:
    answers = _answers(called, stream)
    judged = {
        "rate": float(called.double().mean()),
        **{how: accuracy(answer, stream.digits) for how, answer in answers.items()},
    }
    if mixed:
        congruent = stream.inks == stream.digits
        judged["rate_congruent"] = float(called[congruent].double().mean())
        judged["rate_incongruent"] = float(called[~congruent].double().mean())
    return judged


def _judge_all(gate: acc.Gate, streams: Mapping[str, Stream]) -> dict[str, Any]:
    return {name: _judge(_called(gate, s), s, name == MIXED) for name, s in streams.items()}


def _by_truth(gates: Mapping[str, acc.Gate], calibrating: Tensor, test: Stream, seed: int) -> dict[str, Any]:
    """Judge `call_by_truth` with as many calls of the mixed test stream as each of two gates makes there."""
    judged: dict[str, Any] = {}
    for name in RIVALS:
        judged[name] = {}
        for rate in RATES:
            gates[name].calibrate(calibrating, rate)
            called = call_by_truth(test, int(_called(gates[name], test).sum()), seed)
            judged[name][f"{rate:g}"] = _judge(called, test, mixed=True)
    right = {who: getattr(test, who).argmax(1) == test.digits for who in ("default", "control")}
    return {
        **judged,
        "helped": float((~right["default"] & right["control"]).double().mean()),
        "spoiled": float((right["default"] & ~right["control"]).double().mean()),
    }


def call_by_truth(stream: Stream, count: int, seed: int) -> Tensor:
    """Call `count` of N items, chosen by what no gate can know: who is right. Returns bool [N].

    First come the items that habit gets wrong and control right, then those on which both are right or both
    are wrong, and last those that control would spoil. Within each of the three groups the order is random,
    from `seed`; it does not change how many answers are right.
    """
    right = (stream.default.argmax(1) == stream.digits).int()
    gain = (stream.control.argmax(1) == stream.digits).int() - right
    order = torch.randperm(len(gain), generator=seeded(seed))
    first = order[gain[order].argsort(descending=True, stable=True)[:count]]
    called = torch.zeros(len(gain), dtype=torch.bool)
    called[first] = True
    return called


def survey(
    gates: Mapping[str, acc.Gate],
    calibrating: Stream,
    mixed: Stream,
    streams: Mapping[str, Stream],
    seed: int,
) -> dict[str, Any]:
    """Judge every gate at every rate.

    Returns
    -------
    dict
        ``gates``: by calibration ("as trained" or "mixed"), gate and rate: on each test stream the call rate,
        and the accuracy of "control" (π₂ alone where it ran) and "mixture" answers; ``always``; ``never``;
        ``mcnemar``: p of the entropy and the value gate's answers against the random gate's on the mixed
        stream at each rate; ``truth``: `call_by_truth` on the mixed stream with as many calls as the value
        and the entropy gate make there, and the shares of items on which control helps and spoils;
        ``entropy``: mean normalised entropies.
    """
    torch.manual_seed(seed)
    surveyed: dict[str, Any] = {name: _judge_all(gates[name], streams) for name in ("always", "never")}
    by_calibration: dict[str, dict[str, dict[str, Any]]] = {}
    for how, stream in (("as trained", calibrating), (MIXED, mixed)):
        by_calibration[how] = {name: {} for name in GATES}
        for name in GATES:
            for rate in RATES:
                gates[name].calibrate(stream.default, rate)
                by_calibration[how][name][f"{rate:g}"] = _judge_all(gates[name], streams)
    tests: dict[str, dict[str, float]] = {}
    test = streams[MIXED]
    for rate in RATES:
        right = {}
        for name in ("value", "entropy", "random"):
            gates[name].calibrate(mixed.default, rate)
            answers = _answers(_called(gates[name], test), test)
            right[name] = answers["control"].argmax(1) == test.digits
        tests[f"{rate:g}"] = {name: mcnemar(right[name], right["random"]) for name in ("value", "entropy")}
    entropy = {
        name: {
            who: float(acc.normalised_entropy(logits).mean())
            for who, logits in (("default", stream.default), ("control", stream.control))
        }
        for name, stream in streams.items()
    }
    return {
        **surveyed,
        "gates": by_calibration,
        "truth": _by_truth(gates, mixed.default, test, seed),
        "mcnemar": tests,
        "entropy": entropy,
    }
