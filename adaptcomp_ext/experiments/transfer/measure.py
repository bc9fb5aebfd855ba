"""Several tasks one after another: what is kept between tasks, and the cost until each is learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from adaptcomp_ext.experiments.bench.machine import keep_freed_memory
from adaptcomp_ext.experiments.control.training import Settings, Trainer, build, train
from adaptcomp_ext.experiments.runs import Cell, Tick, span
from adaptcomp_ext.models.agents import PlanningAgent

__all__ = ["measure", "successor"]

LARGEST = 1000.0  # the largest return


def successor(agent: PlanningAgent, settings: Settings, keep: str) -> PlanningAgent:
    """Return the agent that begins the next task, with `settings`; new parts come from torch's random state.

    `keep` says what it takes over from the `agent` of the task before, which is left as it is: "nothing", the
    "habit" with the encoder that it reads, or "everything".
    """
    world = agent.world
    inputs = next(world.encoder.parameters()).shape[1]
    new = build(settings, inputs, world.actions)
    if keep == "everything":
        new.load_state_dict(agent.state_dict())
    elif keep == "habit":
        new.world.encoder.load_state_dict(world.encoder.state_dict())
        new.world.habit.load_state_dict(world.habit.state_dict())
    return new


def measure(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    """Learn the tasks in order; the first one comes from the cell that learned it from scratch."""
    keep_freed_memory()
    settings = Settings(**cell.options["settings"])
    order, keep = cell.options["order"], cell.options["keep"]
    agent: PlanningAgent | None = None
    found: list[dict[str, Any]] = []
    for i, task in enumerate(order):
        own = replace(settings, task=task, warm=settings.warm if i == 0 else 0)
        where = (
            folder.parent / cell.options["begin"] if i == 0 and keep != "nothing" else folder
        ) / f"{i}-{task}"
        where.mkdir(exist_ok=True)
        # Each task begins from a state of its own, so that one that is taken up again ends as it would have.
        torch.manual_seed(1000 * cell.seed + i)
        begin = None if agent is None else successor(agent, own, keep)
        trainer = Trainer(own, cell.seed + i, where, begin)
        history = train(trainer, None, span(tick, task, i / len(order), (i + 1) / len(order)))
        agent = trainer.agent
        regret = [LARGEST - record["return"] for record in history]
        found.append(
            {
                "task": task,
                "returns": [record["return"] for record in history],
                "regret": sum(regret) / len(regret),
                "early regret": sum(regret[: max(1, len(regret) // 4)]) / max(1, len(regret) // 4),
                "rate": sum(record["rate"] for record in history) / len(history),
            }
        )
    return {"tasks": found, "regret": sum(f["regret"] for f in found) / len(found)}
