"""One way of distilling System 2 into System 1, and one seed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptcomp_ext as ac
from adaptcomp_ext.models.acc import EntropyGate, Objective
from adaptcomp_ext.models.acc.features import kl_divergence

from .. import vision
from ..runs import Cell, Tick, span

TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
SHARES = (0.3, 0.5, 0.6)
"""Shares of a layer's units that are removed."""
RATES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
FINE_TUNING = 2 / 3  # of the learning rate, for a third of the epochs
BATCH = 256
FORMS: dict[str, bool | dict[str, str]] = {
    "dense": False,
    "sparse": {"form": "sparse"},
    "units": {"form": "sparse", "per": "unit"},
}
"""The noise of π₁ in training: none, one for each weight, one for the weights of each unit."""


def build_student(side: int) -> nn.Sequential:
    """π₁: two convolutions and two linear layers, with more units than it needs: some can be removed."""
    kernel, stride = (5, 2) if side >= vision.LARGE else (3, 1)
    left = ((side - kernel) // stride + 1 - 2) // 2
    first = nn.Conv2d(1, 32, kernel, stride=stride), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()
    linear = nn.Linear(32 * left * left, 64), nn.ReLU(), nn.Linear(64, vision.CLASSES)
    return nn.Sequential(*first, nn.MaxPool2d(2), nn.Flatten(), *linear)


def measure(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    """Do what the cell's options say: "after" or "online"."""
    recipe = vision.Recipe(**cell.options["recipe"])
    return (_after if cell.options["part"] == "after" else _online)(cell, recipe, folder, tick)


def _after(cell: Cell, recipe: vision.Recipe, folder: Path, tick: Tick) -> dict[str, Any]:
    """π₂ first; then students of its logits at each temperature, and one of the labels alone."""
    name, train, _, test = vision.load_grey(cell.options["data"])
    torch.manual_seed(cell.seed)
    teacher = nn.Sequential(vision.Scale(), vision.build_cnn(train.side, 1))
    spot = span(tick, "π₂", 0.0, 0.25)
    vision.train_classifier(teacher, train, recipe, cell.seed, folder / "teacher.safetensors", spot)
    soft = vision.logits(teacher, train.images)
    students: dict[str, float] = {}
    ways: list[float | None] = [None, *TEMPERATURES]
    for i, temperature in enumerate(ways):
        torch.manual_seed(cell.seed)
        student = nn.Sequential(vision.Scale(), build_student(train.side))
        label = "labels" if temperature is None else f"{temperature:g}"
        begin = 0.25 + 0.75 * i / len(ways)
        spot = span(tick, f"π₁ of {label}", begin, begin + 0.75 / len(ways))
        loss = None if temperature is None else _imitation(soft, temperature, train)
        file = folder / f"student-{label}.safetensors"
        vision.train_classifier(student, train, recipe, cell.seed, file, spot, loss=loss)
        students[label] = _right(student, test)
    return {"data": name, "teacher": _right(teacher, test), "students": students}


def _right(model: nn.Module, test: vision.Grey) -> float:
    return vision.accuracy(vision.logits(model, test.images), test.digits)


def _imitation(soft: Tensor, temperature: float, data: vision.Grey) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of labels and the teacher's logits with equal weight, as in ACC's objective."""

    def loss(index: Tensor, output: Tensor) -> Tensor:
        divergence = kl_divergence(soft[index], output, temperature).mean()
        return F.cross_entropy(output, data.digits[index]) + temperature**2 * divergence

    return loss


def _online(cell: Cell, recipe: vision.Recipe, folder: Path, tick: Tick) -> dict[str, Any]:
    """Both together; then what can be removed from π₁, and what the gated pair costs."""
    name, train, held, test = vision.load_grey(cell.options["data"])
    side, form, temperature = train.side, cell.options["form"], cell.options["temperature"]
    objective = Objective(temperature=temperature, need=False, beta=cell.options["beta"])
    torch.manual_seed(cell.seed)
    parts = vision.Scale(), build_student(side), vision.build_cnn(side, 1)
    pair = ac.models.ACC(*parts, vision.CLASSES, variational=FORMS[form], objective=objective)
    spot = span(tick, "π₁ and π₂", 0.0, 0.6)
    vision.train_acc(pair, train, recipe, cell.seed, folder / "pair.safetensors", spot)
    control = nn.Sequential(vision.Scale(), pair.control)
    found: dict[str, Any] = {
        "data": name,
        "default": _right(nn.Sequential(vision.Scale(), pair.default), test),
        "control": _right(control, test),
        "sparsity": ac.nn.sparsity(pair.default),
    }
    if form == "dense":
        return found
    shape, whole = (1, side, side), build_student(side).eval()
    both = {"default": whole, "control": pair.control}
    found["multiply_adds"] = {key: vision.multiply_adds(policy, shape) for key, policy in both.items()}
    found["shrunk"] = {"as it is": _judge(whole, ac.shrink(pair.default), test, cell)}
    if form == "units":
        noisy, soft = pair.default, vision.logits(control, train.images)
        epochs, rate = max(1, recipe.epochs // 3), FINE_TUNING * recipe.learning_rate
        tuning = replace(recipe, epochs=epochs, learning_rate=rate)
        loss = _imitation(soft, temperature, train)
        for i, share in enumerate(SHARES):
            small = _pruned(noisy, share)
            scaled = nn.Sequential(vision.Scale(), small)
            before = _right(scaled, test)
            spot = span(tick, f"π₁ less {100 * share:g} % of its units", 0.6 + 0.1 * i, 0.7 + 0.1 * i)
            file = folder / f"small-{share:g}.safetensors"
            vision.train_classifier(scaled, train, tuning, cell.seed + 1, file, spot, loss=loss)
            found["shrunk"][f"{share:g}"] = {**_judge(whole, small, test, cell), "before tuning": before}
            if share == cell.options["share"]:
                pair.default = small
        tick("the gated pair", 0.92)
        found["gated"] = _gated(pair, held, test, cell)
    return found


def _pruned(network: nn.Module, share: float) -> nn.Module:
    """A smaller copy, without the noisiest units of every layer but the last, whose units are the classes."""
    network = copy.deepcopy(network)
    layers = [part for part in network.modules() if isinstance(part, ac.VariationalDropout)]
    for layer in layers[:-1]:
        layer.prune(share)
    return ac.shrink(network)


@torch.no_grad()
def _judge(whole: nn.Module, small: nn.Module, test: vision.Grey, cell: Cell) -> dict[str, Any]:
    small.eval()
    images = test.images[:BATCH].float() / 255
    calls = {"whole": lambda: whole(images), "small": lambda: small(images)}
    milliseconds, over = vision.time_calls(calls, cell.options["timing_seconds"])
    return {
        "accuracy": _right(nn.Sequential(vision.Scale(), small), test),
        "multiply_adds": vision.multiply_adds(small, (1, test.side, test.side)),
        "units": [len(part.weight) for part in small.modules() if isinstance(part, (nn.Linear, nn.Conv2d))],
        "ms": milliseconds,
        "faster": over("whole", "small"),
    }


@torch.no_grad()
def _gated(pair: ac.models.ACC, held: vision.Grey, test: vision.Grey, cell: Cell) -> dict[str, Any]:
    """Accuracy and cost of the pair with a calibrated entropy gate."""
    pair.eval()
    gate = pair.gate = EntropyGate()
    habit, control = (nn.Sequential(pair.encoder, policy) for policy in (pair.default, pair.control))
    of_held, of_test = (vision.logits(habit, part.images) for part in (held, test))
    of_control = vision.logits(control, test.images)
    by_rate: dict[str, Mapping[str, float]] = {}
    for rate in RATES:
        gate.calibrate(of_held, rate)
        called = gate(of_test)
        answers = torch.where(called[:, None], of_control, of_test)
        by_rate[f"{rate:g}"] = {
            "rate": float(called.double().mean()),
            "accuracy": vision.accuracy(answers, test.digits),
        }
    gate.calibrate(of_held, cell.options["rate"])
    timing = vision.compare_gated(pair, test.images[:BATCH], cell.options["timing_seconds"])
    return {"by_rate": by_rate, "control": vision.accuracy(of_control, test.digits), "timing": timing}
