"""The pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from adaptcomp_ext.experiments.style import (
    ORANGE,
    OTHERS,
    OURS,
    PANEL,
    STYLE,
    WIDTH,
    WRONG,
    bars,
    legend,
    save,
)

from .markdown import NAMES

__all__ = ["draw", "draw_strip"]

Summary = Mapping[str, Any]
COLORS = {"always": OTHERS, "value": OURS, "never": WRONG, "random": ORANGE}


def draw(summary: Summary, path: Path, quick: bool = False) -> None:
    """Return and planning rate over training; return against seconds."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(3, 1, figsize=(WIDTH, 3 * PANEL), layout="constrained")
        for name, found in summary["agents"].items():
            rounds = len(found["curve"]["return"])
            steps = found["steps"] / rounds * np.arange(1, rounds + 1) / 1e3
            _band(axes[0], steps, found["curve"]["return"], COLORS[name], NAMES[name])
            if name in ("value", "random"):
                _band(axes[1], steps, found["curve"]["rate"], COLORS[name], NAMES[name], 100)
            seconds, last = found["seconds"], found["return"]
            axes[2].errorbar(
                [seconds.mean],
                [last.mean],
                bars([last]),
                bars([seconds]),
                color=COLORS[name],
                marker="o",
                label=NAMES[name],
            )
        axes[0].set(
            title="Learning (exploring, short episodes)",
            xlabel="steps, thousands",
            ylabel="return, per 1,000 steps",
        )
        legend(axes[0])
        axes[1].set(
            title="How often it plans", xlabel="steps, thousands", ylabel="states planned, %", ylim=(0, 100)
        )
        axes[2].set(title="What it took", xlabel="training, s", ylabel="return at the end")
        axes[2].set_xlim(left=0)
        # From 0, as returns are: the axis would else be cut to the little by which single dots differ.
        axes[2].set_ylim(0, 1.15 * max(1.0, axes[2].get_ylim()[1]))
        legend(axes[2])
        save(figure, path, 130, quick)
        plt.close(figure)


def _band(
    axes: Axes, x: NDArray[Any], values: Sequence[Any], color: str, label: str, scale: float = 1.0
) -> None:
    mean, half = scale * np.array([v.mean for v in values]), scale * np.array([v.half for v in values])
    axes.plot(x, mean, color=color, lw=1.6, label=label)
    axes.fill_between(x, mean - half, mean + half, color=color, alpha=0.15, lw=0)


def draw_strip(
    strip: Summary, path: Path, frames: Sequence[NDArray[np.uint8]] = (), quick: bool = False
) -> None:
    """Draw an episode's rewards, pictures above them if there are any, the planner's iterations below."""
    rows = 3 if len(frames) else 2
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, 1, figsize=(WIDTH, 1.7 * rows + 0.6), layout="constrained", sharex=not len(frames)
        )
        if len(frames):
            axes[0].imshow(np.concatenate(list(frames), axis=1))
            axes[0].set_axis_off()
        reward, iterations = axes[-2], axes[-1]
        reward.plot(strip["reward"], color=OTHERS, lw=1.2)
        reward.set_ylabel("reward")
        reward.set_ylim(0, 1.1 * max(1e-9, *strip["reward"]))
        reward.set_title("The episode that was planned most")
        iterations.bar(range(len(strip["iterations"])), strip["iterations"], 1.0, color=OURS)
        iterations.set_ylabel("iterations")
        iterations.set_xlabel("decision")
        save(figure, path, 120, quick)
        plt.close(figure)
