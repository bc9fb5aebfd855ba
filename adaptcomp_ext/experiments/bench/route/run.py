"""The routing benchmark: the contenders side by side in one run, one row per configuration.

``bench_route`` is what the command line calls; see its signature.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import machine
from ..files import write
from ..markdown import QUICK
from ..progress import progress_bar
from .measure import measure
from .problem import GRIDS, Config
from .report import markdown, show

__all__ = ["bench_route", "run"]

JSON_NAME = "bench_route.json"
MARKDOWN_NAME = "bench_route.md"


def run(
    configs: Iterable[Config],
    out: Path,
    device: torch.device,
    *,
    seconds: float = 3.0,
    seed: int = 0,
    progress: bool = True,
    quick: bool = False,
) -> dict[str, Any]:
    """Run configurations and write the report: `bench_route` with the grid as an argument.

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
    chosen = list(dict.fromkeys(configs))
    report: dict[str, Any] = {
        "benchmark": "route",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **machine.describe(device),
        "quick": quick,
        **({"note": QUICK} if quick else {}),
        "settings": {"seconds": seconds, "seed": seed, "keeps_freed_memory": machine.keep_freed_memory()},
        "rows": [],
    }
    with progress_bar(progress) as bar:
        task = bar.add_task("", total=len(chosen))
        for config in chosen:
            bar.update(task, description=config.label)
            report["rows"].append(measure(config, device, seed, seconds))
            write(out / JSON_NAME, json.dumps(report, indent=1))
            bar.advance(task)
    write(out / MARKDOWN_NAME, markdown(report))
    failed = [f"{row['label']}: {row['error']}" for row in report["rows"] if row["error"]]
    if failed:
        raise RuntimeError("contenders disagree:\n" + "\n".join(failed))
    return report


def bench_route(
    out: str = "results/bench_route",
    device: str = "cpu",
    quick: bool = False,
    threads: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Time `route` against masking, boolean indexing and index_select; print tables, write JSON and Markdown.

    Parameters
    ----------
    out : str
        Folder of the results.
    device : str
        "cpu" or "cuda".
    quick : bool
        A small grid, less than half a minute.
    threads : int, optional
        Threads of torch while measuring; default: as they are set.
    seconds : float, optional
        Time for the repeats of one configuration; default 3, quick 1.
    seed : int
        Seed of weights, tensors and routed rows.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    dict
        The content of the JSON file.
    """
    where = machine.device_named(device)
    if seconds is None:
        seconds = 1.0 if quick else 3.0
    with machine.threads(threads):
        report = run(
            GRIDS["quick" if quick else "default"](),
            Path(out),
            where,
            seconds=seconds,
            seed=seed,
            progress=progress,
            quick=quick,
        )
    show(report, Console())
    if quick:
        Console().print(f"[bold]{QUICK}[/]")
    return report
