"""Whole episodes with an agent as it is: no exploration, nothing learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adaptcomp_ext.experiments.environments.control import ControlVectorEnv
from adaptcomp_ext.models.agents import PlanningAgent

__all__ = ["Episodes", "run_episodes"]


class Episodes(NamedTuple):
    """N episodes of T decisions.

    Attributes
    ----------
    returns : Tensor
        float64 [N].
    called : Tensor
        Bool [T, N]: which states were planned.
    iterations : Tensor
        int64 [T, N].
    gain, divergence, distance, score : Tensor
        [T, N]: of plans, NaN where there was none; the gate's score.
    reward : Tensor
        float64 [T, N].
    broken : int
        Episodes that the simulator ended.
    """

    returns: Tensor
    called: Tensor
    iterations: Tensor
    gain: Tensor
    divergence: Tensor
    distance: Tensor
    score: Tensor
    reward: Tensor
    broken: int

    @property
    def rate(self) -> float:
        """Share of the states that were planned."""
        return float(self.called.double().mean())


@torch.no_grad()
def run_episodes(
    agent: PlanningAgent,
    task: str,
    count: int,
    seed: int,
    kind: str | None = None,
    length: int | None = None,
    watch: Callable[[ControlVectorEnv], None] | None = None,
) -> Episodes:
    """Run N episodes.

    Parameters
    ----------
    agent : PlanningAgent
        Who acts; its gate's kind is put back afterwards.
    task : str
        Which task.
    count, seed : int
        N, and of the states they start from: the same ones for the same seed.
    kind : str, optional
        Of the gate. Default: its own.
    length : int, optional
        Decisions of an episode. Default: as many as make the suite's own episode.
    watch : callable, optional
        Is shown the environment before each decision.
    """
    env = ControlVectorEnv(task, count, max_steps=length, autoreset_mode="SameStep")
    observation, _ = env.reset(seed=seed)
    own, agent.gate.kind = agent.gate.kind, kind or agent.gate.kind
    least, agent.planner.least_std = agent.planner.least_std, 0.05
    records: list[tuple[Tensor, ...]] = []
    going = np.ones(count, bool)
    before = None
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            while going.any():
                if watch is not None:
                    watch(env)
                act = agent.act(torch.from_numpy(observation), before)
                before = act.following
                observation, reward, _, truncated, _ = env.step(act.action.numpy())
                counted = torch.from_numpy(np.where(going, reward, 0.0))
                records.append(
                    (act.called, act.iterations, act.gain, act.divergence, act.distance, act.score, counted)
                )
                going &= ~truncated
    finally:
        agent.gate.kind, agent.planner.least_std = own, least
    called, iterations, gain, apart, distance, score, rewards = (
        torch.stack(part) for part in zip(*records, strict=True)
    )
    return Episodes(rewards.sum(0), called, iterations, gain, apart, distance, score, rewards, env.broken)
