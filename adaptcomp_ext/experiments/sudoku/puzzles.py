"""All 4×4 Sudoku grids, their puzzles, and a split that keeps puzzles of the same kind on one side.

There are 288 grids, and the symmetries of Sudoku (relabelled digits; rows, columns, bands and stacks
exchanged; reflection) make two kinds of them. A network that treats all rows, all columns and all boxes alike
cannot tell a puzzle from its mirror image, so holding out grids alone holds out next to nothing: nearly every
puzzle of a held-out grid would have a twin among the puzzles trained on. `FourByFour` therefore holds out
*kinds of puzzles* as well, a kind being a puzzle with all that the 3,072 symmetries make of it.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..device import seeded

BLANKS = range(4, 12)
SIDE, CELLS = 4, 16
HELD_OUT_GRIDS = 68
HELD_OUT_KINDS = 0.2


class Puzzles(NamedTuple):
    """Puzzles with one solution each."""

    solution: Tensor  # int64 [n, cells], digits from 0, row by row
    given: Tensor  # bool [n, cells]; the other cells are blank

    @property
    def blanks(self) -> Tensor:
        """Number of blank cells, int64 [n]: the difficulty."""
        return (~self.given).sum(dim=1)

    def board(self) -> Tensor:
        """Return a solver's input: float32 [n, cells, side + 1], the digit one-hot, then 1 for a blank."""
        side = round(self.solution.shape[1] ** 0.5)
        digits = torch.nn.functional.one_hot(self.solution, side) * self.given[..., None]
        return torch.cat((digits, ~self.given[..., None]), dim=2).float()


class Source(Protocol):
    """Where puzzles come from: those to train on and those held out."""

    box: int  # side of a box
    blanks: range  # numbers of blanks

    def train(self, rows: int, generator: torch.Generator) -> Puzzles:
        """Draw training puzzles, all numbers of blanks alike."""
        ...

    def test(self, rows: int, generator: torch.Generator) -> Puzzles:
        """Draw held-out puzzles, each number of blanks in turn."""
        ...


def _legal(rows: tuple[tuple[int, ...], ...]) -> bool:
    """Whether no column and no box of these first rows holds a digit twice."""
    columns_differ = all(len(set(column)) == len(rows) for column in zip(*rows, strict=True))
    bands = zip(rows[::2], rows[1::2], strict=False)
    return columns_differ and all(not (set(a[:2]) & set(b[:2]) or set(a[2:]) & set(b[2:])) for a, b in bands)


def all_grids() -> Tensor:
    """Return the 288 complete grids, int64 [288, 16]."""
    grids: list[tuple[tuple[int, ...], ...]] = [()]
    for _ in range(SIDE):
        longer = ((*rows, row) for rows in grids for row in itertools.permutations(range(SIDE)))
        grids = [rows for rows in longer if _legal(rows)]
    return torch.tensor(grids).flatten(1)


def position_symmetries() -> Tensor:
    """Return the 128 exchanges of rows, columns, bands, stacks and axes, int64 [128, 16]."""
    lines = [
        (*a, *b) for x, y in (((0, 1), (2, 3)), ((2, 3), (0, 1))) for a in (x, x[::-1]) for b in (y, y[::-1])
    ]
    cells = torch.arange(CELLS).view(SIDE, SIDE)
    moved = [cells[list(rows)][:, list(columns)] for rows in lines for columns in lines]
    return torch.stack([way.flatten() for each in moved for way in (each, each.T)])


def _relabel(grids: Tensor) -> Tensor:
    """Name the digits of each grid [..., 16] in the order of its first row."""
    return grids[..., :SIDE].argsort(dim=-1).gather(-1, grids)


