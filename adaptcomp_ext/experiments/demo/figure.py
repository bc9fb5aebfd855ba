"""The picture: which digits got few looks and which got many, and what that is worth on the clock."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure

from adaptcomp_ext.experiments.style import FAINT, INK, MUTED, ORANGE, OTHERS, OURS, STYLE, WRONG, save

from .model import GlimpseReader
from .reading import Reading

__all__ = ["draw"]

PER_CLASS = 5
FEWEST_FOR_A_SHARE = 10
LABELS = {
    "masked": "masked",
    "indexed": "boolean\nindexing",
    "adaptive": "AdaptiveHalt",
    "limit": "limit",
}


def draw(report: Mapping[str, Any], reading: Reading, reader: GlimpseReader, path: Path) -> None:
    """Draw the picture.

    Parameters
    ----------
    report : mapping
        The content of the JSON file.
    reading : Reading
        The test images and what became of them.
    reader : GlimpseReader
        Says where it looked.
    path : Path
        PNG to write.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(15, 9.6), facecolor="white")
        FigureCanvasAgg(figure)
        _title(figure, report)
        digits, charts = figure.subfigures(1, 2, width_ratios=(1.32, 1), wspace=0, squeeze=False)[0]
        _digits(digits, reading, reader)
        grid = charts.add_gridspec(3, 1, left=0.15, right=0.96, top=0.835, bottom=0.07, hspace=0.52)
        _histogram(charts.add_subplot(grid[0]), report)
        _classes(charts.add_subplot(grid[1]), report)
        _clock(charts.add_subplot(grid[2]), report)
        save(figure, path, 130)


def _title(figure: Figure, report: Mapping[str, Any]) -> None:
    steps, data = report["steps"], report["data"]
    figure.text(0.025, 0.952, "How many looks does a digit need?", fontsize=19, weight="bold")
    figure.text(
        0.025,
        0.918,
        f"{data['name']}, {data['test']:,} test images: {report['accuracy']:.1%} read right with {steps['mean']:.2f} looks on "
        f"average ({steps['min']} to {steps['max']}, at most {steps['at_most']} allowed)",
        fontsize=12,
        color=MUTED,
    )


def _digits(figure: SubFigure, reading: Reading, reader: GlimpseReader) -> None:
    grid = figure.add_gridspec(
        10,
        2 * PER_CLASS + 1,
        width_ratios=[1] * PER_CLASS + [0.25] + [1] * PER_CLASS,
        **{"left": 0.07, "right": 0.985, "top": 0.835, "bottom": 0.045, "wspace": 0.06, "hspace": 0.32},
    )
    for label in range(10):
        rows = (reading.labels == label).nonzero()[:, 0]
        # The ponder cost N + R puts rows with the same number of steps in order.
        rows = rows[reading.cost[rows].argsort()]
        few = rows[:PER_CLASS].tolist()
        many = rows[max(len(few), len(rows) - PER_CLASS) :].tolist()
        for first, chosen in ((0, few), (PER_CLASS + 1, many)):
            for i, row in enumerate(chosen):
                _digit(figure.add_subplot(grid[label, first + i]), reading, reader, row)
    figure.text(0.07, 0.872, "Fewest looks", fontsize=11, weight="bold")
    figure.text(0.555, 0.872, "Most looks", fontsize=11, weight="bold")
    legend = "number: looks     line: where it looked, from ○ to ●     red: misread, as what"
    figure.text(0.985, 0.012, legend, fontsize=9.5, color=MUTED, ha="right")


