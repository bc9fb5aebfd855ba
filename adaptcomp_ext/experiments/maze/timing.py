"""How long an episode takes on the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adaptcomp_ext.experiments.bench.machine import keep_freed_memory
from adaptcomp_ext.experiments.environments.maze import MazeVectorEnv
from adaptcomp_ext.models.agents import MazeAgent

from .training import observe

__all__ = ["compare"]

CHUNK = 16  # steps between two contenders' turns


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
            self.observation, _, terminated, truncated, _ = self.env.step(decided.action.numpy())
            ended += int((terminated | truncated).sum())
        if counted:
            self.seconds.append(time.perf_counter() - begin)
            self.episodes += ended


def compare(agent: MazeAgent, mazes: int, size: int, density: float, seconds: float) -> dict[str, Any]:
    """Milliseconds of an episode, environment and all, with `mazes` side by side: as the gate decides, the same masked, K = 16.

    The contenders take turns; the ratios are medians of pairs of turns, each turn per episode that the
    contender ends on average.
    """
    keep_freed_memory()
    ways: Mapping[str, tuple[int | None, bool]] = {
        "gated": (None, True),
        "masked": (None, False),
        "fixed 16": (16, True),
    }
    contenders = {
        name: _Walk(agent, MazeVectorEnv(mazes, size, density, autoreset_mode="SameStep"), *way)
        for name, way in ways.items()
    }
    for _ in range(6):  # past the first episodes, which all begin together
        for walk in contenders.values():
            walk.turn(False)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(contenders["gated"].seconds) < 3:
        for walk in contenders.values():
            walk.turn(True)
    per_turn = {name: max(walk.episodes, 1) / len(walk.seconds) for name, walk in contenders.items()}
    each = {name: [s / per_turn[name] for s in walk.seconds] for name, walk in contenders.items()}
    return {
        "mazes": mazes,
        "size": size,
        "ms": {name: 1e3 * statistics.median(values) for name, values in each.items()},
        **{
            f"{name} / gated": statistics.median(
                a / b for a, b in zip(each[name], each["gated"], strict=True)
            )
            for name in ("masked", "fixed 16")
        },
    }
