"""The picture: one puzzle on its way down the energy, and what the solvers make of all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from adaptcomp_ext.experiments.style import INK, MUTED, ORANGE, OTHERS, OURS, STYLE, WRONG, save

from .evaluation import ENERGY_TOLERANCES
from .puzzles import Puzzles
from .training import EnergySolver, first_answer

__all__ = ["Way", "draw", "way_of"]

BOARDS = 7


class Way(NamedTuple):
    """One puzzle, solution and given [cells], and its descent: answers [N + 1, cells, side], energies [N + 1]."""

    solution: Tensor
    given: Tensor
    answers: Tensor
    energies: Tensor


@torch.no_grad()
def way_of(solver: EnergySolver, puzzles: Puzzles, seed: int) -> Way:
    """Follow the puzzle, out of those with the most blanks, that takes the median number of steps."""
    hardest = (puzzles.blanks == puzzles.blanks.max()).nonzero()[:, 0]
    some = Puzzles(puzzles.solution[hardest], puzzles.given[hardest])
    board = some.board()
    start = first_answer(board, torch.Generator().manual_seed(seed))
    solver.descend.tol, solver.descend.keep_trace = ENERGY_TOLERANCES[0], True
    result = solver(start, board)
    solver.descend.keep_trace = False
    assert result.trace is not None
    row = int(result.steps.argsort()[len(hardest) // 2])
    answers = torch.cat((start[row : row + 1], result.trace.outputs[result.trace.row == row]))
    energies = solver.energy(answers, board[row : row + 1].expand(len(answers), -1, -1))
    return Way(some.solution[row], some.given[row], answers, energies)


def draw(report: Mapping[str, Any], way: Way, path: Path) -> None:
    """Draw the picture.

    Parameters
    ----------
    report : mapping
        The content of the JSON file.
    way : Way
        The puzzle to show.
    path : Path
        PNG to write.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(15, 9.2), facecolor="white")
        FigureCanvasAgg(figure)
        _title(figure, report)
        _boards(figure, way)
        charts = figure.add_gridspec(1, 4, left=0.045, right=0.985, top=0.535, bottom=0.075, wspace=0.24)
        _allowed(figure.add_subplot(charts[0]), report)
        _solved(figure.add_subplot(charts[1]), report)
        _steps(figure.add_subplot(charts[2]), report)
        _starts(figure.add_subplot(charts[3]), report)
        save(figure, path, 130, bool(report.get("quick")))


def _title(figure: Figure, report: Mapping[str, Any]) -> None:
    runs = report["runs"]
    stopped = [run["energy"]["stopped"][0] for run in runs]
    share, steps = _mean(stopped, lambda each: each["solved"]), _mean(stopped, lambda each: each["steps"])
    puzzles = report["puzzles"]
    size = puzzles["size"]
    figure.text(0.025, 0.948, "Thinking by going downhill", fontsize=19, weight="bold")
    figure.text(
        0.025,
        0.912,
        f"{size}×{size} Sudoku, {puzzles['test']:,} held-out puzzles: {share:.1%} solved in {steps:.1f} steps on average, each "
        f"stopped where its energy changes by no more than {stopped[0]['tolerance']:g} "
        f"({len(runs)} seed{'s' if len(runs) > 1 else ''})",
        fontsize=12,
        color=MUTED,
    )


def _boards(figure: Figure, way: Way) -> None:
    last = len(way.answers) - 1
    shown = sorted({round(last * (i / (BOARDS - 1)) ** 1.7) for i in range(BOARDS)})
    grid = figure.add_gridspec(1, BOARDS, left=0.025, right=0.985, top=0.84, bottom=0.64, wspace=0.12)
    side = way.answers.shape[2]
    box = round(side**0.5)
    for i, step in enumerate(shown):
        axis = figure.add_subplot(grid[0, i])
        chance, digit = way.answers[step].softmax(dim=1).max(dim=1)
        for cell in range(side * side):
            given, right = bool(way.given[cell]), bool(digit[cell] == way.solution[cell])
            shade = 1.0 if given else float(chance[cell] - 1 / side) / (1 - 1 / side)
            axis.text(
                cell % side + 0.5,
                cell // side + 0.54,
                str(int(way.solution[cell] if given else digit[cell]) + 1),
                color=INK if given else OURS if right else WRONG,
                alpha=0.15 + 0.85 * shade,
                fontsize=64 / side,
                weight="bold" if given else "normal",
                ha="center",
                va="center",
            )
        for line in range(side + 1):
            width = 1.6 if line % box == 0 else 0.6
            axis.plot((0, side), (line, line), color=MUTED, linewidth=width)
            axis.plot((line, line), (0, side), color=MUTED, linewidth=width)
        axis.set(xlim=(-0.05, side + 0.05), ylim=(side + 0.05, -0.05), xticks=[], yticks=[], aspect="equal")
        for spine in axis.spines.values():
            spine.set_visible(False)
        when = "start" if step == 0 else f"step {step}"
        axis.set_title(
            f"{when}    E = {float(way.energies[step]):.3g}",
            fontsize=10,
            weight="normal",
            loc="center",
            color=MUTED,
        )
    figure.text(0.025, 0.878, "One puzzle on its way down", fontsize=11, weight="bold")
    legend = "black: given     blue: right     red: wrong     the fainter, the less sure"
    figure.text(0.985, 0.612, legend, fontsize=9.5, color=MUTED, ha="right")


