"""One seed: train the reader, read the test images, and time the ways of running it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adaptcomp_ext as ac

from ..data import ImageData, find_images
from ..device import here
from ..files import write_tensors
from ..runs import Cell, Tick
from .baselines import compare
from .model import GlimpseReader, Recipe, train

SHOWN = "shown.safetensors"
PER_CLASS = 4
TIMED_ROWS = 2000


def measure(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    """Train, read and time; the digits that the picture shows are written into the cell's folder."""
    recipe, data = Recipe(**cell.options["recipe"]), here(find_images(cell.options["data"]))
    reader = GlimpseReader(data.side, recipe.window, recipe.dim, recipe.max_steps)
    updates = recipe.epochs * -(-len(data.train_images) // recipe.batch)
    done = 0

    def progress(loss: float, right: float, steps: float) -> None:
        nonlocal done
        done += 1
        tick(f"loss {loss:.3f}, right {right:.1%}, {steps:.2f} looks", 0.8 * done / updates)

    begin = time.perf_counter()
    history = train(reader, data, recipe, cell.seed, progress)
    seconds = time.perf_counter() - begin
    tick("reading", 0.8)
    with torch.inference_mode():
        results = [reader(images) for images in data.test_images.split(TIMED_ROWS)]
    steps, status, cost, output = (
        torch.cat([getattr(result, name) for result in results])
        for name in ("steps", "status", "cost", "output")
    )
    predicted = output.argmax(dim=1)
    write_tensors(folder / SHOWN, _chosen(reader, data, cost, steps, predicted))
    tick("timing the four ways of running it", 0.85)
    timed = data.test_images[:TIMED_ROWS]
    times, agreed = compare(reader, timed, cell.options["seconds"])
    right = predicted == data.test_labels
    return {
        "training": {"seconds": seconds, "epochs": [epoch._asdict() for epoch in history]},
        "accuracy": float(right.float().mean()),
        "steps": {
            "mean": float(steps.double().mean()),
            "min": int(steps.min()),
            "max": int(steps.max()),
            "at_most": recipe.max_steps,
            "ended_by_the_limit": int((status == ac.Status.MAX_STEPS).sum()),
        },
        "by_steps": _groups(steps, steps, right),
        "by_class": _groups(data.test_labels, steps, right),
        "batch": {
            "rows": len(timed),
            "mean_steps": float(steps[: len(timed)].double().mean()),
            "longest": int(steps[: len(timed)].max()),
            "threads": torch.get_num_threads(),
        },
        "times_ms": times,
        "rows_that_differ": agreed,
    }


def _groups(of: Tensor, steps: Tensor, right: Tensor) -> list[dict[str, Any]]:
    """Images, mean steps and accuracy for each value of `of` that occurs."""
    return [
        {
            "value": value,
            "images": int((of == value).sum()),
            "mean_steps": float(steps[of == value].double().mean()),
            "accuracy": float(right[of == value].double().mean()),
        }
        for value in of.unique().tolist()
    ]


def _chosen(
    reader: GlimpseReader, data: ImageData, cost: Tensor, steps: Tensor, predicted: Tensor
) -> dict[str, Tensor]:
    """Return the images of each digit with the fewest and with the most looks.

    Images with equally many are ordered by their ponder cost N + R. ``column`` is the place in the row of the
    digit, the fewest looks first; ``path`` [K, max_steps, 2] is where each look went, NaN after the last one.
    """
    images, labels = data.test_images, data.test_labels
    rows: list[int] = []
    columns: list[int] = []
    for label in range(10):
        order = (labels == label).nonzero()[:, 0]
        order = order[cost[order].argsort()]
        few = order[:PER_CLASS].tolist()
        many = order[max(len(few), len(order) - PER_CLASS) :].tolist()
        rows += few + many
        columns += [*range(len(few)), *range(PER_CLASS, PER_CLASS + len(many))]
    path = torch.full((len(rows), reader.max_steps, 2), float("nan"))
    for i, row in enumerate(rows):
        looks = int(steps[row])
        path[i, :looks] = reader.path(images[row], looks)
    chosen = torch.tensor(rows)
    return {
        "image": images[chosen],
        "label": labels[chosen],
        "steps": steps[chosen],
        "predicted": predicted[chosen],
        "column": torch.tensor(columns),
        "path": path,
    }
