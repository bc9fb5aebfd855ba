"""The experiment: its options and cells, and its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..runs import Cell, FirstSeed, Quick, Results, Seeds, Setup, experiment
from ..runs.report import Block, Column, Picture, Verdicts, tabulate
from ..runs.statistics import ONE_SEED, estimate, form, interval, mean_interval, points, said
from ..style import INK, MUTED, ORANGE, OTHERS, OURS, WRONG, curve
from .measure import ALLOWED, SOURCES, measure
from .training import Recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["sudoku"]

TEST_PUZZLES, QUICK_PUZZLES, QUICK_UPDATES = {4: 1600, 9: 400}, 24, 20
LABELS = {"feed_forward": "feed-forward", "recurrent": "recurrent", "energy": "energy"}
ITERATE = {"recurrent": ORANGE, "energy": OURS}
"""The solvers that take steps, and their colours."""
HELD_OUT = {
    4: "Held out: 68 of the 288 grids, and with them a fifth of the kinds of puzzles: no training puzzle "
    "becomes a held-out one by relabelling digits, exchanging rows, columns, bands or stacks, or "
    "reflection. All solvers treat the lines of a board alike, so that puzzles of held-out grids alone "
    "would be no news to them. No puzzle is altered in training.",
    9: "Held out: puzzles of other random grids. Naked and hidden singles alone solve all puzzles. No puzzle "
    "is altered in training.",
}


@experiment(measure)
def sudoku(
    *,
    size: Annotated[
        int, typer.Option(help="Side of the boards: 4 or 9. 9 is a try: few blanks, and 4's recipe.")
    ] = 4,
    seeds: Seeds = 1,
    first_seed: FirstSeed = 0,
    quick: Quick = False,
) -> Setup:
    """Solve Sudoku by descending a learnt energy, longer if harder. Two minutes per seed; ten for 9×9."""
    if size not in SOURCES:
        raise ValueError(f"size: expected 4 or 9, got {size}")
    recipe = asdict(replace(Recipe(), updates=QUICK_UPDATES) if quick else Recipe())
    every = list(range(first_seed, first_seed + seeds))
    options = {"size": size, "puzzles": QUICK_PUZZLES if quick else TEST_PUZZLES[size], "recipe": recipe}
    blanks = SOURCES[size].blanks
    return Setup(
        config={**options, "seeds": every, "quick": quick},
        cells=[Cell(f"seed-{seed}", options, seed) for seed in every],
        about=f"[bold]{size}×{size} Sudoku[/], {blanks[0]} to {blanks[-1]} blanks, one solution each. "
        f"{HELD_OUT[size]}",
    )


def _known(values: Any) -> Any:
    """Drop seeds in which a quantity is undefined, such as a correlation of constants; None if all are."""
    values = values.dropna()
    return values.astype(float) if len(values) else None


def _solver(row: Results) -> str:
    return row.path.split("/")[0]


def _rule(row: Results, path: str) -> Any:
    """Return a quantity with the stop rule at its first tolerance; the feed-forward network has no rule."""
    if _solver(row) == "feed_forward":
        return row[path] if path == "solved" else None
    return _known(row[f"stopped/0/{path}"])


def _ratio(row: Results) -> Any:
    return row["stopped/0/by_blanks/-1/steps"] / row["stopped/0/by_blanks/0/steps"]


@sudoku.reports
def report(results: Results) -> list[Block]:
    """What the solvers solve, in how many steps, and whether the energy tells right from wrong."""
    solvers = {name: results.at(name) for name in LABELS}
    energy, size = solvers["energy"], results.config["size"]
    blanks = [entry["blanks"] for entry in energy.first("stopped/0/by_blanks")]
    tolerances = {name: solvers[name].first("stopped/0/tolerance") for name in ITERATE}
    stops = {
        (LABELS[name], f"{entry['tolerance']:g}"): solvers[name].at(f"stopped/{i}")
        for name in ITERATE
        for i, entry in sorted(
            enumerate(solvers[name].first("stopped")), key=lambda each: -each[1]["tolerance"]
        )
    }
    few = {
        f"{steps} step{'s' if steps != '1' else ''}": energy.at(f"few_steps/{steps}")
        for steps in energy.keys("few_steps")
    }
    starts = energy.keys("few_steps/1/best_of")
    plain, share = form(1, 1.0), form()
    twins = []
    if "of_any_kind" in results:
        each = (f"{LABELS[name]} {interval(results[f'of_any_kind/{name}/solved'])} %" for name in LABELS)
        twins = [
            "Puzzles of the held-out grids that may have twins among the training puzzles: "
            f"{', '.join(each)} solved."
        ]
    return [
        f"# Sudoku, {size}×{size}",
        f"{results.config['puzzles']:,} held-out puzzles of {blanks[0]} to {blanks[-1]} blanks, one "
        f"solution each; {results.opening} {HELD_OUT[size]}",
        Picture(
            "sudoku.png", "One puzzle, and all of them", lambda figure: _draw(figure, results), (15, 9.2)
        ),
        Verdicts(_sentences(solvers)),
        "## Held-out puzzles",
        f"Steps until the energy changes by no more than {tolerances['energy']:g}, or no probability of "
        f"the recurrent network by more than {tolerances['recurrent']:g}; the step that shows it "
        "counts. r: correlation of steps and blanks. ms: time to solve all puzzles as one batch.",
        tabulate(
            "solver",
            {
                f"{LABELS[name]}, {row.first('parameters') / 1000:.0f}k parameters": row
                for name, row in solvers.items()
            },
            Column("training, s", "seconds", form(0, 1.0)),
            Column("solved, %", lambda row: _rule(row, "solved"), share),
            Column("steps", lambda row: _rule(row, "steps"), plain),
            Column(f"at {blanks[0]} blanks", lambda row: _rule(row, "by_blanks/0/steps"), plain),
            Column(f"at {blanks[-1]} blanks", lambda row: _rule(row, "by_blanks/-1/steps"), plain),
            Column("r", lambda row: _rule(row, "correlation"), form(2, 1.0)),
            Column("ms", "milliseconds", form(0, 1.0)),
        ),
        "## Solved, %, after so many steps, nothing stopped before",
        tabulate(
            "solver",
            {LABELS[name]: solvers[name] for name in ITERATE},
            *(Column(str(steps), f"allowed/{steps}", share) for steps in ALLOWED),
        ),
        "## Where the stop rule stops",
        tabulate(
            ("solver", "tolerance"),
            stops,
            Column("solved, %", "solved", share),
            Column("steps", "steps", plain),
            Column(f"at {blanks[0]} blanks", "by_blanks/0/steps", plain),
            Column(f"at {blanks[-1]} blanks", "by_blanks/-1/steps", plain),
        ),
        "## Does the energy tell right from wrong?",
        "n: puzzles solved, %, by the one of n random starts that ends with the lowest energy. Wrong: "
        "number of wrong first answers, of all seeds. The last columns say how often a right answer has "
        "less energy than a wrong one (1: always, 0.5: by chance): an answer to the same puzzle, to "
        "another with as many blanks, to any other.",
        tabulate(
            "at most",
            few,
            *(Column(f"n = {n}", f"best_of/{n}", share) for n in starts),
            Column("wrong", lambda row: int(row["wrong"].sum())),
            *(
                Column(name, lambda row, name=name: _known(row[f"auc_{name}"]), form(2, 1.0))  # type: ignore[misc]
                for name in ("within", "alike", "across")
            ),
        ),
        *twins,
    ]


class _Compared(NamedTuple):
    """A quantity of the two solvers with steps: whether more (1) or less (−1) is better, digits, scale."""

    name: str
    quantity: Any
    sign: int
    digits: int = 1
    scale: float = 1.0


COMPARED = (
    _Compared("share solved, %", lambda row: _rule(row, "solved"), 1, scale=100.0),
    _Compared("steps", lambda row: _rule(row, "steps"), -1),
    _Compared("time to solve, ms", lambda row: row["milliseconds"], -1, 0),
    _Compared("time to train, s", lambda row: row["seconds"], -1, 0),
    _Compared("steps on the hardest for each on the easiest", _ratio, 1),
)


def _sentences(solvers: dict[str, Results]) -> list[str]:
    """Compare the energy with the feed-forward network, and the two iterating solvers with each other."""
    energy, recurrent = solvers["energy"], solvers["recurrent"]
    ours, theirs = _rule(energy, "solved"), solvers["feed_forward"]["solved"]
    text = (
        f"The energy solves {100 * ours.mean():.1f} %, the feed-forward network {100 * theirs.mean():.1f} %: "
        f"{points(ours - theirs, 1)} points"
    )
    one = len(ours) == 1
    undecided = ONE_SEED if one else "Not decided, the interval holds 0"
    sentences = [f"{ONE_SEED}. {text}." if one else f"{text} ({said(ours - theirs, 'more', 'fewer')})."]
    verdicts: dict[str, list[str]] = {
        "The energy does better": [],
        "The recurrent network does better": [],
        f"{undecided}: energy against recurrent network": [],
    }
    better, worse, open_question = verdicts.values()
    for entry in COMPARED:
        own, other = entry.quantity(energy), entry.quantity(recurrent)
        difference = estimate(entry.sign * (own - other))
        figures = " against ".join(
            f"{entry.scale * values.mean():.{entry.digits}f}" for values in (own, other)
        )
        kind = better if difference.above else worse if difference.below else open_question
        kind.append(f"{entry.name} ({figures})")
    return sentences + [f"{title}: {'; '.join(parts)}." for title, parts in verdicts.items() if parts]


def _draw(figure: Figure, results: Results) -> None:
    """One puzzle on its way down the energy; below it, what the solvers make of all puzzles."""
    figure.set_layout_engine("none")
    energy = results.at("energy")
    size, seeds = results.config["size"], len(results.seeds)
    figure.text(0.025, 0.948, "Thinking by going downhill", fontsize=19, weight="bold")
    figure.text(
        0.025,
        0.912,
        f"{size}×{size} Sudoku, {results.config['puzzles']:,} held-out puzzles: "
        f"{100 * energy['stopped/0/solved'].mean():.1f}% solved in "
        f"{energy['stopped/0/steps'].mean():.1f} steps on average, each stopped where its energy "
        f"changes by no more than {energy.first('stopped/0/tolerance'):g} ({seeds} "
        f"seed{'s' if seeds > 1 else ''})",
        fontsize=12,
        color=MUTED,
    )
    _boards(figure, results.first("descent"))
    charts = figure.add_gridspec(1, 4, left=0.045, right=0.985, top=0.535, bottom=0.075, wspace=0.24)
    for i, chart in enumerate((_allowed, _solved, _steps, _starts)):
        chart(figure.add_subplot(charts[i]), results)


def _boards(figure: Figure, descent: dict[str, Any]) -> None:
    given, solution = descent["given"], descent["solution"]
    side = round(len(given) ** 0.5)
    box = round(side**0.5)
    grid = figure.add_gridspec(1, 7, left=0.025, right=0.985, top=0.84, bottom=0.64, wspace=0.12)
    for i, step in enumerate(descent["step"]):
        axes = figure.add_subplot(grid[0, i])
        for cell, (digit, chance) in enumerate(
            zip(descent["digit"][i], descent["probability"][i], strict=True)
        ):
            shade = 1.0 if given[cell] else (chance - 1 / side) / (1 - 1 / side)
            axes.text(
                cell % side + 0.5,
                cell // side + 0.54,
                str((solution[cell] if given[cell] else digit) + 1),
                color=INK if given[cell] else OURS if digit == solution[cell] else WRONG,
                alpha=0.15 + 0.85 * shade,
                fontsize=64 / side,
                weight="bold" if given[cell] else "normal",
                ha="center",
                va="center",
            )
        for line in range(side + 1):
            width = 1.6 if line % box == 0 else 0.6
            axes.plot((0, side), (line, line), color=MUTED, linewidth=width)
            axes.plot((line, line), (0, side), color=MUTED, linewidth=width)
        axes.set(xlim=(-0.05, side + 0.05), ylim=(side + 0.05, -0.05), aspect="equal")
        axes.set_axis_off()
        when = f"{f'step {step}' if step else 'start'}    E = {descent['energy'][i]:.3g}"
        axes.set_title(when, fontsize=10, weight="normal", loc="center", color=MUTED)
    figure.text(0.025, 0.878, "One puzzle on its way down", fontsize=11, weight="bold")
    legend = "black: given     blue: right     red: wrong     the fainter, the less sure"
    figure.text(0.985, 0.612, legend, fontsize=9.5, color=MUTED, ha="right")


def _powers_of_two(axes: Axes, ticks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()


def _allowed(axes: Axes, results: Results) -> None:
    for name, color in ITERATE.items():
        solved = [results[f"{name}/allowed/{steps}"] for steps in ALLOWED]
        curve(axes, ALLOWED, solved, name, scale=100, color=color)
    plain = 100 * results["feed_forward/solved"].mean()
    axes.axhline(plain, color=OTHERS, linestyle=(0, (4, 3)), label="feed-forward")
    _powers_of_two(axes, ALLOWED)
    axes.set(xlabel="steps allowed", ylabel="solved, %")
    axes.legend(loc="lower right")
    axes.set_title("Solved, by steps allowed", pad=8)


def _solved(axes: Axes, results: Results) -> None:
    for name, color in {"feed_forward": OTHERS, **ITERATE}.items():
        path = f"{name}/by_blanks" if name == "feed_forward" else f"{name}/stopped/0/by_blanks"
        blanks = [entry["blanks"] for entry in results.first(path)]
        curve(axes, blanks, results.each(path, "solved"), LABELS[name], scale=100, color=color)
    axes.set_xticks(blanks)
    axes.set(xlabel="blanks", ylabel="solved, %")
    axes.set_title("Solved, by blanks", pad=8)


def _steps(axes: Axes, results: Results) -> None:
    for name, color in ITERATE.items():
        path = f"{name}/stopped/0/by_blanks"
        blanks = [entry["blanks"] for entry in results.first(path)]
        low, high = ([v.mean() for v in results.each(path, f"quartiles/{i}")] for i in (0, 2))
        axes.fill_between(blanks, low, high, color=color, alpha=0.15, linewidth=0)
        means = [mean_interval(list(steps)).mean for steps in results.each(path, "steps")]
        axes.plot(blanks, means, "o-", color=color, markersize=4)
    axes.set_xticks(blanks)
    axes.set(ylim=(0, None), xlabel="blanks (shaded: between the quartiles)", ylabel="steps")
    axes.set_title("Steps until it stops, by blanks", pad=8)


def _starts(axes: Axes, results: Results) -> None:
    budgets = results.keys("energy/few_steps")
    for i, budget in enumerate(budgets):
        few = results.at(f"energy/few_steps/{budget}")
        starts = [int(n) for n in few.keys("best_of")]
        label = f"at most {budget} step{'s' if budget != '1' else ''}"
        shade = 0.35 + 0.65 * i / (len(budgets) - 1)
        curve(axes, starts, [few[f"best_of/{n}"] for n in starts], label, scale=100, color=OURS, alpha=shade)
    _powers_of_two(axes, starts)
    axes.set(xlabel="random starts", ylabel="solved, %")
    axes.legend(loc="best")
    axes.set_title("Best of several starts, by energy", pad=8)
