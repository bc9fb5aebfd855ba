"""The experiment's own report: a table, and sentences that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptcomp_ext.experiments.runs import ONE_SEED, counted, interval, measured_over, points, table

from .cell import KEEPS

__all__ = ["FIGURE", "NAMES", "verdicts", "write_markdown"]

FIGURE = "transfer.png"
NAMES = {"nothing": "from scratch", "habit": "the habit is kept", "everything": "everything is kept"}
Found = Mapping[str, Any]


def verdicts(summary: Found) -> list[str]:
    """What the figures say."""
    out = []
    for keep in KEEPS[1:]:
        found = summary["later"][keep]
        whole = found["− scratch"]
        how = (
            "lower than"
            if whole.below
            else "higher than"
            if whole.above
            else "not proven to differ from that"
        )
        kept = f"Where {NAMES[keep].replace(' is kept', '')} is kept, the mean regret over the three tasks"
        said = f"{ONE_SEED}. {kept} less that" if whole.low is None else f"{kept} is {how}"
        out.append(
            f"{said} from scratch: {points(whole, 0, 1.0)} of 1,000. On the second and third task alone "
            f"{points(found['regret'], 0, 1.0)}; in their first "
            f"quarter {points(found['early regret'], 0, 1.0)}."
        )
    return out


def write_markdown(summary: Found, config: Mapping[str, Any], machine: str) -> str:
    """The whole report."""
    settings, seeds = config["settings"], len(config["seeds"])
    parts = [
        "# Transfer: walker stand, walk and run, one after another\n",
        f"{counted(len(config['orders']), 'order')}, {counted(seeds, 'seed')}; each task {settings['rounds']} rounds of "
        f"{settings['episode']} decisions in {settings['envs']} environments; {machine}. Regret is 1,000 less the return per "
        "1,000 steps, averaged over a task's training. The orders of a seed share its three trainings from scratch and are "
        f"averaged. {measured_over(seeds)} Thin lines in the figure are single runs.\n",
        f"![Transfer]({FIGURE})\n",
        "\n".join(f"- {verdict}" for verdict in verdicts(summary)) + "\n",
    ]
    rows = [[NAMES["nothing"], interval(summary["total"]["nothing"], 0, 1.0), "–", "–", "–"]]
    for keep in KEEPS[1:]:
        found = summary["later"][keep]
        each = [points(found[key], 0, 1.0) for key in ("− scratch", "regret", "early regret")]
        rows.append([NAMES[keep], interval(summary["total"][keep], 0, 1.0), *each])
    parts.append(
        table(["what is kept", "regret", "− scratch", "2nd and 3rd task", "their first quarter"], rows)
    )
    return "\n".join(parts)
