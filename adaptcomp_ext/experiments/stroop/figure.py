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

from adaptcomp_ext.experiments.data import COLOURS
from adaptcomp_ext.experiments.style import (
    FAINT,
    INK,
    MUTED,
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
    span_at_least,
)

from .gates import RATES
from .summary import CONDITIONS, MIXED, TABLE_RATE, TASKS

__all__ = ["draw_beliefs", "draw_main", "draw_reaction"]

GATE_LOOKS = {
    "value": (OURS, "-", "learned value"),
    "kl": ("#6aa6d8", "-", "predicted KL"),
    "entropy": (ORANGE, "-", "normalised entropy"),
    "random": (OTHERS, "--", "random"),
    "batch-mean": (WRONG, ":", "one decision a batch"),
}
CONDITION_COLOURS = {"congruent": OURS, "neutral": OTHERS, "incongruent": WRONG}


def draw_main(main: Mapping[str, Any], path: Path, quick: bool = False) -> None:
    """Accuracy on incongruent digits, accuracy against calls, and who is called."""
    settings = list(main)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(3, 1, figsize=(WIDTH, 3 * PANEL), layout="constrained")
        _bars(axes[0], main, settings)
        _curves(axes[1], main[settings[0]], settings[0])
        _calls(axes[2], main, settings)
        save(figure, path, 130, quick)
        plt.close(figure)


def _bars(axes: Axes, main: Mapping[str, Any], settings: Sequence[str]) -> None:
    rate = f"{100 * float(TABLE_RATE):g} %"
    looks = (
        ("the CNN alone", OTHERS, lambda f: f["accuracy"]["cnn"]["incongruent"]),
        ("habit π₁ alone", "#6aa6d8", lambda f: f["accuracy"]["default"]["incongruent"]),
        (
            f"ACC, {rate} called",
            OURS,
            lambda f: f["gates"]["as trained"]["value"][TABLE_RATE]["incongruent/control"],
        ),
        ("control π₂ alone", ORANGE, lambda f: f["accuracy"]["control"]["incongruent"]),
    )
    width = 0.8 / len(looks)
    for i, (name, look, get) in enumerate(looks):
        values = [get(main[p]) for p in settings]
        at = np.arange(len(settings)) + (i - (len(looks) - 1) / 2) * width
        axes.bar(at, [100 * v.mean for v in values], width * 0.92, color=look, label=name)
        axes.errorbar(
            at, [100 * v.mean for v in values], bars(values, 100), fmt="none", ecolor=INK, elinewidth=1
        )
    axes.set_xticks(range(len(settings)), [f"{100 * float(p):g} %" for p in settings])
    axes.set_xlabel("congruent in training")
    axes.set_ylabel("right, %")
    axes.set_title("Incongruent test digits")
    axes.set_ylim(0, 105)
    legend(axes)


def _curves(axes: Axes, found: Mapping[str, Any], p: str) -> None:
    for gate, (look, line, name) in GATE_LOOKS.items():
        at = [found["gates"][MIXED][gate][f"{r:g}"] for r in RATES]
        x = [100 * v[f"{MIXED}/rate"].mean for v in at]
        y = [v[f"{MIXED}/control"] for v in at]
        axes.errorbar(
            x,
            [100 * v.mean for v in y],
            bars(y, 100),
            color=look,
            ls=line,
            marker="o",
            ms=4,
            lw=1.6,
            label=name,
        )
    always = 100 * found["always"][MIXED].mean
    axes.axhline(always, color=MUTED, lw=1)
    axes.annotate(
        "control everywhere", (0, always), xytext=(2, 3), textcoords="offset points", color=MUTED, fontsize=11
    )
    axes.set_xlabel("rows that call control, %")
    axes.set_ylabel("right, %")
    axes.set_xlim(left=0)
    axes.set_title(f"Mixed stream ({100 * float(p):g} % in training)")
    span_at_least(axes, "y", 2.0)
    legend(axes)