class FourByFour:
    """Every 4×4 puzzle with 4 to 11 blanks and one solution, those to train on and those held out.

    A puzzle is held out if both its grid and its kind are: no training puzzle becomes a held-out one by any
    symmetry of Sudoku. A fifth of the kinds of each number of blanks are held out, and 68 of the 288 grids;
    the `seed` decides which. `train_grids` and `test_grids` are indices into `grids`.
    """

    box, blanks = 2, BLANKS

    def __init__(self, seed: int) -> None:
        generator = seeded(seed)
        self.grids = all_grids()
        order = torch.randperm(len(self.grids), generator=generator)
        self.test_grids, self.train_grids = order[:HELD_OUT_GRIDS], order[HELD_OUT_GRIDS:]

        symmetries = position_symmetries()
        images = _relabel(self.grids[:, symmetries])
        keys, best = (images * SIDE ** torch.arange(CELLS)).sum(dim=2).min(dim=1)
        standards, self._standard = keys.unique(return_inverse=True)
        self._to_standard = symmetries[best]
        pools: dict[tuple[str, int, int], Tensor] = {}
        self.kinds = {"train": 0, "test": 0}
        for standard in range(len(standards)):
            first = int((self._standard == standard).nonzero()[0])
            grid = images[first, best[first]]
            patterns = _patterns_with_one_solution(grid, self.grids)
            kinds = _kinds(patterns, symmetries[(_relabel(grid[symmetries]) == grid).all(dim=1)])
            for blanks in BLANKS:
                here = (~patterns).sum(dim=1) == blanks
                names, kind = kinds[here].unique(return_inverse=True)
                count = max(1, round(HELD_OUT_KINDS * len(names)))
                held_out = torch.randperm(len(names), generator=generator) < count
                for part, chosen in (("train", ~held_out), ("test", held_out)):
                    pools[part, standard, blanks] = patterns[here][chosen[kind]]
                    self.kinds[part] += int(chosen.sum())
                pools["any", standard, blanks] = patterns[here]
        each = [(standard, blanks) for standard in range(len(standards)) for blanks in BLANKS]
        self._pools = {
            part: _Pools([pools[part, standard, blanks] for standard, blanks in each])
            for part in ("train", "test", "any")
        }

    def train(self, rows: int, generator: torch.Generator) -> Puzzles:
        """Draw training puzzles, all numbers of blanks alike."""
        blanks = torch.randint(len(BLANKS), (rows,), generator=generator)
        return self._draw("train", self.train_grids, blanks, generator)

    def test(self, rows: int, generator: torch.Generator) -> Puzzles:
        """Draw held-out puzzles, each number of blanks in turn."""
        return self._draw("test", self.test_grids, torch.arange(rows) % len(BLANKS), generator)

    def test_of_any_kind(self, rows: int, generator: torch.Generator) -> Puzzles:
        """Draw puzzles of held-out grids that may have twins in training, each number of blanks in turn."""
        return self._draw("any", self.test_grids, torch.arange(rows) % len(BLANKS), generator)

    def _draw(self, part: str, grids: Tensor, blanks: Tensor, generator: torch.Generator) -> Puzzles:
        rows = len(blanks)
        grid = grids[torch.randint(len(grids), (rows,), generator=generator)]
        pattern = self._pools[part].draw(self._standard[grid] * len(BLANKS) + blanks, generator)
        given = torch.empty_like(pattern).scatter_(1, self._to_standard[grid], pattern)
        return Puzzles(self.grids[grid], given)


class _Pools:
    """Lists of patterns to draw from."""

    def __init__(self, pools: list[Tensor]) -> None:
        self.patterns = torch.cat(pools)
        self.sizes = torch.tensor([len(pool) for pool in pools])
        self.begins = self.sizes.cumsum(0) - self.sizes

    def draw(self, pool: Tensor, generator: torch.Generator) -> Tensor:
        """One pattern [n, 16] from each of the pools [n]."""
        size = self.sizes[pool]
        at = (torch.rand(len(pool), generator=generator, dtype=torch.float64) * size).long()
        return self.patterns[self.begins[pool] + at]


def _patterns_with_one_solution(grid: Tensor, grids: Tensor) -> Tensor:
    """Return sets of given cells, bool [n, 16], with as many blanks as puzzles, that determine `grid`."""
    patterns = (torch.arange(2**CELLS)[:, None] >> torch.arange(CELLS)) & 1 == 1
    blanks = (~patterns).sum(dim=1)
    patterns = patterns[(blanks >= BLANKS.start) & (blanks < BLANKS.stop)]
    others = grids[(grids != grid).any(dim=1)] != grid
    return patterns[((patterns.float() @ others.float().T) > 0).all(dim=1)]


def _kinds(patterns: Tensor, symmetries: Tensor) -> Tensor:
    """A number for each pattern [n, 16], the same for what these symmetries of its grid make of it."""
    powers = 2 ** torch.arange(CELLS)
    images = torch.stack([(patterns[:, symmetry] * powers).sum(dim=1) for symmetry in symmetries])
    return images.amin(dim=0)