def _digit(axis: Axes, reading: Reading, reader: GlimpseReader, row: int) -> None:
    side = reading.images.shape[-1]
    steps, label, predicted = int(reading.steps[row]), int(reading.labels[row]), int(reading.predicted[row])
    axis.imshow(reading.images[row].numpy(), cmap="Greys", vmin=0, vmax=1.25)
    places = (reader.path(reading.images[row], steps) + 1) * (side - 1) / 2
    y, x = places.numpy().T
    axis.plot(x, y, color=ORANGE, linewidth=1.1, alpha=0.9)
    axis.plot(x[0], y[0], "o", color=ORANGE, markersize=4, markerfacecolor="white")
    axis.plot(x[-1], y[-1], "o", color=ORANGE, markersize=4)
    axis.set(xlim=(-0.5, side - 0.5), ylim=(side - 0.5, -0.5), xticks=[], yticks=[])
    wrong = label != predicted
    for spine in axis.spines.values():
        spine.set(visible=True, color=WRONG if wrong else FAINT, linewidth=1.6 if wrong else 0.8)
    if wrong:
        badge = {"boxstyle": "square,pad=0.22", "facecolor": WRONG, "edgecolor": "none"}
        at: dict[str, Any] = {"x": 0.9, "y": 0.1, "transform": axis.transAxes, "ha": "center", "va": "center"}
        axis.text(s=str(predicted), fontsize=8, weight="bold", color="white", bbox=badge, **at)
    axis.set_title(str(steps), fontsize=8.5, color=MUTED, weight="normal", loc="center", pad=2)


def _histogram(axis: Axes, report: Mapping[str, Any]) -> None:
    groups = report["by_steps"]
    x, y = [group["value"] for group in groups], [group["images"] for group in groups]
    axis.bar(x, y, color=OURS, width=0.72)
    for group in groups:
        if group["images"] >= FEWEST_FOR_A_SHARE:
            at = (group["value"], group["images"])
            share = f"{group['accuracy']:.0%}"
            axis.annotate(share, at, (0, 3), textcoords="offset points", ha="center", fontsize=9, color=MUTED)
    axis.set(ylim=(0, max(y) * 1.18), ylabel="images", xlim=(0.4, report["steps"]["at_most"] + 0.6))
    axis.set_xticks(range(1, report["steps"]["at_most"] + 1))
    axis.set_xlabel(f"looks (above the bars: share read right, where {FEWEST_FOR_A_SHARE} images or more)")
    axis.set_title(f"Looks per image: {report['steps']['mean']:.2f} on average", pad=8)


def _classes(axis: Axes, report: Mapping[str, Any]) -> None:
    groups = sorted(report["by_class"], key=lambda group: group["mean_steps"])
    means = [group["mean_steps"] for group in groups]
    axis.bar(range(len(groups)), means, color=OURS, width=0.72)
    for i, mean in enumerate(means):
        axis.annotate(
            f"{mean:.1f}", (i, mean), (0, 3), textcoords="offset points", ha="center", fontsize=9, color=MUTED
        )
    axis.set_xticks(range(len(groups)), [str(group["value"]) for group in groups], fontsize=11, color=INK)
    axis.set(ylim=(0, max(means) * 1.15), ylabel="looks", xlabel="digit")
    axis.set_title("Mean looks per digit", pad=8)


def _clock(axis: Axes, report: Mapping[str, Any]) -> None:
    times = report["times_ms"]
    limit = times["limit"]["median"]
    for i, (name, label) in enumerate(LABELS.items()):
        timing = times[name]
        middle = timing["median"]
        spread = [[middle - timing["low"]], [timing["high"] - middle]]
        axis.barh(i, middle, color=OURS if name == "adaptive" else OTHERS, height=0.66)
        axis.errorbar(middle, i, xerr=spread, color=INK, linewidth=1, capsize=2)
        text = f"{middle:.1f} ms" + ("" if name == "limit" else f"   {timing['over_limit']:.2f} × the limit")
        axis.annotate(
            text, (timing["high"], i), (7, 0), textcoords="offset points", va="center", fontsize=9.5
        )
        axis.text(0, i, f"{label}  ", ha="right", va="center", fontsize=9.5, color=INK)
    axis.axvline(limit, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axis.set(
        ylim=(len(LABELS) - 0.5, -0.5), yticks=[], xlabel="milliseconds per batch (median and quartiles)"
    )
    axis.set_xlim(0, max(timing["high"] for timing in times.values()) * 1.6)
    threads = report["machine"]["threads"]
    plural = "s" if threads > 1 else ""
    axis.set_title(f"Time for a batch of {report['batch']['rows']:,} on {threads} CPU thread{plural}", pad=8)
