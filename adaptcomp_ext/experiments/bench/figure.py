"""The figure: time over the limit against mean/M, one panel per size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptcomp_ext.experiments.style import save

from .grid import REQUIRED_SIZES
from .report import LABELS

__all__ = ["draw"]

STYLES = {
    "masked": ("tab:gray", "o-"),
    "masked_compile": ("black", "s--"),
    "boolean": ("tab:orange", "^-"),
    "compact": ("tab:cyan", "v:"),
    "auto": ("tab:blue", "D-"),
}


def draw(report: Mapping[str, Any], path: Path) -> bool:
    """Draw GRU, M = 16, fixed steps, inference.

    Parameters
    ----------
    report : mapping
        The content of the JSON file.
    path : Path
        PNG to write.

    Returns
    -------
    bool
        False if no size has two fractions, in which case nothing is drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = []
    for batch, dim in REQUIRED_SIZES:
        shape = {
            "core": "gru",
            "batch": batch,
            "dim": dim,
            "max_steps": 16,
            "policy": "fixed",
            "training": False,
        }
        rows = [r for r in report["rows"] if r["error"] is None and shape.items() <= r["config"].items()]
        if len(rows) > 1:
            panels.append((batch, dim, sorted(rows, key=lambda row: row["config"]["fraction"])))
    if not panels:
        return False

    figure = Figure(figsize=(3.4 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (batch, dim, rows) in zip(axes, panels, strict=True):
        for name, (color, style) in STYLES.items():
            points = [
                (r["config"]["fraction"], r["ratios"][f"{name}/limit"])
                for r in rows
                if f"{name}/limit" in r["ratios"]
            ]
            if points:
                axis.plot(*zip(*points, strict=True), style, color=color, label=LABELS[name], markersize=4)
        axis.axhline(1, color="tab:green", linewidth=1)
        axis.set(title=f"B = {batch}, D = {dim}", xlabel="mean steps / M", yscale="log")
        axis.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("time over the limit")
    # Not every panel has every contender.
    lines = {
        line.get_label(): line
        for axis in axes
        for line in axis.get_lines()
        if line.get_label() in LABELS.values()
    }
    figure.legend(
        handles=list(lines.values()), loc="outside lower center", ncols=len(lines), fontsize="small"
    )
    figure.suptitle(
        "GRU cell, M = 16, inference: what halting costs beyond the rows that run", fontsize="medium"
    )
    save(figure, path, 150, bool(report.get("quick")))
    return True
