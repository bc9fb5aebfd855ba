"""What the experiment consists of: its configuration and its cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from adaptcomp_ext.experiments.environments.control import ACTION_REPEAT, check_task
from adaptcomp_ext.experiments.runs import Cell, Plan, seeds_from

from .training import Settings

__all__ = ["AGENTS", "matched", "plan", "preset"]

AGENTS = ("always", "value", "never", "random")
"""Plan every state; those that the value gate calls; none; as many as the value gate did, at random."""

SMALL = Settings("", hidden=64, updates=4, planner={"samples": 512})
LARGE = Settings("", latent=64, hidden=128, rounds=60, updates=8, planner={"samples": 256})
PRESETS: Mapping[str, Settings] = {
    # Values at rest, where there is nothing more to win, came out between 0.93 and 1.
    "pendulum-swingup": replace(
        SMALL,
        rounds=24,
        price=0.0012,
        test_price=0.0012 / 16,
        bursts=0.02,
        planner={**SMALL.planner, "enough": 0.9},
    ),
    "reacher-easy": replace(SMALL, rounds=28, price=0.012),
    "walker-stand": LARGE,
    "walker-walk": LARGE,
    "walker-run": LARGE,
    "hopper-stand": LARGE,
    "cheetah-run": LARGE,
}


def preset(task: str, *, steps: int | None = None, quick: bool = False) -> Settings:
    """The settings of a task; `steps` of the suite are rounded up to whole rounds."""
    settings = replace(PRESETS[check_task(task)], task=task)
    if quick:
        planner = {**settings.planner, "samples": 64, "elites": 12, "habits": 4, "iterations": 3}
        small: dict[str, Any] = {"latent": 16, "hidden": 32, "learning": {"batch": 32}}
        settings = replace(
            settings,
            envs=6,
            rounds=4,
            episode=40,
            warm=1,
            updates=1,
            first_updates=30,
            planner=planner,
            **small,
        )
    if steps is not None:
        round_ = settings.envs * settings.episode * ACTION_REPEAT
        settings = replace(settings, rounds=max(settings.warm + 1, -(-steps // round_)))
    return settings


def plan(
    task: str,
    *,
    seeds: int,
    first_seed: int,
    steps: int | None,
    agents: Sequence[str],
    price: float | None,
    test_price: float | None,
    quick: bool,
) -> Plan:
    """Lay out the experiment."""
    settings = preset(task, steps=steps, quick=quick)
    if price is not None:
        settings = replace(settings, price=price, test_price=None)
    if test_price is not None:
        settings = replace(settings, test_price=test_price)
    unknown = [name for name in agents if name not in AGENTS]
    if unknown or not agents:
        raise ValueError(f"agents: expected some of {', '.join(AGENTS)}, got {', '.join(unknown) or 'none'}")
    if "random" in agents and "value" not in agents:
        raise ValueError("agents: expected value with random, which plans as often, got random without it")
    every = seeds_from(first_seed, seeds)
    measured: dict[str, Any] = {
        "episodes": 2 if quick else 20,
        "checks": 1 if quick else 3,
        "check_episodes": 2 if quick else 5,
        "length": 60 if quick else None,
    }
    cells = [
        Cell(f"{name}-seed-{seed}", {"settings": asdict(replace(settings, gate=name)), **measured}, seed)
        for seed in every
        for name in AGENTS
        if name in agents
    ]
    config = {
        "settings": asdict(settings),
        "agents": list(agents),
        "seeds": list(every),
        "quick": quick,
        **measured,
    }
    return Plan("control", config, cells)


def matched(cells: Sequence[Cell], found: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
    """Return the random gate's cells, with the rates at which the value gate of the same seed planned."""
    out = []
    for cell in cells:
        if cell.options["settings"]["gate"] == "random":
            rates = [record["rate"] for record in found[f"value-seed-{cell.seed}"]["history"]]
            out.append(
                cell._replace(
                    options={**cell.options, "settings": {**cell.options["settings"], "rates": rates}}
                )
            )
    return out
