"""One way of deciding how much to compute, and one seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptcomp_ext as ac
from adaptcomp_ext.models.acc import EntropyGate, Gate, NeverGate, Objective, ValueGate

from .. import vision
from ..demo.model import GlimpseStep
from ..runs import Cell, Tick, rank_correlation, shuffled, span
from ..vision import CLASSES, LARGE, Scale, build_cnn

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
    spot, recipe = span(tick, "habit and control", 0.0, 0.9), vision.Recipe(**cell.options["pair_recipe"])
    vision.train_acc(model, learnt, recipe, cell.seed, folder / "pair.safetensors", spot)
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


MAX_STEPS = 10
WINDOW = 5


class Reader(nn.Module):
    """Looks at an image through a window, as often as a policy says: "act", "ponder" or (no head) "depth".

    `dim` and `features` are the widths of the state and of a look.
    """

    def __init__(self, side: int, policy: str, prior: float = 0.2, dim: int = 96, features: int = 64) -> None:
        super().__init__()
        self.side, self.dim, self.features = side, dim, features
        self.first = nn.Parameter(torch.zeros(dim))
        self.look = GlimpseStep(side, WINDOW, dim, features)
        self.readout = nn.Linear(dim, CLASSES)
        self.policy: ac.Policy = ac.FixedSteps(MAX_STEPS)
        if policy != "depth":
            head = nn.Linear(dim, 1)
            nn.init.constant_(head.bias, -3.0 if policy == "act" else -1.5)  # long looking first
            self.policy = ac.ACT(head) if policy == "act" else ac.PonderNet(head, prior=prior)

    def start(self, rows: int) -> Tensor:
        """What is known before the first look, [rows, dim]."""
        return self.first.expand(rows, -1)

    def read(
        self, images: Tensor, policy: ac.Policy | None = None, compact: bool | str = "auto"
    ) -> ac.HaltResult:
        """Read images float32 [B, H, W] under its own policy or another; ``output``: logits [B, 10]."""
        policy = policy or self.policy
        halt = ac.AdaptiveHalt(self.look, policy, MAX_STEPS, readout=self.readout, compact=compact)
        return halt(self.start(len(images)), images)

    def every_step(self, images: Tensor) -> list[Tensor]:
        """Logits [B, 10] after each of all steps, for a loss at every depth."""
        state, found = self.start(len(images)), []
        for _ in range(MAX_STEPS):
            state = self.look(state, images)
            found.append(self.readout(state))
        return found

    def multiply_adds(self, halts: bool) -> int:
        """Of one look: window, encoding, cell, next place, readout, and where it `halts` the head."""
        side, dim, features = self.side, self.dim, self.features
        window = WINDOW * side * side + WINDOW * WINDOW * side
        encoding, cell = (WINDOW * WINDOW + 2) * features, 3 * (features + dim) * dim
        return window + encoding + cell + (2 + CLASSES + halts) * dim


def build_pair(side: int) -> ac.models.ACC:
    """Habit: a coarse convolution and a linear layer; control: the reference CNN."""
    kernel, stride = (5, 2) if side >= LARGE else (3, 1)
    left = ((side - kernel) // stride + 1) // 2
    habit = nn.Sequential(
        nn.Conv2d(1, 16, kernel, stride=stride),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * left * left, CLASSES),
    )
    return ac.models.ACC(Scale(), habit, build_cnn(side, 1), CLASSES, objective=Objective())
