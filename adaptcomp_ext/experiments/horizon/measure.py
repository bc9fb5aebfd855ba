"""Train an agent that plans, learn what each level of depth gains, and let the states choose."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adaptcomp_ext.experiments.bench.machine import keep_freed_memory
from adaptcomp_ext.experiments.control.training import Settings, Trainer, train
from adaptcomp_ext.experiments.environments.control import ControlVectorEnv
from adaptcomp_ext.experiments.runs import Cell, Tick, rank_correlation, span
from adaptcomp_ext.models.agents import DepthGate, DepthPlanner, PlanningAgent

__all__ = ["measure"]

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
    generator = torch.Generator().manual_seed(seed)
    recent = replay.observation[replay.length * 3 // 4 : replay.length].flatten(0, 1)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
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
    env = ControlVectorEnv(task, count, max_steps=length, autoreset_mode="SameStep")
    observation, _ = env.reset(seed=seed)
    going = np.ones(count, bool)
    records: list[tuple[Tensor, ...]] = []
    world = agent.world
    least, agent.planner.least_std = agent.planner.least_std, 0.05
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        while going.any():
            seen = torch.from_numpy(observation)
            z = world.encode(seen)
            log_std = world.habit.parameters_of(z)[1]
            chosen = torch.full((count,), depth) if isinstance(depth, int) else depth(z, log_std)
            if shuffle:
                chosen = chosen[torch.randperm(count)]
            plan = planner.plan(z, chosen)
            observation, reward, _, truncated, _ = env.step(plan.action.numpy())
            counted = torch.from_numpy(np.where(going, reward, 0.0))
            records.append((chosen, plan.horizon, seen, log_std, counted))
            going &= ~truncated
    agent.planner.least_std = least
    depths, horizon, observations, log_stds, rewards = (torch.stack(p) for p in zip(*records, strict=True))
    return _Walked(rewards.sum(0), depths, horizon, observations, log_stds, rewards)


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
