"""From a plan to cells, JSON, Markdown and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from adaptcomp_ext.experiments.control.plan import preset
from adaptcomp_ext.experiments.runs import Cell, Plan, interval, mean_interval, paired, points, publish, run_plan, table

from . import figure
from .cell import run_cell

__all__ = ["horizon", "plan", "summarise"]

LEVELS = (1, 2, 4, 8)
PRICES = (0.0003, 0.001, 0.003, 0.01)
FIGURE = "horizon.png"
Found = Mapping[str, Any]


def plan(task: str, *, seeds: int, first_seed: int, steps: int | None, quick: bool) -> Plan:
    """Lay out the experiment: one agent for each seed, which plans everywhere while it learns."""
    settings = replace(preset(task, steps=steps, quick=quick), gate="always")
    measured: dict[str, Any] = {
        "levels": list(LEVELS),
        "iterations": 1 if quick else 2,
        "prices": list(PRICES[1:3] if quick else PRICES),
        "episodes": 2 if quick else 16,
        "fit_episodes": 1 if quick else 4,
        "length": 60 if quick else None,
    }
    every = range(first_seed, first_seed + seeds)
    cells = [Cell(f"seed-{seed}", {"settings": asdict(settings), **measured}, seed) for seed in every]
    return Plan("horizon", {"settings": asdict(settings), "seeds": list(every), "quick": quick, **measured}, cells)


def summarise(cells: Sequence[Cell], found: Mapping[str, Found]) -> dict[str, Any]:
    """Means, intervals and differences over seeds."""
    some = [found[cell.name] for cell in cells]
    prices = list(some[0]["adaptive"])
    return {
        "mean gain": [mean_interval([c["mean gain"][k] for c in some]) for k in range(len(some[0]["mean gain"]))],
        "fixed": {h: _of([c["fixed"][h] for c in some]) for h in some[0]["fixed"]},
        "adaptive": {
            price: {
                **_of([c["adaptive"][price] for c in some]),
                "shuffled": _of([c["adaptive"][price]["shuffled"] for c in some]),
                "− shuffled": paired(
                    [c["adaptive"][price]["return"] for c in some], [c["adaptive"][price]["shuffled"]["return"] for c in some]
                ),
                "correlations": {
                    name: mean_interval(
                        [v for c in some if (v := c["adaptive"][price]["correlations"][name]) is not None] or [0.0]
                    )
                    for name in some[0]["adaptive"][price]["correlations"]
                },
            }
            for price in prices
        },
        "strip": some[0]["adaptive"][prices[len(prices) // 2]]["strip"],
    }


def _of(parts: Sequence[Found]) -> dict[str, Any]:
    return {
        **{key: mean_interval([p[key] for p in parts]) for key in ("return", "horizon", "steps imagined")},
        "share": {h: mean_interval([p["share"][h] for p in parts]) for h in parts[0]["share"]},
    }


def verdicts(summary: Found) -> list[str]:
    """What the figures say."""
    fixed = summary["fixed"]
    best = max(fixed, key=lambda h: fixed[h]["return"].mean)
    out = [
        "Return by horizon, the same in all states: "
        + ", ".join(f"H = {h}: {interval(f['return'], 0, 1.0)}" for h, f in fixed.items())
        + f". The best is {best}.",
    ]
    for price, found in summary["adaptive"].items():
        used = sum(1 for share in found["share"].values() if share.mean > 0.02)
        out.append(
            f"At price {price} the states choose H = {interval(found['horizon'], 2, 1.0)} on average, {used} "
            "different ones in more "
            f"than 2 % of the states; return {interval(found['return'], 0, 1.0)} for "
            f"{interval(found['steps imagined'], 1, 1.0)} steps "
            f"of each candidate imagined; the same depths dealt at random: {points(found['− shuffled'], 0, 1.0)} "
            "in favour of the choice."
        )
    return out


def write_markdown(summary: Found, config: Mapping[str, Any], machine: str) -> str:
    """The whole report."""
    settings, seeds = config["settings"], len(config["seeds"])
    parts = [
        f"# How far to look ahead: {settings['task']}\n",
        f"Agents that plan everywhere while they learn ({settings['rounds']} rounds of {settings['episode']} decisions in "
        f"{settings['envs']} environments); afterwards {config['episodes']} whole episodes for each row; {seeds} "
        f"seed{'s' if seeds > 1 else ''}; {machine}. Means over seeds ± half of Student's 95 % interval.\n",
        f"![Horizons]({FIGURE})\n",
        "\n".join(f"- {verdict}" for verdict in verdicts(summary)) + "\n",
    ]
    shares = list(next(iter(summary["fixed"].values()))["share"])
    rows = []
    for h, found in summary["fixed"].items():
        rows.append([f"H = {h} everywhere", *_row(found, shares), "–"])
    for price, found in summary["adaptive"].items():
        rows.append([f"chosen, price {price}", *_row(found, shares), points(found["− shuffled"], 0, 1.0)])
    header = ["horizon", "return", "mean H", "imagined", *(f"H = {h}, %" for h in shares), "− dealt at random"]
    parts.append(table(header, rows))
    parts.append("## What the chosen horizon goes with (rank correlation)\n")
    names = list(next(iter(summary["adaptive"].values()))["correlations"])
    rows = [[p, *(interval(f["correlations"][n], 2, 1.0) for n in names)] for p, f in summary["adaptive"].items()]
    parts.append(table(["price", *names], rows))
    return "\n".join(parts)


def _row(found: Found, shares: Sequence[str]) -> list[str]:
    return [
        interval(found["return"], 0, 1.0),
        interval(found["horizon"], 2, 1.0),
        interval(found["steps imagined"], 1, 1.0),
        *(interval(found["share"][h], 0) for h in shares),
    ]


def horizon(
    task: str,
    out: Path,
    *,
    steps: int | None = None,
    seeds: int = 1,
    first_seed: int = 0,
    workers: int = 1,
    threads: int = 1,
    quick: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run what is not finished yet, and write ``horizon.json``, ``horizon.md`` and a picture.

    Parameters
    ----------
    task : str
        One of `adaptcomp_ext.experiments.environments.control.TASKS`.
    out : Path
        Folder of the results and checkpoints. One that holds another configuration is refused; an interrupted run goes on.
    steps : int, optional
        Of the suite, in training. Default: what suits the task.
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
    what = plan(task, seeds=seeds, first_seed=first_seed, steps=steps, quick=quick)
    found = run_plan(what, out, run_cell, workers=workers, threads=threads, console=console)
    summary = summarise(what.cells, found)
    figure.draw(summary, out / FIGURE)
    return publish(what, out, summary, verdicts(summary), partial(write_markdown, summary, what.config), console)
