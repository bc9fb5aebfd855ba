"""The halting benchmark: the contenders side by side in one run, one row per configuration.

``bench_halting`` is what the command line calls; see its signature.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from adaptcomp_ext.experiments.files import read_json

from . import figure, machine
from .compiling import CompileCache
from .cores import CORES
from .cuda import bandwidth_rows, sync_rows
from .files import write
from .grid import GRIDS, estimate_seconds, machine_flops, select
from .markdown import QUICK
from .measure import Model, measure
from .memory import memory_rows
from .problem import Config, make_model
from .progress import progress_bar
from .report import markdown

__all__ = ["bench_halting", "run"]

JSON_NAME = "bench_halting.json"
MARKDOWN_NAME = "bench_halting.md"
FIGURE_NAME = "bench_halting.png"


def _previous(path: Path, fresh: dict[str, Any]) -> tuple[dict[Config, dict[str, Any]], dict[str, float]]:
    """Return the good rows and the compile times of an earlier run on the same machine with the same settings."""
    if not path.exists():
        return {}, {}
    old = read_json(path)
    if not isinstance(old, dict) or any(
        old.get(part) != fresh[part] for part in ("machine", "versions", "settings")
    ):
        return {}, {}
    return {Config(**row["config"]): row for row in old["rows"] if row["error"] is None}, old[
        "compile_seconds"
    ]


def run(
    configs: Iterable[Config],
    out: Path,
    device: torch.device,
    *,
    cores: tuple[str, ...] = tuple(CORES),
    seconds: float = 3.0,
    limit_seconds: float = 1.5,
    compiled: bool = True,
    memory: bool = True,
    resume: bool = False,
    seed: int = 0,
    progress: bool = True,
    quick: bool = False,
) -> dict[str, Any]:
    """Run configurations and write the report: `bench_halting` with the grid as an argument.

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
    flops = machine_flops(device)
    chosen, skipped = select(configs, cores, flops, limit_seconds)
    report: dict[str, Any] = {
        "benchmark": "halting",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **machine.describe(device),
        "quick": quick,
        **({"note": QUICK} if quick else {}),
        "settings": {
            "seconds": seconds,
            "limit_seconds": limit_seconds,
            "seed": seed,
            "keeps_freed_memory": keeps,
        },
        "rows": [],
        "compile_seconds": {},
        "memory": [],
        "cuda": None,
        "skipped": [config.as_dict() for config in skipped],
    }
    cache = CompileCache()
    known, cache.seconds = _previous(out / JSON_NAME, report) if resume else ({}, {})
    report["compile_seconds"] = cache.seconds
    models: dict[Any, Model] = {}
    expected = {config: max(seconds, 8 * 5 * estimate_seconds(config, flops)) for config in chosen}
    with progress_bar(progress) as bar:
        task = bar.add_task("", total=sum(expected.values()))
        for config in chosen:
            bar.update(task, description=config.label)
            if config in known:
                report["rows"].append(known[config])
            else:
                if config.model_key not in models:
                    models = {config.model_key: make_model(config, device, seed)}
                compiling = cache if compiled and config.compiled else None
                row = measure(config, models[config.model_key], device, seed, seconds, compiling)
                report["rows"].append(row)
                write(out / JSON_NAME, json.dumps(report, indent=1))
            bar.advance(task, expected[config])
        if memory:
            bar.update(task, description="training memory")
            report["memory"] = memory_rows(cores, device, seed)
        if device.type == "cuda":
            bar.update(task, description="kernels")
            report["cuda"] = {"bandwidth": bandwidth_rows(device), "synchronisation": sync_rows(device, seed)}

    write(out / JSON_NAME, json.dumps(report, indent=1))
    write(out / MARKDOWN_NAME, markdown(report))
    figure.draw(report, out / FIGURE_NAME)
    failed = [f"{Config(**row['config']).label}: {row['error']}" for row in report["rows"] if row["error"]]
    if failed:
        raise RuntimeError("contenders disagree:\n" + "\n".join(failed))
    return report


def bench_halting(
    out: str = "results/bench_halting",
    device: str = "cpu",
    quick: bool = False,
    threads: int | None = None,
    cores: str = "gru,mlp,transformer",
    grid: str = "default",
    seconds: float | None = None,
    limit_seconds: float = 1.5,
    compiled: bool = True,
    memory: bool = True,
    resume: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Time AdaptiveHalt against masked and boolean-indexed loops and the limit; write JSON, Markdown and a figure.

    Parameters
    ----------
    out : str
        Folder of the results.
    device : str
        "cpu" or "cuda".
    quick : bool
        Short for ``grid="quick"``: one or two minutes.
    threads : int, optional
        Threads of torch while measuring; default: as they are set.
    cores : str
        Comma-separated names out of gru, mlp, transformer.
    grid : str
        "default", "quick" or "required".
    seconds : float, optional
        Time for the repeats of one configuration; default 4, quick 1.
    limit_seconds : float
        Configurations are left out if one masked inference call is estimated to take longer; three times that
        in training.
    compiled : bool
        Whether the compiled contenders take part.
    memory : bool
        Whether training memory is measured.
    resume : bool
        Keep the rows of an interrupted run in `out` with the same settings.
    seed : int
        Seed of weights, tensors and step counts.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    dict
        The content of the JSON file.
    """
    wanted = tuple(name.strip() for name in cores.split(",") if name.strip())
    if not wanted or not set(wanted) <= set(CORES):
        raise ValueError(f"cores: expected names out of {', '.join(CORES)}, got {cores!r}")
    grid = "quick" if quick else grid
    if grid not in GRIDS:
        raise ValueError(f"grid: expected one of {', '.join(GRIDS)}, got {grid!r}")
    where = machine.device_named(device)
    if seconds is None:
        seconds = 1.0 if grid == "quick" else 4.0
    with machine.threads(threads):
        report = run(
            GRIDS[grid](),
            Path(out),
            where,
            cores=wanted,
            seconds=seconds,
            limit_seconds=limit_seconds,
            compiled=compiled,
            memory=memory,
            resume=resume,
            seed=seed,
            progress=progress,
            quick=grid == "quick",
        )
    if report["quick"]:
        Console().print(f"[bold]{QUICK}[/]")
    return report