def _calls(axes: Axes, main: Mapping[str, Any], settings: Sequence[str]) -> None:
    width = 0.8 / len(CONDITIONS)
    for i, condition in enumerate(CONDITIONS):
        values = [main[p]["gates"]["as trained"]["value"][TABLE_RATE][f"{condition}/rate"] for p in settings]
        at = np.arange(len(settings)) + (i - 1) * width
        axes.bar(
            at,
            [100 * v.mean for v in values],
            width * 0.92,
            color=CONDITION_COLOURS[condition],
            label=condition,
        )
        axes.errorbar(
            at, [100 * v.mean for v in values], bars(values, 100), fmt="none", ecolor=INK, elinewidth=1
        )
    axes.set_xticks(range(len(settings)), [f"{100 * float(p):g} %" for p in settings])
    axes.set_xlabel("congruent in training")
    axes.set_ylabel("rows that call control, %")
    axes.set_ylim(0, 105)
    axes.set_title("Who calls control (value gate)")
    legend(axes, 3)


def draw_beliefs(
    items: Sequence[Mapping[str, Any]], images: Tensor, title: str, path: Path, quick: bool = False
) -> None:
    """Draw both beliefs about single incongruent items side by side; images uint8 [N, 3, H, W]."""
    names = list(COLOURS)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(items),
            3,
            figsize=(WIDTH, 1.6 * len(items) + 0.4),
            width_ratios=(1, 2, 2),
            layout="constrained",
            squeeze=False,
        )
        for row, (item, image) in enumerate(zip(items, images, strict=True)):
            picture, *others = axes[row]
            picture.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            picture.set_axis_off()
            picture.set_title(f"a {names[item['ink']]} {item['digit']}", fontsize=11)
            for one, who, name in zip(
                others, ("default", "control"), ("habit π₁", "control π₂"), strict=True
            ):
                colours = [
                    WRONG if d == item["ink"] else OURS if d == item["digit"] else OTHERS for d in range(10)
                ]
                one.bar(range(10), item[who], color=colours)
                one.set_xticks(range(10))
                one.set_ylim(0, 1)
                one.set_yticks((0, 1))
                said = int(np.argmax(item[who]))
                one.set_title(f"{name} says {said}", fontsize=11)
                one.tick_params(labelsize=9)
        figure.suptitle(title, color=INK, x=0.01, ha="left")
        save(figure, path, 120, quick)
        plt.close(figure)


def draw_reaction(reaction: Mapping[str, Any], path: Path, quick: bool = False) -> None:
    """Steps by condition, the effect against the proportion congruent, and against practice."""
    proportions = {float(n.split()[1]): f for n, f in reaction.items() if n.startswith("congruent ")}
    high = max(proportions)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(4, 1, figsize=(WIDTH, 4 * PANEL), layout="constrained")
        for one, task, title in zip(axes, TASKS, ("Reading the digit", "Naming the ink"), strict=False):
            for i, condition in enumerate(CONDITIONS):
                values = [f[task]["steps"][condition] for f in proportions.values()]
                at = np.arange(len(values)) + (i - 1) * 0.27
                one.bar(
                    at, [v.mean for v in values], 0.25, color=CONDITION_COLOURS[condition], label=condition
                )
                one.errorbar(at, [v.mean for v in values], bars(values), fmt="none", ecolor=INK, elinewidth=1)
            one.set_xticks(range(len(proportions)), [f"{100 * p:g} %" for p in proportions])
            one.set_xlabel("congruent in practice")
            one.set_ylabel("steps until halting")
            one.set_title(title)
            one.set_ylim(bottom=0)
            legend(one, 3)
        for task, look in zip(TASKS, (OURS, ORANGE), strict=True):
            effects = [f[task]["effect"] for f in proportions.values()]
            x = [100 * p for p in proportions]
            label = "read" if task == "read" else "name"
            axes[2].errorbar(x, [e.mean for e in effects], bars(effects), color=look, marker="o", label=label)
            practice = proportions[high][task]["practice"]
            updates = [(i + 1) * proportions[high]["updates"] for i in range(len(practice))]
            axes[3].errorbar(
                updates, [e.mean for e in practice], bars(practice), color=look, marker="o", label=label
            )
        for one in axes[2:]:
            one.axhline(0, color=FAINT, lw=1)
            one.set_ylabel("incongruent − congruent, steps")
            span_at_least(one, "y", 0.5)
        axes[2].set_xlabel("congruent in practice, %")
        axes[2].set_title("The effect, by the proportion")
        axes[3].set_xlabel("updates")
        axes[3].set_title(f"With practice ({100 * high:g} % congruent)")
        legend(axes[2])
        legend(axes[3])
        save(figure, path, 120, quick)
        plt.close(figure)
