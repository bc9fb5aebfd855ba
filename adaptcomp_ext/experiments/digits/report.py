"""From a plan to cells, JSON, Markdown and figures."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from adaptcomp_ext.experiments.bench import machine
from adaptcomp_ext.experiments.data import find_images
from adaptcomp_ext.experiments.runs import RunFolder, run_cells, write_json, write_text

from . import figure
from .cell import run_cell
from .markdown import FIGURES, SHOWN, verdicts, write_markdown
from .plan import plan
from .summary import summarise

__all__ = ["digits"]

NAME = "digits"


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
        Folder of the results and checkpoints. One that holds another configuration is refused; an interrupted run goes on.
    seeds, first_seed : int
        So many, from this on.
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
    folder = RunFolder.open(out, NAME, what.config)
    console.print(f"[bold]{what.config['data']}[/]: {what.config['train']:,} training images; {len(what.cells)} cells in {out}")
    found = run_cells(folder, what.cells, run_cell, workers=workers, threads=threads, console=console)
    summary = summarise(what.cells, found)
    about = machine.describe(torch.device("cpu"))
    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **about,
        "config": what.config,
        "verdicts": verdicts(summary),
        **summary,
    }
    write_json(out / f"{NAME}.json", report)
    where = f"{about['machine']['cpu']}, torch {about['versions']['torch']}"
    write_text(out / f"{NAME}.md", write_markdown(summary, what.config, where))
    figure.draw(summary, out / FIGURES["main"])
    shown = found[f"depth-seed-{first_seed}"]["confidence"][SHOWN]
    images = find_images(data).test_images
    figure.draw_examples(images, shown["fewest"], shown["most"], shown["examples"], out / FIGURES["examples"])
    console.print(Markdown("\n".join(f"- {verdict}" for verdict in report["verdicts"])))
    console.print(f"Report, figures and pictures: {out}/{NAME}.md, .json, .png", soft_wrap=True)
    return report
