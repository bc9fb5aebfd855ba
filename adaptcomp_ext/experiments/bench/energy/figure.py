"""The figure: the contenders' times over the kernel's, and the kernel's rate next to that of a matrix product."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptcomp_ext.experiments.style import save

from .contenders import LABELS

__all__ = ["draw"]

STYLES = {
    "eager": ("tab:gray", "o-"),
    "compiled": ("black", "s--"),
    "analytic": ("tab:orange", "^-"),
    "private": ("tab:red", "d-"),
    "generic": ("tab:cyan", "v:"),
    "kernel_all": ("tab:purple", "x-."),
}
TITLES = {"all": "all rows, all steps", "stop": "rows stop, mean/M = 0.25", "train": "training"}


def _plain(row: Mapping[str, Any]) -> bool:
    """Whether the row belongs to the series over sizes: a silu network with one layer."""
    c = row["config"]
    return row["error"] is None and c["kind"] == "mlp" and c["activation"] == "silu" and len(c["hidden"]) == 1


def draw(report: Mapping[str, Any], path: Path) -> bool:
    """Draw the silu networks with one layer.

    Parameters
    ----------
    report : mapping
        The content of the JSON file.
    path : Path
        PNG to write.

    Returns
    -------
    bool
        False if nothing was timed, in which case nothing is drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    by_mode = {
        mode: [r for r in report["rows"] if _plain(r) and r["config"]["mode"] == mode] for mode in TITLES
    }
    panels = [(mode, rows) for mode, rows in by_mode.items() if rows]
    rates = by_mode["all"]
    if not panels:
        return False
    count = len(panels) + bool(rates)
    figure = Figure(figsize=(3.4 * count, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, count, squeeze=False)[0]

    def name_sizes(axis: Any, rows: list[Mapping[str, Any]]) -> None:
        sizes = [r["config"] for r in rows]
        axis.set_xticks(
            range(len(rows)),
            [f"B {c['batch']}\ny {c['dim']}\nh {c['hidden'][0]}" for c in sizes],
            fontsize="small",
        )
        axis.set_xlim(-0.5, len(rows) - 0.5)
        axis.grid(alpha=0.3, axis="y")

    for axis, (mode, rows) in zip(axes, panels, strict=False):
        for name, (color, style) in STYLES.items():
            points = [
                (i, r["ratios"][f"{name}/kernel"])
                for i, r in enumerate(rows)
                if f"{name}/kernel" in r["ratios"]
            ]
            if points:
                axis.plot(*zip(*points, strict=True), style, color=color, label=LABELS[name], markersize=5)
        axis.axhline(1, color="tab:green", linewidth=1)
        axis.set(title=TITLES[mode], yscale="log")
        name_sizes(axis, rows)
        axis.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        axis.minorticks_off()
    axes[0].set_ylabel("time over the kernel's")
    if rates:
        axis = axes[-1]
        axis.bar(
            range(len(rates)),
            [100 * r["ratios"]["kernel/matmul"] for r in rates],
            width=0.5,
            color="tab:blue",
        )
        axis.axhline(60, color="tab:green", linewidth=1)
        axis.set(title="rate of the arithmetic", ylabel="% of a matrix product's rate")
        name_sizes(axis, rates)
    lines = {
        line.get_label(): line
        for axis in axes
        for line in axis.get_lines()
        if line.get_label() in LABELS.values()
    }
    figure.legend(
        handles=list(lines.values()), loc="outside lower center", ncols=len(lines), fontsize="small"
    )
    figure.suptitle("Energy descent on a silu network, 20 steps: time over the kernel's", fontsize="medium")
    save(figure, path, 150, bool(report.get("quick")))
    return True
