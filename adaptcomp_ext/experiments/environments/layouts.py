"""Random grids with walls, a goal, and how far from it each cell is; many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["FAR", "MOVES", "Layouts", "distances", "draw_layouts"]

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
