"""From data to figures on the screen, two pictures and a JSON file."""

from __future__ import annotations

import datetime
import statistics
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
from adaptcomp_ext.experiments.style import QUICK
from adaptcomp_ext.models import LatentEnergyClassifier

from . import descents, figure
from .evaluation import (
    Reading,
    by_budget,
    by_tolerance,
    changes,
    hardness,
    parts,
    read,
    spread,
    under_corruption,
)
from .landscape import choose, survey
from .model import build_classifier, build_model, setting
from .timing import compare
from .training import Epoch, Recipe, train, train_classifier

__all__ = ["energy", "hold_out", "recipe_for"]

JSON_NAME = "energy.json"
FIGURE_NAME = "energy.png"
DESCENTS_NAME = "energy_descents.png"
BUDGETS = (1, 2, 3, 5, 8, 12, 20, 50)
TOLERANCES = (1.0, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4)
TIMED_UPDATES = 120
QUICK_TIMED_UPDATES = 6
CLASSIFIER_SEED = 1000


def recipe_for(data: ImageData, quick: bool = False) -> Recipe:
    """Return the recipe that suits the size of the data."""
    if data.side > 12:
        return Recipe(epochs=1 if quick else 12)
    return Recipe(epochs=12 if quick else 60, batch=32)


def hold_out(data: ImageData, count: int, seed: int = 0) -> ImageData:
    """Put `count` training images in the place of the test images: recipes are chosen on these."""
    if not 0 < count < len(data.train_labels):
        raise ValueError(f"held out: expected 1 to {len(data.train_labels) - 1} images, got {count}")
    order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(seed))
    held, kept = order[:count], order[count:]
    images, labels = data.train_images, data.train_labels
    return ImageData(data.name, images[kept], labels[kept], images[held], labels[held])


