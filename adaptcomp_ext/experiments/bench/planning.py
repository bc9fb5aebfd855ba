"""What batched planning costs when each state stops by itself, against the planner's own time at the rows that are active."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from adaptcomp_ext import FixedSteps
from adaptcomp_ext.experiments.files import write_json, write_text
from adaptcomp_ext.experiments.runs.statistics import table
from adaptcomp_ext.experiments.settings import settings
from adaptcomp_ext.models.agents import Planner, WorldModel
from adaptcomp_ext.models.agents.mppi import FIRST_STD

from . import machine
from .timing import clock, interleave, ratio

__all__ = ["bench_planning"]

SIZES = (
    {"observations": 3, "actions": 1, "latent": 32, "hidden": 128, "samples": 384},
    {"observations": 24, "actions": 6, "latent": 64, "hidden": 192, "samples": 384},
)
"""A pendulum's agent and a walker's."""
ITERATIONS = 6
STOPS = (0.0, 0.35, 0.25, 0.15, 0.1, 0.15)
"""Share of the states that stop after 1, 2, … iterations: 3.4 on average, about what trained agents do."""


def _limit(planner: Planner, latent: Tensor, active: list[int]) -> Callable[[], Tensor]:
    """The planner's arithmetic on as many rows as go through each iteration: nothing decided, moved or written back."""
    with torch.no_grad():
        habit = planner.habit_plans(latent)
    blocks = [(latent[:n].clone(), habit[:n].clone()) for n in active]
    size = planner.world.actions

    @torch.no_grad()
    def run() -> Tensor:
        mean = planner.habit_plans(latent)[:, 0].contiguous()
        std = torch.full_like(mean, FIRST_STD)
        drawn = planner.samples - planner.habits - 1
        noise = torch.randn(planner.iterations, drawn, planner.horizon, size)
        for i, (z, rolled) in enumerate(blocks):
            planner.improve(mean[: len(z)], std[: len(z)], z, rolled, noise[i])
        return planner.score(latent, mean[:, None, :1], planner.horizon)

    return run


def _measure(size: dict[str, int], rows: int, seconds: float, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    world = WorldModel(size["observations"], size["actions"], size["latent"], size["hidden"]).eval()
    planner = Planner(world, samples=size["samples"], iterations=ITERATIONS)
    with torch.no_grad():
        latent = world.encode(torch.randn(rows, size["observations"]))
    counts = [round(share * rows) for share in STOPS]
    counts[1] += rows - sum(counts)
    steps = torch.cat([torch.full((count,), k + 1) for k, count in enumerate(counts)])
    active = [int((steps > k).sum()) for k in range(ITERATIONS)]
    scattered = steps[torch.randperm(rows)]
    calls: dict[str, Callable[[], Any]] = {
        "each its own": partial(planner.plan, latent, None, FixedSteps(scattered)),
        "all to the end": partial(planner.plan, latent, None, FixedSteps(ITERATIONS)),
        "limit": _limit(planner, latent, active),
    }
    times = interleave(calls, clock(torch.device("cpu")), seconds)
    return {
        **size,
        "rows": rows,
        "mean iterations": float(steps.double().mean()),
        "ms": {name: statistics.median(values) for name, values in times.items()},
        "each its own / limit": ratio(times, "each its own", "limit"),
        "all to the end / each its own": ratio(times, "all to the end", "each its own"),
    }


def bench_planning(
    out: str | Path = "results/bench_planning",
    *,
    rows: int = 32,
    threads: int = 1,
    seconds: float = 10.0,
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Time it, print a table and write ``bench_planning.json`` and ``.md``.

    Parameters
    ----------
    out : str or Path
        Folder of the results.
    rows : int
        States planned together.
    threads : int
        Of torch.
    seconds : float
        For all repeats of one size.
    seed : int
        Of weights, states and which of them stop when.
    console : Console, optional
        Where to print.

    Returns
    -------
    dict
        The content of the JSON file.
    """
    console = console or Console()
    machine.keep_freed_memory()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with settings(threads, seed):
        found = [_measure(size, rows, seconds, seed) for size in SIZES]
        about = machine.describe(torch.device("cpu"))
    report = {**about, "stops": STOPS, "rows": found}
    lines = [
        [
            f"z {f['latent']}, hidden {f['hidden']}, {f['actions']} actions",
            f"{f['mean iterations']:.2f}",
            *(f"{f['ms'][name]:.2f}" for name in ("limit", "each its own", "all to the end")),
            f"{f['each its own / limit']:.3f}",
            f"{f['all to the end / each its own']:.2f}",
        ]
        for f in found
    ]
    header = [
        "agent",
        "mean iterations",
        "limit, ms",
        "each its own, ms",
        "all to the end, ms",
        "own / limit",
        "all / own",
    ]
    text = (
        "# Planning, each state for itself\n\n"
        f"{rows} states, {SIZES[0]['samples']} candidates, horizon 3, at most {ITERATIONS} iterations; {threads} thread(s), "
        f"{about['machine']['cpu']}, torch {about['versions']['torch']}. The limit is the planner's own arithmetic at the "
        "rows that are active in each iteration, prepared beforehand. Medians of ratios within interleaved rounds.\n\n"
        + table(header, lines)
    )
    write_json(folder / "bench_planning.json", report)
    write_text(folder / "bench_planning.md", text)
    for line in lines:
        console.print(
            f"{line[0]}: {line[5]} of the limit; all states to the end take {line[6]} times as long"
        )
    return report
