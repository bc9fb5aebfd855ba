"""One setting and one seed: train the CNN and ACC, evaluate both, try all gates, and measure times."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import adaptcomp_ext as ac
from adaptcomp_ext.models.acc import Objective, normalised_entropy

from .. import vision
from ..data import Condition, StroopMNIST
from ..device import here
from ..runs import Cell, Tick, span
from . import gates
from .reaction import measure_reaction

__all__ = ["CONDITIONS", "EFFORTS", "build_acc", "build_baseline", "build_habit", "measure"]

CONDITIONS = tuple(condition.name.lower() for condition in Condition)
CHANNELS = 3
HIDDEN = 128
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


def build_acc(side: int, objective: Objective, hidden: int = HIDDEN) -> ac.models.ACC:
    """Habit with variational dropout, and a CNN as control. Each reads the image for itself.

    The hidden layer of the thesis' reference CNN has 128 units.
    """
    policies = build_habit(side), vision.build_cnn(side, CHANNELS, hidden)
    return ac.models.ACC(vision.Scale(), *policies, vision.CLASSES, objective=objective)


def equal_width(side: int, parameters: int) -> int:
    """Width of the hidden layer with which a CNN comes closest to so many weights and biases."""

    def difference(hidden: int) -> int:
        return abs(vision.weights(vision.build_cnn(side, CHANNELS, hidden)) - parameters)

    return min(range(96, 193), key=difference)


def build_baseline(side: int, parameters: int) -> nn.Sequential:
    """The reference CNN alone, its hidden layer as wide as comes closest to so many weights and biases."""
    return nn.Sequential(vision.Scale(), *vision.build_cnn(side, CHANNELS, equal_width(side, parameters)))


def measure(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    """Do what the cell's options say: "main", "effort" or "reaction"."""
    parts = {"main": _main, "effort": _effort, "reaction": measure_reaction}
    return parts[cell.options["part"]](cell, folder, tick)


@dataclass(frozen=True)
class _Items:
    """Coloured images and their digits."""

    images: Tensor
    digits: Tensor


def _data(cell: Cell, split: str) -> StroopMNIST:
    congruent = None if split == "test" else cell.options["congruent"]
    return StroopMNIST(cell.options["data"], split, congruent, seed=cell.seed)


def _items(data: StroopMNIST) -> _Items:
    """What is trained on, on the default device."""
    return here(_Items(data.images, data.digits))


def _accuracies(streams: dict[str, gates.Stream]) -> dict[str, dict[str, float]]:
    return {
        who: {c: vision.accuracy(getattr(streams[c], who), streams[c].digits) for c in CONDITIONS}
        for who in ("default", "control")
    }


def _main(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    recipe = vision.Recipe(**cell.options["recipe"])
    train, held, test = (_data(cell, split) for split in ("train", "held-out", "test"))
    items, side = _items(train), train.images.shape[-1]
    torch.manual_seed(cell.seed)
    acc = build_acc(side, Objective())
    spot = span(tick, "ACC", 0.0, 0.3)
    history = vision.train_acc(acc, items, recipe, cell.seed, folder / "acc.safetensors", spot)
    cnns = _train_cnns(cell, items, vision.weights(acc), recipe, folder, tick)

    tick("gates", 0.85)
    streams = gates.read_test(acc, test)
    fitting, calibrating, mixed = gates.held_out(acc, held)
    built = gates.build_gates(fitting, cell.seed)
    surveyed = gates.survey(built, calibrating, mixed, streams, cell.seed)
    of_cnns: dict[str, dict[str, float]] = {name: {} for name in cnns}
    for condition in Condition:
        images, digits = here(test.recoloured(condition)[0]), here(test.digits)
        for name, cnn in cnns.items():
            of_cnns[name][condition.name.lower()] = vision.accuracy(vision.logits(cnn, images), digits)

    tick("timing", 0.95)
    acc.gate = built["value"]
    acc.gate.calibrate(mixed.default, TIMED_RATE)
    half = gates.BATCH // 2
    sides = [test.recoloured(c)[0] for c in (Condition.CONGRUENT, Condition.INCONGRUENT)]
    batch = here(torch.cat((sides[0][:half], sides[1][half : 2 * half])))
    shape = (CHANNELS, side, side)
    return {
        "data": train.name,
        "accuracy": {**_accuracies(streams), **of_cnns},
        "parameters": {
            "acc": vision.weights(acc),
            **{name: vision.weights(cnn) for name, cnn in cnns.items()},
        },
        "multiply_adds": {
            "default": vision.multiply_adds(acc.default, shape),
            "control": vision.multiply_adds(acc.control, shape),
        },
        "training": history,
        "timing": vision.compare_gated(acc, batch, cell.options["timing_seconds"]),
        "beliefs": _beliefs(streams["incongruent"]),
        **surveyed,
    }


def _train_cnns(
    cell: Cell, train: _Items, parameters: int, recipe: vision.Recipe, folder: Path, tick: Tick
) -> dict[str, nn.Module]:
    """Train single CNNs of equal size: "cnn" on all rows alike, "cnn_by_need" as control is trained.

    The latter learns beside a habit by whose loss the rows are weighted, and which is then thrown away.
    """
    side = train.images.shape[-1]
    rest = recipe, cell.seed
    torch.manual_seed(cell.seed)
    cnn = build_baseline(side, parameters)
    spot = span(tick, "the CNN alone", 0.3, 0.55)
    vision.train_classifier(cnn, train, *rest, folder / "cnn.safetensors", spot)
    torch.manual_seed(cell.seed)
    pair = build_acc(side, Objective(), equal_width(side, parameters))
    spot = span(tick, "the CNN weighted by need", 0.55, 0.85)
    vision.train_acc(pair, train, *rest, folder / "cnn_by_need.safetensors", spot)
    return {"cnn": cnn, "cnn_by_need": nn.Sequential(pair.encoder, pair.control)}


def _effort(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    train, test = _data(cell, "train"), _data(cell, "test")
    torch.manual_seed(cell.seed)
    acc = build_acc(train.images.shape[-1], EFFORTS[cell.options["effort"]])
    recipe, spot = vision.Recipe(**cell.options["recipe"]), span(tick, "ACC", 0.0, 0.95)
    history = vision.train_acc(acc, _items(train), recipe, cell.seed, folder / "acc.safetensors", spot)
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
