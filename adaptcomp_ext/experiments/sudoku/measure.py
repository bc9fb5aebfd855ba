"""One seed: train the three solvers on the same puzzles, and examine them on the puzzles held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..bench.timing import clock
from ..device import seeded
from ..runs import Cell, Tick
from .model import FeedForward, Recurrent
from .nine import NineByNine
from .puzzles import FourByFour, Puzzles
from .training import EnergySolver, Recipe, first_answer, train_energy, train_feed_forward, train_recurrent

SOURCES: dict[int, type[FourByFour] | type[NineByNine]] = {4: FourByFour, 9: NineByNine}
BOARDS = 7
"""Number of steps of the descent that is followed at which its board is kept."""


def measure(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    """Train and examine the three solvers."""
    seed, recipe = cell.seed, Recipe(**cell.options["recipe"])
    source = SOURCES[cell.options["size"]](seed)
    puzzles = source.test(cell.options["puzzles"], seeded(seed))
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
        twins = source.test_of_any_kind(len(puzzles.given), seeded(seed))
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

    At some of its steps: ``step``, ``energy``, each cell's most probable ``digit`` with its ``probability``.
    """
    hardest = (puzzles.blanks == puzzles.blanks.max()).nonzero()[:, 0]
    chosen = Puzzles(puzzles.solution[hardest], puzzles.given[hardest])
    board = chosen.board()
    start = first_answer(board, seeded(seed))
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


ALLOWED = (1, 2, 3, 5, 9, 16, 32, 64)
STARTS = (1, 2, 4, 8)
FEW_STEPS = (1, 2, 3, 64)
# How much the energy, or any probability of the recurrent network, may still change where it stops; the first
# one is the one used wherever only one is.
ENERGY_TOLERANCES = (1e-3, 1e-1, 3e-2, 1e-2, 3e-3, 3e-4, 1e-4)
RECURRENT_TOLERANCES = (3e-2, 3e-1, 1e-1, 1e-2)


class Attempt(NamedTuple):
    """One try at n puzzles: right, bool [n]; steps, int64 [n]; the final energy, [n], or None."""

    right: Tensor
    steps: Tensor
    energy: Tensor | None = None


def solved(answer: Tensor, puzzles: Puzzles) -> Tensor:
    """Whether all blank cells of each puzzle are right, bool [n]; `answer` holds logits [n, cells, side]."""
    return ((answer.argmax(dim=2) == puzzles.solution) | puzzles.given).all(dim=1)


def by_blanks(attempt: Attempt, blanks: Tensor) -> list[dict[str, Any]]:
    """Return puzzles, share solved, and mean, deviation and quartiles of the steps by number of blanks."""
    quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    parts = [(value, blanks == value) for value in blanks.unique().tolist()]
    return [
        {
            "blanks": value,
            "puzzles": int(here.sum()),
            "solved": _share(attempt.right[here]),
            "steps": float((steps := attempt.steps[here].double()).mean()),
            "sd": float(steps.std(correction=0)),
            "quartiles": torch.quantile(steps, quarters).tolist(),
        }
        for value, here in parts
    ]


def best_of(energy: Tensor, right: Tensor, starts: int) -> float:
    """Return the share solved by the lowest-energy one of the first `starts` attempts; both [n, attempts]."""
    chosen = energy[:, :starts].argmin(dim=1, keepdim=True)
    return _share(right.gather(1, chosen))


def auc(energy: Tensor, right: Tensor) -> float | None:
    """Return how often a right answer has less energy than a wrong one, over all pairs; ties count one half.

    1 if the energy tells them apart without fail, 0.5 if it says nothing, None if all are right or all are
    wrong.
    """
    return _ordered(energy[right][:, None], energy[~right][None])


def auc_within(energy: Tensor, right: Tensor) -> float | None:
    """The same over pairs of answers to the same puzzle; both tensors are [n, attempts]."""
    puzzle, first, second = (right[:, :, None] & ~right[:, None, :]).nonzero(as_tuple=True)
    return _ordered(energy[puzzle, first], energy[puzzle, second])


def auc_alike(energy: Tensor, right: Tensor, blanks: Tensor) -> float | None:
    """The same over pairs of answers to different puzzles with equally many blanks; all tensors are [n]."""
    alike = blanks[:, None] == blanks
    first, second = (right[:, None] & ~right & alike).nonzero(as_tuple=True)
    return _ordered(energy[first], energy[second])


def _ordered(right: Tensor, wrong: Tensor) -> float | None:
    ranks = (right < wrong).double() + (right == wrong).double() / 2
    return float(ranks.mean()) if ranks.numel() else None


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def _timed(call: Callable[[], Any]) -> float:
    """Milliseconds of the quickest of three calls."""
    time_once = clock(torch.get_default_device())
    return min(time_once(call) for _ in range(3))


def _stopped(attempt: Attempt, puzzles: Puzzles, tolerance: float) -> dict[str, Any]:
    """Summarise a stop rule: shares, steps, steps by blanks, and their correlation (None if constant)."""
    both = torch.stack((attempt.steps, puzzles.blanks)).double()
    varies = bool((both.std(dim=1) > 0).all())
    return {
        "tolerance": tolerance,
        "solved": _share(attempt.right),
        "steps": float(attempt.steps.double().mean()),
        "correlation": float(torch.corrcoef(both)[0, 1]) if varies else None,
        "by_blanks": by_blanks(attempt, puzzles.blanks),
    }


def _allowed(right: Tensor, allowed: Sequence[int]) -> dict[str, float]:
    return {str(steps): _share(right[steps - 1]) for steps in allowed}


