"""The experiment: its options and cells, and its report."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data import ImageData, find_images
from ..runs import Cell, Data, Epochs, FirstSeed, Quick, Results, Seeds, Setup, experiment
from ..runs.report import Block, Column, Picture, Verdicts, column, tabulate
from ..runs.statistics import counted, form, interval
from ..style import INK, MUTED, ORANGE, OTHERS, OURS, WIDTH, curve, legend, note
from .landscape import draw_descents, load
from .measure import LANDSCAPES, hold_out, measure
from .training import Recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TIMED_UPDATES, QUICK_TIMED_UPDATES = 120, 6
CHANGES = {"noise": "noise, standard deviation", "patch": "patch, share of the side"}
LOOKS: tuple[dict[str, Any], ...] = (
    {"color": OURS, "marker": "o", "lw": 1.8, "ms": 5},
    {"color": ORANGE, "marker": "s", "lw": 1.8, "ms": 5},
)
DASHED = (0, (4, 3))


def recipe_for(data: ImageData, quick: bool = False) -> Recipe:
    """Return the recipe that suits the size of the data."""
    if data.side > 12:
        return Recipe(epochs=1 if quick else 12)
    return Recipe(epochs=12 if quick else 60, batch=32)


@experiment(measure)
def energy(
    data: Data = None,
    *,
    seeds: Seeds = 1,
    first_seed: FirstSeed = 0,
    epochs: Epochs = None,
    held_out: Annotated[
        int,
        typer.Option(
            min=0, help="Number of training images that are reported on instead of the test images."
        ),
    ] = 0,
    quick: Quick = False,
) -> Setup:
    """Train a latent-variable energy through its own descent: which digits are hard? A minute per seed."""
    images = find_images(data)
    if held_out:
        images = hold_out(images, held_out)
    recipe = recipe_for(images, quick)
    if epochs is not None:
        recipe = replace(recipe, epochs=epochs)
    every = list(range(first_seed, first_seed + seeds))
    options = {
        "data": None if data is None else str(data),
        "held_out": held_out,
        "recipe": asdict(recipe),
        "timed_updates": QUICK_TIMED_UPDATES if quick else TIMED_UPDATES,
    }
    train, test = len(images.train_images), len(images.test_images)
    tested_on = "held-out" if held_out else "test"
    config = {"data": images.name, "train": train, "test": test, "tested_on": tested_on, "side": images.side}
    return Setup(
        config={**config, "seeds": every, "recipe": asdict(recipe), "quick": quick},
        cells=[Cell(f"seed-{seed}", options, seed) for seed in every],
        about=f"[bold]{images.name}[/]: {train:,} training images, {test:,} {tested_on} images",
    )


@energy.reports
def report(results: Results) -> list[Block]:
    """How many steps the descent takes, for which images, what they are worth, and what training costs."""
    config, timing = results.config, results.at("timing")
    two, share = form(2, 1.0), form(2)
    right, steps = Column("right, %", "accuracy", share), Column("mean steps", "mean_steps", two)
    stopped = Column("at the bound, images", "ended_by_the_limit", form(0, 1.0))
    in_use, per_epoch = results.first("tol"), timing.first("updates_per_epoch")
    tolerances = {
        f"{entry['tol']:g}" + (" (in use)" if entry["tol"] == in_use else ""): row
        for entry, row in _entries(results, "by_tolerance")
    }
    budgets = {str(entry["max_steps"]): row for entry, row in _entries(results, "by_budget")}
    harder = {
        (label, f"{entry['strength']:g}"): row
        for name, label in CHANGES.items()
        for entry, row in _entries(results, f"corrupted/{name}")
    }
    tenths = {str(i): row for i, (_, row) in enumerate(_entries(results, "by_difficulty"), 1)}
    timed = {"update": timing.at("update_ms"), "its descent, forward and backward": timing.at("descent_ms")}
    charts = (_histogram, _difficulty, _corrupted_steps, _budget, _tolerance, _seconds)
    return [
        f"# Energy: {config['data']}",
        f"{config['train']:,} training images, {config['test']:,} {config['tested_on']} images; "
        f"{results.opening} E(x, y, z) is an energy over the logits y of the classes and a latent z. "
        f"Inference descends it in both until a step lowers it by no more than {in_use:g}, at most "
        f"{results.first('steps/at_most')} steps.",
        column("energy.png", "Steps down the energy", results, *charts, height=3.4),
        Verdicts(_sentences(results)),
        Picture(
            "energy_descents.png",
            "Single descents",
            lambda figure: draw_descents(figure, load(results.files / LANDSCAPES)),
            (WIDTH, 14.2),
        ),
        "## Steps by difficulty",
        "Tenths of the images by the margin of an independent classifier, the easiest first.",
        tabulate("tenth", tenths, steps, right),
        "## Steps allowed",
        tabulate(
            "steps at most",
            budgets,
            right,
            Column("right, hardest tenth, %", "accuracy_hardest", share),
            steps,
            stopped,
        ),
        "## Tolerance of the stop",
        tabulate(
            "tolerance",
            tolerances,
            right,
            steps,
            Column("steps, hardest / easiest tenth", "hardest_over_easiest", two),
            stopped,
        ),
        "## Harder images",
        tabulate(("change", "strength"), harder, right, steps, stopped),
        "## Training",
        f"Whole epochs as trained take {interval(results['training/seconds_per_epoch'], 1, 1.0)} s each, "
        f"{interval(results['training/seconds'], 0, 1.0)} s in all. The rows below are updates alone on "
        f"{counted(timing.first('threads'), 'thread')}, in turn on the same batches; seconds per epoch "
        f"are those of {per_epoch} updates, extrapolated from {timing.first('updates')}. The ratio is "
        "the median within one update.",
        tabulate(
            "what",
            timed,
            Column("kernels, ms", "kernels", two),
            Column("plain autograd, ms", "plain", two),
            Column("plain / kernels", "ratio", two),
            Column("s per epoch", lambda row: row["kernels"] * per_epoch / 1e3, two),
            Column("plain, s per epoch", lambda row: row["plain"] * per_epoch / 1e3, two),
        ),
    ]


def _entries(results: Results, path: str) -> list[tuple[dict[str, Any], Results]]:
    """Each entry of a list under the first seed, and the results of all seeds at it."""
    return [(entry, results.at(f"{path}/{i}")) for i, entry in enumerate(results.first(path))]


def _sentences(results: Results) -> list[str]:
    steps, first, control = results.at("steps"), results.at("after_the_first_step"), results.at("classifier")
    tenths, timing = results.each("by_difficulty", "mean_steps"), results.at("timing")
    return [
        f"{interval(results['accuracy'], 2)} % of the images are read right (an ordinary classifier: "
        f"{interval(control['accuracy'], 2)} %), in {interval(steps['mean'], 2, 1.0)} steps on average, "
        f"{steps['min'].min()} to {steps['max'].max()}; {interval(steps['ended_by_the_limit'], 0, 1.0)} "
        f"images end at the bound of {steps.first('at_most')}.",
        f"The hardest tenth takes {interval(results['hardest_over_easiest'], 2, 1.0)} times as many "
        f"steps as the easiest ({interval(tenths[-1], 2, 1.0)} against {interval(tenths[0], 2, 1.0)}); "
        f"rank correlation of difficulty and steps {interval(results['rank_correlation'], 2, 1.0)}.",
        f"After one step {interval(first['accuracy'], 2)} % are right; the rest of the descent mends "
        f"{interval(first['mended'], 0, 1.0)} of {results.config['test']:,} and spoils "
        f"{interval(first['spoilt'], 0, 1.0)}.",
        f"An update takes {interval(timing['update_ms/ratio'], 2, 1.0)} times as long on plain autograd "
        f"as on the kernels, its descent alone {interval(timing['descent_ms/ratio'], 2, 1.0)} times.",
    ]


def _small(
    axes: Axes, text: str, x: float, y: float, offset: tuple[float, float] = (0, 4), **look: Any
) -> None:
    note(axes, text, (x, y), offset, **{"ha": "center", "fontsize": 9, "color": MUTED, **look})


def _histogram(axes: Axes, results: Results) -> None:
    """The steps of every image, under the first seed."""
    steps = results.first("steps")
    counts, total = steps["counts"], sum(steps["counts"])
    last = next(n for n in range(1, len(counts) + 1) if sum(counts[:n]) >= 0.995 * total)
    shown = counts[:last]
    axes.bar(range(1, last + 1), shown, color=OURS, width=0.76)
    axes.axvline(steps["mean"], color=MUTED, lw=1, ls=DASHED)
    _small(axes, f"mean {steps['mean']:.1f}", steps["mean"], max(shown), (5, 2), ha="left")
    rest = total - sum(shown)
    beyond = f" ({rest} images beyond, up to {steps['max']})" if rest else ""
    axes.set(xlabel=f"steps to the minimum{beyond}", ylabel="images")
    axes.set(ylim=(0, max(shown) * 1.12), xlim=(0.3, last + 0.7))
    axes.set_title("Steps per image")


def _difficulty(axes: Axes, results: Results) -> None:
    means = [v.mean() for v in results.each("by_difficulty", "mean_steps")]
    right = [v.mean() for v in results.each("by_difficulty", "accuracy")]
    places = range(1, len(means) + 1)
    axes.bar(places, means, color=OURS, width=0.76)
    for place, mean, accuracy in zip(places, means, right, strict=True):
        _small(axes, f"{accuracy:.1%}" if accuracy < 1 else "100%", place, mean)
    axes.set_xticks(places)
    axes.set(ylim=(0, max(means) * 1.14), ylabel="mean steps (above: read right)")
    axes.set_xlabel("tenths of the images, by the margin of a classifier, easiest first")
    axes.set_title(f"Steps against difficulty: {means[0]:.1f} to {means[-1]:.1f}")


def _corrupted_steps(axes: Axes, results: Results) -> None:
    for (name, label), look in zip(CHANGES.items(), LOOKS, strict=True):
        path = f"corrupted/{name}"
        x = [entry["strength"] for entry in results.first(path)]
        steps, right = results.each(path, "mean_steps"), results.each(path, "accuracy")
        curve(axes, x, steps, label, **look)
        above = name == "noise"
        for i in (0, len(x) // 2, len(x) - 1):
            if i or above:  # at strength 0 both are the same
                last = i == len(x) - 1
                offset = (6, -9 if above else 3) if last else (0, 7 if above else -15)
                align = "left" if last else "center"
                _small(
                    axes,
                    f"{right[i].mean():.1%}",
                    x[i],
                    steps[i].mean(),
                    offset,
                    ha=align,
                    color=look["color"],
                )
    axes.margins(x=0.13, y=0.2)
    axes.set(xlabel="strength (percentages: share read right)", ylabel="mean steps")
    axes.set_title("Steps on harder images")
    legend(axes)


def _budget(axes: Axes, results: Results) -> None:
    x = [entry["max_steps"] for entry in results.first("by_budget")]
    keys = {"accuracy": "all images", "accuracy_hardest": "hardest tenth"}
    lowest = 1.0
    for (key, label), look in zip(keys.items(), LOOKS, strict=True):
        right, control = results.each("by_budget", key), results[f"classifier/{key}"].mean()
        curve(axes, x, right, label, **look)
        axes.axhline(control, color=look["color"], lw=1, ls=DASHED, alpha=0.8)
        _small(axes, f"{right[-1].mean():.1%}", x[-1], right[-1].mean(), (0, -16), color=look["color"])
        lowest = min(lowest, control, *(v.mean() for v in right))
    axes.axhline(-1, color=MUTED, lw=1, ls=DASHED, label="ordinary classifier")
    axes.set_xscale("log")
    axes.set_xticks(x, [str(n) for n in x])
    axes.minorticks_off()
    axes.set(ylim=(lowest - 0.35 * (1 - lowest), 1.01), xlabel="steps allowed", ylabel="share read right")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_title("Accuracy against the steps allowed")
    legend(axes, 3)


def _tolerance(axes: Axes, results: Results) -> None:
    x, ratio, right = (
        [v.mean() for v in results.each("by_tolerance", key)]
        for key in ("mean_steps", "hardest_over_easiest", "accuracy")
    )
    axes.plot(x, ratio, "o-", color=OURS, lw=1.8, ms=5)
    for i, entry in enumerate(results.first("by_tolerance")):
        weight = "bold" if entry["tol"] == results.first("tol") else "normal"
        text = f"{entry['tol']:g}: {right[i]:.2%}"
        # To both sides in turn: neighbours may lie at one height.
        offset, align = ((-8, 4), "right") if i % 2 else ((8, -8), "left")
        _small(axes, text, x[i], ratio[i], offset, ha=align, fontsize=8.5, weight=weight)
    span = x[-1] - x[0]
    axes.set_xlim(x[0] - 0.12 * span, x[-1] + 0.1 * span)
    axes.margins(y=0.1)
    axes.set(xlabel="mean steps (tolerance: share read right)", ylabel="steps, hardest / easiest tenth")
    axes.set_title("Tolerance of the stop")


def _seconds(axes: Axes, results: Results) -> None:
    timing, training = results.at("timing"), results.at("training")
    scale, threads = timing.first("updates_per_epoch") / 1e3, timing.first("threads")
    whole = f"whole epochs as trained, {training.first('images'):,} images: kernels"
    rows = {whole: (training["seconds_per_epoch"].mean(), OURS)}
    for key, label in (
        ("update_ms", "updates alone"),
        ("descent_ms", "their descents, forward and backward"),
    ):
        rows[f"{label}: kernels"] = timing[f"{key}/kernels"].mean() * scale, OURS
        rows[f"{label}: plain autograd"] = timing[f"{key}/plain"].mean() * scale, OTHERS
    for i, (label, (value, color)) in enumerate(rows.items()):
        axes.barh(i, value, color=color, height=0.36)
        axes.text(0, i - 0.24, label, fontsize=10, color=INK, va="bottom")
        text = f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
        _small(axes, text, value, i, (6, -3), ha="left", fontsize=10)
    axes.set(ylim=(len(rows) - 0.6, -0.75), yticks=[])
    axes.set_xlim(0, 1.2 * max(value for value, _ in rows.values()))
    axes.set_xlabel(f"seconds per epoch (from the second bar on: from {timing.first('updates')} updates)")
    axes.set_title(f"An epoch of training, {counted(threads, 'thread')}")
