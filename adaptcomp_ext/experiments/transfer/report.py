"""From a plan to cells, JSON, Markdown and a figure."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from adaptcomp_ext.experiments.runs import RunFolder, publish, run_cells, run_plan

from . import figure
from .cell import run_cell
from .markdown import FIGURE, verdicts, write_markdown
from .plan import ORDERS, plan
from .summary import summarise

__all__ = ["transfer"]


def transfer(
    out: Path,
    *,
    steps: int | None = None,
    orders: int = len(ORDERS),
    seeds: int = 1,
    first_seed: int = 0,
    workers: int = 1,
    threads: int = 1,
    quick: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run what is not finished yet, and write ``transfer.json``, ``transfer.md`` and a picture.

    Parameters
    ----------
    out : Path
        Folder of the results and checkpoints. One that holds another configuration is refused; an interrupted
        run goes on.
    steps : int, optional
        Of the suite, for each task. Default: what suits the walker.
    orders : int
        Number of orders, 1 to 6.
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
    if not 1 <= orders <= len(ORDERS):
        raise ValueError(f"orders: expected 1 to {len(ORDERS)}, got {orders}")
    what = plan(orders=orders, seeds=seeds, first_seed=first_seed, steps=steps, quick=quick)
    scratch = [cell for cell in what.cells if "begin" not in cell.options]
    found = run_plan(
        what._replace(cells=scratch), out, run_cell, workers=workers, threads=threads, console=console
    )
    # The orders begin where these have ended.
    later = [cell for cell in what.cells if "begin" in cell.options]
    folder = RunFolder.open(out, what.name, what.config)
    found.update(run_cells(folder, later, run_cell, workers=workers, threads=threads, console=console))
    summary = summarise(what.cells, found)
    figure.draw(summary, out / FIGURE, quick)
    return publish(
        what, out, summary, verdicts(summary), partial(write_markdown, summary, what.config), console
    )
