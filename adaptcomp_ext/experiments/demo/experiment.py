"""The demonstration: its options and cells, and its report."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from safetensors.torch import load_file

from ..data import ImageData, find_images
from ..runs import Cell, Data, Epochs, FirstSeed, Results, Seeds, Setup, experiment
from ..runs.report import Block, Column, Picture, Verdicts, tabulate
from ..runs.statistics import counted, estimate, form, interval
from ..style import FAINT, INK, MUTED, ORANGE, OTHERS, OURS, WIDTH, WRONG, note
from .measure import PER_CLASS, SHOWN, measure
from .model import Recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    """Train a reader that looks longer at hard digits, time it, and draw what it did. About a minute."""
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
    batch, classes = results.first("batch"), results.first("by_class")
    times, two = {label: results.at(f"times_ms/{name}") for name, label in LABELS.items()}, form(2, 1.0)
    return [
        f"# Demo: {results.config['data']}",
        f"{results.config['about']}; {results.opening}",
        Picture("demo.png", "How many looks does a digit need?", partial(_draw, results), (WIDTH, 18.5)),
        Verdicts(_sentences(results)),
        f"## One batch of {batch['rows']:,} images, {counted(batch['threads'], 'thread')}",
        "Masked: all rows run until the last one halts. Lower bound: the networks alone on the active "
        "rows. Ratios: median over the rounds of the quotient within a round.",
        tabulate(
            "way",
            times,
            Column("median, ms", "median", two),
            Column("lower quartile, ms", "low", two),
            Column("upper quartile, ms", "high", two),
            Column("over masked", "over_masked", two),
            Column("over the lower bound", "over_limit", two),
        ),
        "## Looks by digit",
        tabulate(
            "digit",
            {str(entry["value"]): results.at(f"by_class/{i}") for i, entry in enumerate(classes)},
            Column("images", "images", form(0, 1.0)),
            Column("looks", "mean_steps", two),
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


def _draw(results: Results, figure: Figure) -> None:
    """Which digits got few looks and which got many, and what that is worth on the clock."""
    figure.suptitle("How many looks does a digit need?", x=0.02, ha="left", weight="bold")
    panels = figure.subplots(4, 1, height_ratios=(10.2, 3, 3, 3.2))
    for axes, draw in zip(panels, (_digits, _histogram, _classes, _clock), strict=True):
        draw(axes, results)


def _digits(axes: Axes, results: Results) -> None:
    """The digits of the first seed with the fewest and the most looks, each a square of side 1."""
    from matplotlib.patches import Rectangle

    shown = load_file(results.files / SHOWN)
    for i in range(len(shown["label"])):
        steps, label, predicted, place = (
            int(shown[name][i]) for name in ("steps", "label", "predicted", "column")
        )
        left, top = 1.1 * place + 0.3 * (place >= PER_CLASS), 1.38 * label
        image = shown["image"][i].numpy()
        axes.imshow(image, cmap="Greys", vmin=0, vmax=1.25, extent=(left, left + 1, top + 1, top))
        y, x = ((shown["path"][i, :steps].numpy() + 1) / 2 * (len(image) - 1) + 0.5).T / len(image)
        axes.plot(left + x, top + y, color=ORANGE, lw=1.1, alpha=0.9)
        axes.plot(left + x[0], top + y[0], "o", color=ORANGE, ms=4, mfc="white")
        axes.plot(left + x[-1], top + y[-1], "o", color=ORANGE, ms=4)
        color, width = (FAINT, 0.8) if label == predicted else (WRONG, 1.6)
        axes.add_patch(Rectangle((left, top), 1, 1, ec=color, lw=width, fill=False))
        if label != predicted:
            badge = {"boxstyle": "square,pad=0.2", "facecolor": WRONG, "edgecolor": "none"}
            look: dict[str, Any] = {"ha": "center", "va": "center", "bbox": badge, "weight": "bold"}
            axes.text(left + 0.9, top + 0.9, str(predicted), fontsize=9, color="white", **look)
        axes.text(left + 0.5, top - 0.03, str(steps), fontsize=10, color=MUTED, ha="center", va="bottom")
    for text, begin in (("Fewest looks", 0.0), ("Most looks", 1.1 * PER_CLASS + 0.3)):
        axes.text(begin, -0.42, text, fontsize=12, weight="bold", va="bottom")
    legend = "number: looks   line: where it looked, from ○ to ●   red: misread, as what"
    axes.text(0, 9 * 1.38 + 1.12, legend, fontsize=9.5, color=MUTED, va="top")
    axes.set(xlim=(-0.05, 2.2 * PER_CLASS + 0.25), ylim=(9 * 1.38 + 1.5, -0.9), aspect="equal")
    axes.set_axis_off()


def _histogram(axes: Axes, results: Results) -> None:
    """The looks of every image, under the first seed."""
    groups, steps = results.first("by_steps"), results.first("steps")
    axes.bar([g["value"] for g in groups], [g["images"] for g in groups], color=OURS, width=0.72)
    for group in groups:
        if group["images"] >= FEWEST_FOR_A_SHARE:
            place = (group["value"], group["images"])
            note(axes, f"{group['accuracy']:.0%}", place, (0, 3), ha="center", fontsize=8.5, color=MUTED)
    most = max(group["images"] for group in groups)
    axes.set(ylim=(0, most * 1.18), ylabel="images", xlim=(0.4, steps["at_most"] + 0.6))
    axes.set_xticks(range(1, steps["at_most"] + 1))
    axes.set_xlabel(f"looks (above: share read right, from {FEWEST_FOR_A_SHARE} images on)")
    axes.set_title(f"Looks per image: {steps['mean']:.2f} on average")


def _classes(axes: Axes, results: Results) -> None:
    groups = sorted(results.first("by_class"), key=lambda group: group["mean_steps"])
    means = [group["mean_steps"] for group in groups]
    axes.bar(range(len(groups)), means, color=OURS, width=0.72)
    for i, mean in enumerate(means):
        note(axes, f"{mean:.1f}", (i, mean), (0, 3), ha="center", fontsize=10, color=MUTED)
    axes.set_xticks(range(len(groups)), [str(group["value"]) for group in groups], color=INK)
    axes.set(ylim=(0, max(means) * 1.15), ylabel="looks", xlabel="digit")
    axes.set_title("Mean looks per digit")


def _clock(axes: Axes, results: Results) -> None:
    highest = 0.0
    for i, name in enumerate(LABELS):
        timing = results.at(f"times_ms/{name}")
        low, median, high = (estimate(timing[key]).mean for key in ("low", "median", "high"))
        axes.barh(i, median, color=OURS if name == "adaptive" else OTHERS, height=0.66)
        axes.errorbar(median, i, xerr=[[median - low], [high - median]], color=INK, lw=1, capsize=2)
        over = "" if name == "limit" else f", {timing['over_limit'].mean():.2f} × the bound"
        note(axes, f"{median:.1f} ms{over}", (high, i), (7, 0), va="center", fontsize=10)
        highest = max(highest, high)
    axes.axvline(results["times_ms/limit/median"].mean(), color=MUTED, lw=1, ls=(0, (4, 3)), zorder=0)
    axes.set_yticks(range(len(LABELS)), [label.replace(" ", "\n") for label in LABELS.values()], color=INK)
    axes.set(ylim=(len(LABELS) - 0.5, -0.5), xlabel="milliseconds per batch (median and quartiles)")
    axes.set_xlim(0, highest * 1.9)
    batch = results.first("batch")
    axes.set_title(f"A batch of {batch['rows']:,} on {counted(batch['threads'], 'CPU thread')}")
