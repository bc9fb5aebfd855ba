"""What the experiment consists of: its configuration and its cells."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace

from adaptcomp_ext.experiments.control.plan import preset
from adaptcomp_ext.experiments.runs import Cell, Plan

from .cell import KEEPS

__all__ = ["ORDERS", "TASKS", "plan"]

TASKS = ("walker-stand", "walker-walk", "walker-run")
ORDERS = tuple(itertools.permutations(TASKS))


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
