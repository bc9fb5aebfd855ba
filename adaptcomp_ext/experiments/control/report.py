"""From a plan to cells, JSON, Markdown and figures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from adaptcomp_ext.experiments.runs import RunFolder, publish, run_cells, run_plan

from . import figure
from .cell import FRAMES_NAME, run_cell
from .markdown import FIGURES, verdicts, write_markdown
from .plan import AGENTS, matched, plan
from .summary import summarise

__all__ = ["control"]


def control(
    task: str,
    out: Path,
    *,
    steps: int | None = None,
    seeds: int = 1,
    first_seed: int = 0,
    agents: Sequence[str] = AGENTS,
    price: float | None = None,
    test_price: float | None = None,
    workers: int = 1,
    threads: int = 1,
    quick: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run what is not finished yet, and write ``control.json``, ``control.md`` and two pictures.

    Parameters
    ----------
    task : str
        One of `adaptcomp_ext.experiments.environments.control.TASKS`.
    out : Path
        Folder of the results and checkpoints. One that holds another configuration is refused; an interrupted
        run goes on.
    steps : int, optional
        Of the suite, all environments together. Default: what suits the task.
    seeds, first_seed : int
        Number of seeds; first seed.
    agents : sequence of str
        Some of "always", "value", "never", "random".
    price : float, optional
        Of planning, for the value gate, in units of the spread of values.
    test_price : float, optional
        The same in evaluations. Default: what suits the task; `price` where that is given.
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
    what = plan(
        task,
        seeds=seeds,
        first_seed=first_seed,
        steps=steps,
        agents=agents,
        price=price,
        test_price=test_price,
        quick=quick,
    )
    first = [cell for cell in what.cells if cell.options["settings"]["gate"] != "random"]
    found = run_plan(
        what._replace(cells=first), out, run_cell, workers=workers, threads=threads, console=console
    )
    # The random gate plans as often as the value gate did: known only now.
    last = matched(what.cells, found)
    folder = RunFolder.open(out, what.name, what.config)
    found.update(run_cells(folder, last, run_cell, workers=workers, threads=threads, console=console))
    summary = summarise(what.cells, found)
    figure.draw(summary, out / FIGURES["main"], quick)
    if "strip" in summary:
        frames = folder.cell(f"value-seed-{first_seed}") / FRAMES_NAME
        figure.draw_strip(
            summary["strip"], out / FIGURES["strip"], np.load(frames) if frames.is_file() else (), quick
        )
    said = verdicts(summary, what.config["settings"])
    return publish(what, out, summary, said, partial(write_markdown, summary, what.config), console)
