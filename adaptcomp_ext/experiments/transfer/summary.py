"""What the cells found together: means over orders, intervals over seeds, and what differences there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adaptcomp_ext.experiments.runs import Cell, Difference, mean_interval, paired

from .cell import KEEPS
from .plan import TASKS

__all__ = ["summarise"]

Found = Mapping[str, Any]


def summarise(cells: Sequence[Cell], found: Mapping[str, Found]) -> dict[str, Any]:
    """Regret of tasks that are not the first of their order, paired with the same task and seed from scratch.

    The orders of a seed share its trainings from scratch and are no independent runs: they are averaged, and
    intervals are over seeds.
    """
    scratch = {
        (cell.seed, task["task"]): task
        for cell in cells
        if cell.options["keep"] == "nothing"
        for task in found[cell.name]["tasks"]
    }
    out: dict[str, Any] = {"total": {}, "later": {}, "curves": {}}
    seeds = sorted({seed for seed, _ in scratch})
    out["total"]["nothing"] = mean_interval(
        [_mean([scratch[seed, task]["regret"] for task in TASKS]) for seed in seeds]
    )
    for keep in KEEPS[1:]:
        some = [cell for cell in cells if cell.options["keep"] == keep]
        ours = [found[cell.name]["regret"] for cell in some]
        theirs = [
            _mean([scratch[cell.seed, task]["regret"] for task in cell.options["order"]]) for cell in some
        ]
        later = [found[cell.name]["tasks"][1:] for cell in some]
        of = [cell.seed for cell in some]
        out["total"][keep] = mean_interval(_by_seed(ours, of))._replace(n=len(some))
        out["later"][keep] = {
            "− scratch": _paired(ours, theirs, of),
            **{
                key: _paired(
                    [_mean([task[key] for task in tasks]) for tasks in later],
                    [
                        _mean([scratch[c.seed, task["task"]][key] for task in tasks])
                        for c, tasks in zip(some, later, strict=True)
                    ],
                    of,
                )
                for key in ("regret", "early regret")
            },
        }
    for task in TASKS:
        out["curves"][task] = {"nothing": [v["returns"] for (_, name), v in scratch.items() if name == task]}
        for keep in KEEPS[1:]:
            kept = [
                entry["returns"]
                for cell in cells
                if cell.options["keep"] == keep
                for entry in found[cell.name]["tasks"][1:]
                if entry["task"] == task
            ]
            if kept:
                out["curves"][task][keep] = kept
    return out


def _by_seed(values: Sequence[float], seeds: Sequence[int]) -> list[float]:
    """The mean over the orders of each seed."""
    return [
        _mean([v for v, seed in zip(values, seeds, strict=True) if seed == one])
        for one in dict.fromkeys(seeds)
    ]


def _paired(ours: Sequence[float], theirs: Sequence[float], seeds: Sequence[int]) -> Difference:
    """Of runs, of which `n` says how many there are; the interval is over seeds."""
    return paired(_by_seed(ours, seeds), _by_seed(theirs, seeds))._replace(n=len(ours))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
