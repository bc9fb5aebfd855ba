"""The demonstration: its options and cells, and its report."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from safetensors.torch import load_file

from ..data import ImageData, find_images
from ..runs import Cell, Data, Epochs, FirstSeed, Results, Seeds, Setup, experiment
from ..runs.report import Block, Column, Picture, Verdicts, tabulate
from ..runs.statistics import counted, estimate, form, interval
from ..style import FAINT, INK, MUTED, ORANGE, OTHERS, OURS, WRONG, note
from .measure import PER_CLASS, SHOWN, measure
from .training import Recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["demo", "recipe_for"]

FEWEST_FOR_A_SHARE = 10
LABELS = {
    "masked": "masked",
    "indexed": "boolean indexing",
    "adaptive": "AdaptiveHalt",
    "limit": "lower bound",
}


def recipe_for(data: ImageData) -> Recipe:
    """Return the recipe that suits the size of the data."""
    if data.side <= 12:
        return Recipe(window=5, epochs=40)
    return Recipe(window=data.side // 2, epochs=2)


@experiment(measure)
def demo(
    data: Data = None,
    *,
    seeds: Seeds = 1,
    first_seed: FirstSeed = 0,
    epochs: Epochs = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Seconds for all repeats of the timing together.")
    ] = 5.0,
) -> Setup:
    """Train a reader that looks longer at hard digits, time it, and draw what it did. Under a minute."""
    images = find_images(data)
    recipe = recipe_for(images)
    if epochs is not None:
        recipe = replace(recipe, epochs=epochs)
    every = list(range(first_seed, first_seed + seeds))
    options = {"data": None if data is None else str(data), "recipe": asdict(recipe), "seconds": seconds}
    train, test = len(images.train_images), len(images.test_images)
    about = (
        f"{train:,} training images, {test:,} test images. The reader sees "
        f"{recipe.window}x{recipe.window} of {images.side}x{images.side} pixels at a look, and decides "
        f"itself when it has seen enough (ACT, at most {recipe.max_steps} looks)"
    )
    config = {"data": images.name, "train": train, "test": test, "side": images.side, "about": about}
    return Setup(
        config={**config, "seeds": every, "recipe": asdict(recipe), "seconds": seconds},
        cells=[Cell(f"seed-{seed}", options, seed) for seed in every],
        about=f"[bold]{images.name}[/]: {about}",
    )


@demo.reports
def report(results: Results) -> list[Block]:
    """How many looks a digit gets, and what that is worth on the clock."""
    batch = results.first("batch")
    times = {label: results.at(f"times_ms/{name}") for name, label in LABELS.items()}
    milliseconds, ratio = form(2, 1.0), form(2, 1.0)
    return [
        f"# Demo: {results.config['data']}",
        f"{results.config['about']}; {results.opening}",
        Picture(
            "demo.png", "How many looks does a digit need?", lambda figure: _draw(figure, results), (15, 9.6)
        ),
        Verdicts(_sentences(results)),
        f"## One batch of {batch['rows']:,} images, {counted(batch['threads'], 'thread')}",
        "Masked: all rows run until the last one halts. Lower bound: the networks alone on the active "
        "rows. Ratios: median over the rounds of the quotient within a round.",
        tabulate(
            "way",
            times,
            Column("median, ms", "median", milliseconds),
            Column("lower quartile, ms", "low", milliseconds),
            Column("upper quartile, ms", "high", milliseconds),
            Column("over masked", "over_masked", ratio),
            Column("over the lower bound", "over_limit", ratio),
        ),
        "## Looks by digit",
        tabulate(
            "digit",
            {
                str(entry["value"]): results.at(f"by_class/{i}")
                for i, entry in enumerate(results.first("by_class"))
            },
            Column("images", "images", form(0, 1.0)),
            Column("looks", "mean_steps", form(2, 1.0)),
            Column("right, %", "accuracy", form()),
        ),
    ]


def _sentences(results: Results) -> list[str]:
    steps, batch, times = results.at("steps"), results.first("batch"), results.at("times_ms")
    differ = {key: int(results[f"rows_that_differ/{key}"].sum()) for key in ("predictions", "steps")}
    images = f"{batch['rows']:,} images"
    same = f"All ways give the same prediction and the same number of steps for each of the {images}."
    different = (
        f"The ways differ in the prediction of {differ['predictions']} and the steps of {differ['steps']} of "
        f"{batch['rows']:,} images: matrix products round differently in batches of different sizes."
    )
    return [
        f"{interval(results['accuracy'])} % of the test images are read right with "
        f"{interval(steps['mean'], 2, 1.0)} looks on average, {steps['min'].min()} to "
        f"{steps['max'].max()} (at most {steps.first('at_most')} allowed). Training took "
        f"{interval(results['training/seconds'], 0, 1.0)} s.",
        f"A batch takes {interval(times['adaptive/median'], 2, 1.0)} ms with AdaptiveHalt, "
        f"{interval(times['indexed/median'], 2, 1.0)} ms with boolean indexing, "
        f"{interval(times['masked/median'], 2, 1.0)} ms masked; the lower bound is "
        f"{interval(times['limit/median'], 2, 1.0)} ms. AdaptiveHalt takes "
        f"{interval(times['adaptive/over_masked'], 2, 1.0)} of the masked time, "
        f"{interval(times['adaptive/over_limit'], 2, 1.0)} times the lower bound "
        "(medians of the ratios within a round).",
        different if any(differ.values()) else same,
    ]


def _draw(figure: Figure, results: Results) -> None:
    """Which digits got few looks and which got many, and what that is worth on the clock."""
    figure.set_layout_engine("none")
    config, steps = results.config, results.first("steps")
    figure.text(0.025, 0.952, "How many looks does a digit need?", fontsize=19, weight="bold")
    figure.text(
        0.025,
        0.918,
        f"{config['data']}, {config['test']:,} test images: {results.first('accuracy'):.1%} read right with "
        f"{steps['mean']:.2f} looks on average ({steps['min']} to {steps['max']}, at most "
        f"{steps['at_most']} allowed)",
        fontsize=12,
        color=MUTED,
    )
    digits, charts = figure.subfigures(1, 2, width_ratios=(1.32, 1), wspace=0, squeeze=False)[0]
    _digits(digits, results)
    grid = charts.add_gridspec(3, 1, left=0.19, right=0.96, top=0.835, bottom=0.07, hspace=0.52)
    for i, chart in enumerate((_histogram, _classes, _clock)):
        chart(charts.add_subplot(grid[i]), results)


def _digits(figure: SubFigure, results: Results) -> None:
    """The digits of the first seed with the fewest and the most looks."""
    shown = load_file(results.files / SHOWN)
    grid = figure.add_gridspec(
        10,
        2 * PER_CLASS + 1,
        width_ratios=[1] * PER_CLASS + [0.25] + [1] * PER_CLASS,
        left=0.07,
        right=0.985,
        top=0.835,
        bottom=0.045,
        wspace=0.06,
        hspace=0.32,
    )
    for i, (label, column) in enumerate(zip(shown["label"].tolist(), shown["column"].tolist(), strict=True)):
        axes = figure.add_subplot(grid[label, column + (column >= PER_CLASS)])
        _digit(axes, {name: values[i] for name, values in shown.items()})
    figure.text(0.07, 0.872, "Fewest looks", fontsize=11, weight="bold")
    figure.text(0.555, 0.872, "Most looks", fontsize=11, weight="bold")
    legend = "number: looks     line: where it looked, from ○ to ●     red: misread, as what"
    figure.text(0.985, 0.012, legend, fontsize=9.5, color=MUTED, ha="right")


def _digit(axes: Axes, shown: dict[str, Any]) -> None:
    side = shown["image"].shape[-1]
    steps, label, predicted = (int(shown[name]) for name in ("steps", "label", "predicted"))
    axes.imshow(shown["image"].numpy(), cmap="Greys", vmin=0, vmax=1.25)
    y, x = ((shown["path"][:steps] + 1) * (side - 1) / 2).numpy().T
    axes.plot(x, y, color=ORANGE, linewidth=1.1, alpha=0.9)
    axes.plot(x[0], y[0], "o", color=ORANGE, markersize=4, markerfacecolor="white")
    axes.plot(x[-1], y[-1], "o", color=ORANGE, markersize=4)
    axes.set(xlim=(-0.5, side - 0.5), ylim=(side - 0.5, -0.5), xticks=[], yticks=[])
    wrong = label != predicted
    for spine in axes.spines.values():
        spine.set(visible=True, color=WRONG if wrong else FAINT, linewidth=1.6 if wrong else 0.8)
    if wrong:
        badge = {"boxstyle": "square,pad=0.22", "facecolor": WRONG, "edgecolor": "none"}
        place: dict[str, Any] = {"transform": axes.transAxes, "ha": "center", "va": "center", "bbox": badge}
        axes.text(0.9, 0.1, str(predicted), fontsize=8, weight="bold", color="white", **place)
    axes.set_title(str(steps), fontsize=8.5, color=MUTED, weight="normal", loc="center", pad=2)


def _histogram(axes: Axes, results: Results) -> None:
    """The looks of every image, under the first seed."""
    groups, steps = results.first("by_steps"), results.first("steps")
    axes.bar([g["value"] for g in groups], [g["images"] for g in groups], color=OURS, width=0.72)
    for group in groups:
        if group["images"] >= FEWEST_FOR_A_SHARE:
            place = (group["value"], group["images"])
            note(axes, f"{group['accuracy']:.0%}", place, (0, 3), ha="center", fontsize=8, color=MUTED)
    most = max(group["images"] for group in groups)
    axes.set(ylim=(0, most * 1.18), ylabel="images", xlim=(0.4, steps["at_most"] + 0.6))
    axes.set_xticks(range(1, steps["at_most"] + 1))
    axes.set_xlabel(f"looks (above: share read right, from {FEWEST_FOR_A_SHARE} images on)")
    axes.set_title(f"Looks per image: {steps['mean']:.2f} on average", pad=8)


def _classes(axes: Axes, results: Results) -> None:
    groups = sorted(results.first("by_class"), key=lambda group: group["mean_steps"])
    means = [group["mean_steps"] for group in groups]
    axes.bar(range(len(groups)), means, color=OURS, width=0.72)
    for i, mean in enumerate(means):
        note(axes, f"{mean:.1f}", (i, mean), (0, 3), ha="center", fontsize=9, color=MUTED)
    axes.set_xticks(range(len(groups)), [str(group["value"]) for group in groups], fontsize=11, color=INK)
    axes.set(ylim=(0, max(means) * 1.15), ylabel="looks", xlabel="digit")
    axes.set_title("Mean looks per digit", pad=8)


def _clock(axes: Axes, results: Results) -> None:
    highest = 0.0
    for i, name in enumerate(LABELS):
        timing = results.at(f"times_ms/{name}")
        low, median, high = (estimate(timing[key]).mean for key in ("low", "median", "high"))
        axes.barh(i, median, color=OURS if name == "adaptive" else OTHERS, height=0.66)
        axes.errorbar(median, i, xerr=[[median - low], [high - median]], color=INK, linewidth=1, capsize=2)
        over = "" if name == "limit" else f"   {timing['over_limit'].mean():.2f} × the bound"
        note(axes, f"{median:.1f} ms{over}", (high, i), (7, 0), va="center", fontsize=9.5)
        highest = max(highest, high)
    axes.axvline(results["times_ms/limit/median"].mean(), color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(LABELS)), [label.replace(" ", "\n") for label in LABELS.values()])
    axes.tick_params(axis="y", colors=INK)
    axes.set(ylim=(len(LABELS) - 0.5, -0.5), xlabel="milliseconds per batch (median and quartiles)")
    axes.set_xlim(0, highest * 1.9)
    batch = results.first("batch")
    axes.set_title(
        f"Time for a batch of {batch['rows']:,} on {counted(batch['threads'], 'CPU thread')}", pad=8
    )
