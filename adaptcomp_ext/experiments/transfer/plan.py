"""What the experiment consists of: its configuration and its cells."""

from __future__ import annotations

from dataclasses import asdict, replace

from adaptcomp_ext.experiments.control.plan import preset
from adaptcomp_ext.experiments.runs import Cell, Plan, seeds_from

from .cell import KEEPS

__all__ = ["ORDERS", "TASKS", "plan"]

TASKS = ("walker-stand", "walker-walk", "walker-run")
ORDERS = tuple(tasks[i:] + tasks[:i] for tasks in (TASKS, TASKS[::-1]) for i in range(len(TASKS)))
"""All six; each task is the first of one of the first three, the second of one, the third of one."""


def plan(*, orders: int, seeds: int, first_seed: int, steps: int | None, quick: bool) -> Plan:
    """Lay out the experiment: each task from scratch, then the orders, which begin with one of those."""
    settings = replace(preset(TASKS[0], steps=steps, quick=quick), gate="value")
    common = {"settings": asdict(settings)}
    every = seeds_from(first_seed, seeds)
    scratch = {
        (task, seed): Cell(f"scratch-{task}-seed-{seed}", {**common, "order": [task], "keep": KEEPS[0]}, seed)
        for seed in every
        for task in TASKS
    }
    later = [
        Cell(
            f"{keep}-{'-'.join(task.removeprefix('walker-') for task in order)}-seed-{seed}",
            {**common, "order": list(order), "keep": keep, "begin": scratch[order[0], seed].name},
            seed,
        )
        for seed in every
        for order in ORDERS[:orders]
        for keep in KEEPS[1:]
    ]
    config = {
        **common,
        "orders": [list(order) for order in ORDERS[:orders]],
        "seeds": list(every),
        "quick": quick,
    }
    return Plan("transfer", config, [*scratch.values(), *later])
