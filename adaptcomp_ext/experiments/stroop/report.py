"""From a plan to cells, JSON, Markdown and figures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from adaptcomp_ext.experiments.data import Condition, StroopMNIST
from adaptcomp_ext.experiments.runs import publish, run_plan

from . import figure
from .cell import run_cell
from .markdown import FIGURES, verdicts, write_markdown
from .plan import CONGRUENT, plan
from .summary import Results, summarise

__all__ = ["stroop"]


def stroop(
    data: Path | None,
    out: Path,
    *,
    congruent: Sequence[float] = CONGRUENT,
    seeds: int = 1,
    first_seed: int = 0,
    epochs: int | None = None,
    workers: int = 1,
    threads: int = 1,
    quick: bool = False,
    with_reaction: bool = True,
    with_effort: bool = True,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run what is not finished yet, and write ``stroop.json``, ``stroop.md`` and three pictures.

    Parameters
    ----------
    data : Path, optional
        Folder with MNIST's four IDX files; scikit-learn's digits without one.
    out : Path
        Folder of the results and checkpoints. One that holds another configuration is refused; an interrupted
        run goes on.
    congruent : sequence of float
        Proportions congruent of the training sets, each in [0, 1].
    seeds, first_seed : int
        Number of seeds; first seed.
    epochs : int, optional
        Of the CNN and of ACC. Default: what suits the data.
    workers, threads : int
        Processes side by side, and threads of torch in each.
    quick : bool
        Few epochs, few designs, little timing.
    with_reaction, with_effort : bool
        Whether the observers, and the comparison of prices of effort, take part.
    console : Console, optional
        Where to print.

    Returns
    -------
    dict
        The content of the JSON file.
    """
    console = console or Console()
    what = plan(
        data,
        congruent=congruent,
        seeds=seeds,
        first_seed=first_seed,
        epochs=epochs,
        quick=quick,
        with_reaction=with_reaction,
        with_effort=with_effort,
    )
    found = run_plan(what, out, run_cell, workers=workers, threads=threads, console=console)
    results = Results(what.cells, found)
    summary = summarise(results)
    if summary["main"]:
        figure.draw_main(summary["main"], out / FIGURES["main"], quick)
        _draw_beliefs(data, results, out / FIGURES["beliefs"], quick)
    if summary["reaction"]:
        figure.draw_reaction(summary["reaction"], out / FIGURES["reaction"], quick)
    return publish(
        what, out, summary, verdicts(summary), partial(write_markdown, summary, what.config), console
    )


def _draw_beliefs(data: Path | None, results: Results, path: Path, quick: bool) -> None:
    p = results.values("main", "congruent")[0]
    items = results.of("main", congruent=p)[0]["beliefs"]
    if items:
        images, _ = StroopMNIST(data, "test").recoloured(Condition.INCONGRUENT)
        title = f"Habit and control on the same items ({100 * p:g} % congruent in training)"
        figure.draw_beliefs(items, images[[item["item"] for item in items]], title, path, quick)
