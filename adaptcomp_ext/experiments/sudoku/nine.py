"""Random 9×9 puzzles that singles alone solve, from random complete grids."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import seeded
from .model import units
from .puzzles import Puzzles

NINE_BLANKS = range(10, 46, 5)
BOX, SIDE, CELLS = 3, 9, 81


def random_grid(generator: random.Random) -> list[int]:
    """Return a complete 9×9 grid, digits from 0: three boxes at random, the others by search."""
    grid, free = [-1] * CELLS, [(1 << SIDE) - 1] * 3 * SIDE

    def places(cell: int) -> tuple[int, int, int]:
        row, column = divmod(cell, SIDE)
        return row, SIDE + column, 2 * SIDE + row // BOX * BOX + column // BOX

    def put(cell: int, digit: int) -> None:
        grid[cell] = digit
        for place in places(cell):
            free[place] &= ~(1 << digit)

    def take(cell: int) -> None:
        for place in places(cell):
            free[place] |= 1 << grid[cell]
        grid[cell] = -1

    def complete(open_cells: set[int]) -> bool:
        if not open_cells:
            return True
        left = {cell: free[a] & free[b] & free[c] for cell in open_cells for a, b, c in (places(cell),)}
        cell = min(sorted(left), key=lambda each: left[each].bit_count())
        digits = [digit for digit in range(SIDE) if left[cell] >> digit & 1]
        generator.shuffle(digits)
        for digit in digits:
            put(cell, digit)
            if complete(open_cells - {cell}):
                return True
            take(cell)
        return False

    for box in range(BOX):
        digits = list(range(SIDE))
        generator.shuffle(digits)
        for i, digit in enumerate(digits):
            put((box * BOX + i // BOX) * SIDE + box * BOX + i % BOX, digit)
    complete({cell for cell in range(CELLS) if grid[cell] < 0})
    return grid


def singles_solve(puzzles: Puzzles) -> Tensor:
    """Return whether naked and hidden singles alone solve each puzzle, bool [n]; it is then unique."""
    groups = units(BOX)
    peers = (groups.T @ groups > 0).float()
    done = torch.zeros(len(puzzles.given), dtype=torch.bool)
    row = torch.arange(len(puzzles.given))
    placed = F.one_hot(puzzles.solution, SIDE).float() * puzzles.given[..., None]
    while len(row):
        open_cells = 1 - placed.sum(dim=2, keepdim=True)
        possible = ((peers @ placed) == 0).float() * open_cells
        only_digit = possible.sum(dim=2, keepdim=True) == 1
        only_place = groups.T @ (groups @ possible == 1).float() > 0
        new = possible * (only_digit | only_place)
        placed = placed + new
        complete = placed.sum(dim=(1, 2)) == CELLS
        done[row[complete]] = True
        going = ~complete & (new.sum(dim=(1, 2)) > 0)
        row, placed = row[going], placed[going]
    return done


class NineByNine:
    """9×9 puzzles with 10 to 45 blanks, made for the occasion.

    The grids held out are other random ones. There are 5·10⁹ kinds of grids under the symmetries of Sudoku,
    so that twins of training grids, which a 4×4 grid has in plenty, are not to be expected. An eighth as many
    grids as are trained on are held out.
    """

    box, blanks = BOX, NINE_BLANKS

    def __init__(self, seed: int, grids: int = 2000, per_blanks: int = 5000) -> None:
        shuffle, generator = random.Random(seed), seeded(seed)
        made = torch.tensor([random_grid(shuffle) for _ in range(grids + grids // 8)])
        self.train_grids, self.test_grids = made[:grids], made[grids:]
        self._pool = _join([_make(self.train_grids, blanks, per_blanks, generator) for blanks in self.blanks])

    def train(self, rows: int, generator: torch.Generator) -> Puzzles:
        """Draw training puzzles, all numbers of blanks alike."""
        which = torch.randint(len(self._pool.given), (rows,), generator=generator)
        return Puzzles(self._pool.solution[which], self._pool.given[which])

    def test(self, rows: int, generator: torch.Generator) -> Puzzles:
        """Make held-out puzzles, equally many for each number of blanks, or one more."""
        counts = [len(range(i, rows, len(self.blanks))) for i in range(len(self.blanks))]
        return _join(
            [_make(self.test_grids, *each, generator) for each in zip(self.blanks, counts, strict=True)]
        )


def _make(grids: Tensor, blanks: int, rows: int, generator: torch.Generator) -> Puzzles:
    """Blank cells of random grids at random, until there are enough puzzles that singles solve."""
    found: list[Puzzles] = []
    while sum(len(puzzles.given) for puzzles in found) < rows:
        solution = grids[torch.randint(len(grids), (rows,), generator=generator)]
        given = torch.rand(rows, CELLS, generator=generator).argsort(dim=1).argsort(dim=1) >= blanks
        good = singles_solve(Puzzles(solution, given))
        found.append(Puzzles(solution[good], given[good]))
    enough = _join(found)
    return Puzzles(enough.solution[:rows], enough.given[:rows])


def _join(parts: list[Puzzles]) -> Puzzles:
    return Puzzles(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
