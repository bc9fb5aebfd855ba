"""From a plan to cells, JSON, Markdown and figures."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from adaptcomp_ext.experiments.data import find_images
from adaptcomp_ext.experiments.runs import publish, run_plan

from . import figure
from .cell import run_cell
from .markdown import FIGURES, SHOWN, verdicts, write_markdown
from .plan import plan
from .summary import summarise

__all__ = ["digits"]


def digits(
    data: Path | None,
    out: Path,
    *,
    seeds: int = 1,
    first_seed: int = 0,
    epochs: int | None = None,
    workers: int = 1,
    threads: int = 1,
    quick: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run what is not finished yet, and write ``digits.json``, ``digits.md`` and two pictures.

    Parameters
    ----------
    data : Path, optional
        Folder with MNIST's four IDX files; scikit-learn's digits without one.
    out : Path
        Folder of the results and checkpoints. One that holds another configuration is refused; an interrupted
        run goes on.
    seeds, first_seed : int
        Number of seeds; first seed.
    epochs : int, optional
        Of every network. Default: what suits the data.
    workers, threads : int
        Processes side by side, and threads of torch in each.
    quick : bool
        Few epochs, few settings, little timing.
    console : Console, optional
        Where to print.

    Returns
    -------
    dict
        The content of the JSON file.
    """
    console = console or Console()
    what = plan(data, seeds=seeds, first_seed=first_seed, epochs=epochs, quick=quick)
    found = run_plan(what, out, run_cell, workers=workers, threads=threads, console=console)
    summary = summarise(what.cells, found)
    figure.draw(summary, out / FIGURES["main"], quick)
    shown = found[f"depth-seed-{first_seed}"]["confidence"][SHOWN]
    images = find_images(data).test_images
    figure.draw_examples(
        images, shown["fewest"], shown["most"], shown["examples"], out / FIGURES["examples"], quick
    )
    return publish(
        what, out, summary, verdicts(summary), partial(write_markdown, summary, what.config), console
    )
