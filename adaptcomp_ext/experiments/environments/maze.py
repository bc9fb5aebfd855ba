"""Random mazes, and many of them at once as one vector environment of Gymnasium."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from adaptcomp_ext.ops._checks import check_int, describe
from adaptcomp_ext.ops.descent import check_number

from .modes import RENDER_MODES, check_autoreset_mode, check_render_mode, check_reset_mask, refuse_ended

__all__ = ["FAR", "MOVES", "Layouts", "MazeVectorEnv", "distances", "draw_layouts"]

MOVES = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])
"""Row and column of a step up, right, down, left."""
FAR = np.iinfo(np.int16).max
"""The distance of walls and of cells from which the goal cannot be reached."""
LEAST_DISTANCE = 2
COMPACT_EVERY = 8  # waves, after which the mazes that are flooded leave


class Layouts(NamedTuple):
    """N mazes of S × S cells: start and goal are free cells, connected, at least two steps apart."""

    walls: NDArray[np.bool_]  # [N, S, S]
    start: NDArray[np.int64]  # [N, 2]: row and column
    goal: NDArray[np.int64]
    distance: NDArray[np.int16]  # [N, S, S]: steps from each cell to the goal; `FAR` where there is no way

    def take(self, index: NDArray[np.integer] | slice) -> Layouts:
        """Some of them."""
        return Layouts(self.walls[index], self.start[index], self.goal[index], self.distance[index])

    @staticmethod
    def join(parts: Sequence[Layouts]) -> Layouts:
        """All mazes of these, in their order."""
        return parts[0] if len(parts) == 1 else Layouts(*map(np.concatenate, zip(*parts, strict=True)))

    @property
    def shortest(self) -> NDArray[np.int16]:
        """int16 [N]: steps from start to goal."""
        return self.distance[np.arange(len(self.start)), self.start[:, 0], self.start[:, 1]]


def distances(walls: NDArray[np.bool_], goal: NDArray[np.int64]) -> NDArray[np.int16]:
    """Count the steps to the goal from each cell: walls [N, S, S], goal [N, 2] → int16 [N, S, S]."""
    n, size, _ = walls.shape
    width = size + 2
    # All mazes as one line of cells, each with a rim: a shift that runs from one into the next meets walls on
    # both sides.
    open_ = np.zeros((n, width, width), bool)
    open_[:, 1:-1, 1:-1] = ~walls
    front = np.zeros_like(open_)
    front[np.arange(n), goal[:, 0] + 1, goal[:, 1] + 1] = True
    found = np.zeros((n, width, width), np.int16)
    left = np.arange(n)  # the mazes whose flood still spreads
    waves, still = 0, found.copy()
    while len(left):
        open_ &= ~front
        # A cell is as far away as it stays dry.
        still += open_
        line = front.reshape(-1)
        spread = np.zeros_like(line)
        inner = spread[width:-width]
        np.logical_or(line[: -2 * width], line[2 * width :], out=inner)
        inner |= line[width - 1 : -width - 1]
        inner |= line[width + 1 : len(line) - width + 1]
        front = spread.reshape(front.shape) & open_
        waves += 1
        if waves % COMPACT_EVERY == 0 or not front.any():
            going = front.any((1, 2))
            done = ~going
            found[left[done]] = np.where(open_[done], FAR, still[done])
            left, open_, front, still = left[going], open_[going], front[going], still[going]
    found = found[:, 1:-1, 1:-1]
    blocked = walls.copy()
    blocked[np.arange(n), goal[:, 0], goal[:, 1]] = False
    found[blocked] = FAR
    return np.ascontiguousarray(found)


def draw_layouts(count: int, size: int, density: float, random: np.random.Generator) -> Layouts:
    """Draw N mazes of side `size`, at least 3: each cell is a wall with probability `density` in 0..0.6."""
    parts: list[Layouts] = []
    missing = count
    while missing > 0:
        n = missing + missing // 4 + 8
        walls = random.random((n, size, size)) < density
        cells = np.where(walls.reshape(n, -1), -1.0, random.random((n, size * size))).argmax(1)
        goal = np.stack([cells // size, cells % size], 1)
        walls[np.arange(n), goal[:, 0], goal[:, 1]] = False
        distance = distances(walls, goal)
        fit = (distance >= LEAST_DISTANCE) & (distance < FAR)
        cells = np.where(fit.reshape(n, -1), random.random((n, size * size)), -1.0).argmax(1)
        start = np.stack([cells // size, cells % size], 1)
        good = np.flatnonzero(fit.reshape(n, -1).any(1))[:missing]
        parts.append(Layouts(walls, start, goal, distance).take(good))
        missing -= len(good)
    return Layouts.join(parts)


POOL = 4096  # layouts drawn at a time: flooding one alone costs as much as flooding hundreds
LARGEST_DENSITY = 0.6  # above it most grids have no two cells that are connected
STEPS_PER_SIDE = 6
STEP_REWARD = -0.01
GOAL_REWARD = 1.0
PIXELS = 16  # of a cell's side in a picture
FLOOR, WALL, GOAL, WALKER = (255, 255, 255), (34, 39, 46), (240, 138, 36), (33, 102, 172)

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
    autoreset_mode : AutoresetMode or str
        When an ended episode is followed by the next one (see the notes). Default: Gymnasium's own,
        ``NEXT_STEP``.
    render_mode : str or None
        "rgb_array" (the default): `render` returns pictures. None: it returns None. Nothing is drawn before
        `render` is called.

    Notes
    -----
    Observations: ``walls`` int8 [N, S, S], ``position`` and ``goal`` int64 [N, 2] (row, column). Actions: up,
    right, down, left; a step into a wall or off the grid stays where it is. Reward: 1 at the goal, less 0.01
    a step. ``info["distance"]``, int16 [N], is how many steps remain on a shortest way from the observed
    position: for analysis, no part of the observation.

    Autoreset modes are Gymnasium's, as `ControlVectorEnv` describes them. Under ``SAME_STEP``,
    ``info["final_info"]`` holds int64 arrays [N] of the ended episode's ``steps``, ``shortest`` way and
    remaining ``distance``; otherwise ``info`` itself has ``steps`` and ``shortest`` of the episodes that end
    (masks ``_steps``, ``_shortest``).

    Gymnasium's wrappers of observations refuse ``SAME_STEP``; those for arrays (``NormalizeObservation``,
    ``DtypeObservation``) refuse dictionaries, and go around ``FlattenObservation``.
    """

    metadata = {  # noqa: RUF012 (as in Gymnasium)
        "autoreset_mode": AutoresetMode.NEXT_STEP,
        "render_modes": list(RENDER_MODES),
        "render_fps": 10,
    }

    def __init__(
        self,
        num_envs: int = 256,
        size: int = 11,
        density: float = 0.3,
        max_steps: int | None = None,
        layouts: Layouts | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = "rgb_array",
    ) -> None:
        self.num_envs = check_int("num_envs", num_envs, 1)
        self.size = check_int("size", size, 3)
        self.density = check_number("density", density, 0.0, LARGEST_DENSITY, ends="[]")
        self.max_steps = STEPS_PER_SIDE * size if max_steps is None else check_int("max_steps", max_steps, 1)
        if layouts is not None and layouts.walls.shape != (num_envs, size, size):
            raise ValueError(
                f"layouts: expected walls of shape {(num_envs, size, size)}, got {layouts.walls.shape}"
            )
        self.autoreset_mode = check_autoreset_mode(autoreset_mode)
        self.render_mode = check_render_mode(render_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
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
        self._drawn_by: np.random.Generator | None = None  # the generator that drew the pool
        self._used = 0
        self._ready = False
        self._ended = np.zeros(num_envs, bool)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin N episodes, or those of ``options["reset_mask"]``, bool [N]. A seed makes them repeatable."""
        if seed is not None:
            check_int("seed", seed, 0, bounded=False)  # NumPy draws seeds of 128 bits
        mask = check_reset_mask(options, self.num_envs, self._ready)
        super().reset(seed=seed)
        if self._ready and not mask.all():
            self._open(np.flatnonzero(mask), self._given)
            return self._observe(), {"distance": self._distance()}
        first = self._draw(self.num_envs) if self._given is None else self._given
        self.layouts = Layouts(*(part.copy() for part in first))
        # One cell more all round, and walls there: a look-up instead of four comparisons.
        self._closed = np.ones((self.num_envs, self.size + 2, self.size + 2), bool)
        self._closed[:, 1:-1, 1:-1] = self.layouts.walls
        self._walls = self.layouts.walls.astype(np.int8)
        self._position = self.layouts.start.copy()
        self._steps = np.zeros(self.num_envs, np.int64)
        self._ended = np.zeros(self.num_envs, bool)
        self._ready = True
        return self._observe(), {"distance": self._distance()}

    def step(
        self, actions: NDArray[Any]
    ) -> tuple[Observation, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Move in every maze."""
        if not self._ready:
            raise RuntimeError("step: expected a reset() before the first step")
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or actions.dtype.kind not in "iu":
            raise ValueError(f"actions: expected {self.num_envs} integers, got {describe(actions)}")
        if actions.size and (actions.min() < 0 or actions.max() >= len(MOVES)):
            raise ValueError(
                f"actions: expected values from 0 to {len(MOVES) - 1}, got {actions.min()} to {actions.max()}"
            )
        if self.autoreset_mode is AutoresetMode.DISABLED:
            refuse_ended(self._ended)
        begins = self._ended.copy()  # only in mode NEXT_STEP are there any
        to = self._position + MOVES[actions]
        blocked = self._closed[self._every, to[:, 0] + 1, to[:, 1] + 1]
        self._position = np.where(blocked[:, None], self._position, to)
        self._steps += 1
        if begins.any():
            self._open(np.flatnonzero(begins))
        terminated = (self._position == self.layouts.goal).all(1)
        truncated = ~terminated & (self._steps >= self.max_steps)
        reward = STEP_REWARD + GOAL_REWARD * terminated
        reward[begins] = 0.0
        info: dict[str, Any] = {}
        over = terminated | truncated
        ended = np.flatnonzero(over)
        if self.autoreset_mode is not AutoresetMode.SAME_STEP:
            self._ended = over
            if len(ended):
                about = self._about(ended)
                for name in ("steps", "shortest"):
                    info[name], info[f"_{name}"] = about[name], over.copy()
        elif len(ended):
            info.update(self._close(ended))
            self._open(ended)
        info["distance"] = self._distance()
        return self._observe(), reward, terminated, truncated, info

    def render(self) -> tuple[NDArray[np.uint8], ...] | None:
        """Draw each maze, its goal and its walker: N pictures, uint8 [16 S, 16 S, 3]; None without a mode."""
        if self.render_mode is None:
            return None
        if not self._ready:
            raise RuntimeError("render: expected a reset() before the first picture")
        picture = np.array([FLOOR, WALL], np.uint8)[self._walls]
        for at, color in ((self.layouts.goal, GOAL), (self._position, WALKER)):
            picture[self._every, at[:, 0], at[:, 1]] = color
        return tuple(picture.repeat(PIXELS, 1).repeat(PIXELS, 2))

    def __repr__(self) -> str:
        sizes = f"num_envs={self.num_envs}, size={self.size}, density={self.density:g}"
        return f"{type(self).__name__}({sizes}, autoreset_mode={self.autoreset_mode.value!r})"

    def _draw(self, count: int) -> Layouts:
        parts: list[Layouts] = []
        random = self.np_random
        while count:
            # What another generator drew belongs to another seed.
            if self._pool is None or self._drawn_by is not random or self._used == len(self._pool.start):
                self._pool = draw_layouts(max(POOL, self.num_envs), self.size, self.density, random)
                self._drawn_by, self._used = random, 0
            some = self._pool.take(slice(self._used, self._used + count))
            self._used += len(some.start)
            count -= len(some.start)
            parts.append(some)
        return Layouts.join(parts)

    def _open(self, which: NDArray[np.int64], given: Layouts | None = None) -> None:
        new = self._draw(len(which)) if given is None else given.take(which)
        for part in Layouts._fields:
            getattr(self.layouts, part)[which] = getattr(new, part)
        self._closed[which, 1:-1, 1:-1] = new.walls
        self._walls[which] = new.walls
        self._position[which] = new.start
        self._steps[which] = 0
        self._ended[which] = False

    def _close(self, which: NDArray[np.int64]) -> dict[str, Any]:
        mask = np.zeros(self.num_envs, bool)
        mask[which] = True
        last = np.full(self.num_envs, None, object)
        walls, position, goal = self._walls[which], self._position[which], self.layouts.goal[which]
        for k, i in enumerate(which):
            last[i] = {"walls": walls[k], "position": position[k], "goal": goal[k]}
        about = self._about(which)
        return {"final_obs": last, "_final_obs": mask, "final_info": about, "_final_info": mask.copy()}

    def _about(self, which: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Steps, shortest way and remaining distance of these episodes, each int64 [N], 0 elsewhere."""
        about = {name: np.zeros(self.num_envs, np.int64) for name in ("steps", "shortest", "distance")}
        about["steps"][which] = self._steps[which]
        about["shortest"][which] = self.layouts.take(which).shortest
        about["distance"][which] = self._distance()[which]
        return about

    def _distance(self) -> NDArray[np.int16]:
        return self.layouts.distance[self._every, self._position[:, 0], self._position[:, 1]]

    def _observe(self) -> Observation:
        # Copies: what the caller keeps of one step must not change at the next.
        return {
            "walls": self._walls.copy(),
            "position": self._position.copy(),
            "goal": self.layouts.goal.copy(),
        }
