"""What the experiment consists of: its configuration and its cells."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from adaptcomp_ext.experiments.runs import Cell, Plan, seeds_from

from .training import Settings

__all__ = ["OTHERS", "PRICE", "plan", "timings"]

PRICE = 0.0009
"""Of a sweep; the goal is worth 1, and a step costs 0.01."""
OTHERS = ((17, 0.3), (23, 0.3), (11, 0.2), (11, 0.4))
"""Sizes and densities that no agent is trained on."""


def plan(*, seeds: int, first_seed: int, updates: int | None, price: float, quick: bool) -> Plan:
    """Lay out the experiment."""
    common = {"updates": updates or (60 if quick else 600)}
    agents = {
        "priced": Settings(price=price, **common),
        "free": Settings(price=0.0, **common),
        "fixed-8": Settings(price=0.0, sweeps=8, **common),
        "fixed-16": Settings(price=0.0, sweeps=16, **common),
        "habit": Settings(price=0.0, sweeps=0, **common),
    }
    if quick:
        agents = {name: agents[name] for name in ("priced", "free")}
    every = seeds_from(first_seed, seeds)
    measured: dict[str, Any] = {
        "mazes": 300 if quick else 2000,
        "larger": 100 if quick else 1000,
        "others": [list(other) for other in (OTHERS[:1] if quick else OTHERS)],
    }
    timed: dict[str, Any] = {
        "timed": [[256, 11]] if quick else [[256, 11], [2048, 11], [8192, 11], [2048, 17]],
        "timing_seconds": 0.3 if quick else 8.0,
    }
    cells = [
        Cell(f"{name}-seed-{seed}", {"agent": name, "settings": asdict(settings), **measured}, seed)
        for seed in every
        for name, settings in agents.items()
    ]
    config = {
        "agents": {name: asdict(settings) for name, settings in agents.items()},
        "seeds": list(every),
        "quick": quick,
        **measured,
        **timed,
    }
    return Plan("maze", config, cells)


def timings(what: Plan) -> list[Cell]:
    """One more for each priced agent: on the clock, when nothing else runs any more."""
    options = {key: what.config[key] for key in ("timed", "timing_seconds")}
    options["density"] = what.config["agents"]["priced"]["density"]
    return [Cell(f"timing-seed-{s}", {"of": f"priced-seed-{s}", **options}, s) for s in what.config["seeds"]]
