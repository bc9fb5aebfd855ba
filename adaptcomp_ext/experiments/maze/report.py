"""From a plan to cells, JSON, Markdown and figures."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from adaptcomp_ext.experiments.runs import RunFolder, publish, run_cells, run_plan

from . import figure
from .cell import run_cell, time_cell
from .markdown import FIGURES, verdicts, write_markdown
from .plan import PRICE, plan, timings
from .summary import summarise

__all__ = ["maze"]


def maze(
    out: Path,
    *,
    seeds: int = 1,
    first_seed: int = 0,
    updates: int | None = None,
    price: float = PRICE,
    workers: int = 1,
    threads: int = 1,
    quick: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run what is not finished yet, and write ``maze.json``, ``maze.md`` and two pictures.

    Parameters
    ----------
    out : Path
        Folder of the results. One that holds another configuration is refused; an interrupted run goes on,
        cell by cell.
    seeds, first_seed : int
        Number of seeds; first seed.
    updates : int, optional
        Of each agent.
    price : float
        Of a sweep, in units of the goal's reward.
    workers, threads : int
        Processes side by side, and threads of torch in each.
    quick : bool
        Few updates, few agents, little timing.
    console : Console, optional
        Where to print.

    Returns
    -------
    dict
        The content of the JSON file.
    """
    console = console or Console()
    what = plan(seeds=seeds, first_seed=first_seed, updates=updates, price=price, quick=quick)
    found = run_plan(what, out, run_cell, workers=workers, threads=threads, console=console)
    folder = RunFolder.open(out, what.name, what.config)
    found.update(run_cells(folder, timings(what), time_cell, workers=1, threads=1, console=console))
    summary = summarise(what.cells, found)
    figure.draw(summary, out / FIGURES["main"], quick)
    figure.draw_example(summary["example"], out / FIGURES["example"], quick)
    return publish(
        what, out, summary, verdicts(summary), partial(write_markdown, summary, what.config), console
    )
