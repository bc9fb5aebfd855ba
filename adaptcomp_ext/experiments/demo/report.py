"""From data to figures on the screen, a picture and a JSON file."""

from __future__ import annotations

import datetime
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import adaptcomp_ext as ac
from adaptcomp_ext.experiments.bench import machine
from adaptcomp_ext.experiments.data import ImageData
from adaptcomp_ext.experiments.files import write_json
from adaptcomp_ext.experiments.settings import settings

from . import figure
from .contenders import compare
from .model import GlimpseReader
from .reading import Reading
from .training import Epoch, Recipe, train

__all__ = ["demo", "recipe_for"]

JSON_NAME = "demo.json"
FIGURE_NAME = "demo.png"
TIMED_ROWS = 2000

LABELS = {
    "masked": "masked",
    "indexed": "boolean indexing",
    "adaptive": "AdaptiveHalt",
    "limit": "limit",
}
CAPTION = (
    "Masked: all rows run until the last one halts. Limit: the networks alone on the active rows. "
    "Ratios: median over the rounds of the quotient within a round."
)


def recipe_for(data: ImageData) -> Recipe:
    """Return the recipe that suits the size of the data."""
    if data.side <= 12:
        return Recipe(window=5, epochs=40)
    return Recipe(window=data.side // 2, epochs=2)


def _train(
    reader: GlimpseReader, data: ImageData, recipe: Recipe, seed: int, console: Console
) -> list[Epoch]:
    updates = recipe.epochs * -(-len(data.train_images) // recipe.batch)
    bar = Progress(
        TextColumn("training"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TextColumn(
            "loss {task.fields[loss]:.3f}   right {task.fields[right]:6.1%}   steps {task.fields[steps]:5.2f}"
        ),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task("", total=updates, loss=float("nan"), right=0.0, steps=float("nan"))
        return train(
            reader,
            data,
            recipe,
            seed,
            lambda loss, right, steps: bar.update(task, advance=1, loss=loss, right=right, steps=steps),
        )


def demo(
    data: ImageData,
    out: Path,
    *,
    epochs: int | None = None,
    seed: int = 0,
    threads: int = 1,
    seconds: float = 5.0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train an adaptive reader, time it against the alternatives, and write ``demo.json`` and ``demo.png``.

    Parameters
    ----------
    data : ImageData
        What to read.
    out : Path
        Folder of the results; made if it does not exist.
    epochs : int, optional
        Default: what suits the data.
    seed : int
        Of weights, order and jitter.
    threads : int
        Threads of torch, in training and while measuring. On a machine that does something else as well, a
        second one waits more than it works.
    seconds : float
        For all repeats of the timing together.
    console : Console, optional
        Where to print.

    Returns
    -------
    dict
        The content of the JSON file.
    """
    console = console or Console()
    out.mkdir(parents=True, exist_ok=True)
    recipe = recipe_for(data)
    if epochs is not None:
        recipe = replace(recipe, epochs=epochs)
    with settings(threads, seed):
        reader = GlimpseReader(data.side, recipe.window, recipe.dim, recipe.max_steps)
        console.print(
            f"[bold]{data.name}[/]: {len(data.train_images):,} images to learn from, {len(data.test_images):,} to test on. "
            f"The reader sees {recipe.window}x{recipe.window} of {data.side}x{data.side} pixels at a look, and decides "
            f"itself when it has seen enough (ACT, at most {recipe.max_steps} looks)."
        )
        begin = time.perf_counter()
        history = _train(reader, data, recipe, seed, console)
        training_seconds = time.perf_counter() - begin
        reading = Reading(reader, data, TIMED_ROWS)
        timed = data.test_images[:TIMED_ROWS]
        with console.status("timing the four ways of running it"):
            times, agreed = compare(reader, timed, seconds)
        about = machine.describe(torch.device("cpu"))

    steps = reading.steps
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **about,
        "data": {
            "name": data.name,
            "train": len(data.train_images),
            "test": len(data.test_images),
            "side": data.side,
        },
        "recipe": asdict(recipe),
        "seed": seed,
        "training": {"seconds": training_seconds, "epochs": [epoch._asdict() for epoch in history]},
        "accuracy": reading.accuracy,
        "steps": {
            "mean": float(steps.double().mean()),
            "min": int(steps.min()),
            "max": int(steps.max()),
            "at_most": recipe.max_steps,
            "ended_by_the_limit": int((reading.status == ac.Status.MAX_STEPS).sum()),
        },
        "by_steps": reading.groups(steps),
        "by_class": reading.groups(reading.labels),
        "batch": {
            "rows": len(timed),
            "mean_steps": float(steps[: len(timed)].double().mean()),
            "longest": int(steps[: len(timed)].max()),
        },
        "times_ms": {name: timing._asdict() for name, timing in times.items()},
        "rows_that_differ": agreed,
    }
    write_json(out / JSON_NAME, report)
    figure.draw(report, reading, reader, out / FIGURE_NAME)
    _print(report, console)
    console.print(f"Picture: {out / FIGURE_NAME}   Figures: {out / JSON_NAME}", soft_wrap=True)
    return report


def _print(report: dict[str, Any], console: Console) -> None:
    steps, batch, times = report["steps"], report["batch"], report["times_ms"]
    summary = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    summary.add_row("accuracy", f"[bold]{report['accuracy']:.1%}[/]")
    summary.add_row(
        "steps",
        f"[bold]{steps['mean']:.2f}[/] on average, {steps['min']} to {steps['max']} (allowed: {steps['at_most']})",
    )
    summary.add_row("training", f"{report['training']['seconds']:.0f} s")
    console.print(summary)

    threads = report["machine"]["threads"]
    table = Table(
        title=f"One batch of {batch['rows']:,} images, {threads} thread{'s' if threads > 1 else ''}",
        caption=CAPTION,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    table.add_column("median", justify="right")
    table.add_column("quartiles", justify="right")
    table.add_column("over masked", justify="right")
    table.add_column("over limit", justify="right")
    for name, label in LABELS.items():
        timing = times[name]
        table.add_row(
            label,
            f"{timing['median']:.2f} ms",
            f"{timing['low']:.2f} to {timing['high']:.2f}",
            f"{timing['over_masked']:.2f}",
            f"{timing['over_limit']:.2f}",
            style="bold" if name == "adaptive" else None,
        )
    console.print(table)

    differ, rows = report["rows_that_differ"], batch["rows"]
    if differ["predictions"] or differ["steps"]:
        console.print(
            f"[yellow]The ways differ[/] in the prediction of {differ['predictions']} and the steps of {differ['steps']} of "
            f"{rows:,} images: matrix products round differently in batches of different sizes."
        )
    else:
        console.print(
            f"All ways give the same prediction and the same number of steps for each of the {rows:,} images."
        )
