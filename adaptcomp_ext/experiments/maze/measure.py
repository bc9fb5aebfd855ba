"""One agent and one seed: train it, let it walk through mazes never seen, and put it on the clock."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from adaptcomp_ext.experiments.bench.machine import keep_freed_memory
from adaptcomp_ext.experiments.bench.timing import ratio
from adaptcomp_ext.experiments.device import seeded
from adaptcomp_ext.experiments.environments.maze import Layouts, MazeVectorEnv, draw_layouts
from adaptcomp_ext.experiments.files import write_tensors
from adaptcomp_ext.experiments.runs import Cell, Tick, span
from adaptcomp_ext.models.agents import MazeAgent

from .training import Settings, observe, train

FIXED = (0, 2, 4, 6, 8, 12, 16, 24, 32)
"""Numbers of sweeps that the priced agent is also made to do everywhere."""
AGENT_NAME = "agent.safetensors"
LARGER = 17
TEST_SEED = 10_000
DISTANCES = ((1, 1), (2, 3), (4, 5), (6, 8), (9, 12), (13, 17), (18, 24), (25, 40))
CURVE = 60  # points of the training curve that are kept
CHUNK = 16  # steps between two turns of a way of acting


def measure(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    """Train and measure an agent, or time the agent of another cell."""
    return (_time if "of" in cell.options else _train)(cell, folder, tick)


def _train(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    """Train an agent as the options say, and measure it on the same mazes as all others."""
    settings = Settings(**cell.options["settings"])
    torch.manual_seed(cell.seed)
    agent = MazeAgent()
    history = train(agent, settings, cell.seed, span(tick, "training", 0.0, 0.8))
    write_tensors(folder / AGENT_NAME, agent.state_dict())
    every = max(1, len(history) // CURVE)
    found: dict[str, Any] = {
        "curve": [_mean(history[i : i + every]) for i in range(0, len(history), every)],
        "every": every,
    }
    with torch.no_grad():
        found.update(_measure(agent, settings, cell, tick))
    return found


def _time(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    """Put the agent of another cell on the clock."""
    agent = MazeAgent()
    agent.load_state_dict(load_file(folder.parent / cell.options["of"] / AGENT_NAME))
    found, timed = [], cell.options["timed"]
    for i, (mazes, size) in enumerate(timed):
        tick(f"{mazes} mazes of side {size}", i / len(timed))
        found.append(compare(agent, mazes, size, cell.options["density"], cell.options["timing_seconds"]))
    return {"timing": found}


def _mean(records: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(r[key] for r in records) / len(records) for key in records[0]}


def unseen_layouts(count: int, size: int, density: float) -> Layouts:
    """The mazes of all trials; none of them is likely to have been trained on, there being some 10³⁰."""
    return draw_layouts(count, size, density, np.random.default_rng([TEST_SEED, size, round(100 * density)]))


def _measure(agent: MazeAgent, settings: Settings, cell: Cell, tick: Tick) -> dict[str, Any]:
    tick("unseen mazes", 0.8)
    layouts = unseen_layouts(cell.options["mazes"], settings.size, settings.density)
    own = run_trial(agent, layouts, settings.density, cell.seed, settings.sweeps)
    found: dict[str, Any] = {"own": own.summary()}
    if settings.sweeps is not None:
        return found
    found["by_distance"] = _by_distance(own)
    shuffler = seeded(cell.seed)
    controls = {
        "shuffled": lambda chosen, _: chosen[torch.randperm(len(chosen), generator=shuffler)],
        "fixed at the mean": math.ceil(found["own"]["sweeps_per_step"]),
    }
    for name, sweeps in controls.items():
        found[name] = run_trial(agent, layouts, settings.density, cell.seed, sweeps).summary()
    tick("other mazes", 0.85)
    fixed = FIXED if cell.options["agent"] == "priced" else (16,)
    found["fixed"] = {
        str(k): run_trial(agent, layouts, settings.density, cell.seed, k).summary() for k in fixed
    }
    found["others"] = {}
    for size, density in cell.options["others"]:
        some = unseen_layouts(cell.options["larger"], size, density)
        trial = run_trial(agent, some, density, cell.seed)
        found["others"][f"{size} x {size}, {density:g}"] = {
            "own": trial.summary(),
            "fixed 16": run_trial(agent, some, density, cell.seed, 16).summary(),
        }
        if (size, density) == (LARGER, settings.density):
            found["by_distance_larger"] = _by_distance(trial)
    if cell.options["agent"] == "priced":
        found["example"] = _example(layouts, own)
    return found


def _by_distance(trial: Trial) -> list[dict[str, float]]:
    """Sweeps, and share of the states without any, by distances that some state had."""
    out = []
    for low, high in DISTANCES:
        some = trial.at_sweeps[(trial.at_distance >= low) & (trial.at_distance <= high)]
        if len(some):
            means = {"sweeps": float(some.mean()), "none": float((some == 0).float().mean())}
            out.append({"low": low, "high": high, **means})
    return out


def _example(layouts: Layouts, trial: Trial) -> dict[str, Any]:
    """The longest way among those that were found without a detour, and the sweeps along it."""
    direct = trial.success & (trial.efficiency > 0.99)
    best = int((torch.as_tensor(layouts.shortest.astype(np.float32)) * direct).argmax())
    at = trial.at_maze == best
    return {
        "walls": layouts.walls[best].astype(int).tolist(),
        "start": layouts.start[best].tolist(),
        "goal": layouts.goal[best].tolist(),
        "positions": trial.at_position[at].tolist(),
        "sweeps": trial.at_sweeps[at].int().tolist(),
    }


class _Walk:
    """An agent that goes on walking, one episode after another."""

    def __init__(self, agent: MazeAgent, env: MazeVectorEnv, sweeps: int | None, compact: bool | str) -> None:
        self.agent, self.env, self.compact = agent, env, compact
        self.sweeps: Tensor | None = None if sweeps is None else torch.full((env.num_envs,), sweeps)
        self.observation, _ = self.env.reset(seed=0)
        self.seconds: list[float] = []
        self.episodes = 0

    def turn(self, counted: bool) -> None:
        begin = time.perf_counter()
        ended = 0
        for _ in range(CHUNK):
            decided = self.agent.act(*observe(self.observation), sweeps=self.sweeps, compact=self.compact)
            self.observation, _, terminated, truncated, _ = self.env.step(decided.action.cpu().numpy())
            ended += int((terminated | truncated).sum())
        if counted:
            self.seconds.append(time.perf_counter() - begin)
            self.episodes += ended


def compare(agent: MazeAgent, mazes: int, size: int, density: float, seconds: float) -> dict[str, Any]:
    """Time an episode, in ms, with `mazes` side by side: with the gate's K, the same masked, and with K = 16.

    The three take turns; the ratios are medians of pairs of turns, a turn divided by the number of episodes
    that end in it on average.
    """
    keep_freed_memory()
    ways: Mapping[str, tuple[int | None, bool]]
    ways = {"gated": (None, True), "masked": (None, False), "fixed 16": (16, True)}
    walks = {
        name: _Walk(agent, MazeVectorEnv(mazes, size, density, autoreset_mode="SameStep"), *way)
        for name, way in ways.items()
    }
    for _ in range(6):  # past the first episodes, which all begin together
        for walk in walks.values():
            walk.turn(False)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(walks["gated"].seconds) < 3:
        for walk in walks.values():
            walk.turn(True)
    per_turn = {name: max(walk.episodes, 1) / len(walk.seconds) for name, walk in walks.items()}
    each = {name: [s / per_turn[name] for s in walk.seconds] for name, walk in walks.items()}
    return {
        "mazes": mazes,
        "size": size,
        "ms": {name: 1e3 * statistics.median(values) for name, values in each.items()},
        **{f"{name} / gated": ratio(each, name, "gated") for name in ("masked", "fixed 16")},
    }


Chooser = Callable[[Tensor, int], Tensor]


class Trial(NamedTuple):
    """N mazes, each walked through once, and the D decisions of all episodes in the order of time."""

    success: Tensor  # bool [N]
    efficiency: Tensor  # [N]: shortest way / way taken, 0 without success (SPL: Anderson et al. 2018)
    steps: Tensor  # [N], of the episode
    sweeps: Tensor
    at_sweeps: Tensor  # [D]
    at_distance: Tensor  # that remains
    at_maze: Tensor
    at_position: Tensor  # [D, 2]

    def correlation(self) -> float:
        """Pearson's r of sweeps and remaining distance over the decisions; 0 where all sweeps are alike."""
        if float(self.at_sweeps.std()) == 0:
            return 0.0
        return float(torch.corrcoef(torch.stack([self.at_sweeps, self.at_distance]))[0, 1])

    def summary(self) -> dict[str, Any]:
        """Means."""
        return {
            "success": float(self.success.double().mean()),
            "efficiency": float(self.efficiency.mean()),
            "sweeps_per_step": float(self.sweeps.sum() / self.steps.sum()),
            "sweeps_per_episode": float(self.sweeps.mean()),
            "steps": float(self.steps.mean()),
            "correlation": self.correlation(),
        }


