"""The pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from adaptcomp_ext.experiments.style import (
    INK,
    MUTED,
    ORANGE,
    OTHERS,
    OURS,
    STYLE,
    WRONG,
    bars,
    save,
    span_at_least,
)

__all__ = ["draw", "draw_example"]

Summary = Mapping[str, Any]


def draw(summary: Summary, path: Path, quick: bool = False) -> None:
    """Path efficiency against sweeps; sweeps against distance; effort over practice."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(13.5, 4.1), layout="constrained", width_ratios=(1.3, 1, 1))
        _pareto(axes[0], summary)
        _distance(axes[1], summary)
        _practice(axes[2], summary)
        save(figure, path, 130, quick)
        plt.close(figure)


def _point(axes: Axes, found: Summary, label: str, **look: Any) -> None:
    x, y = found["sweeps_per_step"], found["efficiency"]
    axes.errorbar([x.mean], [y.mean], bars([y]), bars([x]), label=label, ls="", ms=8, **look)


def _pareto(axes: Axes, summary: Summary) -> None:
    fixed = list(summary["fixed"].values())
    efficiency = [f["efficiency"] for f in fixed]
    x = [f["sweeps_per_step"].mean for f in fixed]
    axes.errorbar(
        x,
        [v.mean for v in efficiency],
        bars(efficiency),
        color=OTHERS,
        marker="o",
        ms=4.5,
        lw=1.6,
        label="K fixed",
    )
    _point(
        axes,
        summary["controls"]["shuffled"],
        "the gate's K, dealt at random",
        color=OURS,
        marker="o",
        mfc="white",
    )
    _point(axes, summary["agents"]["priced"], "the gate's K, with a price", color=OURS, marker="o")
    _point(axes, summary["agents"]["free"], "the gate's K, no price", color=ORANGE, marker="s")
    for name, label in (("fixed-8", "trained with K = 8"), ("fixed-16", "trained with K = 16")):
        if name in summary["agents"]:
            _point(
                axes, summary["agents"][name], label, color=WRONG, marker="^" if name == "fixed-8" else "v"
            )
    axes.set_xlabel("sweeps a step")
    axes.set_ylabel("path efficiency (shortest way / way taken)")
    axes.set_title("What thinking is worth")
    span_at_least(axes, "y", 0.1)
    axes.legend(loc="lower right", fontsize=8.5)


def _distance(axes: Axes, summary: Summary) -> None:
    looks = {
        "priced": (OURS, "o", "11 × 11, with a price"),
        "priced, larger": ("#3f9c6c", "D", "17 × 17, never seen"),
        "free": (ORANGE, "s", "11 × 11, no price"),
    }
    for name, (color, marker, label) in looks.items():
        found = summary["by_distance"][name]
        middle = [(e["low"] + e["high"]) / 2 for e in found]
        values = [e["sweeps"] for e in found]
        axes.errorbar(
            middle,
            [v.mean for v in values],
            bars(values),
            color=color,
            marker=marker,
            ms=4.5,
            lw=1.6,
            label=label,
        )
    axes.set_xlabel("steps to the goal")
    axes.set_ylabel("sweeps")
    axes.set_ylim(0, 34)
    axes.set_title("Who gets the sweeps")
    axes.legend(loc="best", fontsize=8.5)


def _practice(axes: Axes, summary: Summary) -> None:
    for name, color, label in (("priced", OURS, "with a price"), ("free", ORANGE, "no price")):
        curve = summary["curves"][name]
        x = curve["every"] * np.arange(1, len(curve["sweeps"]) + 1)
        mean, half = np.array([v.mean for v in curve["sweeps"]]), np.array([v.half for v in curve["sweeps"]])
        axes.plot(x, mean, color=color, lw=1.6, label=label)
        axes.fill_between(x, mean - half, mean + half, color=color, alpha=0.2, lw=0)
    axes.set_xlabel("updates")
    axes.set_ylabel("sweeps a step")
    axes.set_ylim(0, 34)
    axes.set_title("Effort over practice")
    axes.legend(loc="best", fontsize=8.5)


def draw_example(example: Summary, path: Path, quick: bool = False) -> None:
    """A maze, the way taken, and the sweeps of each step: on the map, and under it in time."""
    walls, sweeps = np.array(example["walls"]), example["sweeps"]
    places = np.array(example["positions"])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.9), layout="constrained", width_ratios=(1, 1.4))
        axes[0].imshow(walls, cmap="gray_r", vmin=0, vmax=1.6, interpolation="nearest")
        line = np.concatenate([places, [example["goal"]]])
        axes[0].plot(line[:, 1], line[:, 0], color=MUTED, lw=1.2, zorder=1)
        axes[0].scatter(
            places[:, 1], places[:, 0], 12 + 7 * np.array(sweeps), color=OURS, alpha=0.8, zorder=2, lw=0
        )
        axes[0].scatter(*example["goal"][::-1], 110, marker="*", color=ORANGE, zorder=3)
        axes[0].set_title("Sweeps along the way (area)")
        axes[0].set_axis_off()
        axes[1].bar(range(1, len(sweeps) + 1), sweeps, 0.7, color=OURS)
        axes[1].set_xlabel("step")
        axes[1].set_ylabel("sweeps")
        axes[1].set_title("The same in time")
        axes[1].tick_params(colors=INK)
        save(figure, path, 120, quick)
        plt.close(figure)
