"""The picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from adaptcomp_ext.experiments.style import OTHERS, OURS, PANEL, STYLE, WIDTH, bars, legend, save

__all__ = ["draw"]


def draw(summary: Mapping[str, Any], path: Path, quick: bool = False) -> None:
    """Return against what is imagined; which horizons are chosen; an episode."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(3, 1, figsize=(WIDTH, 3 * PANEL), layout="constrained")
        for name, parts, color, marker in (
            ("the same everywhere", summary["fixed"], OTHERS, "o"),
            ("chosen by state", summary["adaptive"], OURS, "o"),
            (
                "the same, dealt at random",
                {k: v["shuffled"] for k, v in summary["adaptive"].items()},
                OURS,
                "x",
            ),
        ):
            found = list(parts.values())
            half = bars([f["return"] for f in found])
            x, y = [f["steps imagined"].mean for f in found], [f["return"].mean for f in found]
            axes[0].errorbar(
                x, y, half, color=color, marker=marker, ms=5, lw=1.4 if marker == "o" else 0, label=name
            )
        axes[0].set(
            title="What looking ahead is worth", xlabel="steps imagined by each candidate", ylabel="return"
        )
        axes[0].set_ylim(0, 1.15 * max(1.0, axes[0].get_ylim()[1]))
        legend(axes[0])
        width = 0.8 / len(summary["adaptive"])
        for i, (price, found) in enumerate(summary["adaptive"].items()):
            share = [100 * v.mean for v in found["share"].values()]
            axes[1].bar([k + i * width for k in range(len(share))], share, width, label=f"price {price}")
        names = list(next(iter(summary["adaptive"].values()))["share"])
        axes[1].set_xticks([k + 0.4 - width / 2 for k in range(len(names))], names)
        axes[1].set(title="Which horizons are chosen", xlabel="H", ylabel="states, %")
        legend(axes[1])
        strip = summary["strip"]
        axes[2].bar(range(len(strip["horizon"])), strip["horizon"], 1.0, color=OURS)
        axes[2].plot([4 * r for r in strip["reward"]], color=OTHERS, lw=1.2)
        axes[2].set(
            title="An episode: H, and the reward (line)", xlabel="decision, at the lowest price", ylabel="H"
        )
        save(figure, path, 130, quick)
        plt.close(figure)
