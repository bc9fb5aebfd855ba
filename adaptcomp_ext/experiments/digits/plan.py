"""What the experiment consists of: its configuration and its cells."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from adaptcomp_ext.experiments.data import find_images
from adaptcomp_ext.experiments.runs import Cell, Plan, seeds_from
from adaptcomp_ext.experiments.vision import Recipe, recipe_for

__all__ = ["PRICES", "PRIORS", "plan"]

PRICES = (0.0, 0.01, 0.03, 0.1)
"""Of a step, under ACT."""
PRIORS = (0.2, 0.4)
"""Of PonderNet: the probability of halting that it is drawn to."""


def plan(data: Path | None, *, seeds: int, first_seed: int, epochs: int | None, quick: bool) -> Plan:
    """Lay out the experiment; the data is read here, so that what is missing is said before anything runs."""
    found = find_images(data)
    rows = len(found.train_labels)
    pair = asdict(recipe_for(rows, quick))
    large = Recipe(epochs=1 if quick else 4, learning_rate=5e-3)
    small = Recipe(epochs=8 if quick else 20, batch=32, learning_rate=1e-2)
    reader = asdict(large if rows > 10_000 else small)
    if epochs is not None:
        pair["epochs"] = reader["epochs"] = epochs
    common = {
        "data": None if data is None else str(data),
        "recipe": reader,
        "pair_recipe": pair,
        "timing_seconds": 0.3 if quick else 2.0,
    }
    prices = PRICES[::3] if quick else PRICES
    priors = PRIORS[:1] if quick else PRIORS
    every = seeds_from(first_seed, seeds)
    cells = []
    for seed in every:
        cells.append(Cell(f"acc-seed-{seed}", {**common, "part": "acc"}, seed))
        cells.append(Cell(f"depth-seed-{seed}", {**common, "part": "depth"}, seed))
        for price in prices:
            cells.append(Cell(f"act-{price:g}-seed-{seed}", {**common, "part": "act", "price": price}, seed))
        for prior in priors:
            cells.append(
                Cell(f"ponder-{prior:g}-seed-{seed}", {**common, "part": "ponder", "prior": prior}, seed)
            )
    config = {
        "data": found.name,
        "train": rows,
        "seeds": list(every),
        "recipe": reader,
        "pair_recipe": pair,
        "quick": quick,
    }
    return Plan("digits", config, cells)
