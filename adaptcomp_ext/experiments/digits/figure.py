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
from torch import Tensor

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

from .markdown import SHOWN

__all__ = ["draw", "draw_examples"]

Summary = Mapping[str, Any]


def draw(summary: Summary, path: Path, quick: bool = False) -> None:
    """Accuracy against multiply–adds; what a price does; who gets the steps."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(13.5, 4.1), layout="constrained", width_ratios=(1.4, 1, 1))
        _compute(axes[0], summary)
        _price(axes[1], summary)
        _classes(axes[2], summary)
        save(figure, path, 130, quick)
        plt.close(figure)


def _curve(axes: Axes, points: Sequence[Summary], label: str, **look: Any) -> None:
    x = [p["multiply_adds"].mean / 1e6 for p in points]
    y = [p["accuracy"] for p in points]
    axes.errorbar(x, [100 * v.mean for v in y], bars(y, 100), label=label, ms=4.5, lw=1.6, **look)


def _compute(axes: Axes, summary: Summary) -> None:
    _curve(axes, list(summary["fixed"].values()), "fixed depth", color=OTHERS, marker="o")
    _curve(axes, list(summary["confidence"].values()), "stops when sure", color=OURS, marker="o")
    shuffled = [{**p, "accuracy": p["shuffled"]} for p in summary["confidence"].values()]
    _curve(axes, shuffled, "the same steps, dealt at random", color=OURS, marker="o", ls=":", mfc="white")
    _curve(axes, list(summary["act"].values()), "ACT, by price", color=ORANGE, marker="s", ls="")
    _curve(axes, list(summary["ponder"].values()), "PonderNet, by prior", color=WRONG, marker="^", ls="")
    _curve(
        axes,
        list(summary["acc"]["value"].values()),
        "habit and control (whole image)",
        color="#3f9c6c",
        marker="D",
    )
    axes.set_xscale("log")
    axes.set_xlabel("multiply–adds of an image, millions")
    axes.set_ylabel("right, %")
    axes.set_title("Accuracy against compute")
    span_at_least(axes, "y", 2.0)
    axes.legend(loc="best", fontsize=8.5)


def _price(axes: Axes, summary: Summary) -> None:
    names = list(summary["act"])
    steps = [f["steps"] for f in summary["act"].values()]
    axes.bar(range(len(names)), [s.mean for s in steps], 0.6, color=ORANGE)
    axes.errorbar(
        range(len(names)), [s.mean for s in steps], bars(steps), fmt="none", ecolor=INK, elinewidth=1
    )
    for i, found in enumerate(summary["act"].values()):
        text = f"{100 * found['accuracy'].mean:.1f} %"
        axes.annotate(
            text,
            (i, found["steps"].mean),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            color=MUTED,
        )
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
    axes.set_xlabel("price of a step, nats")
    axes.set_ylabel("steps (right, %)")
    axes.set_title("Steps by their price (ACT)")


def _classes(axes: Axes, summary: Summary) -> None:
    steps = summary["confidence"][SHOWN]["by_class"]
    order = np.argsort([s.mean for s in steps])
    means, halves = [steps[d].mean for d in order], bars([steps[d] for d in order])
    axes.barh(range(10), means, color=OURS)
    axes.errorbar(means, range(10), xerr=halves, fmt="none", ecolor=INK, elinewidth=1)
    axes.set_yticks(range(10), [str(d) for d in order])
    axes.set_xlabel("steps until sure")
    axes.set_ylabel("digit")
    axes.set_title(f"Who gets the steps (confidence {SHOWN})")


def draw_examples(
    images: Tensor,
    few: Sequence[int],
    many: Sequence[int],
    steps: Mapping[str, int],
    path: Path,
    quick: bool = False,
) -> None:
    """The test images with the fewest and the most steps; images float32 [N, H, W]."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, len(few), figsize=(1.15 * len(few), 3.0), layout="constrained", squeeze=False
        )
        for row, items in zip(axes, (few, many), strict=True):
            for one, item in zip(row, items, strict=True):
                one.imshow(images[item].numpy(), cmap="gray_r", interpolation="nearest")
                one.set_title(str(steps[str(item)]), loc="center")
                one.set_axis_off()
        figure.suptitle(
            f"Fewest and most steps (confidence {SHOWN})", color=INK, x=0.01, ha="left", fontsize=11
        )
        save(figure, path, 120, quick)
        plt.close(figure)
