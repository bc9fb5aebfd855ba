"""The experiment: its options and cells, and its report."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data import ImageData, find_images
from ..runs import Cell, Data, Epochs, FirstSeed, Quick, Results, Seeds, Setup, experiment
from ..runs.report import Block, Column, Picture, Table, Verdicts, tabulate
from ..runs.statistics import counted, form, interval, mean_interval
from ..style import INK, MUTED, ORANGE, OTHERS, OURS, curve, note
from .landscape import draw_descents, load
from .measure import LANDSCAPES, hold_out, measure
from .training import Recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["energy", "recipe_for"]

TIMED_UPDATES, QUICK_TIMED_UPDATES = 120, 6


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
    """Train a latent-variable energy through its own descent, and see which digits take many steps."""
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
    return Setup(
        config={
            "data": images.name,
            "train": train,
            "test": test,
            "tested_on": tested_on,
            "side": images.side,
            "seeds": every,
            "recipe": asdict(recipe),
            "quick": quick,
        },
        cells=[Cell(f"seed-{seed}", options, seed) for seed in every],
        about=f"[bold]{images.name}[/]: {train:,} training images, {test:,} {tested_on} images",
    )


@energy.reports
def report(results: Results) -> list[Block]:
    """How many steps the descent takes, for which images, what they are worth, and what training costs."""
    config = results.config
    plain, share, ratio = form(2, 1.0), form(2), form(2, 1.0)
    tolerances = {
        f"{entry['tol']:g}" + (" (in use)" if entry["tol"] == results.first("tol") else ""): results.at(
            f"by_tolerance/{i}"
        )
        for i, entry in enumerate(results.first("by_tolerance"))
    }
    budgets = {
        str(entry["max_steps"]): results.at(f"by_budget/{i}")
        for i, entry in enumerate(results.first("by_budget"))
    }
    harder = {
        (label, f"{entry['strength']:g}"): results.at(f"corrupted/{name}/{i}")
        for name, label in (("noise", "noise, standard deviation"), ("patch", "patch, share of the side"))
        for i, entry in enumerate(results.first(f"corrupted/{name}"))
    }
    tenths = {
        str(i + 1): results.at(f"by_difficulty/{i}") for i in range(len(results.first("by_difficulty")))
    }
    stopped = Column("at the bound, images", "ended_by_the_limit", form(0, 1.0))
    timing = results.at("timing")
    per_epoch = results.first("timing/updates_per_epoch")
    return [
        f"# Energy: {config['data']}",
        f"{config['train']:,} training images, {config['test']:,} {config['tested_on']} images; "
        f"{results.opening} E(x, y, z) is an energy over the logits y of the classes and a latent z. "
        "Inference descends it in both until a step lowers it by no more than "
        f"{results.first('tol'):g}, at most {results.first('steps/at_most')} steps.",
        Picture("energy.png", "Steps down the energy", lambda figure: _draw(figure, results), (15, 8.6)),
        Verdicts(_sentences(results)),
        Picture(
            "energy_descents.png",
            "Single descents",
            lambda figure: draw_descents(figure, load(results.files / LANDSCAPES)),
            (18, 12.1),
            110,
        ),
        "## Steps by difficulty",
        "Tenths of the images by the margin of an independent classifier, the easiest first.",
        tabulate(
            "tenth", tenths, Column("mean steps", "mean_steps", plain), Column("right, %", "accuracy", share)
        ),
        "## Steps allowed",
        tabulate(
            "steps at most",
            budgets,
            Column("right, %", "accuracy", share),
            Column("right, hardest tenth, %", "accuracy_hardest", share),
            Column("mean steps", "mean_steps", plain),
            stopped,
        ),
        "## Tolerance of the stop",
        tabulate(
            "tolerance",
            tolerances,
            Column("right, %", "accuracy", share),
            Column("mean steps", "mean_steps", plain),
            Column("steps, hardest / easiest tenth", "hardest_over_easiest", ratio),
            stopped,
        ),
        "## Harder images",
        tabulate(
            ("change", "strength"),
            harder,
            Column("right, %", "accuracy", share),
            Column("mean steps", "mean_steps", plain),
            stopped,
        ),
        "## Training",
        f"Whole epochs as trained take {interval(results['training/seconds_per_epoch'], 1, 1.0)} s each, "
        f"{interval(results['training/seconds'], 0, 1.0)} s in all. The rows below are updates alone on "
        f"{counted(timing.first('threads'), 'thread')}, in turn on the same batches; seconds per epoch "
        f"are those of {per_epoch} updates, extrapolated from {timing.first('updates')}. The ratio is "
        "the median within one update.",
        Table(
            [
                "what",
                "kernels, ms",
                "plain autograd, ms",
                "plain / kernels",
                "s per epoch",
                "plain, s per epoch",
            ],
            [
                [
                    name,
                    *(interval(timing[f"{key}/{way}"], 2, 1.0) for way in ("kernels", "plain", "ratio")),
                    *(
                        interval(timing[f"{key}/{way}"] * per_epoch / 1e3, 2, 1.0)
                        for way in ("kernels", "plain")
                    ),
                ]
                for name, key in (
                    ("update", "update_ms"),
                    ("its descent, forward and backward", "descent_ms"),
                )
            ],
        ),
    ]


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


def _draw(figure: Figure, results: Results) -> None:
    figure.set_layout_engine("none")
    config, steps = results.config, results.at("steps")
    figure.text(0.022, 0.945, "How far is it to the bottom?", fontsize=19, weight="bold")
    figure.text(
        0.022,
        0.905,
        f"{config['data']}, {config['test']:,} {config['tested_on']} images: "
        f"{results['accuracy'].mean():.2%} read right in {steps['mean'].mean():.1f} steps down the "
        f"energy ({steps['min'].min()} to {steps['max'].max()}); "
        f"{results['hardest_over_easiest'].mean():.2f} times as many for the hardest tenth as for the "
        "easiest",
        fontsize=11,
        color=MUTED,
    )
    grid = figure.add_gridspec(2, 3, left=0.05, right=0.985, top=0.82, bottom=0.08, hspace=0.5, wspace=0.24)
    charts = (_histogram, _difficulty, _corrupted_steps, _budget, _tolerance, _seconds)
    for i, chart in enumerate(charts):
        chart(figure.add_subplot(grid[i // 3, i % 3]), results)


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
    axes.axvline(steps["mean"], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    _small(axes, f"mean {steps['mean']:.1f}", steps["mean"], max(shown), (5, 2), ha="left")
    rest = total - sum(shown)
    beyond = f" ({rest} images beyond, up to {steps['max']})" if rest else ""
    axes.set(
        xlabel=f"steps to the minimum{beyond}",
        ylabel="images",
        ylim=(0, max(shown) * 1.12),
        xlim=(0.3, last + 0.7),
    )
    axes.set_title("Steps per image", pad=8)


def _difficulty(axes: Axes, results: Results) -> None:
    steps = [mean_interval(list(v)) for v in results.each("by_difficulty", "mean_steps")]
    right = [v.mean() for v in results.each("by_difficulty", "accuracy")]
    means = [v.mean for v in steps]
    places = range(1, len(means) + 1)
    axes.bar(places, means, color=OURS, width=0.76)
    for place, mean, accuracy in zip(places, means, right, strict=True):
        _small(axes, f"{accuracy:.1%}" if accuracy < 1 else "100%", place, mean, fontsize=8.5)
    axes.set_xticks(places)
    axes.set(ylim=(0, max(means) * 1.14), ylabel="mean steps")
    axes.set_xlabel(
        "tenths by the margin of an independent classifier, easiest first\n(above the bars: share read right)"
    )
    axes.set_title(f"Steps against difficulty: {means[0]:.1f} to {means[-1]:.1f}", pad=8)


def _corrupted_steps(axes: Axes, results: Results) -> None:
    for name, label, color, marker in (
        ("noise", "noise, standard deviation", OURS, "o"),
        ("patch", "patch, share of the side", ORANGE, "s"),
    ):
        path = f"corrupted/{name}"
        x = [entry["strength"] for entry in results.first(path)]
        steps, right = results.each(path, "mean_steps"), results.each(path, "accuracy")
        curve(axes, x, steps, label, color=color, marker=marker, lw=1.8, ms=5)
        for i in (0, len(x) // 2, len(x) - 1):
            if i or name == "noise":
                offset = (0, -14 if name == "patch" else 7)
                _small(axes, f"{right[i].mean():.1%}", x[i], steps[i].mean(), offset, color=color)
    axes.margins(x=0.07, y=0.2)
    axes.legend(loc="upper left")
    axes.set(xlabel="strength (percentages: share read right)", ylabel="mean steps (cut axis)")
    axes.set_title("Steps on harder images", pad=8)


def _budget(axes: Axes, results: Results) -> None:
    x = [entry["max_steps"] for entry in results.first("by_budget")]
    lowest = 1.0
    for key, label, color, marker in (
        ("accuracy", "all images", OURS, "o"),
        ("accuracy_hardest", "hardest tenth", ORANGE, "s"),
    ):
        right, control = results.each("by_budget", key), results[f"classifier/{key}"].mean()
        curve(axes, x, right, label, color=color, marker=marker, lw=1.8, ms=5)
        axes.axhline(control, color=color, linewidth=1, linestyle=(0, (4, 3)), alpha=0.8)
        _small(axes, f"{right[-1].mean():.1%}", x[-1], right[-1].mean(), (0, -14), color=color)
        lowest = min(lowest, control, *(v.mean() for v in right))
    axes.axhline(-1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="ordinary classifier")
    axes.set_xscale("log")
    axes.set_xticks(x, [str(n) for n in x])
    axes.minorticks_off()
    axes.set(ylim=(lowest - 0.35 * (1 - lowest), 1.01), xlabel="steps allowed", ylabel="share read right")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend(loc="lower left", ncols=3, columnspacing=1.2, handlelength=1.6)
    axes.set_title("Accuracy against the steps allowed (cut axis)", pad=8)


def _tolerance(axes: Axes, results: Results) -> None:
    entries = results.first("by_tolerance")
    x = [v.mean() for v in results.each("by_tolerance", "mean_steps")]
    ratio = [v.mean() for v in results.each("by_tolerance", "hardest_over_easiest")]
    right = [v.mean() for v in results.each("by_tolerance", "accuracy")]
    axes.plot(x, ratio, "o-", color=OURS, linewidth=1.8, markersize=5)
    for i, entry in enumerate(entries):
        weight = "bold" if entry["tol"] == results.first("tol") else "normal"
        text = f"{entry['tol']:g}\n{right[i]:.2%}"
        _small(axes, text, x[i], ratio[i], (8, -18), ha="left", fontsize=8, weight=weight)
    axes.margins(x=0.16, y=0.2)
    axes.set(xlabel="mean steps", ylabel="steps, hardest over easiest tenth (cut axis)")
    axes.set_title("Tolerance of the stop, and share read right", pad=8)


def _seconds(axes: Axes, results: Results) -> None:
    timing, training = results.at("timing"), results.at("training")
    scale, threads = timing.first("updates_per_epoch") / 1e3, timing.first("threads")
    alone, behind = "updates alone", "their descents, forward and backward"
    rows = {
        f"whole epochs as trained, {training.first('images'):,} images: kernels": (
            training["seconds_per_epoch"],
            OURS,
        ),
        f"{alone}: kernels": (timing["update_ms/kernels"] * scale, OURS),
        f"{alone}: plain autograd": (timing["update_ms/plain"] * scale, OTHERS),
        f"{behind}: kernels": (timing["descent_ms/kernels"] * scale, OURS),
        f"{behind}: plain autograd": (timing["descent_ms/plain"] * scale, OTHERS),
    }
    for i, (label, (values, color)) in enumerate(rows.items()):
        value = values.mean()
        axes.barh(i, value, color=color, height=0.36)
        axes.text(0, i - 0.24, label, fontsize=9, color=INK, va="bottom")
        text = f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
        _small(axes, text, value, i, (6, -3), ha="left", fontsize=9.5)
    most = max(values.mean() for values, _ in rows.values())
    axes.set(ylim=(len(rows) - 0.6, -0.75), yticks=[], xlim=(0, 1.2 * most))
    axes.set_xlabel(f"seconds per epoch (from the second bar on: from {timing.first('updates')} updates)")
    axes.set_title(f"An epoch of training, {threads} thread{'s' if threads > 1 else ''}", pad=8)
