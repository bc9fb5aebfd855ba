"""How far to look ahead: what each level of depth gains, and a horizon that follows the state."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from adaptcomp_ext.models.agents import DepthGate, DepthPlanner, PlanningAgent

from .bench.machine import keep_freed_memory
from .control.measure import walk
from .control.training import Settings, Trainer, preset, train
from .device import gpus, seeded
from .runs import (
    Cell,
    FirstSeed,
    Later,
    Quick,
    Results,
    Seeds,
    Setup,
    Steps,
    Task,
    Tick,
    experiment,
    rank_correlation,
    span,
)
from .runs.report import Block, Column, Table, Verdicts, column, tabulate
from .runs.statistics import form, interval, points, said
from .style import GREEN, ORANGE, OTHERS, OURS, WRONG, curve, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["horizon"]

LEVELS = (1, 2, 4, 8)
"""Horizons, each planned on from the one before it."""
PRICES = (0.00003, 0.0001, 0.0003, 0.001)
"""Price of a step of the horizon, in units of the spread of values."""
FIT_SEED, TEST_SEED = 30_000, 10_000
CHUNK = 64  # states whose gains are found at a time
SHOWN = 250  # decisions of the episode that is drawn


class _Walked(NamedTuple):
    returns: Tensor
    depth: Tensor
    horizon: Tensor
    observation: Tensor
    log_std: Tensor
    reward: Tensor


def measure(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    """Train an agent, fit its gate, and let it walk with fixed, chosen and random horizons."""
    keep_freed_memory()
    settings = Settings(**cell.options["settings"])
    trainer = Trainer(settings, cell.seed, folder)
    history = train(trainer, None, span(tick, "training", 0.0, 0.7))
    agent = trainer.agent
    planner = DepthPlanner(agent.planner, cell.options["levels"], cell.options["iterations"])
    episodes, deepest = cell.options["episodes"], len(planner.levels)
    walk = partial(_walk, agent, planner, settings.task, length=cell.options["length"])
    tick("what depth gains", 0.72)
    latent, log_std, gains = _tried(trainer, planner, cell.options["states"], FIT_SEED + cell.seed)
    # A fifth is kept, to see how well the gate knows what depth gains where it was not told.
    learned = len(latent) * 4 // 5
    gate = DepthGate(settings.latent, agent.world.actions, planner.levels)
    gate.fit(latent[:learned], log_std[:learned], gains[:learned], seed=cell.seed)
    with torch.no_grad():
        expected = gate.gains(latent[learned:], log_std[learned:])
    found: dict[str, Any] = {
        "history": history,
        "mean gain": gains.mean(0).tolist(),
        "rank correlation with gain": [
            rank_correlation(e, g) for e, g in zip(expected.T, gains[learned:].T, strict=True)
        ],
        "fixed": {},
        "adaptive": {},
    }
    for i, depth in enumerate(range(deepest + 1)):
        tick(f"fixed depth {depth}", 0.76 + 0.1 * i / (deepest + 1))
        walked = walk(episodes, TEST_SEED + cell.seed, depth)
        found["fixed"][str((0, *planner.levels)[depth])] = _judge(walked, planner)
    for i, price in enumerate(cell.options["prices"]):
        tick(f"price {price:g}", 0.86 + 0.14 * i / len(cell.options["prices"]))
        gate.price = price
        own = walk(episodes, TEST_SEED + cell.seed, gate)
        dealt = walk(episodes, TEST_SEED + cell.seed, gate, shuffle=True)
        shown = int(own.horizon[:SHOWN].sum(0).argmax())  # where the most was looked ahead
        found["adaptive"][f"{price:g}"] = {
            **_judge(own, planner),
            "shuffled": _judge(dealt, planner),
            "correlations": _correlations(own),
            "strip": {
                "reward": own.reward[:SHOWN, shown].tolist(),
                "horizon": own.horizon[:SHOWN, shown].tolist(),
            },
        }
    return found


def _tried(trainer: Trainer, planner: DepthPlanner, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return states from the last quarter of the training, and each level's gain, in units of the spread."""
    world, replay = trainer.agent.world, trainer.replay
    generator = seeded(seed)
    recent = replay.observation[replay.length * 3 // 4 : replay.length].flatten(0, 1)
    with torch.random.fork_rng(devices=gpus()), torch.no_grad():
        torch.manual_seed(seed)
        latent = world.encode(recent[torch.randperm(len(recent), generator=generator)[:count]])
        log_std = world.habit.parameters_of(latent)[1]
        gains = torch.cat([planner.gains(some) for some in latent.split(CHUNK)]) / world.spread
    return latent, log_std, gains


def _walk(
    agent: PlanningAgent,
    planner: DepthPlanner,
    task: str,
    count: int,
    seed: int,
    depth: int | DepthGate,
    length: int | None = None,
    shuffle: bool = False,
) -> _Walked:
    """Run N episodes of `length` decisions, or complete ones; `shuffle` permutes depths over states."""
    world = agent.world

    def decide(seen: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        z = world.encode(seen)
        log_std = world.habit.parameters_of(z)[1]
        chosen = torch.full((count,), depth) if isinstance(depth, int) else depth(z, log_std)
        if shuffle:
            chosen = chosen[torch.randperm(count)]
        plan = planner.plan(z, chosen)
        return plan.action, (chosen, plan.horizon, seen, log_std)

    records, _ = walk(agent, task, count, seed, decide, length)
    return _Walked(records[-1].sum(0), *records)


def _judge(walked: _Walked, planner: DepthPlanner) -> dict[str, Any]:
    levels = torch.tensor((0, *planner.levels))
    cost = torch.cat([torch.zeros(1), levels[1:].cumsum(0).float()]) * planner.iterations
    share = [(float((walked.horizon == int(h)).double().mean())) for h in levels]
    return {
        "return": float(walked.returns.mean()),
        "horizon": float(walked.horizon.double().mean()),
        "steps imagined": float(cost[walked.depth].mean()),
        "share": dict(zip((str(int(h)) for h in levels), share, strict=True)),
    }


def _correlations(walked: _Walked) -> dict[str, float]:
    """Rank correlation of H with what a state is like."""
    steps, count = walked.horizon.shape
    change = torch.zeros(steps, count)
    change[1:] = (walked.observation[1:] - walked.observation[:-1]).norm(dim=2)
    about = {
        "doubt": walked.log_std.mean(-1),
        "reward": walked.reward,
        "time": torch.arange(steps)[:, None].expand(steps, count),
        "speed": change,
    }
    return {name: rank_correlation(walked.horizon, values) for name, values in about.items()}


@experiment(Later(f"{__package__}.environments.control", measure), out="adaptcomp-out/horizon-{task}")
def horizon(
    task: Task = "pendulum-swingup",
    *,
    steps: Steps = None,
    seeds: Seeds = 1,
    first_seed: FirstSeed = 0,
    quick: Quick = False,
) -> Setup:
    """Learn to control and what deeper plans gain: each state chooses its horizon. Ten minutes per seed."""
    settings = asdict(replace(preset(task, steps=steps, quick=quick), gate="always"))
    measured: dict[str, Any] = {
        "levels": list(LEVELS),
        "iterations": 1 if quick else 2,
        "prices": list(PRICES[1:3] if quick else PRICES),
        "episodes": 2 if quick else 16,
        "states": 20 if quick else 1500,
        "length": 30 if quick else None,
    }
    every = list(range(first_seed, first_seed + seeds))
    return Setup(
        config={"settings": settings, "seeds": every, "quick": quick, **measured},
        cells=[Cell(f"seed-{seed}", {"settings": settings, **measured}, seed) for seed in every],
    )


class _Found:
    """The results under the names of the report: horizons that are fixed, and those chosen at a price."""

    def __init__(self, results: Results) -> None:
        self.fixed = {h: results.at(f"fixed/{h}") for h in results.keys("fixed")}
        self.chosen = {price: results.at(f"adaptive/{price}") for price in results.keys("adaptive")}


_signed = partial(points, digits=0, scale=1.0)


def _gain(row: Results) -> Any:
    """What it is worth that each state gets its own horizon; a KeyError where all have the same."""
    return row["return"] - row["shuffled/return"]


@horizon.reports
def report(results: Results) -> list[Block]:
    """What looking ahead is worth, and which states look how far."""
    found, config = _Found(results), results.config
    settings = config["settings"]
    rows = {f"H = {h} everywhere": row for h, row in found.fixed.items()}
    rows |= {f"chosen, price {price}": row for price, row in found.chosen.items()}
    levels = zip(
        config["levels"], results.each("mean gain"), results.each("rank correlation with gain"), strict=True
    )
    return [
        f"# How far to look ahead: {settings['task']}",
        f"The agents plan everywhere while they learn ({settings['rounds']} rounds of "
        f"{settings['episode']} decisions in {settings['envs']} environments). Afterwards each row of "
        f"the table is measured in {config['episodes']} whole episodes; {results.opening} Dealt at "
        "random means: among the episodes of the same moment.",
        column("horizon.png", "Horizons", found, _worth, _share, _depths, _rewards, height=3.2),
        Verdicts(_sentences(found)),
        tabulate(
            "horizon",
            rows,
            Column("return", "return", form(0, 1.0)),
            Column("mean H", "horizon", form(2, 1.0)),
            Column("imagined", "steps imagined", form(1, 1.0)),
            *(Column(f"H = {h}, %", f"share/{h}", form(0)) for h in found.fixed),
            Column("− dealt at random", _gain, _signed),
        ),
        "## What a level gains",
        f"The gain of a level over the level before it is the model's estimate, in {config['states']} "
        "states of the last quarter of the training: what its first action is worth when all that "
        "follows is planned to the deepest horizon, in thousandths of the spread of values. The gate's "
        "expectation is compared with it in a fifth of the states, which the gate did not learn from.",
        Table(
            ["level", "mean gain", "rank correlation of the gate's expectation"],
            [[f"H = {h}", interval(gain, 3, 1000.0), interval(known, 2, 1.0)] for h, gain, known in levels],
        ),
        "## What the chosen horizon goes with (rank correlation)",
        tabulate(
            "price",
            found.chosen,
            *(
                Column(name, f"correlations/{name}", form(2, 1.0))
                for name in next(iter(found.chosen.values())).keys("correlations")
            ),
        ),
    ]


def _sentences(found: _Found) -> list[str]:
    best = max(found.fixed, key=lambda h: found.fixed[h]["return"].mean())
    returns = ", ".join(f"{interval(row['return'], 0, 1.0)} for H = {h}" for h, row in found.fixed.items())
    sentences = [
        f"With the same horizon in all states the return is {returns}. The largest mean is that of H = "
        f"{best}."
    ]
    for price, row in found.chosen.items():
        used = sum(row[f"share/{h}"].mean() > 0.02 for h in found.fixed)
        sentences.append(
            f"At price {price} the states choose H = {interval(row['horizon'], 2, 1.0)} on average, and "
            f"{used} different ones in more than 2 % of the states each. The return is "
            f"{interval(row['return'], 0, 1.0)} for {interval(row['steps imagined'], 1, 1.0)} imagined "
            "steps of each candidate. Against the same depths dealt at random it differs by "
            f"{_signed(_gain(row))} ({said(_gain(row), 'better', 'worse')})."
        )
    return sentences


def _worth(axes: Axes, found: _Found) -> None:
    def draw(rows: Any, label: str, **look: Any) -> None:
        curve(axes, [r["steps imagined"] for r in rows], [r["return"] for r in rows], label, **look)

    draw(found.fixed.values(), "the same everywhere", color=OTHERS)
    draw(found.chosen.values(), "chosen by state", color=OURS)
    dealt = [row.at("shuffled") for row in found.chosen.values()]
    draw(dealt, "the same, dealt at random", color=OURS, marker="x", ls="")
    axes.set_xscale("symlog", linthresh=0.5)
    axes.set_xticks(ticks := [0, 0.5, 1, 2, 6, 14, 30], [f"{tick:g}" for tick in ticks])
    axes.set(xlabel="steps imagined by each candidate (log scale from 0.5)", ylabel="return")
    axes.set_title("What looking ahead is worth")
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    legend(axes)


def _share(axes: Axes, found: _Found) -> None:
    width = 0.8 / len(found.chosen)
    for i, ((price, row), color) in enumerate(
        zip(found.chosen.items(), (OURS, GREEN, ORANGE, WRONG), strict=False)
    ):
        share = [100 * row[f"share/{h}"].mean() for h in found.fixed]
        axes.bar(
            [k + i * width for k in range(len(share))], share, width, color=color, label=f"price {price}"
        )
    axes.set_xticks([k + 0.4 - width / 2 for k in range(len(found.fixed))], list(found.fixed))
    axes.set(xlabel="H", ylabel="states, %", ylim=(0, 100))
    axes.set_title("Which horizons are chosen")
    legend(axes)


def _depths(axes: Axes, found: _Found) -> None:
    axes.bar(range(len(depths := _strip(found)["horizon"])), depths, 1.0, color=OURS)
    axes.set_yticks([int(h) for h in found.fixed], list(found.fixed))
    axes.set(xlabel="decision", ylabel="H")
    axes.set_title("An episode at the lowest price")


def _rewards(axes: Axes, found: _Found) -> None:
    axes.plot(_strip(found)["reward"], color=ORANGE, lw=1.6)
    axes.set(xlabel="decision", ylabel="reward", ylim=(0, 2.1))
    axes.set_title("Its rewards")


def _strip(found: _Found) -> dict[str, Any]:
    return dict(next(iter(found.chosen.values())).first("strip"))
