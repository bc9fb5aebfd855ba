"""The picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
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

from .markdown import gated_cost
from .summary import LABELS

__all__ = ["draw"]

Summary = Mapping[str, Any]


def draw(summary: Summary, path: Path, quick: bool = False) -> None:
    """Ways of distilling; accuracy against time before and after shrinking; accuracy against compute of the pair."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained", width_ratios=(1.25, 1, 1))
        _ways(axes[0], summary)
        _shrinking(axes[1], summary)
        _pair(axes[2], summary)
        save(figure, path, 130, quick)
        plt.close(figure)


def _ways(axes: Axes, summary: Summary) -> None:
    named = [("labels alone", summary["after"][LABELS], OTHERS)]
    named += [
        (f"after, T = {way}", value, "#6aa6d8") for way, value in summary["after"].items() if way != LABELS
    ]
    named += [
        (f"online, {name.partition(', ')[2]}", found["default"], OURS)
        for name, found in summary["online"].items()
        if name.startswith("dense")
    ]
    for i, (_, value, look) in enumerate(named):
        axes.errorbar(100 * value.mean, i, xerr=bars([value], 100), color=look, marker="o", ms=7, lw=2)
    axes.axvline(100 * summary["teacher"].mean, color=MUTED, lw=1)
    axes.annotate(
        "π₂ alone", (100 * summary["teacher"].mean, -0.75), color=MUTED, fontsize=9, ha="right", va="center"
    )
    axes.set_yticks(range(len(named)), [name for name, _, _ in named])
    axes.set_ylim(len(named) - 0.4, -1.1)
    axes.set_xlabel("right, %")
    axes.set_title("π₁ alone, by what it learned from")
    span_at_least(axes, "x", 2.0)


def _shrinking(axes: Axes, summary: Summary) -> None:
    dense = summary["online"]["dense, T = 4"]["default"]
    axes.errorbar(1, 100 * dense.mean, yerr=bars([dense], 100), color=OTHERS, marker="o", ms=7, label="dense")
    for form, look, label in (("sparse", WRONG, "noise of weights"), ("units", OURS, "noise of units")):
        some = summary["shrunk"][form]
        x = [s["faster"].mean for s in some.values()]
        y = [s["accuracy"] for s in some.values()]
        spread = bars([s["faster"] for s in some.values()])
        axes.errorbar(
            x,
            [100 * v.mean for v in y],
            yerr=bars(y, 100),
            xerr=spread,
            color=look,
            marker="o",
            ms=5,
            label=label,
        )
        for name, a, b in zip(some, x, y, strict=True):
            text = "whole" if name == "as it is" else f"−{100 * float(name):g} %"
            axes.annotate(
                text, (a, 100 * b.mean), xytext=(5, 5), textcoords="offset points", color=INK, fontsize=9
            )
    axes.set_xlabel("times as fast, shrunk")
    axes.set_ylabel("right, %")
    axes.set_title("Units removed from π₁")
    span_at_least(axes, "y", 2.0)
    axes.legend(loc="upper right")


def _pair(axes: Axes, summary: Summary) -> None:
    rates = summary["gated"]["by_rate"]
    control = summary["multiply_adds"]["control"]
    x = [100 * gated_cost(summary, found["rate"].mean) / control for found in rates.values()]
    y = [found["accuracy"] for found in rates.values()]
    axes.errorbar(
        x,
        [100 * v.mean for v in y],
        yerr=bars(y, 100),
        color=OURS,
        marker="o",
        ms=5,
        label="π₁, and π₂ where called",
    )
    everywhere = summary["gated"]["control"]
    axes.errorbar(
        100,
        100 * everywhere.mean,
        yerr=bars([everywhere], 100),
        color=ORANGE,
        marker="s",
        label="π₂ everywhere",
    )
    for rate, a, b in zip(rates, x, y, strict=True):
        axes.annotate(
            f"{100 * float(rate):g} %",
            (a, 100 * b.mean),
            xytext=(4, -12),
            textcoords="offset points",
            fontsize=8.5,
        )
    axes.set_xlabel("multiply–adds, % of π₂'s")
    axes.set_ylabel("right, %")
    axes.set_title("The pair, by calls of held-out images")
    span_at_least(axes, "y", 2.0)
    axes.legend(loc="lower right")
