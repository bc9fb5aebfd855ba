"""One setting and one seed: practise, and measure the steps of each task and condition after every epoch.

What was tried, on MNIST, one seed, 1,500 updates, 80 % congruent; steps to read a congruent and an
incongruent item (right ones):

===============================================  =====================
noise 1.0, price of a step 0.01                  16.0 and 16.0, the limit
noise 0.7, price 0.03                            11.2 and 13.4
noise 0.5, price 0.02                            9.3 and 11.8
noise 0.5, price 0.05, as it is                  4.5 and 7.1
===============================================  =====================

With inks of unlike lengths in RGB neutral items were read faster than congruent ones (5.3 against 7.8 steps
at 20 % congruent): their inks happen to be brighter, and a bright shape is easier to see in noise.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptcomp_ext.experiments.bench.timing import clock, interleave, ratio
from adaptcomp_ext.experiments.data import Condition, find_images
from adaptcomp_ext.experiments.runs import Cell, Checkpoint, Tick, fit

from .model import Observer
from .trials import BIASED, NAME, READ, RESPONSES, Design, Pool, Trials

__all__ = ["Recipe", "Setting", "measure_reaction", "recipe_for", "settings_of"]

TASKS = {"read": READ, "name": NAME}
TIMED_ROWS = 256


@dataclass(frozen=True)
class Setting:
    """A design, and the name it goes by."""

    name: str
    design: Design


@dataclass(frozen=True)
class Recipe:
    """How long is practised, and how often measured: AdamW on a one-cycle schedule, weight decay 0.01."""

    epochs: int
    updates: int
    trials: int
    batch: int = 128
    learning_rate: float = 3e-3
    price: float = 0.05
    noise: float = 0.5
    features: int = 96
    dim: int = 64


def recipe_for(mnist: bool, quick: bool) -> Recipe:
    """Return the recipe for the images: `updates` of an epoch, `trials` of each tested task and condition."""
    if quick:
        return Recipe(epochs=2, updates=250, trials=500, batch=64, features=64, dim=32)
    return Recipe(epochs=5, updates=300, trials=4000) if mnist else Recipe(epochs=5, updates=200, trials=2000)


def settings_of(quick: bool) -> list[Setting]:
    """Return the designs: proportion congruent, share of practice, and the control for contingency."""
    proportions = [Setting(f"congruent {p:g}", Design(p)) for p in ((0.2, 0.8) if quick else (0.2, 0.5, 0.8))]
    if quick:
        return proportions
    practice = [Setting(f"reading {r:g}", Design(0.5, reading=r)) for r in (0.1, 0.9)]
    control = [Setting(f"unbiased items, congruent {p:g}", Design(p, control=True)) for p in (0.2, 0.8)]
    return proportions + practice + control


def measure_reaction(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    """Train one observer.

    Returns
    -------
    dict
        ``history``: for each epoch the loss and the `_measure` of it; ``final``, the last of these;
        ``timing``.
    """
    design, recipe = Design(**cell.options["design"]), Recipe(**cell.options["recipe"])
    data = find_images(cell.options["data"])
    practice, test = Pool(data, "train"), Pool(data, "test")
    torch.manual_seed(cell.seed)
    model = Observer(practice.width, recipe.features, recipe.dim, recipe.noise)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    total = recipe.epochs * recipe.updates
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=total)

    def loss(index: Tensor, done: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        trials = practice.practise(len(index), design)  # new ones always: the index only counts them
        result = model(trials)
        cost = result.cost.mean()
        return F.cross_entropy(result.output, trials.targets) + recipe.price * cost, {"cost": cost}

    history = fit(
        model,
        loss,
        optimizer,
        rows=recipe.updates * recipe.batch,
        batch=recipe.batch,
        epochs=recipe.epochs,
        seed=cell.seed,
        schedule=schedule,
        checkpoint=Checkpoint(folder / "observer.safetensors"),
        tick=lambda done: tick("observer", 0.95 * done),
        after=lambda epoch: _measure(model, test, design, recipe.trials),
    )
    tick("timing", 0.96)
    return {
        "data": data.name,
        "design": asdict(design),
        "recipe": asdict(recipe),
        "history": history,
        "final": {key: value for key, value in history[-1].items() if "/" in key},
        "timing": _time(model, test.practise(TIMED_ROWS, design), cell.options["timing_seconds"]),
    }


@torch.no_grad()
def _measure(model: Observer, pool: Pool, design: Design, count: int) -> dict[str, float]:
    """Return ``TASK/CONDITION/steps``, the mean over right answers, and ``TASK/CONDITION/right``."""
    found = {}
    responses = range(BIASED, RESPONSES) if design.control else range(RESPONSES)
    targets = torch.tensor(list(responses)).repeat(-(-count // len(responses)))[:count]
    for task, number in TASKS.items():
        for condition in Condition:
            trials = pool.draw(
                torch.full((count,), number), targets, torch.full((count,), int(condition)), design
            )
            result = model(trials)
            right = result.output.argmax(dim=1) == targets
            where = f"{task}/{condition.name.lower()}"
            found[f"{where}/right"] = float(right.double().mean())
            steps = result.steps[right] if bool(right.any()) else result.steps
            found[f"{where}/steps"] = float(steps.double().mean())
    return found


@torch.no_grad()
def _time(model: Observer, trials: Trials, seconds: float) -> dict[str, Any]:
    """Time inference on one batch of practice trials: compacted, and masked until the last row has halted."""

    def run(compact: bool | str) -> None:
        model.halt.compact = compact
        model(trials)

    times = interleave(
        {"compacted": lambda: run("auto"), "masked": lambda: run(False)}, clock(torch.device("cpu")), seconds
    )
    model.halt.compact = "auto"
    return {
        "rows": len(trials.images),
        "ms": {name: statistics.median(values) for name, values in times.items()},
        "masked_over_compacted": ratio(times, "masked", "compacted"),
    }