def run_trial(
    agent: MazeAgent, layouts: Layouts, density: float, seed: int, sweeps: Chooser | int | None = None
) -> Trial:
    """Walk through each maze once; choices and moves are sampled from `seed`.

    `sweeps`: all states get so many; or ``sweeps(chosen, step)`` changes what the gate chose, int64 [N];
    None: the gate's.
    """
    count, size = layouts.walls.shape[:2]
    env = MazeVectorEnv(count, size, density, layouts=layouts, autoreset_mode="SameStep")
    observation, info = env.reset(seed=seed)
    generator = seeded(seed)
    going = torch.ones(count, dtype=torch.bool)
    success = torch.zeros(count, dtype=torch.bool)
    steps, spent = torch.zeros(2, count, dtype=torch.float64)
    records: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    while bool(going.any()):
        seen = observe(observation)
        if isinstance(sweeps, int):
            given = torch.full((count,), sweeps)
        else:
            gate = agent.react(agent.features(*seen))[1].softmax(1)
            given = agent.numbers[torch.multinomial(gate, 1, generator=generator)[:, 0]]
            if sweeps is not None:
                given = given.clone()
                given[going] = sweeps(given[going], len(records))
        given = given * going
        decided = agent.act(*seen, sweeps=given, generator=generator)
        distance = torch.as_tensor(info["distance"].astype(np.float32))
        where = going.nonzero()[:, 0]
        records.append((given[where].float(), distance[where], where, seen[1][where]))
        steps += going
        spent += given
        observation, _, terminated, truncated, info = env.step(decided.action.cpu().numpy())
        arrived = torch.as_tensor(terminated) & going
        success |= arrived
        going &= ~(torch.as_tensor(terminated) | torch.as_tensor(truncated))
    shortest = torch.as_tensor(layouts.shortest.astype(np.float64))
    at = [torch.cat(part) for part in zip(*records, strict=True)]
    return Trial(success, success * shortest / steps, steps, spent, *at)
