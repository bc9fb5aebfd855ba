"""What the experiment consists of: its configuration and its cells."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from adaptcomp_ext.experiments.data import find_images
from adaptcomp_ext.experiments.runs import Cell, Plan, seeds_from
from adaptcomp_ext.experiments.vision import LARGE, recipe_for

__all__ = ["ONLINE", "RATE", "SHARE", "plan"]

SHARE, RATE = 0.5, 0.05
ONLINE = (("dense", 1.0), ("dense", 4.0), ("units", 4.0), ("sparse", 4.0))
"""Form and temperature of the pairs that are trained together."""


def plan(data: Path | None, *, seeds: int, first_seed: int, epochs: int | None, quick: bool) -> Plan:
    """Lay out the experiment; the data is read here, so that what is missing is said before anything runs."""
    found = find_images(data)
    recipe = asdict(recipe_for(len(found.train_labels), quick))
    if epochs is not None:
        recipe["epochs"] = epochs
    common = {
        "data": None if data is None else str(data),
        "timing_seconds": 0.3 if quick else 3.0,
        "recipe": recipe,
        "share": SHARE,
        "rate": RATE,
        # On a few hundred images the description length outweighs the labels, and nothing is left.
        "beta": 1.0 if found.side >= LARGE else 0.02,
    }
    cells = []
    every = seeds_from(first_seed, seeds)
    for seed in every:
        cells.append(Cell(f"after-seed-{seed}", {**common, "part": "after"}, seed))
        for form, temperature in ONLINE:
            options = {**common, "part": "online", "form": form, "temperature": temperature}
            cells.append(Cell(f"online-{form}-{temperature:g}-seed-{seed}", options, seed))
    config = {
        "data": found.name,
        "train": len(found.train_labels),
        "seeds": list(every),
        "recipe": recipe,
        "quick": quick,
    }
    return Plan("distill", config, cells)
