"""One way of distilling and one seed."""

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
from .networks import CHANNELS, build_pair, build_student, build_teacher

__all__ = ["RATES", "SHARES", "TEMPERATURES", "measure"]

TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
SHARES = (0.3, 0.5, 0.6)
"""Of a layer's units that are dropped."""
RATES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
FINE_TUNING = 2 / 3  # of the learning rate, for one epoch
BATCH = 256


def measure(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    """Do what the cell's options say: "after" or "online"."""
    recipe = vision.Recipe(**cell.options["recipe"])
    return (_after if cell.options["part"] == "after" else _online)(cell, recipe, folder, tick)


def _after(cell: Cell, recipe: vision.Recipe, folder: Path, tick: Tick) -> dict[str, Any]:
    """π₂ first; then students of its logits at each temperature, and one of the labels alone."""
    name, train, _, test = vision.load_grey(cell.options["data"])
    side = train.side
    torch.manual_seed(cell.seed)
    teacher = nn.Sequential(vision.Scale(), build_teacher(side))
    vision.train_classifier(
        teacher, train, recipe, cell.seed, folder / "teacher.safetensors", span(tick, "π₂", 0.0, 0.25)
    )
    soft = vision.logits(teacher, train.images)
    students: dict[str, float] = {}
    ways: list[float | None] = [None, *TEMPERATURES]
    for i, temperature in enumerate(ways):
        torch.manual_seed(cell.seed)
        student = nn.Sequential(vision.Scale(), build_student(side))
        label = "labels" if temperature is None else f"{temperature:g}"
        where, begin = folder / f"student-{label}.safetensors", 0.25 + 0.75 * i / len(ways)
        spot = span(tick, f"π₁ of {label}", begin, begin + 0.75 / len(ways))
        if temperature is None:
            vision.train_classifier(student, train, recipe, cell.seed, where, spot)
        else:
            _distil(student, soft, temperature, train, recipe, cell.seed, where, spot)
        students[label] = vision.accuracy(vision.logits(student, test.images), test.digits)
    return {
        "data": name,
        "teacher": vision.accuracy(vision.logits(teacher, test.images), test.digits),
        "students": students,
    }


def _distil(
    student: nn.Module,
    soft: Tensor,
    temperature: float,
    data: vision.Grey,
    recipe: vision.Recipe,
    seed: int,
    checkpoint: Path,
    tick: Callable[[float], None],
) -> None:
    """Labels and the teacher's logits with equal weight, as in ACC's objective."""

    def loss(index: Tensor, output: Tensor) -> Tensor:
        divergence = kl_divergence(soft[index], output, temperature).mean()
        return F.cross_entropy(output, data.digits[index]) + temperature**2 * divergence

    vision.train_classifier(student, data, recipe, seed, checkpoint, tick, loss=loss)


def _online(cell: Cell, recipe: vision.Recipe, folder: Path, tick: Tick) -> dict[str, Any]:
    """Both together; then what can be removed from π₁, and what the gated pair costs."""
    name, train, held, test = vision.load_grey(cell.options["data"])
    side, form, temperature = train.side, cell.options["form"], cell.options["temperature"]
    objective = Objective(temperature=temperature, need=False, beta=cell.options["beta"])
    torch.manual_seed(cell.seed)
    pair = build_pair(side, form, objective)
    vision.train_acc(
        pair, train, recipe, cell.seed, folder / "pair.safetensors", span(tick, "π₁ and π₂", 0.0, 0.6)
    )
    habit = nn.Sequential(vision.Scale(), pair.default)
    control = nn.Sequential(vision.Scale(), pair.control)
    found: dict[str, Any] = {
        "data": name,
        "default": vision.accuracy(vision.logits(habit, test.images), test.digits),
        "control": vision.accuracy(vision.logits(control, test.images), test.digits),
        "sparsity": ac.nn.sparsity(pair.default),
    }
    if form == "dense":
        return found
    shape = (CHANNELS, side, side)
    whole = build_student(side).eval()
    found["multiply_adds"] = {
        "default": vision.multiply_adds(whole, shape),
        "control": vision.multiply_adds(pair.control, shape),
    }
    found["shrunk"] = {"as it is": _judge(whole, ac.shrink(pair.default), shape, test, cell)}
    if form == "units":
        noisy, soft = pair.default, vision.logits(control, train.images)
        for i, share in enumerate(SHARES):
            small = _pruned(noisy, share)
            before = vision.accuracy(
                vision.logits(nn.Sequential(vision.Scale(), small), test.images), test.digits
            )
            tuning = replace(
                recipe, epochs=max(1, recipe.epochs // 3), learning_rate=FINE_TUNING * recipe.learning_rate
            )
            spot = span(tick, f"π₁ less {100 * share:g} % of its units", 0.6 + 0.1 * i, 0.7 + 0.1 * i)
            where = folder / f"small-{share:g}.safetensors"
            _distil(
                nn.Sequential(vision.Scale(), small),
                soft,
                temperature,
                train,
                tuning,
                cell.seed + 1,
                where,
                spot,
            )
            found["shrunk"][f"{share:g}"] = {
                **_judge(whole, small, shape, test, cell),
                "before tuning": before,
            }
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
def _judge(
    whole: nn.Module, small: nn.Module, shape: tuple[int, ...], test: vision.Grey, cell: Cell
) -> dict[str, Any]:
    small.eval()
    images = test.images[:BATCH].float() / 255
    calls = {"whole": lambda: whole(images), "small": lambda: small(images)}
    milliseconds, over = vision.time_calls(calls, cell.options["timing_seconds"])
    units = [len(part.weight) for part in small.modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    return {
        "accuracy": vision.accuracy(
            vision.logits(nn.Sequential(vision.Scale(), small), test.images), test.digits
        ),
        "multiply_adds": vision.multiply_adds(small, shape),
        "units": units,
        "ms": milliseconds,
        "faster": over("whole", "small"),
    }


@torch.no_grad()
def _gated(pair: ac.models.ACC, held: vision.Grey, test: vision.Grey, cell: Cell) -> dict[str, Any]:
    """Accuracy and cost of the pair with a calibrated entropy gate."""
    pair.eval()
    gate = EntropyGate()
    pair.gate = gate
    of_held, of_test = (
        vision.logits(lambda x: pair.default(pair.encoder(x)), part.images) for part in (held, test)
    )
    of_control = vision.logits(lambda x: pair.control(pair.encoder(x)), test.images)
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
