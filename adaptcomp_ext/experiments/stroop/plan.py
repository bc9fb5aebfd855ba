"""What the experiment consists of: its configuration and its cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from adaptcomp_ext.experiments.data import StroopMNIST
from adaptcomp_ext.experiments.runs import Cell, Plan, seeds_from
from adaptcomp_ext.experiments.vision import LARGE, recipe_for

from . import reaction
from .cell import EFFORTS

__all__ = ["CONGRUENT", "EFFORT_CONGRUENT", "plan"]

CONGRUENT = (0.8, 0.95, 0.99, 0.995)
EFFORT_CONGRUENT = 0.95


def plan(
    data: Path | None,
    *,
    congruent: Sequence[float],
    seeds: int,
    first_seed: int,
    epochs: int | None,
    quick: bool,
    with_reaction: bool,
    with_effort: bool,
) -> Plan:
    """Lay out the experiment.

    Parameters
    ----------
    data : Path, optional
        MNIST's folder; scikit-learn's digits without one. It is read here: what is missing is said before
        anything runs.
    congruent : sequence of float
        Proportions congruent of the training sets.
    seeds, first_seed : int
        Number of seeds; first seed.
    epochs : int, optional
        Of the CNN and of ACC; default: what suits the data.
    quick : bool
        Few epochs, few designs, little timing.
    with_reaction, with_effort : bool
        Whether the observers, and the comparison of prices of effort, take part.
    """
    train = StroopMNIST(data, "train")
    mnist = train.images.shape[-1] >= LARGE
    recipe = asdict(recipe_for(len(train), quick))
    if epochs is not None:
        recipe["epochs"] = epochs
    practice = asdict(reaction.recipe_for(mnist, quick))
    common = {"data": None if data is None else str(data), "timing_seconds": 0.5 if quick else 4.0}
    cells = []
    every = seeds_from(first_seed, seeds)
    for seed in every:
        for p in congruent:
            options = {**common, "part": "main", "congruent": p, "recipe": recipe}
            cells.append(Cell(f"main-{p:g}-seed-{seed}", options, seed))
    if with_reaction:
        for seed in every:
            for setting in reaction.settings_of(quick):
                options = {**common, "part": "reaction", "design": asdict(setting.design), "recipe": practice}
                options["setting"] = setting.name
                cells.append(Cell(f"reaction-{_file_name(setting.name)}-seed-{seed}", options, seed))
    if with_effort:
        for i, name in enumerate(EFFORTS):
            options = {
                **common,
                "part": "effort",
                "effort": name,
                "congruent": EFFORT_CONGRUENT,
                "recipe": recipe,
            }
            cells.append(Cell(f"effort-{i}-seed-{first_seed}", options, first_seed))
    config = {
        "data": train.name,
        "train": len(train),
        "congruent": list(congruent),
        "seeds": list(every),
        "recipe": recipe,
        "reaction": practice if with_reaction else None,
        "effort": with_effort,
        "quick": quick,
    }
    return Plan("stroop", config, cells)


def _file_name(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")
