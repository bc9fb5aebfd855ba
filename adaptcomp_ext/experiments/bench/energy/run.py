"""The energy benchmark: the contenders side by side in one run, one row per configuration.

``bench_energy`` is what the command line calls; see its signature.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import compiling, machine
from ..files import write
from ..markdown import QUICK
from ..progress import progress_bar
from . import figure
from .bars import judge
from .grid import GRIDS
from .measure import measure
from .memory import memory_rows
from .problem import Config
from .report import markdown, show

__all__ = ["bench_energy", "run"]

JSON_NAME = "bench_energy.json"
MARKDOWN_NAME = "bench_energy.md"
FIGURE_NAME = "bench_energy.png"


def run(
    configs: Iterable[Config],
    out: Path,
    device: torch.device,
    *,
    seconds: float = 4.0,
    compiled: bool = True,
    memory: bool = True,
    seed: int = 0,
    progress: bool = True,
    quick: bool = False,
) -> dict[str, Any]:
    """Run configurations and write the report: `bench_energy` with the grid as an argument.

    Returns
    -------
    dict
        The content of the JSON file.

    Raises
    ------
    RuntimeError
        After everything has run and been written, if any contender disagreed with the others.
    """
    out.mkdir(parents=True, exist_ok=True)
    keeps = machine.keep_freed_memory()
    chosen = list(dict.fromkeys(configs))
    missing = compiling.why_not(device) if compiled else "not wanted"
    cache = compiling.CompileCache()
    report: dict[str, Any] = {
        "benchmark": "energy",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **machine.describe(device),
        "quick": quick,
        **({"note": QUICK} if quick else {}),
        "settings": {"seconds": seconds, "seed": seed, "keeps_freed_memory": keeps},
        "compiler": missing,
        "rows": [],
        "compile_seconds": cache.seconds,
        "memory": [],
        "bars": [],
    }
    with progress_bar(progress) as bar:
        task = bar.add_task("", total=len(chosen) + memory)
        for config in chosen:
            bar.update(task, description=config.label)
            compiles = missing is None and config.compiled and config.mode != "train"
            report["rows"].append(measure(config, device, seed, seconds, cache if compiles else None))
            write(out / JSON_NAME, json.dumps(report, indent=1))
            bar.advance(task)
        if memory:
            bar.update(task, description="training memory")
            report["memory"] = memory_rows(device, seed)
            bar.advance(task)
    if device.type == "cpu":
        report["bars"] = [verdict._asdict() for verdict in judge(report["rows"], report["memory"])]

    write(out / JSON_NAME, json.dumps(report, indent=1))
    write(out / MARKDOWN_NAME, markdown(report))
    figure.draw(report, out / FIGURE_NAME)
    failed = [f"{row['label']}: {row['error']}" for row in report["rows"] if row["error"]]
    if failed:
        raise RuntimeError("contenders disagree:\n" + "\n".join(failed))
    return report


def bench_energy(
    out: str = "results/bench_energy",
    device: str = "cpu",
    quick: bool = False,
    threads: int | None = None,
    seconds: float | None = None,
    compiled: bool = True,
    memory: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Time EnergyDescent against autograd, torch.compile and hand-written loops; print tables, write JSON, Markdown and a figure.

    Parameters
    ----------
    out : str
        Folder of the results.
    device : str
        "cpu" or "cuda".
    quick : bool
        A small grid, less than a minute.
    threads : int, optional
        Threads of torch while measuring; default: as they are set.
    seconds : float, optional
        Time for the repeats of one configuration; default 4, quick 1.
    compiled : bool
        Whether the compiled contender takes part, if there is a compiler.
    memory : bool
        Whether training memory is measured.
    seed : int
        Seed of weights, tensors and step counts.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    dict
        The content of the JSON file.
    """
    where = machine.device_named(device)
    if seconds is None:
        seconds = 1.0 if quick else 4.0
    with machine.threads(threads):
        report = run(
            GRIDS["quick" if quick else "default"](),
            Path(out),
            where,
            seconds=seconds,
            compiled=compiled,
            memory=memory,
            seed=seed,
            progress=progress,
            quick=quick,
        )
    show(report, Console())
    if quick:
        Console().print(f"[bold]{QUICK}[/]")
    return report
