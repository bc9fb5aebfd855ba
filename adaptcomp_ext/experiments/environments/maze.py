"""Many mazes at once, as one vector environment of Gymnasium."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from adaptcomp_ext.ops._checks import check_int, describe
from adaptcomp_ext.ops.descent import check_number

from .layouts import MOVES, Layouts, draw_layouts

__all__ = ["MazeVectorEnv"]

POOL = 4096  # layouts drawn at a time: flooding one alone costs as much as flooding hundreds
LARGEST_DENSITY = 0.6  # above it most grids have no two cells that are connected
STEPS_PER_SIDE = 6
STEP_REWARD = -0.01
GOAL_REWARD = 1.0

Observation = dict[str, NDArray[Any]]


class MazeVectorEnv(VectorEnv[Observation, NDArray[Any], NDArray[Any]]):
    """Walk from a random start to a random goal in a random grid with walls; the map is known.

    Parameters
    ----------
    num_envs : int
        N mazes side by side.
    size : int
        S: cells of a side, at least 3.
    density : float
        Share of walls, in [0, 0.6].
    max_steps : int, optional
        An episode is truncated after so many. Default: 6 S.
    layouts : Layouts, optional
        The first N episodes' mazes, at every `reset`; those after them are drawn. Default: all are drawn.

    Notes
    -----
    Observations: ``walls`` int8 [N, S, S], ``position`` and ``goal`` int64 [N, 2] (row, column). Actions: up, right, down,
    left; a step into a wall or off the grid stays where it is. Reward: 1 at the goal, less 0.01 a step. ``info["distance"]``,
    int16 [N], is how many steps remain on a shortest way from the observed position: for analysis, no part of the observation.

    Mode ``SAME_STEP``: the step that ends an episode already returns the next one's first observation, with the last one's under
    ``info["final_obs"]``, an array of N objects, each an observation or None, and int64 arrays [N] of its steps, shortest way
    and remaining distance under ``info["final_info"]``; the masks ``_final_obs`` and ``_final_info`` say where (Gymnasium's
    convention).
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}  # noqa: RUF012 (as in Gymnasium's base)

    def __init__(
        self,
        num_envs: int = 256,
        size: int = 11,
        density: float = 0.3,
        max_steps: int | None = None,
        layouts: Layouts | None = None,
    ) -> None:
        self.num_envs = check_int("num_envs", num_envs, 1)
        self.size = check_int("size", size, 3)
        self.density = check_number("density", density, 0.0, LARGEST_DENSITY, ends="[]")
        self.max_steps = STEPS_PER_SIDE * size if max_steps is None else check_int("max_steps", max_steps, 1)
        if layouts is not None and layouts.walls.shape != (num_envs, size, size):
            raise ValueError(f"layouts: expected walls of shape {(num_envs, size, size)}, got {layouts.walls.shape}")
        self._given = layouts
        self.single_observation_space = gymnasium.spaces.Dict(
            {
                "walls": gymnasium.spaces.MultiBinary((size, size)),
                "position": gymnasium.spaces.MultiDiscrete([size, size]),
                "goal": gymnasium.spaces.MultiDiscrete([size, size]),
            }
        )
        self.single_action_space = gymnasium.spaces.Discrete(len(MOVES))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._every = np.arange(num_envs)
        self._pool: Layouts | None = None
        self._used = 0
        self._ready = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Begin N episodes. A seed makes everything that follows repeatable."""
        if seed is not None or self._np_random is None:
            self._np_random = np.random.default_rng(seed)
            self._pool = None
        first = self._draw(self.num_envs) if self._given is None else self._given
        self.layouts = Layouts(*(part.copy() for part in first))
        # One cell more all round, and walls there: a look-up instead of four comparisons.
        self._closed = np.ones((self.num_envs, self.size + 2, self.size + 2), bool)
        self._closed[:, 1:-1, 1:-1] = self.layouts.walls
        self._walls = self.layouts.walls.astype(np.int8)
        self._position = self.layouts.start.copy()
        self._steps = np.zeros(self.num_envs, np.int64)
        self._ready = True
        return self._observe(), {"distance": self._distance()}

    def step(self, actions: NDArray[Any]) -> tuple[Observation, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Move in every maze."""
        if not self._ready:
            raise RuntimeError("step: expected a reset() before the first step")
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or actions.dtype.kind not in "iu":
            raise ValueError(f"actions: expected {self.num_envs} integers, got {describe(actions)}")
        if actions.size and (actions.min() < 0 or actions.max() >= len(MOVES)):
            raise ValueError(f"actions: expected values from 0 to {len(MOVES) - 1}, got {actions.min()} to {actions.max()}")
        to = self._position + MOVES[actions]
        blocked = self._closed[self._every, to[:, 0] + 1, to[:, 1] + 1]
        self._position = np.where(blocked[:, None], self._position, to)
        self._steps += 1
        terminated = (self._position == self.layouts.goal).all(1)
        truncated = ~terminated & (self._steps >= self.max_steps)
        reward = STEP_REWARD + GOAL_REWARD * terminated
        info: dict[str, Any] = {}
        ended = np.flatnonzero(terminated | truncated)
        if len(ended):
            info.update(self._close(ended))
            self._open(ended)
        info["distance"] = self._distance()
        return self._observe(), reward, terminated, truncated, info

    def _draw(self, count: int) -> Layouts:
        parts: list[Layouts] = []
        while count:
            if self._pool is None or self._used == len(self._pool.start):
                assert self._np_random is not None
                self._pool = draw_layouts(max(POOL, self.num_envs), self.size, self.density, self._np_random)
                self._used = 0
            some = self._pool.take(slice(self._used, self._used + count))
            self._used += len(some.start)
            count -= len(some.start)
            parts.append(some)
        return parts[0] if len(parts) == 1 else Layouts(*(np.concatenate(p) for p in zip(*parts, strict=True)))

    def _open(self, which: NDArray[np.int64]) -> None:
        new = self._draw(len(which))
        for ours, theirs in zip(self.layouts, new, strict=True):
            ours[which] = theirs
        self._closed[which, 1:-1, 1:-1] = new.walls
        self._walls[which] = new.walls
        self._position[which] = new.start
        self._steps[which] = 0

    def _close(self, which: NDArray[np.int64]) -> dict[str, Any]:
        mask = np.zeros(self.num_envs, bool)
        mask[which] = True
        last = np.full(self.num_envs, None, object)
        walls, position, goal = self._walls[which], self._position[which], self.layouts.goal[which]
        for k, i in enumerate(which):
            last[i] = {"walls": walls[k], "position": position[k], "goal": goal[k]}
        about: dict[str, NDArray[np.int64]] = {}
        values: tuple[NDArray[Any], ...] = (self._steps[which], self.layouts.take(which).shortest, self._distance()[which])
        for name, value in zip(("steps", "shortest", "distance"), values, strict=True):
            about[name] = np.zeros(self.num_envs, np.int64)
            about[name][which] = value
        return {"final_obs": last, "_final_obs": mask, "final_info": about, "_final_info": mask.copy()}

    def _distance(self) -> NDArray[np.int16]:
        return self.layouts.distance[self._every, self._position[:, 0], self._position[:, 1]]

    def _observe(self) -> Observation:
        # Copies: what the caller keeps of one step must not change at the next.
        return {"walls": self._walls.copy(), "position": self._position.copy(), "goal": self.layouts.goal.copy()}
