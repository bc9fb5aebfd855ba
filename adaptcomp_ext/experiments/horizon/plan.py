"""What the experiment consists of: its configuration and its cells."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from adaptcomp_ext.experiments.control.plan import preset
from adaptcomp_ext.experiments.runs import Cell, Plan, seeds_from

__all__ = ["LEVELS", "PRICES", "plan"]

LEVELS = (1, 2, 4, 8)
"""Horizons, each planned on from the one before it."""
PRICES = (0.00003, 0.0001, 0.0003, 0.001)
"""Of a step of the horizon, in units of the spread of values."""


def plan(task: str, *, seeds: int, first_seed: int, steps: int | None, quick: bool) -> Plan:
    """Lay out the experiment: one agent for each seed, which plans everywhere while it learns."""
    settings = replace(preset(task, steps=steps, quick=quick), gate="always")
    measured: dict[str, Any] = {
        "levels": list(LEVELS),
        "iterations": 1 if quick else 2,
        "prices": list(PRICES[1:3] if quick else PRICES),
        "episodes": 2 if quick else 16,
        "states": 40 if quick else 1500,
        "length": 60 if quick else None,
    }
    every = seeds_from(first_seed, seeds)
    cells = [Cell(f"seed-{seed}", {"settings": asdict(settings), **measured}, seed) for seed in every]
    return Plan(
        "horizon", {"settings": asdict(settings), "seeds": list(every), "quick": quick, **measured}, cells
    )
