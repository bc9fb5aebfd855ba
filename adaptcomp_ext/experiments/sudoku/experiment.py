"""The experiment: its options and cells, and its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..runs import Cell, FirstSeed, Quick, Results, Seeds, Setup, experiment
from ..runs.report import Block, Column, Picture, Verdicts, tabulate
from ..runs.statistics import ONE_SEED, estimate, form, interval, points, said
from ..style import INK, MUTED, ORANGE, OTHERS, OURS, WIDTH, WRONG, curve, legend
from .measure import ALLOWED, SOURCES, measure
from .training import Recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

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


def _known_at(row: Results, path: str) -> Any:
    """A quantity of the seeds in which it is defined, as a correlation of constants is not; None: of none."""
    values = row[path].dropna()
    return values.astype(float) if len(values) else None


def _rule(row: Results, path: str) -> Any:
    """Return a quantity with the stop rule at its first tolerance; the feed-forward network has no rule."""
    if row.path == "feed_forward":
        return row[path] if path == "solved" else None
    return _known_at(row, f"stopped/0/{path}")


def _ratio(row: Results) -> Any:
    return row["stopped/0/by_blanks/-1/steps"] / row["stopped/0/by_blanks/0/steps"]


@sudoku.reports
def report(results: Results) -> list[Block]:
    """What the solvers solve, in how many steps, and whether the energy tells right from wrong."""
    solvers = {name: results.at(name) for name in LABELS}
    energy, size = solvers["energy"], results.config["size"]
    iterating = {LABELS[name]: solvers[name] for name in ITERATE}
    blanks = [entry["blanks"] for entry in energy.first("stopped/0/by_blanks")]
    tolerance = {label: row.first("stopped/0/tolerance") for label, row in iterating.items()}
    stops = {
        (label, f"{entry['tolerance']:g}"): row.at(f"stopped/{i}")
        for label, row in iterating.items()
        for i, entry in sorted(enumerate(row.first("stopped")), key=lambda each: -each[1]["tolerance"])
    }
    few = {_at_most(steps): energy.at(f"few_steps/{steps}") for steps in energy.keys("few_steps")}
    plain, share, ratio, whole = form(1, 1.0), form(), form(2, 1.0), form(0, 1.0)
    ends = [(f"at {blanks[i]} blanks", f"by_blanks/{i}/steps") for i in (0, -1)]
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
        Picture("sudoku.png", "One puzzle, and all of them", partial(_draw, results), (WIDTH, 18.5)),
        Verdicts(_sentences(solvers)),
        "## Held-out puzzles",
        f"Steps until the energy changes by no more than {tolerance['energy']:g}, or no probability of "
        f"the recurrent network by more than {tolerance['recurrent']:g}; the step that shows it "
        "counts. r: correlation of steps and blanks. ms: time to solve all puzzles as one batch.",
        tabulate(
            "solver",
            {
                f"{LABELS[name]}, {row.first('parameters') / 1000:.0f}k parameters": row
                for name, row in solvers.items()
            },
            Column("training, s", "seconds", whole),
            Column("solved, %", partial(_rule, path="solved"), share),
            Column("steps", partial(_rule, path="steps"), plain),
            *(Column(title, partial(_rule, path=path), plain) for title, path in ends),
            Column("r", partial(_rule, path="correlation"), ratio),
            Column("ms", "milliseconds", whole),
        ),
        "## Solved, %, after so many steps, nothing stopped before",
        tabulate("solver", iterating, *(Column(str(steps), f"allowed/{steps}", share) for steps in ALLOWED)),
        "## Where the stop rule stops",
        tabulate(
            ("solver", "tolerance"),
            stops,
            Column("solved, %", "solved", share),
            Column("steps", "steps", plain),
            *(Column(*end, plain) for end in ends),
        ),
        "## Does the energy tell right from wrong?",
        "n: puzzles solved, %, by the one of n random starts that ends with the lowest energy. Wrong: "
        "number of wrong first answers, of all seeds. The last columns say how often a right answer has "
        "less energy than a wrong one (1: always, 0.5: by chance): an answer to the same puzzle, to "
        "another with as many blanks, to any other.",
        tabulate(
            "at most",
            few,
            *(Column(f"n = {n}", f"best_of/{n}", share) for n in energy.keys("few_steps/1/best_of")),
            Column("wrong", lambda row: int(row["wrong"].sum())),
            *(
                Column(name, partial(_known_at, path=f"auc_{name}"), ratio)
                for name in ("within", "alike", "across")
            ),
        ),
        *twins,
    ]


def _at_most(steps: str) -> str:
    return f"{steps} step{'s' if steps != '1' else ''}"


class _Compared(NamedTuple):
    """A quantity of the two solvers with steps: whether more (1) or less (−1) is better, digits, scale."""

    name: str
    quantity: Any
    sign: int
    digits: int = 1
    scale: float = 1.0


COMPARED = (
    _Compared("share solved, %", partial(_rule, path="solved"), 1, scale=100.0),
    _Compared("steps", partial(_rule, path="steps"), -1),
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


def _draw(results: Results, figure: Figure) -> None:
    """One puzzle on its way down the energy; below it, what the solvers make of all puzzles."""
    boards, charts = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 3))[:, 0]
    _boards(boards, results.first("descent"))
    for axes, draw in zip(charts.subplots(4, 1), (_allowed, _solved, _steps, _starts), strict=True):
        draw(axes, results)


def _boards(figure: SubFigure, descent: dict[str, Any]) -> None:
    given, solution = descent["given"], descent["solution"]
    side = round(len(given) ** 0.5)
    box, least = round(side**0.5), 1 / side
    figure.suptitle("One puzzle on its way down", x=0.02, ha="left", weight="bold")
    panels = figure.subplots(2, 4).flat
    for i, (axes, step) in enumerate(zip(panels, descent["step"], strict=False)):
        for cell, (digit, chance) in enumerate(
            zip(descent["digit"][i], descent["probability"][i], strict=True)
        ):
            known = given[cell]
            axes.text(
                cell % side + 0.5,
                cell // side + 0.54,
                str((solution[cell] if known else digit) + 1),
                color=INK if known else OURS if digit == solution[cell] else WRONG,
                alpha=1.0 if known else 0.15 + 0.85 * (chance - least) / (1 - least),
                fontsize=56 / side,
                weight="bold" if known else "normal",
                ha="center",
                va="center",
            )
        for line in range(side + 1):
            width = 1.6 if line % box == 0 else 0.6
            axes.plot((0, side), (line, line), color=MUTED, lw=width)
            axes.plot((line, line), (0, side), color=MUTED, lw=width)
        axes.set(xlim=(-0.05, side + 0.05), ylim=(side + 0.05, -0.05), aspect="equal")
        when = f"step {step}" if step else "start"
        axes.set_title(f"{when}, E = {descent['energy'][i]:.3g}", fontsize=10, weight="normal", color=MUTED)
    for axes in figure.axes:
        axes.set_axis_off()
    key = "black: given\nblue: right\nred: wrong\nthe fainter,\nthe less sure"
    figure.axes[-1].text(0, 1, key, fontsize=10.5, color=MUTED, va="top")


def _powers_of_two(axes: Axes, ticks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()


def _allowed(axes: Axes, results: Results) -> None:
    for name, color in ITERATE.items():
        solved = [results[f"{name}/allowed/{steps}"] for steps in ALLOWED]
        curve(axes, ALLOWED, solved, name, scale=100, color=color)
    plain = 100 * results["feed_forward/solved"].mean()
    axes.axhline(plain, color=OTHERS, ls=(0, (4, 3)), label="feed-forward")
    _powers_of_two(axes, ALLOWED)
    axes.set(xlabel="steps allowed", ylabel="solved, %")
    axes.set_title("Solved, by steps allowed")
    legend(axes, 3)


def _solved(axes: Axes, results: Results) -> None:
    for name, color in {"feed_forward": OTHERS, **ITERATE}.items():
        path = f"{name}/by_blanks" if name == "feed_forward" else f"{name}/stopped/0/by_blanks"
        blanks = [entry["blanks"] for entry in results.first(path)]
        curve(axes, blanks, results.each(path, "solved"), LABELS[name], scale=100, color=color)
    axes.set_xticks(blanks)
    axes.set(xlabel="blanks", ylabel="solved, %")
    axes.set_title("Solved, by blanks")
    legend(axes, 3)


def _steps(axes: Axes, results: Results) -> None:
    for name, color in ITERATE.items():
        path = f"{name}/stopped/0/by_blanks"
        blanks = [entry["blanks"] for entry in results.first(path)]
        low, means, high = (
            [v.mean() for v in results.each(path, key)] for key in ("quartiles/0", "steps", "quartiles/2")
        )
        axes.fill_between(blanks, low, high, color=color, alpha=0.15, lw=0)
        axes.plot(blanks, means, "o-", color=color, ms=4, label=LABELS[name])
    axes.set_xticks(blanks)
    axes.set(ylim=(0, None), xlabel="blanks (shaded: between the quartiles)", ylabel="steps")
    axes.set_title("Steps until it stops, by blanks")
    legend(axes)


def _starts(axes: Axes, results: Results) -> None:
    budgets = results.keys("energy/few_steps")
    for i, budget in enumerate(budgets):
        few = results.at(f"energy/few_steps/{budget}")
        starts = [int(n) for n in few.keys("best_of")]
        solved = [few[f"best_of/{n}"] for n in starts]
        shade = 0.35 + 0.65 * i / (len(budgets) - 1)
        curve(axes, starts, solved, f"at most {_at_most(budget)}", scale=100, color=OURS, alpha=shade)
    _powers_of_two(axes, starts)
    axes.set(xlabel="random starts", ylabel="solved, %")
    axes.set_title("Best of several starts, by energy")
    legend(axes)
