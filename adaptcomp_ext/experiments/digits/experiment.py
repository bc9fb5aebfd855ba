"""The experiment: its options and cells, and its report."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from ..data import find_images
from ..runs import Data, Epochs, FirstSeed, Quick, Results, Seeds, Setup, experiment, grid
from ..runs.report import Block, Column, Picture, Table, Verdicts, column, tabulate
from ..runs.statistics import estimate, form, interval, millions, points
from ..style import (
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
from ..vision import Recipe, recipe_for
from .measure import DEPTHS, RATES, THRESHOLDS, measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PRICES = (0.0, 0.01, 0.03, 0.1)
"""Price of one step under ACT, in nats."""
PRIORS = (0.2, 0.4)
"""Probability of halting to which PonderNet is drawn."""
GATES = ("value", "entropy")
SHOWN = 0.9
"""The confidence that sentences and pictures show."""


@experiment(measure)
def digits(
    data: Data = None,
    *,
    seeds: Seeds = 1,
    first_seed: FirstSeed = 0,
    epochs: Epochs = None,
    quick: Quick = False,
) -> Setup:
    """Decide when to stop on grey digits: ACT, PonderNet, confidence, habit and control."""
    images = find_images(data)
    rows = len(images.train_labels)
    pair = asdict(recipe_for(rows, quick))
    # Tried at price 0.03 on scikit-learn's digits, seed 0: 3e-3 and 8 epochs read 85.8 % in 8.5 steps, 1e-2
    # and 8 epochs 92.2 % in 3.2, and 20 epochs 97.2 % in 2.8; batch 64 95.6 % in 4.3; 2e-2 and 12 epochs 94.8
    # % in 2.1; a price that is reached over the first 30 % of the updates 97.2 % in 4.4. At 3e-3 no reader of
    # MNIST's images halted early.
    large = Recipe(epochs=1 if quick else 4, learning_rate=5e-3)
    small = Recipe(epochs=8 if quick else 20, batch=32, learning_rate=1e-2)
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
