"""Every maze once: who arrives, by how long a way, after how much thought."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adaptcomp_ext.experiments.environments.layouts import Layouts
from adaptcomp_ext.experiments.environments.maze import MazeVectorEnv
from adaptcomp_ext.models.agents import MazeAgent

from .training import observe

__all__ = ["Trial", "run_trial"]

Chooser = Callable[[Tensor, int], Tensor]


class Trial(NamedTuple):
    """N mazes, each walked through once.

    Attributes
    ----------
    success : Tensor
        Bool [N].
    efficiency : Tensor
        float64 [N]: shortest way / way taken, 0 without success (SPL: Anderson et al. 2018).
    steps, sweeps : Tensor
        float64 [N]: of the episode.
    at_sweeps, at_distance, at_maze, at_position : Tensor
        [D]: sweeps, remaining distance, maze and position ([D, 2]) of every decision, in the order of time.
    """

    success: Tensor
    efficiency: Tensor
    steps: Tensor
    sweeps: Tensor
    at_sweeps: Tensor
    at_distance: Tensor
    at_maze: Tensor
    at_position: Tensor

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
    """Walk through each maze once, sampling choices and moves.

    Parameters
    ----------
    agent : MazeAgent
        Who walks.
    layouts : Layouts
        N mazes.
    density : float
        Theirs.
    seed : int
        Of what is sampled.
    sweeps : int or callable, optional
        All states get so many; or ``sweeps(chosen, step)`` changes what the gate chose, int64 [N]. Default:
        the gate's.
    """
    count, size = layouts.walls.shape[:2]
    env = MazeVectorEnv(count, size, density, layouts=layouts, autoreset_mode="SameStep")
    observation, info = env.reset(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    going = torch.ones(count, dtype=torch.bool)
    success, steps, spent = (
        torch.zeros(count, dtype=torch.bool),
        torch.zeros(count).double(),
        torch.zeros(count).double(),
    )
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
        distance = torch.from_numpy(info["distance"].astype(np.float32))
        where = going.nonzero()[:, 0]
        records.append((given[where].float(), distance[where], where, seen[1][where]))
        steps += going
        spent += given
        observation, _, terminated, truncated, info = env.step(decided.action.numpy())
        arrived = torch.from_numpy(terminated) & going
        success |= arrived
        going &= ~(torch.from_numpy(terminated) | torch.from_numpy(truncated))
    shortest = torch.from_numpy(layouts.shortest.astype(np.float64))
    at = [torch.cat(part) for part in zip(*records, strict=True)]
    return Trial(success, success * shortest / steps, steps, spent, *at)
