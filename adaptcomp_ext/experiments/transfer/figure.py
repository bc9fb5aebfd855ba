"""The picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from adaptcomp_ext.experiments.style import ORANGE, OTHERS, OURS, PANEL, STYLE, WIDTH, legend, save

from .cell import LARGEST
from .markdown import NAMES

__all__ = ["draw"]

COLORS = {"nothing": OTHERS, "habit": OURS, "everything": ORANGE}


def draw(summary: Mapping[str, Any], path: Path, quick: bool = False) -> None:
    """Return over training of each task, where it is not the first of its order."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(summary["curves"]),
            1,
            figsize=(WIDTH, PANEL * len(summary["curves"])),
            layout="constrained",
            sharey=True,
        )
        for one, (task, curves) in zip(axes, summary["curves"].items(), strict=True):
            for keep, runs in curves.items():
                x, color = np.arange(1, len(runs[0]) + 1), COLORS[keep]
                # Each run rather than an interval: a task is the second or third of few orders.
                for returns in runs:
                    one.plot(x, returns, color=color, lw=0.7, alpha=0.6)
                one.plot(x, np.mean(runs, axis=0), color=color, lw=2.2, label=NAMES[keep])
            one.set(title=task, xlabel="round", ylim=(0, LARGEST))
            one.set_ylabel("return, per 1,000 steps")
        legend(axes[0], 3)
        save(figure, path, 130, quick)
        plt.close(figure)
