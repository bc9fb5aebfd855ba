"""One seed: train the three solvers on the same puzzles, and examine them on the puzzles held out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..runs import Cell, Tick
from .evaluation import ENERGY_TOLERANCES, examine_energy, examine_feed_forward, examine_recurrent, stopped
from .model import FeedForward, Recurrent
from .nine import NineByNine
from .puzzles import FourByFour, Puzzles
from .training import EnergySolver, Recipe, first_answer, train_energy, train_feed_forward, train_recurrent

__all__ = ["SOURCES", "follow", "measure"]

SOURCES: dict[int, type[FourByFour] | type[NineByNine]] = {4: FourByFour, 9: NineByNine}
BOARDS = 7
"""Number of steps of the descent that is followed at which its board is kept."""


def measure(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    """Train and examine the three solvers."""
    seed, recipe = cell.seed, Recipe(**cell.options["recipe"])
    source = SOURCES[cell.options["size"]](seed)
    puzzles = source.test(cell.options["puzzles"], torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    energy = EnergySolver(source.box, recipe)
    recurrent, feed_forward = Recurrent(source.box, recipe.width), FeedForward(source.box, recipe.width)
    updates = 0

    def progress(name: str) -> Callable[[float], None]:
        def after(loss: float) -> None:
            nonlocal updates
            updates += 1
            tick(f"{name}, loss {loss:.3f}", 0.9 * updates / (3 * recipe.updates))

        return after

    seconds = {
        "feed_forward": train_feed_forward(feed_forward, source, recipe, seed, progress("feed-forward")),
        "recurrent": train_recurrent(recurrent, source, recipe, seed, progress("recurrent")),
        "energy": train_energy(energy, source, recipe, seed, progress("energy")),
    }
    tick("held-out puzzles", 0.9)
    results: dict[str, Any] = {
        "feed_forward": examine_feed_forward(feed_forward, puzzles),
        "recurrent": examine_recurrent(recurrent, puzzles, seed),
        "energy": examine_energy(energy, puzzles, seed),
    }
    solvers: dict[str, nn.Module] = {"feed_forward": feed_forward, "recurrent": recurrent, "energy": energy}
    for name, solver in solvers.items():
        count = sum(parameter.numel() for parameter in solver.parameters())
        results[name] = {"parameters": count, "seconds": seconds[name], **results[name]}
    if isinstance(source, FourByFour):
        twins = source.test_of_any_kind(len(puzzles.given), torch.Generator().manual_seed(seed))
        results["kinds"] = source.kinds
        results["of_any_kind"] = {
            "feed_forward": examine_feed_forward(feed_forward, twins),
            "recurrent": stopped(recurrent, twins, seed),
            "energy": stopped(energy, twins, seed),
        }
    results["descent"] = follow(energy, puzzles, seed)
    return results


@torch.no_grad()
def follow(solver: EnergySolver, puzzles: Puzzles, seed: int) -> dict[str, Any]:
    """Follow one descent: of the puzzles with the most blanks, the one that takes the median number of steps.

    Returns
    -------
    dict
        ``solution`` and ``given`` of each cell; and at some of its steps ``step``, ``energy``, and each
        cell's most probable ``digit`` with its ``probability``.
    """
    hardest = (puzzles.blanks == puzzles.blanks.max()).nonzero()[:, 0]
    chosen = Puzzles(puzzles.solution[hardest], puzzles.given[hardest])
    board = chosen.board()
    start = first_answer(board, torch.Generator().manual_seed(seed))
    solver.descend.tol, solver.descend.keep_trace = ENERGY_TOLERANCES[0], True
    result = solver(start, board)
    solver.descend.keep_trace = False
    assert result.trace is not None
    row = int(result.steps.argsort()[len(hardest) // 2])
    answers = torch.cat((start[row : row + 1], result.trace.outputs[result.trace.row == row]))
    last = len(answers) - 1
    steps = sorted({round(last * (i / (BOARDS - 1)) ** 1.7) for i in range(BOARDS)})
    shown = answers[steps]
    probability, digit = shown.softmax(dim=2).max(dim=2)
    energies = solver.energy(shown, board[row : row + 1].expand(len(steps), -1, -1))
    return {
        "solution": chosen.solution[row].tolist(),
        "given": chosen.given[row].tolist(),
        "step": steps,
        "energy": energies.tolist(),
        "digit": digit.tolist(),
        "probability": probability.tolist(),
    }
