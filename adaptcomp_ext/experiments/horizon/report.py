"""From a plan to cells, JSON, Markdown and a figure."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from adaptcomp_ext.experiments.runs import publish, run_plan

from . import figure
from .cell import run_cell
from .markdown import FIGURE, verdicts, write_markdown
from .plan import plan
from .summary import summarise

__all__ = ["horizon"]


def horizon(
    task: str,
    out: Path,
    *,
    steps: int | None = None,
    seeds: int = 1,
    first_seed: int = 0,
    workers: int = 1,
    threads: int = 1,
    quick: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run what is not finished yet, and write ``horizon.json``, ``horizon.md`` and a picture.

    Parameters
    ----------
    task : str
        One of `adaptcomp_ext.experiments.environments.control.TASKS`.
    out : Path
        Folder of the results and checkpoints. One that holds another configuration is refused; an interrupted
        run goes on.
    steps : int, optional
        Of the suite, in training. Default: what suits the task.
    seeds, first_seed : int
        Number of seeds; first seed.
    workers, threads : int
        Processes side by side, and threads of torch in each.
    quick : bool
        Few rounds of a small planner, to see that it runs.
    console : Console, optional
        Where to print.

    Returns
    -------
    dict
        The content of the JSON file.
    """
    console = console or Console()
    what = plan(task, seeds=seeds, first_seed=first_seed, steps=steps, quick=quick)
    found = run_plan(what, out, run_cell, workers=workers, threads=threads, console=console)
    summary = summarise(what.cells, found)
    figure.draw(summary, out / FIGURE, quick)
    return publish(
        what, out, summary, verdicts(summary), partial(write_markdown, summary, what.config), console
    )
