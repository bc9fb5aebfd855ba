"""One seed: train the energy model and a classifier, evaluate them on the test images, time the training."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch

from ..data import ImageData, find_images
from ..device import here, seeded
from ..runs import Cell, Tick, rank_correlation
from .evaluation import (
    by_budget,
    by_tolerance,
    changes,
    hardness,
    parts,
    read,
    setting,
    spread,
    under_corruption,
)
from .landscape import choose, save, survey
from .training import Recipe, build_classifier, build_model, compare, train, train_classifier

LANDSCAPES = "landscapes.safetensors"
BUDGETS = (1, 2, 3, 5, 8, 12, 20, 50)
TOLERANCES = (1.0, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4)
CLASSIFIER_SEED = 1000


def hold_out(data: ImageData, count: int, seed: int = 0) -> ImageData:
    """Put `count` training images in the place of the test images: recipes are chosen on these."""
    if not 0 < count < len(data.train_labels):
        raise ValueError(f"held out: expected 1 to {len(data.train_labels) - 1} images, got {count}")
    order = torch.randperm(len(data.train_labels), generator=seeded(seed))
    held, kept = order[:count], order[count:]
    images, labels = data.train_images, data.train_labels
    return ImageData(data.name, images[kept], labels[kept], images[held], labels[held])


def measure(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    """Train and measure; the landscapes of some descents are written into the cell's folder."""
    seed, recipe = cell.seed, Recipe(**cell.options["recipe"])
    data = here(find_images(cell.options["data"]))
    if cell.options["held_out"]:
        data = hold_out(data, cell.options["held_out"])
    images, labels = data.test_images, data.test_labels
    model = build_model(data.side)
    descend = model.descend
    updates = recipe.epochs * -(-len(data.train_images) // recipe.batch)
    done = 0

    def progress(loss: float, right: float) -> None:
        nonlocal done
        done += 1
        tick(f"loss {loss:.3f}, right {right:.1%}", 0.6 * done / updates)

    history = train(model, data.train_images, data.train_labels, recipe, seed, progress)
    # An ordinary classifier says which images are hard.
    tick("ordinary classifier", 0.6)
    torch.manual_seed(seed + CLASSIFIER_SEED)
    classifier = build_classifier(data.side)
    train_classifier(classifier, data.train_images, data.train_labels, recipe, seed + CLASSIFIER_SEED)
    hard = hardness(classifier, images)
    with torch.no_grad():
        control = classifier(images).argmax(dim=1) == labels
    tick("reading", 0.8)
    reading = read(model, images, labels)
    with setting(descend, max_steps=1):
        first = read(model, images, labels)
    budgets = by_budget(model, images, labels, hard, BUDGETS)
    tolerances = by_tolerance(model, images, labels, hard, TOLERANCES)
    corrupted = under_corruption(model, images, labels, seed)
    surveys = {
        name: survey(model, images[row], int(labels[row]))
        for name, row in choose(reading, first, hard).items()
    }
    save(folder / LANDSCAPES, surveys)
    tick("timing updates", 0.9)
    timing = compare(model, data.train_images, data.train_labels, recipe, cell.options["timed_updates"], seed)
    groups, steps = parts(reading, hard), reading.steps
    hardest = hard.argsort(stable=True).tensor_split(len(groups))[-1]
    return {
        "tol": descend.tol,
        "training": {
            "images": len(data.train_images),
            "seconds": sum(epoch.seconds for epoch in history),
            "seconds_per_epoch": statistics.fmean(epoch.seconds for epoch in history),
            "epochs": [epoch._asdict() for epoch in history],
        },
        "timing": timing,
        "accuracy": reading.accuracy,
        "steps": {
            "mean": reading.mean_steps,
            "min": int(steps.min()),
            "max": int(steps.max()),
            "at_most": descend.max_steps,
            "ended_by_the_limit": reading.summary()["ended_by_the_limit"],
            "counts": steps.bincount()[1:].tolist(),
        },
        "by_difficulty": groups,
        "hardest_over_easiest": spread(groups),
        "rank_correlation": rank_correlation(hard, reading.steps),
        "after_the_first_step": {"accuracy": first.accuracy, **changes(first, reading)},
        "classifier": {
            "accuracy": float(control.double().mean()),
            "accuracy_hardest": float(control[hardest].double().mean()),
        },
        "by_budget": budgets,
        "by_tolerance": tolerances,
        "corrupted": corrupted,
    }
