"""Transfer: walker stand, walk and run in turn, and what is kept from one task to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from adaptcomp_ext.models.agents import PlanningAgent

from .bench.machine import keep_freed_memory
from .control.training import Settings, Trainer, build, preset, train
from .runs import Cell, FirstSeed, Later, Quick, Results, Seeds, Setup, Steps, Tick, experiment, grid, span
from .runs.report import Block, Table, Verdicts, column
from .runs.statistics import ONE_SEED, Shown, counted, interval, points
from .style import ORANGE, OTHERS, OURS, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["transfer"]

TASKS = ("walker-stand", "walker-walk", "walker-run")
ORDERS = tuple(tasks[i:] + tasks[:i] for tasks in (TASKS, TASKS[::-1]) for i in range(len(TASKS)))
"""All six; each task is the first of one of the first three, the second of one, the third of one."""
NAMES = {"nothing": "from scratch", "habit": "the habit is kept", "everything": "everything is kept"}
"""What goes from one task to the next: nothing; π₁ with the encoder that it reads; all networks."""
LARGEST = 1000.0
"""The largest return."""


def successor(agent: PlanningAgent, settings: Settings, keep: str) -> PlanningAgent:
    """Make the agent of the next task; new parts come from torch's random state.

    `keep` says what it takes over from the `agent` of the task before, which is left as it is: "nothing", the
    "habit" with the encoder that it reads, or "everything".
    """
    world = agent.world
    new = build(settings, next(world.encoder.parameters()).shape[1], world.actions)
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
    tasks: list[dict[str, Any]] = []
    for i, task in enumerate(order):
        own = replace(settings, task=task, warm=settings.warm if i == 0 else 0)
        begun = i == 0 and keep != "nothing"
        where = (folder.parent / cell.options["begin"] if begun else folder) / f"{i}-{task}"
        where.mkdir(exist_ok=True)
        # Each task begins from a state of its own, so that one that is taken up again ends as it would have.
        torch.manual_seed(1000 * cell.seed + i)
        begin = None if agent is None else successor(agent, own, keep)
        trainer = Trainer(own, cell.seed + i, where, begin)
        history = train(trainer, None, span(tick, task, i / len(order), (i + 1) / len(order)))
        agent = trainer.agent
        returns = [record["return"] for record in history]
        regret = [LARGEST - value for value in returns]
        tasks.append(
            {
                "task": task,
                "returns": returns,
                "regret": _mean(regret),
                "early regret": _mean(regret[: max(1, len(regret) // 4)]),
                "rate": _mean([record["rate"] for record in history]),
            }
        )
    return {"tasks": tasks, "regret": _mean([entry["regret"] for entry in tasks])}


@experiment(Later(f"{__package__}.environments.control", measure))
def transfer(
    *,
    steps: Steps = None,
    orders: Annotated[
        int, typer.Option(min=1, max=len(ORDERS), help="Number of orders of the three tasks.")
    ] = len(ORDERS),
    seeds: Seeds = 1,
    first_seed: FirstSeed = 0,
    quick: Quick = False,
) -> Setup:
    """Learn walker stand, walk and run in turn, keeping the habit, everything or nothing. It takes hours."""
    common = {"settings": asdict(replace(preset(TASKS[0], steps=steps, quick=quick), gate="value"))}
    every = list(range(first_seed, first_seed + seeds))
    chosen = [list(order) for order in ORDERS[:orders]]
    later = [
        Cell(
            f"{keep}-{'-'.join(task.removeprefix('walker-') for task in order)}-seed-{seed}",
            {**common, "order": order, "keep": keep, "begin": f"scratch-{order[0]}-seed-{seed}"},
            seed,
        )
        for seed in every
        for order in chosen
        for keep in list(NAMES)[1:]
    ]
    return Setup(
        config={**common, "orders": chosen, "seeds": every, "quick": quick},
        cells=grid({f"scratch-{t}": {"order": [t], "keep": "nothing"} for t in TASKS}, every, common),
        then=lambda _: later,  # the orders begin where the trainings from scratch have ended
    )


def _mean(values: Sequence[Any]) -> Any:
    return sum(values) / len(values)


class _Found:
    """The results by task from scratch, and by what is kept and order."""

    def __init__(self, results: Results) -> None:
        self.orders = results.config["orders"]
        self.scratch = {task: results.where(keep="nothing", order=[task]).at("tasks/0") for task in TASKS}
        self.kept = {
            keep: [results.where(keep=keep, order=order) for order in self.orders] for keep in list(NAMES)[1:]
        }

    def regret(self, keep: str, key: str = "regret", since: int = 0) -> Any:
        """Mean regret of each seed over its orders and their tasks, from the task `since` of an order on."""
        if keep == "nothing":
            return _mean([self.scratch[task][key] for order in self.orders for task in order[since:]])
        return _mean([row[f"tasks/{i}/{key}"] for row in self.kept[keep] for i in range(since, len(TASKS))])

    def less_scratch(self, keep: str, *what: Any) -> Shown:
        """Regret less that of the same tasks from scratch."""
        return points(self.regret(keep, *what) - self.regret("nothing", *what), 0, 1.0)

    def runs(self, task: str, keep: str) -> list[list[float]]:
        """Returns of each round, of all runs from scratch, or in which the task was not the first."""
        if keep == "nothing":
            return list(self.scratch[task]["returns"])
        later = [(row, order.index(task)) for row, order in zip(self.kept[keep], self.orders, strict=True)]
        return [returns for row, i in later if i > 0 for returns in row[f"tasks/{i}/returns"]]


ALL, LATER, EARLY = (), ("regret", 1), ("early regret", 1)
"""What is compared: all tasks; those that are not the first of their order; their first quarter."""


@transfer.reports
def report(results: Results) -> list[Block]:
    """What is kept from one task to the next, and the regret that it saves."""
    found, config = _Found(results), results.config
    settings = config["settings"]
    rows = []
    for keep, name in NAMES.items():
        less = ["–" if keep == "nothing" else found.less_scratch(keep, *what) for what in (ALL, LATER, EARLY)]
        rows.append([name, interval(found.regret(keep), 0, 1.0), *less])
    return [
        "# Transfer: walker stand, walk and run, one after another",
        f"{counted(len(config['orders']), 'order')}; each task {settings['rounds']} rounds of "
        f"{settings['episode']} decisions in {settings['envs']} environments; {results.opening} Regret "
        "is 1,000 less the return per 1,000 steps, averaged over a task's training. The orders of a "
        "seed share its three trainings from scratch and are averaged. Thin lines in the figure are "
        "single runs.",
        column("transfer.png", "Transfer", found, *(partial(_task, task=task) for task in TASKS)),
        Verdicts([_sentence(found, keep) for keep in found.kept]),
        Table(["what is kept", "regret", "− scratch", "2nd and 3rd task", "their first quarter"], rows),
    ]


def _sentence(found: _Found, keep: str) -> str:
    value = found.less_scratch(keep).value
    how = "lower than" if value.below else "higher than" if value.above else "not proven to differ from"
    regret = f"Where {NAMES[keep]}, the mean regret over the three tasks"
    compared = f"{ONE_SEED}. {regret} less" if value.low is None else f"{regret} is {how}"
    return (
        f"{compared} that from scratch: {found.less_scratch(keep)} of 1,000. On the second and third "
        f"task alone the difference is {found.less_scratch(keep, *LATER)}, in their first quarter "
        f"{found.less_scratch(keep, *EARLY)}."
    )


def _task(axes: Axes, found: _Found, task: str) -> None:
    """Return over training of a task, where it is not the first of its order."""
    for (keep, name), color in zip(NAMES.items(), (OTHERS, OURS, ORANGE), strict=True):
        runs = found.runs(task, keep)
        # Each run rather than an interval: a task is the second or third of few orders.
        for returns in runs:
            axes.plot(range(1, len(returns) + 1), returns, color=color, lw=0.7, alpha=0.6)
        mean = [_mean(values) for values in zip(*runs, strict=True)]
        axes.plot(range(1, len(mean) + 1), mean, color=color, lw=2.2, label=name)
    axes.set(xlabel="round", ylabel="return, per 1,000 steps", ylim=(0, 1000))
    axes.set_title(task)
    legend(axes, len(NAMES))
