"""One setting and one seed: train the CNN and ACC, evaluate both, try all gates, and measure times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import adaptcomp_ext as ac
from adaptcomp_ext.models.acc import Objective, normalised_entropy

from .. import vision
from ..data import Condition, StroopMNIST
from ..runs import Cell, Tick, span
from . import gates
from .reaction import measure_reaction

__all__ = ["CONDITIONS", "EFFORTS", "build_acc", "build_baseline", "build_habit", "measure"]

CONDITIONS = tuple(condition.name.lower() for condition in Condition)
CHANNELS = 3
TIMED_RATE = 0.3
EFFORTS: dict[str, Objective] = {
    "λ = 1": Objective(),
    "λ = 0": Objective(effort=0.0),
    "λ(s), literal": Objective(effort="literal"),
    "λ(s), value": Objective(effort="value"),
    "λ = 1, control pays too": Objective(mutual=True),
    "λ = 1, all rows alike to control": Objective(need=False),
}
"""The prices of effort that are compared."""
FIVE, YELLOW = 5, 2
SHOWN = 4
"""Number of items whose beliefs are shown."""


def build_habit(side: int) -> nn.Sequential:
    """π₁: one coarse convolution and a linear layer, a sixteenth of the reference CNN's multiply–adds."""
    kernel, stride = (5, 2) if side >= vision.LARGE else (3, 1)
    left = ((side - kernel) // stride + 1) // 2
    convolution = nn.Conv2d(CHANNELS, 16, kernel, stride=stride)
    head = nn.Linear(16 * left * left, vision.CLASSES)
    return nn.Sequential(convolution, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), head)


def build_acc(side: int, objective: Objective) -> ac.models.ACC:
    """Habit with variational dropout, and the reference CNN as control. Each reads the image for itself."""
    policies = build_habit(side), vision.build_cnn(side, CHANNELS)
    return ac.models.ACC(vision.Scale(), *policies, vision.CLASSES, objective=objective)


def build_baseline(side: int, parameters: int) -> nn.Sequential:
    """The reference CNN alone, its hidden layer as wide as comes closest to so many weights and biases."""

    def difference(hidden: int) -> int:
        return abs(vision.weights(vision.build_cnn(side, CHANNELS, hidden)) - parameters)

    hidden = min(range(96, 193), key=difference)
    return nn.Sequential(vision.Scale(), *vision.build_cnn(side, CHANNELS, hidden))


def measure(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    """Do what the cell's options say: "main", "effort" or "reaction"."""
    parts = {"main": _main, "effort": _effort, "reaction": measure_reaction}
    return parts[cell.options["part"]](cell, folder, tick)


def _data(cell: Cell, split: str) -> StroopMNIST:
    congruent = None if split == "test" else cell.options["congruent"]
    return StroopMNIST(cell.options["data"], split, congruent, seed=cell.seed)


def _accuracies(streams: dict[str, gates.Stream]) -> dict[str, dict[str, float]]:
    return {
        who: {c: vision.accuracy(getattr(streams[c], who), streams[c].digits) for c in CONDITIONS}
        for who in ("default", "control")
    }


def _main(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    recipe = vision.Recipe(**cell.options["recipe"])
    train, held, test = (_data(cell, split) for split in ("train", "held-out", "test"))
    side = train.images.shape[-1]
    torch.manual_seed(cell.seed)
    acc = build_acc(side, Objective())
    spot = span(tick, "ACC", 0.0, 0.45)
    history = vision.train_acc(acc, train, recipe, cell.seed, folder / "acc.safetensors", spot)
    torch.manual_seed(cell.seed)
    cnn = build_baseline(side, vision.weights(acc))
    spot = span(tick, "the CNN alone", 0.45, 0.85)
    vision.train_classifier(cnn, train, recipe, cell.seed, folder / "cnn.safetensors", spot)

    tick("gates", 0.85)
    streams = gates.read_test(acc, test)
    fitting, calibrating, mixed = gates.held_out(acc, held)
    built = gates.build_gates(fitting, cell.seed)
    surveyed = gates.survey(built, calibrating, mixed, streams, cell.seed)
    of_cnn = {
        condition.name.lower(): vision.accuracy(
            vision.logits(cnn, test.recoloured(condition)[0]), test.digits
        )
        for condition in Condition
    }

    tick("timing", 0.95)
    acc.gate = built["value"]
    acc.gate.calibrate(mixed.default, TIMED_RATE)
    half = gates.BATCH // 2
    sides = [test.recoloured(c)[0] for c in (Condition.CONGRUENT, Condition.INCONGRUENT)]
    batch = torch.cat((sides[0][:half], sides[1][half : 2 * half]))
    shape = (CHANNELS, side, side)
    return {
        "data": train.name,
        "accuracy": {**_accuracies(streams), "cnn": of_cnn},
        "parameters": {"acc": vision.weights(acc), "cnn": vision.weights(cnn)},
        "multiply_adds": {
            "default": vision.multiply_adds(acc.default, shape),
            "control": vision.multiply_adds(acc.control, shape),
        },
        "training": history,
        "timing": vision.compare_gated(acc, batch, cell.options["timing_seconds"]),
        "beliefs": _beliefs(streams["incongruent"]),
        **surveyed,
    }


def _effort(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    train, test = _data(cell, "train"), _data(cell, "test")
    torch.manual_seed(cell.seed)
    acc = build_acc(train.images.shape[-1], EFFORTS[cell.options["effort"]])
    recipe, spot = vision.Recipe(**cell.options["recipe"]), span(tick, "ACC", 0.0, 0.95)
    history = vision.train_acc(acc, train, recipe, cell.seed, folder / "acc.safetensors", spot)
    streams = gates.read_test(acc, test)
    return {
        "training": history,
        "accuracy": _accuracies(streams),
        "entropy": {c: float(normalised_entropy(streams[c].default).mean()) for c in CONDITIONS},
    }


def _beliefs(stream: gates.Stream) -> list[dict[str, Any]]:
    """Choose incongruent items that habit answers by their ink and control by their digit, a yellow 5 first.

    Each has another digit and another ink: ``item`` (its index in the test split), ``digit``, ``ink``, and
    both beliefs.
    """
    default, control = stream.default.softmax(1), stream.control.softmax(1)
    misled = (default.argmax(1) == stream.inks) & (control.argmax(1) == stream.digits)
    sure = default.gather(1, stream.inks[:, None])[:, 0] + control.gather(1, stream.digits[:, None])[:, 0]
    sure = torch.where(misled, sure, torch.full_like(sure, -1.0))
    asked = ((stream.digits == FIVE) & (stream.inks == YELLOW) & misled).nonzero()[:, 0]
    first = asked[sure[asked].argmax()][None] if len(asked) else asked
    chosen: list[dict[str, Any]] = []
    for item in torch.cat((first, sure.argsort(descending=True))).tolist():
        digit, ink = int(stream.digits[item]), int(stream.inks[item])
        if sure[item] < 0 or len(chosen) == SHOWN:
            break
        if digit not in {c["digit"] for c in chosen} and ink not in {c["ink"] for c in chosen}:
            beliefs = {"default": default[item].tolist(), "control": control[item].tolist()}
            chosen.append({"item": item, "digit": digit, "ink": ink, **beliefs})
    return chosen
