"""What the trained solvers make of held-out puzzles."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .model import FeedForward, Recurrent
from .puzzles import Puzzles
from .training import EnergySolver, first_answer

__all__ = [
    "ALLOWED",
    "STARTS",
    "Attempt",
    "auc",
    "auc_alike",
    "auc_within",
    "best_of",
    "by_blanks",
    "examine_energy",
    "examine_feed_forward",
    "examine_recurrent",
    "solved",
    "stopped",
]

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
    rows = []
    for value in blanks.unique().tolist():
        here = blanks == value
        steps = attempt.steps[here].double()
        low, middle, high = torch.quantile(
            steps, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        ).tolist()
        rows.append(
            {
                "blanks": value,
                "puzzles": int(here.sum()),
                "solved": _share(attempt.right[here]),
                "steps": float(steps.mean()),
                "sd": float(steps.std(correction=0)),
                "quartiles": [low, middle, high],
            }
        )
    return rows


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
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1e3 * min(times)


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
    """Examine an energy.

    Parameters
    ----------
    solver : EnergySolver
        Trained.
    puzzles : Puzzles
        Held-out ones.
    seed : int
        Of the random starts.

    Returns
    -------
    dict
        ``allowed``: share solved after so many steps, nothing stopped before. ``stopped``: for each tolerance
        of the stop rule. ``few_steps``: with at most so many steps, the stop rule on, several random starts
        for each puzzle: share solved by the best of n by energy, how many first answers are wrong, and how
        well the energy tells right from wrong: across puzzles, across puzzles alike in their number of
        blanks, and within puzzles. ``milliseconds``: for all puzzles, with the stop rule.
    """
    generator = torch.Generator().manual_seed(seed)
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
    first, most = first_answer(puzzles.board(), torch.Generator().manual_seed(seed)), ALLOWED[-1]
    if isinstance(solver, Recurrent):
        return _stopped(
            _settle(solver, first, puzzles, RECURRENT_TOLERANCES[0], most), puzzles, RECURRENT_TOLERANCES[0]
        )
    return _stopped(
        _descend(solver, first, puzzles, ENERGY_TOLERANCES[0], most), puzzles, ENERGY_TOLERANCES[0]
    )


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
    first = first_answer(board, torch.Generator().manual_seed(seed))
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
