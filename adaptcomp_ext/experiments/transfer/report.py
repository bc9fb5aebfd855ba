"""From a plan to cells, JSON, Markdown and a figure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from adaptcomp_ext.experiments.control.plan import preset
from adaptcomp_ext.experiments.runs import Cell, Plan, interval, mean_interval, paired, points, publish, run_plan, table

from . import figure
from .cell import KEEPS, run_cell

__all__ = ["ORDERS", "TASKS", "plan", "summarise", "transfer"]

TASKS = ("walker-stand", "walker-walk", "walker-run")
ORDERS = tuple(itertools.permutations(TASKS))
FIGURE = "transfer.png"
NAMES = {"nothing": "from scratch", "habit": "the habit is kept", "everything": "everything is kept"}
Found = Mapping[str, Any]


def plan(*, orders: int, seeds: int, first_seed: int, steps: int | None, quick: bool) -> Plan:
    """Lay out the experiment: from scratch the order does not matter, and is run once for each seed."""
    settings = replace(preset(TASKS[0], steps=steps, quick=quick), gate="value")
    cells = []
    for seed in range(first_seed, first_seed + seeds):
        for keep in KEEPS:
            for i, order in enumerate(ORDERS[:1] if keep == "nothing" else ORDERS[:orders]):
                options = {"settings": asdict(settings), "order": list(order), "keep": keep}
                cells.append(Cell(f"{keep}-order-{i}-seed-{seed}", options, seed))
    config = {
        "settings": asdict(settings),
        "orders": [list(order) for order in ORDERS[:orders]],
        "seeds": list(range(first_seed, first_seed + seeds)),
        "quick": quick,
    }
    return Plan("transfer", config, cells)


def summarise(cells: Sequence[Cell], found: Mapping[str, Found]) -> dict[str, Any]:
    """Regret of tasks that are not the first of their order, paired with the same task and seed from scratch."""
    scratch = {
        (cell.seed, task["task"]): task
        for cell in cells
        if cell.options["keep"] == "nothing"
        for task in found[cell.name]["tasks"]
    }
    out: dict[str, Any] = {"total": {}, "later": {}, "curves": {}}
    out["total"]["nothing"] = mean_interval([found[c.name]["regret"] for c in cells if c.options["keep"] == "nothing"])
    for keep in KEEPS[1:]:
        some = [cell for cell in cells if cell.options["keep"] == keep]
        ours = [found[cell.name]["regret"] for cell in some]
        theirs = [_mean([scratch[cell.seed, task]["regret"] for task in cell.options["order"]]) for cell in some]
        later = [[task for task in found[cell.name]["tasks"][1:]] for cell in some]
        out["total"][keep] = mean_interval(ours)
        out["later"][keep] = {
            "− scratch": paired(ours, theirs),
            **{
                key: paired(
                    [_mean([task[key] for task in tasks]) for tasks in later],
                    [_mean([scratch[c.seed, task["task"]][key] for task in tasks]) for c, tasks in zip(some, later, strict=True)],
                )
                for key in ("regret", "early regret")
            },
        }
    for task in TASKS:
        out["curves"][task] = {"nothing": _curve([v["returns"] for (_, name), v in scratch.items() if name == task])}
        for keep in KEEPS[1:]:
            kept = [
                entry["returns"]
                for cell in cells
                if cell.options["keep"] == keep
                for entry in found[cell.name]["tasks"][1:]
                if entry["task"] == task
            ]
            if kept:
                out["curves"][task][keep] = _curve(kept)
    return out


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _curve(returns: Sequence[Sequence[float]]) -> list[Any]:
    return [mean_interval(values) for values in zip(*returns, strict=True)]


def verdicts(summary: Found) -> list[str]:
    """What the figures say."""
    out = []
    for keep in KEEPS[1:]:
        found = summary["later"][keep]
        whole = found["− scratch"]
        how = "lower than" if whole.below else "higher than" if whole.above else "not different, as far as these runs tell, from"
        out.append(
            f"Where {NAMES[keep].replace(' is kept', '')} is kept, the mean regret over the three tasks is {how} from scratch: "
            f"{points(whole, 0, 1.0)} of 1,000. On the second and third task alone "
            f"{points(found['regret'], 0, 1.0)}; in their first "
            f"quarter {points(found['early regret'], 0, 1.0)}."
        )
    return out


def write_markdown(summary: Found, config: Mapping[str, Any], machine: str) -> str:
    """The whole report."""
    settings = config["settings"]
    parts = [
        "# Transfer: walker stand, walk and run, one after another\n",
        f"{len(config['orders'])} orders, {len(config['seeds'])} seeds; each task {settings['rounds']} rounds of "
        f"{settings['episode']} decisions in {settings['envs']} environments; {machine}. Regret is 1,000 less the "
        "return per 1,000 "
        "steps, averaged over a task's training. Means over orders and seeds ± half of Student's 95 % interval; differences are "
        "paired, with their interval and p. Orders share tasks, so that the runs are not quite independent.\n",
        f"![Transfer]({FIGURE})\n",
        "\n".join(f"- {verdict}" for verdict in verdicts(summary)) + "\n",
    ]
    rows = [[NAMES["nothing"], interval(summary["total"]["nothing"], 0, 1.0), "–", "–", "–"]]
    for keep in KEEPS[1:]:
        found = summary["later"][keep]
        each = [points(found[key], 0, 1.0) for key in ("− scratch", "regret", "early regret")]
        rows.append([NAMES[keep], interval(summary["total"][keep], 0, 1.0), *each])
    parts.append(table(["what is kept", "regret", "− scratch", "2nd and 3rd task", "their first quarter"], rows))
    return "\n".join(parts)


def transfer(
    out: Path,
    *,
    steps: int | None = None,
    orders: int = len(ORDERS),
    seeds: int = 1,
    first_seed: int = 0,
    workers: int = 1,
    threads: int = 1,
    quick: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run what is not finished yet, and write ``transfer.json``, ``transfer.md`` and a picture.

    Parameters
    ----------
    out : Path
        Folder of the results and checkpoints. One that holds another configuration is refused; an interrupted run goes on.
    steps : int, optional
        Of the suite, for each task. Default: what suits the walker.
    orders : int
        So many of the six orders, from 1.
    seeds, first_seed : int
        So many, from this on.
    workers, threads : int
        Processes side by side, and threads of torch in each.
    quick : bool
        Few rounds of a small planner, to see that it runs.
    console : Console, optional
        Where to print.

    Returns
    -------
    dict
        The content of the JSON file.
    """
    console = console or Console()
    if not 1 <= orders <= len(ORDERS):
        raise ValueError(f"orders: expected 1 to {len(ORDERS)}, got {orders}")
    what = plan(orders=orders, seeds=seeds, first_seed=first_seed, steps=steps, quick=quick)
    found = run_plan(what, out, run_cell, workers=workers, threads=threads, console=console)
    summary = summarise(what.cells, found)
    figure.draw(summary, out / FIGURE)
    return publish(what, out, summary, verdicts(summary), partial(write_markdown, summary, what.config), console)
