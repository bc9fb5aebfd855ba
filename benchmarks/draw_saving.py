"""Draw the README's picture from the halting benchmark's report: the time of a batch by its rows' mean steps.

    python benchmarks/draw_saving.py

Reads benchmarks/results/bench_halting.json and writes saving.png beside it.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
CONFIG = {"core": "gru", "policy": "fixed", "batch": 4096, "dim": 256, "max_steps": 16, "training": False}
GREY = "#6b7280"
LINES = {  # name in the report: label, colour, place of the label
    "masked": ("masking", GREY, (4.3, 352)),
    "auto": ("AdaptiveHalt", "#1f66b0", (8.3, 118)),
    "limit": ("the active rows alone (lower bound)", "#16a34a", (4.6, 30)),
}


def main() -> None:
    report = json.loads((RESULTS / "bench_halting.json").read_text())
    rows = [r for r in report["rows"] if CONFIG.items() <= r["config"].items()]
    rows.sort(key=lambda r: r["rows"]["mean_steps"])
    steps, machine = [r["rows"]["mean_steps"] for r in rows], report["machine"]
    plt.rcParams.update({"font.size": 17, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(9, 5.6), dpi=110, layout="constrained")
    for name, (label, colour, place) in LINES.items():
        line, width, weight = ("--", 2, "normal") if name == "limit" else ("o-", 3.5, "bold")
        times = [r["times_ms"][name]["median"] for r in rows]
        axes.plot(steps, times, line, color=colour, linewidth=width, markersize=9)
        axes.text(*place, label, color=colour, fontweight=weight)
    axes.set(xlim=(0, 16.5), ylim=(0, 400), xticks=[0, 4, 8, 12, 16])
    axes.set(xlabel="mean steps per row, of 16 allowed", ylabel="milliseconds per batch")
    axes.set_title("Rows that have halted cost nothing", loc="left", fontweight="bold")
    where = f"GRU, 4,096 rows of 256, inference; {machine['threads']} threads of an {machine['cpu']}"
    figure.text(0.995, 0.005, where, ha="right", fontsize=11, color=GREY)
    figure.get_layout_engine().set(rect=(0, 0.035, 1, 0.965))
    figure.savefig(RESULTS / "saving.png")


if __name__ == "__main__":
    main()
