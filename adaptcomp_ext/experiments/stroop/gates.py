"""Every gate, calibrated to call rates, on the same logits: who is called, and how good the answers are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import adaptcomp_ext as ac
from adaptcomp_ext.experiments.data import Condition, StroopMNIST
from adaptcomp_ext.experiments.runs import mcnemar
from adaptcomp_ext.experiments.vision import accuracy
from adaptcomp_ext.models.acc import (
    AlwaysGate,
    BatchMeanGate,
    EntropyGate,
    Gate,
    KLGate,
    MarginGate,
    NeverGate,
    RandomGate,
    ValueGate,
    normalised_entropy,
)

__all__ = ["BATCH", "GATES", "RATES", "Stream", "build_gates", "held_out", "read_test", "survey"]

RATES = (0.05, 0.1, 0.2, 0.3, 0.4)
GATES = ("value", "kl", "entropy", "margin", "random", "batch-mean")
"""The gates that have a rate; "always" and "never" have none."""
BATCH = 256
MIXED = "mixed"


@dataclass(frozen=True)
class Stream:
    """Items with the logits of both networks: digits int64 [N], inks int64 [N], logits [N, C] of each."""

    digits: Tensor
    inks: Tensor
    default: Tensor
    control: Tensor

    def part(self, chosen: Tensor | slice) -> Stream:
        """Some of them."""
        return Stream(self.digits[chosen], self.inks[chosen], self.default[chosen], self.control[chosen])


@torch.no_grad()
def _read(model: ac.models.ACC, images: Tensor, digits: Tensor, inks: Tensor, batch: int = 500) -> Stream:
    parts = [model.both(part) for part in images.split(batch)]
    return Stream(digits, inks, torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))


def _joined(a: Stream, b: Stream) -> Stream:
    pairs = ((getattr(a, name), getattr(b, name)) for name in Stream.__dataclass_fields__)
    return Stream(*(torch.cat(pair) for pair in pairs))


def read_test(model: ac.models.ACC, data: StroopMNIST) -> dict[str, Stream]:
    """Return test items congruent, neutral, incongruent, and "mixed": half congruent, half incongruent."""
    streams = {}
    for condition in Condition:
        images, inks = data.recoloured(condition)
        streams[condition.name.lower()] = _read(model, images, data.digits, inks)
    streams[MIXED] = _mixed(streams["congruent"], streams["incongruent"], seed=0)
    return streams


def _mixed(congruent: Stream, incongruent: Stream, seed: int) -> Stream:
    order = torch.randperm(len(congruent.digits), generator=torch.Generator().manual_seed(seed))
    half = len(order) // 2
    both = _joined(congruent.part(order[:half]), incongruent.part(order[half:]))
    again = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed + 1))
    return both.part(again)


def held_out(model: ac.models.ACC, data: StroopMNIST) -> tuple[Stream, Stream, Stream]:
    """Three sets of held-out items: for fitting, for calibrating, and the latter's digits as a mixed stream.

    The first two are coloured as in training, and have no digit in common.
    """
    half = len(data) // 2
    as_trained = _read(model, data.images, data.digits, data.inks)
    sides = []
    for condition in (Condition.CONGRUENT, Condition.INCONGRUENT):
        images, inks = data.recoloured(condition, seed=1)
        sides.append(_read(model, images[half:], data.digits[half:], inks[half:]))
    return (
        as_trained.part(slice(0, half)),
        as_trained.part(slice(half, None)),
        _mixed(sides[0], sides[1], seed=2),
    )


def build_gates(fitting: Stream, seed: int) -> dict[str, Gate]:
    """All gates by name; the learned ones fitted."""
    classes = fitting.default.shape[1]
    learned = {"value": ValueGate(classes), "kl": KLGate(classes)}
    for gate in learned.values():
        gate.fit(fitting.default, fitting.control, fitting.digits, seed=seed)
    return {
        **learned,
        "entropy": EntropyGate(),
        "margin": MarginGate(),
        "random": RandomGate(),
        "batch-mean": BatchMeanGate(EntropyGate(), BATCH),
        "always": AlwaysGate(),
        "never": NeverGate(),
    }


def _calls(gate: Gate, stream: Stream) -> Tensor:
    if isinstance(gate, BatchMeanGate):
        return torch.cat([gate(part) for part in stream.default.split(gate.batch)])
    return gate(stream.default)


def _answers(stream: Stream, called: Tensor) -> dict[str, Tensor]:
    mixed = stream.default.softmax(1) + stream.control.softmax(1)
    default = stream.default.softmax(1)
    return {
        "control": torch.where(called[:, None], stream.control, stream.default),
        "mixture": torch.where(called[:, None], mixed, default),
    }


def _judge(gate: Gate, streams: Mapping[str, Stream]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, stream in streams.items():
        called = _calls(gate, stream)
        answers = _answers(stream, called)
        found[name] = {
            "rate": float(called.double().mean()),
            **{how: accuracy(answer, stream.digits) for how, answer in answers.items()},
        }
        if name == MIXED:
            congruent = stream.inks == stream.digits
            found[name]["rate_congruent"] = float(called[congruent].double().mean())
            found[name]["rate_incongruent"] = float(called[~congruent].double().mean())
    return found


def survey(
    gates: Mapping[str, Gate], calibrating: Stream, mixed: Stream, streams: Mapping[str, Stream], seed: int
) -> dict[str, Any]:
    """Every gate at every rate.

    Returns
    -------
    dict
        ``gates``: by calibration ("as trained" or "mixed"), gate and rate: on each test stream the call rate,
        and the accuracy of "control" (π₂ alone where it ran) and "mixture" answers; ``always``; ``never``;
        ``mcnemar``: p of the entropy and the value gate's answers against the random gate's on the mixed
        stream at each rate; ``entropy``: mean normalised entropies.
    """
    torch.manual_seed(seed)
    found: dict[str, Any] = {"gates": {}}
    for name in ("always", "never"):
        found[name] = _judge(gates[name], streams)
    tests: dict[str, dict[str, float]] = {}
    for how, stream in (("as trained", calibrating), (MIXED, mixed)):
        by_gate: dict[str, Any] = {}
        for name in GATES:
            by_gate[name] = {}
            for rate in RATES:
                gates[name].calibrate(stream.default, rate)
                by_gate[name][f"{rate:g}"] = _judge(gates[name], streams)
        found["gates"][how] = by_gate
    for rate in RATES:
        right = {}
        for name in ("value", "entropy", "random"):
            gates[name].calibrate(mixed.default, rate)
            test = streams[MIXED]
            right[name] = _answers(test, _calls(gates[name], test))["control"].argmax(1) == test.digits
        tests[f"{rate:g}"] = {name: mcnemar(right[name], right["random"]) for name in ("value", "entropy")}
    found["mcnemar"] = tests
    found["entropy"] = {
        name: {
            "default": float(normalised_entropy(s.default).mean()),
            "control": float(normalised_entropy(s.control).mean()),
        }
        for name, s in streams.items()
    }
    return found