def _train(
    model: LatentEnergyClassifier, data: ImageData, recipe: Recipe, seed: int, console: Console
) -> list[Epoch]:
    updates = recipe.epochs * -(-len(data.train_images) // recipe.batch)
    bar = Progress(
        TextColumn("training through the descent"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TextColumn("loss {task.fields[loss]:.3f}   right {task.fields[right]:6.1%}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task("", total=updates, loss=float("nan"), right=0.0)
        return train(
            model,
            data.train_images,
            data.train_labels,
            recipe,
            seed,
            lambda loss, right: bar.update(task, advance=1, loss=loss, right=right),
        )


def _steps(reading: Reading, at_most: int) -> dict[str, Any]:
    steps = reading.steps
    return {
        "mean": reading.mean_steps,
        "min": int(steps.min()),
        "max": int(steps.max()),
        "at_most": at_most,
        "ended_by_the_limit": int((reading.status == ac.Status.MAX_STEPS).sum()),
        "counts": steps.bincount(minlength=int(steps.max()) + 1)[1:].tolist(),
    }


def energy(
    data: ImageData,
    out: Path,
    *,
    epochs: int | None = None,
    seed: int = 0,
    threads: int = 1,
    held_out: int = 0,
    quick: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train the energy model, see what its descents do, and write ``energy.json`` and two pictures.

    Parameters
    ----------
    data : ImageData
        What to read.
    out : Path
        Folder of the results; made if it does not exist.
    epochs : int, optional
        Default: what suits the data.
    seed : int
        Of weights, order and corruption.
    threads : int
        Threads of torch.
    held_out : int
        So many training images take the place of the test images. 0: the test images.
    quick : bool
        Few epochs and little timing.
    console : Console, optional
        Where to print.

    Returns
    -------
    dict
        The content of the JSON file.
    """
    console = console or Console()
    out.mkdir(parents=True, exist_ok=True)
    if held_out:
        data = hold_out(data, held_out)
    recipe = recipe_for(data, quick)
    if epochs is not None:
        recipe = replace(recipe, epochs=epochs)
    images, labels = data.test_images, data.test_labels
    tested_on = "held-out" if held_out else "test"
    with settings(threads, seed):
        model = build_model(data.side)
        descend = model.descend
        tol = descend.tol
        console.print(
            f"[bold]{data.name}[/]: {len(data.train_images):,} images to learn from, {len(images):,} {tested_on} images. "
            f"E(x, y, z) over {model.classes} logits y and {model.dim_latent} latents z; inference descends it in both until a "
            f"step lowers it by no more than {tol:g}, at most {descend.max_steps} steps."
        )
        history = _train(model, data, recipe, seed, console)
        with console.status("training an ordinary classifier, which says which images are hard"):
            torch.manual_seed(seed + CLASSIFIER_SEED)
            classifier = build_classifier(data.side)
            train_classifier(classifier, data.train_images, data.train_labels, recipe, seed + CLASSIFIER_SEED)
            hard = hardness(classifier, images)
            with torch.no_grad():
                control = classifier(images).argmax(dim=1) == labels
        with console.status("reading"):
            reading = read(model, images, labels)
            with setting(descend, max_steps=1):
                first = read(model, images, labels)
            budgets = by_budget(model, images, labels, hard, BUDGETS)
            tolerances = by_tolerance(model, images, labels, hard, TOLERANCES)
            corrupted = under_corruption(model, images, labels, seed)
            landscapes = {
                name: survey(model, images[row], int(labels[row]))
                for name, row in choose(reading, first, hard).items()
            }
        with console.status("timing updates on the kernels and on plain autograd"):
            updates = QUICK_TIMED_UPDATES if quick else TIMED_UPDATES
            timing = compare(model, data.train_images, data.train_labels, recipe, updates, seed)
        about = machine.describe(torch.device("cpu"))

    groups = parts(reading, hard)
    hardest = hard.argsort(stable=True).tensor_split(len(groups))[-1]
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **about,
        "data": {
            "name": data.name,
            "train": len(data.train_images),
            "test": len(images),
            "tested_on": tested_on,
            "side": data.side,
        },
        "quick": quick,
        **({"note": QUICK} if quick else {}),
        "recipe": asdict(recipe),
        "seed": seed,
        "tol": tol,
        "training": {
            "images": len(data.train_images),
            "seconds": sum(epoch.seconds for epoch in history),
            "seconds_per_epoch": statistics.fmean(epoch.seconds for epoch in history),
            "epochs": [epoch._asdict() for epoch in history],
        },
        "timing": timing,
        "accuracy": reading.accuracy,
        "steps": _steps(reading, descend.max_steps),
        "by_difficulty": groups,
        "hardest_over_easiest": spread(groups),
        "rank_correlation": _rank_correlation(hard, reading),
        "after_the_first_step": {"accuracy": first.accuracy, **changes(first, reading)},
        "classifier": {
            "accuracy": float(control.double().mean()),
            "accuracy_hardest": float(control[hardest].double().mean()),
        },
        "by_budget": budgets,
        "by_tolerance": tolerances,
        "corrupted": corrupted,
    }
    write_json(out / JSON_NAME, report)
    figure.draw(report, out / FIGURE_NAME)
    descents.draw(landscapes, out / DESCENTS_NAME, quick)
    _print(report, console)
    if quick:
        console.print(f"[bold]{QUICK}[/]")
    names = (FIGURE_NAME, DESCENTS_NAME, JSON_NAME)
    console.print("Pictures and figures: " + "   ".join(str(out / name) for name in names), soft_wrap=True)
    return report


def _rank_correlation(hard: torch.Tensor, reading: Reading) -> float:
    """Spearman's, of difficulty and steps, with mean ranks for equal steps."""
    _, group, counts = reading.steps.unique(return_inverse=True, return_counts=True)
    steps = (counts.cumsum(0) - counts / 2)[group].double()
    ranks = hard.argsort(stable=True).argsort().double()
    return float(torch.corrcoef(torch.stack((ranks, steps)))[0, 1].nan_to_num())


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _print(report: dict[str, Any], console: Console) -> None:
    steps, training, timing = report["steps"], report["training"], report["timing"]
    first, control, groups = report["after_the_first_step"], report["classifier"], report["by_difficulty"]
    summary = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    summary.add_row(
        "accuracy", f"[bold]{report['accuracy']:.2%}[/]  (the ordinary classifier: {control['accuracy']:.2%})"
    )
    summary.add_row(
        "steps",
        f"[bold]{steps['mean']:.2f}[/] on average, {steps['min']} to {steps['max']}; {steps['ended_by_the_limit']} images ended "
        f"by the limit of {steps['at_most']}",
    )
    summary.add_row(
        "difficulty",
        f"[bold]{report['hardest_over_easiest']:.2f}[/] times as many steps for the hardest tenth "
        f"({groups[-1]['mean_steps']:.2f}) as for the easiest ({groups[0]['mean_steps']:.2f}); rank correlation "
        f"{report['rank_correlation']:.2f}",
    )
    summary.add_row(
        "answers",
        f"{first['accuracy']:.2%} after one step; the descent mends {first['mended']} of {report['data']['test']:,} and spoils "
        f"{first['spoilt']}",
    )
    summary.add_row(
        "training", f"{training['seconds']:.0f} s, [bold]{training['seconds_per_epoch']:.1f} s[/] per epoch"
    )
    seconds = timing["seconds_per_epoch"]
    summary.add_row(
        "updates alone",
        f"per epoch {seconds['kernels']:.1f} s on the kernels, {seconds['plain']:.1f} s on plain autograd, extrapolated from "
        f"{timing['updates']} updates; ratio [bold]{timing['update_ms']['ratio']:.2f}[/]",
    )
    descent = timing["descent_ms"]
    summary.add_row(
        "descent alone",
        f"forward and backward {descent['kernels']:.2f} ms per batch on the kernels, {descent['plain']:.2f} ms on plain "
        f"autograd; ratio [bold]{descent['ratio']:.2f}[/]",
    )
    console.print(summary)

    table = _table("Tolerance of the stop", "tolerance", "accuracy", "mean steps", "hardest / easiest tenth")
    for group in report["by_tolerance"]:
        ratio = f"{group['hardest_over_easiest']:.2f}"
        style = "bold" if group["tol"] == report["tol"] else None
        table.add_row(
            f"{group['tol']:g}", f"{group['accuracy']:.2%}", f"{group['mean_steps']:.2f}", ratio, style=style
        )
    console.print(table)

    table = _table("Harder images", "", "strength", "accuracy", "mean steps")
    for name, label in (("noise", "noise, standard deviation"), ("patch", "patch, share of the side")):
        for i, group in enumerate(report["corrupted"][name]):
            row = (f"{group['strength']:g}", f"{group['accuracy']:.2%}", f"{group['mean_steps']:.2f}")
            table.add_row(label if i == 0 else "", *row)
        table.add_section()
    console.print(table)
