"""The picture of the whole test set: how many steps, for which images, and what they are worth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from adaptcomp_ext.experiments.style import INK, MUTED, ORANGE, OTHERS, OURS, STYLE, save

__all__ = ["draw"]

PERCENT = PercentFormatter(1.0, decimals=0)


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw the picture.

    Parameters
    ----------
    report : mapping
        The content of the JSON file.
    path : Path
        PNG to write.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(15, 8.6), facecolor="white")
        FigureCanvasAgg(figure)
        _title(figure, report)
        grid = figure.add_gridspec(
            2, 3, left=0.05, right=0.985, top=0.82, bottom=0.08, hspace=0.5, wspace=0.24
        )
        _histogram(figure.add_subplot(grid[0, 0]), report)
        _difficulty(figure.add_subplot(grid[0, 1]), report)
        _corrupted_steps(figure.add_subplot(grid[0, 2]), report)
        _budget(figure.add_subplot(grid[1, 0]), report)
        _tolerance(figure.add_subplot(grid[1, 1]), report)
        _seconds(figure.add_subplot(grid[1, 2]), report)
        save(figure, path, 130, bool(report.get("quick")))


def _title(figure: Figure, report: Mapping[str, Any]) -> None:
    steps, data = report["steps"], report["data"]
    figure.text(0.022, 0.945, "How far is it to the bottom?", fontsize=19, weight="bold")
    ratio, mean = report["hardest_over_easiest"], steps["mean"]
    told = (
        f"{data['name']}, {data['test']:,} {data['tested_on']} images: {report['accuracy']:.2%} read right in {mean:.1f} steps "
        f"down the energy ({steps['min']} to {steps['max']}); {ratio:.2f} times as many for the hardest tenth as for the easiest"
    )
    figure.text(0.022, 0.905, told, fontsize=12, color=MUTED)


def _note(axis: Axes, text: str, x: float, y: float, **more: Any) -> None:
    style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 9, "color": MUTED}
    axis.annotate(text, (x, y), **{"xytext": (0, 4), **style, **more})


def _histogram(axis: Axes, report: Mapping[str, Any]) -> None:
    counts = report["steps"]["counts"]
    total = sum(counts)
    last = next(n for n in range(1, len(counts) + 1) if sum(counts[:n]) >= 0.995 * total)
    bars = counts[:last]
    axis.bar(range(1, last + 1), bars, color=OURS, width=0.76)
    shown = sum(bars)
    mean = report["steps"]["mean"]
    axis.axvline(mean, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    _note(axis, f"mean {mean:.1f}", mean, max(bars), ha="left", xytext=(5, 2))
    beyond = f" ({total - shown} images beyond, up to {report['steps']['max']})" if total > shown else ""
    axis.set(
        xlabel=f"steps to the minimum{beyond}",
        ylabel="images",
        ylim=(0, max(bars) * 1.12),
        xlim=(0.3, last + 0.7),
    )
    axis.set_title("Steps per image", pad=8)


def _difficulty(axis: Axes, report: Mapping[str, Any]) -> None:
    groups = report["by_difficulty"]
    x, y = range(1, len(groups) + 1), [group["mean_steps"] for group in groups]
    axis.bar(x, y, color=OURS, width=0.76)
    for i, group in zip(x, groups, strict=True):
        _note(
            axis,
            f"{group['accuracy']:.1%}" if group["accuracy"] < 1 else "100%",
            i,
            group["mean_steps"],
            fontsize=8.5,
        )
    axis.set_xticks(list(x))
    axis.set(ylim=(0, max(y) * 1.14), ylabel="mean steps")
    axis.set_xlabel(
        "tenths by the margin of an independent classifier, easiest first\n(above the bars: share read right)"
    )
    axis.set_title(f"Steps against difficulty: {y[0]:.1f} to {y[-1]:.1f}", pad=8)


def _corrupted_steps(axis: Axes, report: Mapping[str, Any]) -> None:
    names = {
        "noise": ("noise, standard deviation", OURS, "o-"),
        "patch": ("patch, share of the side", ORANGE, "s-"),
    }
    for name, (label, colour, style) in names.items():
        groups = report["corrupted"][name]
        x, y = [group["strength"] for group in groups], [group["mean_steps"] for group in groups]
        axis.plot(x, y, style, color=colour, label=label, linewidth=1.8, markersize=5)
        for i, group in enumerate(groups):
            if i in (0, len(groups) // 2, len(groups) - 1) and (i or name == "noise"):
                below = name == "patch"
                _note(
                    axis,
                    f"{group['accuracy']:.1%}",
                    x[i],
                    y[i],
                    color=colour,
                    xytext=(0, -14 if below else 7),
                )
    axis.margins(x=0.07, y=0.2)
    axis.legend(loc="upper left")
    axis.set(xlabel="strength (percentages: share read right)", ylabel="mean steps")
    axis.set_title("Steps on harder images", pad=8)


def _budget(axis: Axes, report: Mapping[str, Any]) -> None:
    groups, control = report["by_budget"], report["classifier"]
    x = [group["max_steps"] for group in groups]
    lines = {"accuracy": ("all images", OURS, "o-"), "accuracy_hardest": ("hardest tenth", ORANGE, "s-")}
    for key, (label, colour, style) in lines.items():
        axis.plot(
            x, [group[key] for group in groups], style, color=colour, label=label, linewidth=1.8, markersize=5
        )
        axis.axhline(control[key], color=colour, linewidth=1, linestyle=(0, (4, 3)), alpha=0.8)
        _note(axis, f"{groups[-1][key]:.1%}", x[-1], groups[-1][key], color=colour, xytext=(0, -14))
    axis.axhline(-1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="ordinary classifier")
    axis.set_xscale("log")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(x, [str(n) for n in x])
    low = min(min(group["accuracy_hardest"] for group in groups), control["accuracy_hardest"])
    axis.set(ylim=(low - 0.35 * (1 - low), 1.01), xlabel="steps allowed", ylabel="share read right")
    axis.yaxis.set_major_formatter(PERCENT)
    axis.legend(loc="lower left", ncols=3, columnspacing=1.2, handlelength=1.6)
    axis.set_title("Accuracy against the steps allowed", pad=8)


def _tolerance(axis: Axes, report: Mapping[str, Any]) -> None:
    groups = report["by_tolerance"]
    x, ratio = [group["mean_steps"] for group in groups], [group["hardest_over_easiest"] for group in groups]
    axis.plot(x, ratio, "o-", color=OURS, linewidth=1.8, markersize=5)
    for i, group in enumerate(groups):
        text = f"{group['tol']:g}\n{group['accuracy']:.2%}"
        chosen = group["tol"] == report["tol"]
        _note(
            axis,
            text,
            x[i],
            ratio[i],
            xytext=(8, -18),
            ha="left",
            fontsize=8,
            weight="bold" if chosen else "normal",
        )
    axis.margins(x=0.16, y=0.2)
    axis.set(xlabel="mean steps", ylabel="steps, hardest over easiest tenth")
    axis.set_title("Tolerance of the stop, and share read right", pad=8)


def _seconds(axis: Axes, report: Mapping[str, Any]) -> None:
    timing, training, threads = report["timing"], report["training"], report["machine"]["threads"]
    updates, descent = timing["seconds_per_epoch"], timing["descent_ms"]
    seconds = {name: descent[name] * timing["updates_per_epoch"] / 1e3 for name in ("kernels", "plain")}
    rows = [
        (
            f"whole epochs as trained, {training['images']:,} images: kernels",
            training["seconds_per_epoch"],
            OURS,
        ),
        ("updates alone: kernels", updates["kernels"], OURS),
        ("updates alone: plain autograd", updates["plain"], OTHERS),
        ("their descents, forward and backward: kernels", seconds["kernels"], OURS),
        ("their descents, forward and backward: plain autograd", seconds["plain"], OTHERS),
    ]
    for i, (label, value, colour) in enumerate(rows):
        axis.barh(i, value, color=colour, height=0.36)
        axis.text(0, i - 0.24, label, fontsize=9, color=INK, va="bottom")
        _note(
            axis,
            f"{value:.2f} s" if value < 10 else f"{value:.1f} s",
            value,
            i,
            xytext=(6, -3),
            ha="left",
            fontsize=9.5,
        )
    axis.set(ylim=(len(rows) - 0.6, -0.75), yticks=[], xlim=(0, 1.2 * max(value for _, value, _ in rows)))
    axis.set_xlabel(f"seconds per epoch (from the second on: from {timing['updates']} updates)")
    axis.set_title(f"An epoch of training, {threads} thread{'s' if threads > 1 else ''}", pad=8)
