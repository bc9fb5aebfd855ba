"""The picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from adaptcomp_ext.experiments.style import ORANGE, OTHERS, OURS, STYLE

from .markdown import NAMES

__all__ = ["draw"]

COLORS = {"nothing": OTHERS, "habit": OURS, "everything": ORANGE}


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Return over training of each task, where it is not the first of its order."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(summary["curves"]), figsize=(13.5, 4.1), layout="constrained", sharey=True)
        for one, (task, curves) in zip(axes, summary["curves"].items(), strict=True):
            for keep, curve in curves.items():
                color, label = COLORS[keep], NAMES[keep]
                mean = np.array([v.mean for v in curve])
                half = np.array([v.half for v in curve])
                x = np.arange(1, len(mean) + 1)
                one.plot(x, mean, color=color, lw=1.6, label=label)
                one.fill_between(x, mean - half, mean + half, color=color, alpha=0.15, lw=0)
            one.set(title=task, xlabel="round")
        axes[0].set_ylabel("return, per 1,000 steps")
        axes[0].legend(loc="best", fontsize=8.5)
        figure.savefig(path, dpi=130)
        plt.close(figure)
