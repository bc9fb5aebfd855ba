"""The reference task: when to stop, on grey digits: ACT, PonderNet, confidence, and habit with control."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptcomp_ext as ac
from adaptcomp_ext.models.acc import EntropyGate, Gate, NeverGate, Objective, ValueGate

from . import vision
from .data import find_images
from .demo.model import GlimpseStep
from .runs import (
    Cell,
    Data,
    Epochs,
    FirstSeed,
    Quick,
    Results,
    Seeds,
    Setup,
    Tick,
    experiment,
    grid,
    rank_correlation,
    shuffled,
    span,
)
from .runs.report import Block, Column, Picture, Table, Verdicts, column, tabulate
from .runs.statistics import estimate, form, interval, millions, points
from .style import (
    GREEN,
    INK,
    MUTED,
    ORANGE,
    OTHERS,
    OURS,
    WRONG,
    bar_chart,
    curve,
    legend,
    note,
    span_at_least,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["digits"]

THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
DEPTHS = (1, 2, 3, 4, 6, 8, 10)
RATES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0)
TIMED_RATE = 0.1
BATCH = 256
EXAMPLES = 8
PONDER_BETA = 0.01
CLIP = 1.0
"""Norm to which the readers' gradients are shortened. Without it one MNIST seed in three was lost at price 0,
and more often under PonderNet."""
PRICES = (0.0, 0.01, 0.03, 0.1)
"""Price of one step under ACT, in nats."""
PRIORS = (0.2, 0.4)
"""Probability of halting to which PonderNet is drawn."""
GATES = ("value", "entropy")
SHOWN = 0.9
"""The confidence that is timed, and that sentences and pictures show."""


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
        assert trace is not None and trace.weights is not None
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
        timed: ac.Policy | None = ac.Confidence(SHOWN)
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
        self.readout = nn.Linear(dim, vision.CLASSES)
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
        return window + encoding + cell + (2 + vision.CLASSES + halts) * dim


def build_pair(side: int) -> ac.models.ACC:
    """Habit: a coarse convolution and a linear layer; control: the reference CNN."""
    kernel, stride = (5, 2) if side >= vision.LARGE else (3, 1)
    left = ((side - kernel) // stride + 1) // 2
    habit = nn.Sequential(
        nn.Conv2d(1, 16, kernel, stride=stride),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * left * left, vision.CLASSES),
    )
    control = vision.build_cnn(side, 1)
    return ac.models.ACC(vision.Scale(), habit, control, vision.CLASSES, objective=Objective())


@experiment(measure)
def digits(
    data: Data = None,
    *,
    seeds: Seeds = 1,
    first_seed: FirstSeed = 0,
    epochs: Epochs = None,
    quick: Quick = False,
) -> Setup:
    """Decide when to stop on digits: ACT, PonderNet, confidence, habit, control. Three minutes per seed."""
    images = find_images(data)
    rows = len(images.train_labels)
    pair = asdict(vision.recipe_for(rows, quick))
    # Tried at price 0.03 on scikit-learn's digits, seed 0: 3e-3 and 8 epochs read 85.8 % in 8.5 steps, 1e-2
    # and 8 epochs 92.2 % in 3.2, and 20 epochs 97.2 % in 2.8; batch 64 95.6 % in 4.3; 2e-2 and 12 epochs 94.8
    # % in 2.1; a price that is reached over the first 30 % of the updates 97.2 % in 4.4. At 3e-3 no reader of
    # MNIST's images halted early.
    large = vision.Recipe(epochs=1 if quick else 4, learning_rate=5e-3)
    small = vision.Recipe(epochs=8 if quick else 20, batch=32, learning_rate=1e-2)
    reader = asdict(large if rows > 10_000 else small)
    if epochs is not None:
        pair["epochs"] = reader["epochs"] = epochs
    common = {"data": None if data is None else str(data), "timing_seconds": 0.3 if quick else 2.0}
    parts: dict[str, dict[str, Any]] = {"acc": {"part": "acc"}, "depth": {"part": "depth"}}
    for price in PRICES[::3] if quick else PRICES:
        parts[f"act-{price:g}"] = {"part": "act", "price": price}
    for prior in PRIORS[:1] if quick else PRIORS:
        parts[f"ponder-{prior:g}"] = {"part": "ponder", "prior": prior}
    every = range(first_seed, first_seed + seeds)
    recipes = {"recipe": reader, "pair_recipe": pair}
    return Setup(
        config={"data": images.name, "train": rows, "seeds": list(every), **recipes, "quick": quick},
        cells=grid(parts, every, {**common, **recipes}),
        about=f"[bold]{images.name}[/]: {rows:,} training images",
    )


class _Found:
    """The results under the names of the report."""

    def __init__(self, results: Results) -> None:
        self.depth, self.pair = results.where(part="depth"), results.where(part="acc")
        self.act = {p: results.where(part="act", price=p).at("own") for p in results.options("price")}
        self.ponder = {p: results.where(part="ponder", prior=p).at("own") for p in results.options("prior")}
        self.sure = {t: self.depth.at(f"confidence/{t:g}") for t in THRESHOLDS}
        self.fixed = {n: self.depth.at(f"fixed/{n}") for n in DEPTHS}
        gates = [(gate, rate) for gate in GATES for rate in RATES]
        self.gated = {(gate, rate): self.pair.at(f"gates/{gate}/{rate:g}") for gate, rate in gates}
        self.shown, self.dearest = self.sure[SHOWN], max(self.act)


@digits.reports
def report(results: Results) -> list[Block]:
    """What halting saves, who gets the steps, and what habit with control saves."""
    found = _Found(results)
    cost = found.pair.first("multiply_adds")
    readers = {
        **{f"ACT, price of a step {p:g}": row for p, row in found.act.items()},
        **{f"PonderNet, prior {p:g}": row for p, row in found.ponder.items()},
        **{f"confidence {t:g}": row for t, row in found.sure.items()},
        **{f"fixed depth {n}": row for n, row in found.fixed.items()},
    }
    pairs = {f"ACC, {gate} gate, {100 * rate:g} %": row for (gate, rate), row in found.gated.items()}
    by_class = {
        f"ACT, price {found.dearest:g}: steps": (found.act[found.dearest], form(2, 1.0)),
        f"confidence {SHOWN:g}: steps": (found.shown, form(2, 1.0)),
        "ACC, value gate, 10 %: calls, %": (found.gated["value", 0.1], form()),
    }
    reads = Column("right, %", "accuracy", form(2))
    return [
        f"# Digits: {results.config['data']}",
        f"{results.config['train']:,} training images, a sixth of them held out; {results.opening}",
        "The readers look at an image (of MNIST at its halved size) through a window, a look at "
        f"{found.depth.first('step'):,} multiply–adds. Habit and control read the whole image, at "
        f"{cost['default']:,} and {cost['control']:,}.",
        column("digits.png", "Accuracy against compute", found, _compute, _price, _classes),
        Verdicts(_sentences(found)),
        Picture("digits_examples.png", "Fewest and most steps", partial(_examples, found), (9.2, 3.0), 120),
        "## Accuracy against compute",
        tabulate(
            "reader",
            readers,
            Column("steps", "steps", form(2, 1.0)),
            Column("multiply–adds", _of_steps, millions),
            reads,
            Column("− same steps at random", _gain, points),
            Column("rank correlation with difficulty", "rank_correlation", form(2, 1.0)),
            Column("masked / compacted time", _timed, form(2, 1.0)),
        ),
        tabulate(
            "habit and control",
            pairs,
            Column("called, %", "rate", form()),
            Column("multiply–adds", _of_calls, millions),
            reads,
            Column("− control everywhere", _over_control, points),
        ),
        "## Who gets the steps",
        Table(
            ["digit", *map(str, range(10))],
            [[name, *map(show, row.each("by_class"))] for name, (row, show) in by_class.items()],
        ),
    ]


def _of_steps(row: Results) -> Any:
    return row["steps"] * row["/step"]


def _of_calls(row: Results) -> Any:
    return row["/multiply_adds/default"] + row["rate"] * row["/multiply_adds/control"]


def _gain(row: Results) -> Any:
    """What it is worth that each image gets its own number of steps; nothing where all have the same."""
    return row["own steps"] - row["shuffled"] if "rank_correlation" in row else None


def _timed(row: Results) -> Any:
    """One policy of each reader was timed."""
    return row["/timing/masked_over_compacted"] if row.path in ("own", f"confidence/{SHOWN:g}") else None


def _over_control(row: Results) -> Any:
    gate = row.path.split("/")[1]
    return row["accuracy"] - row[f"/gates/{gate}/1/accuracy"]


def _sentences(found: _Found) -> list[str]:
    priced = "; ".join(
        f"{interval(row['steps'], 2, 1.0)} steps at price {price:g} ({interval(row['accuracy'], 2)} % right)"
        for price, row in found.act.items()
    )
    shown, pair, always = found.shown, found.gated["value", 0.1], found.gated["value", 1.0]
    nearest = min(found.fixed, key=lambda n: abs(n - shown["steps"].mean()))
    ranked = {"confidence": shown, f"ACT at {found.dearest:g}": found.act[found.dearest]}
    return [
        f"Under ACT {priced}.",
        f"Stopping at a confidence of {SHOWN:g} takes {interval(shown['steps'], 2, 1.0)} steps and reads "
        f"{interval(shown['accuracy'], 2)} %. That is {points(shown['own steps'] - shown['shuffled'])} "
        f"points more than the same steps dealt at random among the images; a fixed depth of {nearest} "
        f"reads {interval(found.fixed[nearest]['accuracy'], 2)} %.",
        f"On the clock, stopping at {SHOWN:g}: masked inference takes "
        f"{interval(shown['/timing/masked_over_compacted'], 2, 1.0)} times as long, all steps "
        f"{interval(shown['/timing/all_steps_over_compacted'], 2, 1.0)} times.",
        *(
            f"Rank correlation of steps ({name}) with how hard an image is for a linear classifier: "
            f"{interval(row['rank_correlation'], 2, 1.0)}."
            for name, row in ranked.items()
            if "rank_correlation" in row
        ),
        f"Habit and control: calling {interval(pair['rate'])} % reads {interval(pair['accuracy'], 2)} %, "
        f"{points(_over_control(pair))} points against control everywhere, at {millions(_of_calls(pair))} "
        f"multiply–adds an image instead of {millions(_of_calls(always))}; a batch takes "
        f"{interval(pair['/timing/saved'])} % less time.",
    ]


def _compute(axes: Axes, found: _Found) -> None:
    def draw(rows: Any, cost: Any, label: str, accuracy: str = "accuracy", **look: Any) -> None:
        rows = list(rows)
        x, y = [cost(row) / 1e6 for row in rows], [row[accuracy] for row in rows]
        curve(axes, x, y, label, scale=100, **look)

    draw(found.fixed.values(), _of_steps, "fixed depth", color=OTHERS)
    draw(found.sure.values(), _of_steps, "stops when sure", color=OURS)
    dealt = "the same, dealt at random"
    draw(found.sure.values(), _of_steps, dealt, "shuffled", color=OURS, ls=":", mfc="white")
    draw(found.act.values(), _of_steps, "ACT, by price", color=ORANGE, marker="s", ls="")
    draw(found.ponder.values(), _of_steps, "PonderNet, by prior", color=WRONG, marker="^", ls="")
    value = [found.gated["value", rate] for rate in RATES]
    draw(value, _of_calls, "habit and control", color=GREEN, marker="D")
    axes.set(xscale="log", xlabel="multiply–adds of an image, millions", ylabel="right, %")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title("Accuracy against compute")
    span_at_least(axes, "y", 2.0)
    legend(axes)


def _price(axes: Axes, found: _Found) -> None:
    act = found.act
    bar_chart(axes, [f"{price:g}" for price in act], [row["steps"] for row in act.values()], color=ORANGE)
    for i, row in enumerate(act.values()):
        steps = estimate(row["steps"])
        at = (i, steps.mean if steps.high is None else steps.high)
        note(axes, f"{100 * row['accuracy'].mean():.1f} %", at, (0, 4), color=MUTED, ha="center")
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
    axes.set(xlabel="price of a step, nats", ylabel="steps (right, %)")
    axes.set_title("Steps by their price (ACT)")


def _classes(axes: Axes, found: _Found) -> None:
    steps = sorted(enumerate(found.shown.each("by_class")), key=lambda entry: entry[1].mean())
    bar_chart(axes, [str(d) for d, _ in steps], [v for _, v in steps], horizontal=True, color=OURS)
    axes.set(xlabel="steps until sure", ylabel="digit")
    axes.set_title(f"Who gets the steps (confidence {SHOWN:g})")


def _examples(found: _Found, figure: Figure) -> None:
    """The test images with the fewest and the most steps, under the first seed."""
    shown, data = found.shown, found.depth.cells[0].options["data"]
    images = find_images(data).test_images
    chosen, steps = shown.first("fewest") + shown.first("most"), shown.first("examples")
    for axes, item in zip(figure.subplots(2, len(chosen) // 2).flat, chosen, strict=True):
        axes.imshow(images[item].numpy(), cmap="gray_r", interpolation="nearest")
        axes.set_title(str(steps[str(item)]), loc="center")
        axes.set_axis_off()
    title = f"Fewest and most steps (confidence {SHOWN:g})"
    figure.suptitle(title, color=INK, x=0.01, ha="left", fontsize=11)
