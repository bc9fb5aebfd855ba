"""What every experiment does around its cells: open the folder, run them, write down what they found."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markdown import Markdown

from adaptcomp_ext.experiments.bench import machine
from adaptcomp_ext.experiments.files import write_json, write_text
from adaptcomp_ext.experiments.style import QUICK
from adaptcomp_ext.ops._checks import check_int

from .cells import Cell, Worker, run_cells
from .folder import RunFolder

__all__ = ["Plan", "publish", "run_plan", "seeds_from"]


class Plan(NamedTuple):
    """An experiment laid out: its name, its configuration as it is recorded, its cells.

    The configuration of one that reads images has their ``data`` and the number of rows to ``train`` on.
    """

    name: str
    config: dict[str, Any]
    cells: list[Cell]


def seeds_from(first_seed: int, seeds: int) -> range:
    """The seeds of an experiment: `seeds` of them, at least 1, from `first_seed` on, at least 0."""
    check_int("first_seed", first_seed, 0)
    return range(first_seed, first_seed + check_int("seeds", seeds, 1))


def run_plan(
    plan: Plan, out: Path, worker: Worker, *, workers: int, threads: int, console: Console
) -> dict[str, dict[str, Any]]:
    """Open the folder, which refuses another configuration; run missing cells; return all results by name."""
    folder = RunFolder.open(out, plan.name, plan.config)
    config = plan.config
    subject = (
        f"[bold]{config['data']}[/]: {config['train']:,} training images"
        if "data" in config
        else f"[bold]{plan.name}[/]"
    )
    console.print(f"{subject}; {len(plan.cells)} cells in {out}")
    if config.get("quick"):
        console.print(f"[bold]{QUICK}[/]")
    return run_cells(folder, plan.cells, worker, workers=workers, threads=threads, console=console)


def publish(
    plan: Plan,
    out: Path,
    summary: Mapping[str, Any],
    verdicts: Sequence[str],
    markdown: Callable[[str], str],
    console: Console,
) -> dict[str, Any]:
    """Write ``NAME.json`` and ``NAME.md`` and show the verdicts.

    Parameters
    ----------
    plan : Plan
        What was run.
    out : Path
        The folder.
    summary : mapping
        The figures.
    verdicts : sequence of str
        Sentences in Markdown.
    markdown : callable
        Makes the report, given what it was measured on.
    console : Console
        Where to print.

    Returns
    -------
    dict
        The content of the JSON file.
    """
    about = machine.describe(torch.device("cpu"))
    quick = bool(plan.config.get("quick"))
    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **about,
        "quick": quick,
        **({"note": QUICK} if quick else {}),
        "config": plan.config,
        "verdicts": list(verdicts),
        **summary,
    }
    write_json(out / f"{plan.name}.json", report)
    write_text(
        out / f"{plan.name}.md",
        _marked(markdown(f"{about['machine']['cpu']}, torch {about['versions']['torch']}"), quick),
    )
    console.print(Markdown("\n".join(f"- {verdict}" for verdict in verdicts)))
    if quick:
        console.print(f"[bold]{QUICK}[/]")
    console.print(f"Report, figures and pictures: {out}/{plan.name}.md, .json, .png", soft_wrap=True)
    return report


def _marked(text: str, quick: bool) -> str:
    """A report in Markdown; that of a quick run says so under its title."""
    title, newline, rest = text.partition("\n")
    return f"{title}\n\n**{QUICK}**\n{rest}" if quick else title + newline + rest
