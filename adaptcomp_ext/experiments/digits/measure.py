"""One way of deciding how much to compute, and one seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptcomp_ext as ac
from adaptcomp_ext.models.acc import EntropyGate, Gate, NeverGate, ValueGate

from .. import vision
from ..runs import Cell, Tick, rank_correlation, shuffled, span
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
CLIP = 1.0
"""Norm to which the readers' gradients are shortened. Without it one MNIST seed in three was lost at price 0,
and more often under PonderNet."""


def _seen(grey: vision.Grey) -> vision.Grey:
    """The images as the readers see them: float32 [N, H, W] in 0..1, large ones halved by 2×2 means."""
    images = grey.images.float() / 255
    return vision.Grey((F.avg_pool2d(images, 2) if grey.side >= vision.LARGE else images)[:, 0], grey.digits)


def measure(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    """Do what the cell's options say: "act", "ponder", "depth" or "acc"."""
    return (_pair if cell.options["part"] == "acc" else _reader)(cell, folder, tick)


def _reader(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    name, *parts = vision.load_grey(cell.options["data"])
    learnt, _, test = map(_seen, parts)
    part, recipe = cell.options["part"], vision.Recipe(**cell.options["recipe"])
    torch.manual_seed(cell.seed)
    model = Reader(test.images.shape[-1], part, prior=cell.options.get("prior", 0.2))
    price = cell.options.get("price", PONDER_BETA)

    def loss(index: Tensor, done: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        images, digits = learnt.images[index], learnt.digits[index]
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

    spot = span(tick, "reader", 0.0, 0.85)
    history = vision.train(
        model, loss, len(learnt.digits), recipe, cell.seed, folder / "reader.safetensors", spot, CLIP
    )
    tick("reading", 0.87)
    hard = _difficulty(learnt, test, cell.seed)
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


def _difficulty(learnt: vision.Grey, test: vision.Grey, seed: int) -> Tensor:
    """How hard each test image is: its loss under a linear classifier that was trained for one epoch."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(test.images[0].numel(), 10))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for index in shuffled(len(learnt.digits), 64, seed, 0):
        optimizer.zero_grad()
        F.cross_entropy(model(learnt.images[index]), learnt.digits[index]).backward()
        optimizer.step()
    with torch.no_grad():
        return F.cross_entropy(model(test.images), test.digits, reduction="none")


@torch.no_grad()
def _judge(model: Reader, test: vision.Grey, hard: Tensor, policy: ac.Policy | None) -> dict[str, Any]:
    """Accuracy, steps, who gets them, and what the same steps are worth when they are dealt out at random."""
    result = model.read(test.images, policy)
    steps = result.steps
    found: dict[str, Any] = {
        "accuracy": vision.accuracy(result.output, test.digits),
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
    found["shuffled"] = vision.accuracy(model.read(test.images, ac.FixedSteps(dealt)).output, test.digits)
    found["own steps"] = vision.accuracy(model.read(test.images, ac.FixedSteps(steps)).output, test.digits)
    return found


def _time(model: Reader, images: Tensor, policy: ac.Policy | None, seconds: float) -> dict[str, Any]:
    calls = {
        "compacted": lambda: model.read(images, policy),
        "masked": lambda: model.read(images, policy, compact=False),
        "all steps": lambda: model.read(images, ac.FixedSteps(MAX_STEPS)),
    }
    milliseconds, over = vision.time_calls(calls, seconds)
    return {
        "ms": milliseconds,
        "masked_over_compacted": over("masked", "compacted"),
        "all_steps_over_compacted": over("all steps", "compacted"),
    }


def _pair(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    name, learnt, held, test = vision.load_grey(cell.options["data"])
    torch.manual_seed(cell.seed)
    model = build_pair(learnt.side)
    spot = span(tick, "habit and control", 0.0, 0.9)
    vision.train_acc(
        model,
        learnt,
        vision.Recipe(**cell.options["pair_recipe"]),
        cell.seed,
        folder / "pair.safetensors",
        spot,
    )
    tick("gates", 0.92)
    default, control = (
        {
            key: vision.logits(nn.Sequential(model.encoder, policy), part.images)
            for key, part in (("held", held), ("test", test))
        }
        for policy in (model.default, model.control)
    )
    half, shape = len(held.digits) // 2, (1, learnt.side, learnt.side)
    value = ValueGate(10)
    value.fit(default["held"][:half], control["held"][:half], held.digits[:half], seed=cell.seed)
    gates: dict[str, Gate] = {"value": value, "entropy": EntropyGate()}
    found: dict[str, Any] = {
        "data": name,
        "multiply_adds": {
            "default": vision.multiply_adds(model.default, shape),
            "control": vision.multiply_adds(model.control, shape),
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
                "accuracy": vision.accuracy(answers, test.digits),
                "by_class": [float(called[test.digits == d].double().mean()) for d in range(10)],
            }
    value.calibrate(default["held"][half:], TIMED_RATE)
    model.gate = value
    found["timing"] = vision.compare_gated(model, test.images[:BATCH], cell.options["timing_seconds"])
    return found