def _descend(solver: EnergySolver, answer: Tensor, puzzles: Puzzles, tolerance: float, most: int) -> Attempt:
    solver.descend.tol, solver.descend.max_steps = tolerance, most
    result = solver(answer, puzzles.board())
    return Attempt(solved(result.y, puzzles), result.steps, result.energy)


@torch.no_grad()
def examine_energy(solver: EnergySolver, puzzles: Puzzles, seed: int) -> dict[str, Any]:
    """Examine a trained energy on held-out puzzles; the `seed` is that of the random starts.

    ``allowed``: share solved after so many steps, nothing stopped before. ``stopped``: for each tolerance of
    the stop rule. ``few_steps``: with at most so many steps, the stop rule on, several random starts for each
    puzzle: share solved by the best of n by energy, how many first answers are wrong, and how well the energy
    tells right from wrong: across puzzles, across puzzles alike in their number of blanks, and within
    puzzles. ``milliseconds``: for all puzzles, with the stop rule.
    """
    generator = seeded(seed)
    board = puzzles.board()
    starts = [first_answer(board, generator) for _ in range(STARTS[-1])]
    first, most = starts[0], ALLOWED[-1]

    solver.descend.tol, solver.descend.max_steps, solver.descend.keep_trace = 0.0, most, True
    trace = solver(first, board).trace
    solver.descend.keep_trace = False
    assert trace is not None
    right = torch.zeros(most, len(board), dtype=torch.bool)
    seen = Puzzles(puzzles.solution[trace.row], puzzles.given[trace.row])
    right[trace.step - 1, trace.row] = solved(trace.outputs, seen)

    few = {}
    for steps in FEW_STEPS:
        attempts = [_descend(solver, start, puzzles, ENERGY_TOLERANCES[0], steps) for start in starts]
        rights = torch.stack([attempt.right for attempt in attempts], dim=1)
        energies = torch.stack([attempt.energy for attempt in attempts if attempt.energy is not None], dim=1)
        few[str(steps)] = {
            "best_of": {str(n): best_of(energies, rights, n) for n in STARTS},
            "wrong": int((~rights[:, 0]).sum()),
            "auc_across": auc(energies[:, 0], rights[:, 0]),
            "auc_alike": auc_alike(energies[:, 0], rights[:, 0], puzzles.blanks),
            "puzzles_with_both": int((rights.any(dim=1) & ~rights.all(dim=1)).sum()),
            "auc_within": auc_within(energies, rights),
        }
    return {
        "step_size": float(solver.log_step.exp()),
        "allowed": _allowed(right, ALLOWED),
        "stopped": [
            _stopped(_descend(solver, first, puzzles, tol, most), puzzles, tol) for tol in ENERGY_TOLERANCES
        ],
        "few_steps": few,
        "milliseconds": _timed(lambda: _descend(solver, first, puzzles, ENERGY_TOLERANCES[0], most)),
    }


@torch.no_grad()
def stopped(solver: EnergySolver | Recurrent, puzzles: Puzzles, seed: int) -> dict[str, Any]:
    """Run a solver until it stops, at the first of its tolerances; return the entry of ``stopped``."""
    first, most = first_answer(puzzles.board(), seeded(seed)), ALLOWED[-1]
    if isinstance(solver, Recurrent):
        tolerance = RECURRENT_TOLERANCES[0]
        return _stopped(_settle(solver, first, puzzles, tolerance, most), puzzles, tolerance)
    tolerance = ENERGY_TOLERANCES[0]
    return _stopped(_descend(solver, first, puzzles, tolerance, most), puzzles, tolerance)


def _settle(solver: Recurrent, answer: Tensor, puzzles: Puzzles, tolerance: float, most: int) -> Attempt:
    """Run until no probability of a blank cell changes by more than `tolerance`, on the active rows only."""
    board, final = puzzles.board(), torch.empty_like(answer)
    steps, row = torch.full((len(answer),), most), torch.arange(len(answer))
    for step in range(1, most + 1):
        last, answer = answer, solver(answer, board)
        change = (answer.softmax(dim=2) - last.softmax(dim=2)).abs() * board[..., -1:]
        going = change.amax(dim=(1, 2)) > tolerance
        final[row] = answer
        steps[row] = step
        row, answer, board = row[going], answer[going], board[going]
        if len(row) == 0:
            break
    return Attempt(solved(final, puzzles), steps)


@torch.no_grad()
def examine_recurrent(solver: Recurrent, puzzles: Puzzles, seed: int) -> dict[str, Any]:
    """Examine a recurrent network as `examine_energy` does: ``allowed``, ``stopped`` and ``milliseconds``."""
    board, most = puzzles.board(), ALLOWED[-1]
    first = first_answer(board, seeded(seed))
    answer, right = first, []
    for _ in range(most):
        answer = solver(answer, board)
        right.append(solved(answer, puzzles))
    return {
        "allowed": _allowed(torch.stack(right), ALLOWED),
        "stopped": [
            _stopped(_settle(solver, first, puzzles, tol, most), puzzles, tol) for tol in RECURRENT_TOLERANCES
        ],
        "milliseconds": _timed(lambda: _settle(solver, first, puzzles, RECURRENT_TOLERANCES[0], most)),
    }


@torch.no_grad()
def examine_feed_forward(solver: FeedForward, puzzles: Puzzles) -> dict[str, Any]:
    """Examine a feed-forward network: ``solved``, ``by_blanks`` and ``milliseconds``."""
    board = puzzles.board()
    right = solved(solver(board), puzzles)
    attempt = Attempt(right, torch.ones(len(board), dtype=torch.int64))
    return {
        "solved": _share(right),
        "by_blanks": by_blanks(attempt, puzzles.blanks),
        "milliseconds": _timed(lambda: solver(board)),
    }