def _allowed(axis: Axes, report: Mapping[str, Any]) -> None:
    runs = report["runs"]
    allowed = [int(steps) for steps in runs[0]["energy"]["allowed"]]
    for name, color in (("recurrent", ORANGE), ("energy", OURS)):
        _line(
            axis,
            allowed,
            [[100 * run[name]["allowed"][str(n)] for run in runs] for n in allowed],
            color,
            name,
        )
    plain = 100 * _mean(runs, lambda run: run["feed_forward"]["solved"])
    axis.axhline(plain, color=OTHERS, linestyle=(0, (4, 3)), label="feed-forward")
    axis.set_xscale("log", base=2)
    axis.set_xticks(allowed, [str(n) for n in allowed])
    axis.minorticks_off()
    axis.set(xlabel="steps allowed", ylabel="solved, %")
    axis.legend(loc="lower right")
    axis.set_title("Solved, by steps allowed", pad=8)


def _solved(axis: Axes, report: Mapping[str, Any]) -> None:
    runs = report["runs"]
    blanks = [row["blanks"] for row in runs[0]["feed_forward"]["by_blanks"]]
    groups: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
        ("feed-forward", OTHERS, lambda run: run["feed_forward"]["by_blanks"]),
        ("recurrent", ORANGE, lambda run: run["recurrent"]["stopped"][0]["by_blanks"]),
        ("energy", OURS, lambda run: run["energy"]["stopped"][0]["by_blanks"]),
    )
    for name, color, of in groups:
        _line(
            axis,
            blanks,
            [[100 * of(run)[i]["solved"] for run in runs] for i in range(len(blanks))],
            color,
            name,
        )
    axis.set_xticks(blanks)
    axis.set(xlabel="blanks", ylabel="solved, %")
    axis.set_title("Solved, by blanks", pad=8)


def _steps(axis: Axes, report: Mapping[str, Any]) -> None:
    runs = report["runs"]
    for name, color in (("recurrent", ORANGE), ("energy", OURS)):
        rows = [run[name]["stopped"][0]["by_blanks"] for run in runs]
        blanks = [row["blanks"] for row in rows[0]]
        means = [statistics.fmean(row[i]["steps"] for row in rows) for i in range(len(blanks))]
        quartiles = [
            [statistics.fmean(row[i]["quartiles"][which] for row in rows) for i in range(len(blanks))]
            for which in (0, 2)
        ]
        axis.fill_between(blanks, quartiles[0], quartiles[1], color=color, alpha=0.15, linewidth=0)
        axis.plot(blanks, means, "o-", color=color, markersize=4)
    axis.set_xticks(blanks)
    axis.set(ylim=(0, None), xlabel="blanks (shaded: between the quartiles)", ylabel="steps")
    axis.set_title("Steps until it stops, by blanks", pad=8)


def _starts(axis: Axes, report: Mapping[str, Any]) -> None:
    runs = report["runs"]
    budgets = list(runs[0]["energy"]["few_steps"])
    for i, budget in enumerate(budgets):
        few = [run["energy"]["few_steps"][budget] for run in runs]
        starts = [int(n) for n in few[0]["best_of"]]
        values = [[100 * each["best_of"][str(n)] for each in few] for n in starts]
        shade = 0.35 + 0.65 * i / (len(budgets) - 1)
        label = f"at most {budget} step{'s' if budget != '1' else ''}"
        _line(axis, starts, values, OURS, label, alpha=shade)
    axis.set_xscale("log", base=2)
    axis.set_xticks(starts, [str(n) for n in starts])
    axis.minorticks_off()
    axis.set(xlabel="random starts", ylabel="solved, %")
    axis.legend(loc="best")
    axis.set_title("Best of several starts, by energy", pad=8)


def _line(
    axis: Axes, x: Sequence[int], y: Sequence[Sequence[float]], color: str, label: str, alpha: float = 1.0
) -> None:
    """Means over seeds, with bars of one standard deviation where there are several."""
    spread = [statistics.stdev(values) for values in y] if len(y[0]) > 1 else None
    means = [statistics.fmean(values) for values in y]
    axis.errorbar(
        x, means, yerr=spread, fmt="o-", color=color, markersize=4, linewidth=1.5, label=label, alpha=alpha
    )


def _mean(items: Sequence[Any], of: Callable[[Any], float]) -> float:
    return statistics.fmean(of(item) for item in items)
