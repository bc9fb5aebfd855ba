"""From puzzles to tables on the screen, a picture and a JSON file."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from adaptcomp_ext.experiments.bench import machine
from adaptcomp_ext.experiments.files import write_json
from adaptcomp_ext.experiments.runs import ONE_SEED, paired, points, said, seeds_from
from adaptcomp_ext.experiments.settings import settings
from adaptcomp_ext.experiments.style import QUICK

from . import figure
from .evaluation import ALLOWED, examine_energy, examine_feed_forward, examine_recurrent, stopped
from .model import FeedForward, Recurrent
from .nine import NineByNine
from .puzzles import FourByFour, Puzzles, Source
from .training import EnergySolver, Recipe, train_energy, train_feed_forward, train_recurrent

__all__ = ["sudoku"]

JSON_NAME = "sudoku.json"
FIGURE_NAME = "sudoku.png"
TEST_PUZZLES, QUICK_PUZZLES, QUICK_UPDATES = {4: 1600, 9: 400}, 24, 20
SOLVERS = ("feed_forward", "recurrent", "energy")
LABELS = {"feed_forward": "feed-forward", "recurrent": "recurrent", "energy": "energy"}
HELD_OUT = {
    4: "Held out: 68 of the 288 grids, and with them a fifth of the kinds of puzzles: no training puzzle becomes a held-out one "
    "by relabelling digits, exchanging rows, columns, bands or stacks, or reflection. All solvers treat the lines of a board "
    "alike, so that puzzles of held-out grids alone would be no news to them. No puzzle is altered in training.",
    9: "Held out: puzzles of other random grids. Naked and hidden singles alone solve all puzzles. No puzzle is altered in "
    "training.",
}


_SOURCES: dict[int, type[FourByFour] | type[NineByNine]] = {4: FourByFour, 9: NineByNine}


def sudoku(
    out: Path,
    *,
    size: int = 4,
    seeds: int = 1,
    first_seed: int = 0,
    quick: bool = False,
    threads: int = 1,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train an energy, a recurrent and a feed-forward network on Sudoku, and write ``sudoku.json`` and ``sudoku.png``.

    Parameters
    ----------
    out : Path
        Folder of the results; made if it does not exist.
    size : int
        4 or 9. For 9×9 there is no more than a try: few blanks, and the recipe of 4×4.
    seeds : int
        How many runs: each has its own split, puzzles and weights.
    first_seed : int
        The others follow.
    quick : bool
        A few updates, to see that everything runs. Nothing is learnt.
    threads : int
        Threads of torch.
    console : Console, optional
        Where to print.

    Returns
    -------
    dict
        The content of the JSON file.

    Raises
    ------
    ValueError
        If `size` is another.
    """
    if size not in HELD_OUT:
        raise ValueError(f"size: expected 4 or 9, got {size}")
    every = seeds_from(first_seed, seeds)
    console = console or Console()
    out.mkdir(parents=True, exist_ok=True)
    recipe = replace(Recipe(), updates=QUICK_UPDATES) if quick else Recipe()
    blanks = _SOURCES[size].blanks
    console.print(
        f"[bold]{size}×{size} Sudoku[/], {blanks[0]} to {blanks[-1]} blanks, one solution each. {HELD_OUT[size]}"
    )
    runs: list[dict[str, Any]] = []
    with settings(threads, first_seed):
        for seed in every:
            source = _SOURCES[size](seed)
            puzzles = source.test(
                QUICK_PUZZLES if quick else TEST_PUZZLES[size], torch.Generator().manual_seed(seed)
            )
            run, energy = _run(source, puzzles, recipe, seed, console)
            runs.append(run)
            if seed == first_seed:
                way = figure.way_of(energy, puzzles, seed)
        about = machine.describe(torch.device("cpu"))
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **about,
        "puzzles": {"size": size, "test": len(puzzles.given), "held_out": HELD_OUT[size]},
        "quick": quick,
        **({"note": QUICK} if quick else {}),
        "recipe": asdict(recipe),
        "runs": runs,
        "summary": _summary(runs),
    }
    write_json(out / JSON_NAME, report)
    figure.draw(report, way, out / FIGURE_NAME)
    _print(report, console)
    if quick:
        console.print(f"[bold]{QUICK}[/]")
    console.print(f"Picture: {out / FIGURE_NAME}   Figures: {out / JSON_NAME}", soft_wrap=True)
    return report


def _run(
    source: Source, puzzles: Puzzles, recipe: Recipe, seed: int, console: Console
) -> tuple[dict[str, Any], EnergySolver]:
    """Train and examine the three solvers."""
    torch.manual_seed(seed)
    energy = EnergySolver(source.box, recipe)
    recurrent, feed_forward = Recurrent(source.box, recipe.width), FeedForward(source.box, recipe.width)
    seconds = {
        "feed_forward": _train(
            "feed_forward",
            lambda tick: train_feed_forward(feed_forward, source, recipe, seed, tick),
            recipe,
            seed,
            console,
        ),
        "recurrent": _train(
            "recurrent",
            lambda tick: train_recurrent(recurrent, source, recipe, seed, tick),
            recipe,
            seed,
            console,
        ),
        "energy": _train(
            "energy", lambda tick: train_energy(energy, source, recipe, seed, tick), recipe, seed, console
        ),
    }
    with console.status(f"seed {seed}: {len(puzzles.given):,} held-out puzzles"):
        found = {
            "feed_forward": examine_feed_forward(feed_forward, puzzles),
            "recurrent": examine_recurrent(recurrent, puzzles, seed),
            "energy": examine_energy(energy, puzzles, seed),
        }
    modules: dict[str, nn.Module] = {"feed_forward": feed_forward, "recurrent": recurrent, "energy": energy}
    for name in SOLVERS:
        count = sum(parameter.numel() for parameter in modules[name].parameters())
        found[name] = {"parameters": count, "seconds": seconds[name], **found[name]}
    if isinstance(source, FourByFour):
        twins = source.test_of_any_kind(len(puzzles.given), torch.Generator().manual_seed(seed))
        found["kinds"] = source.kinds
        found["of_any_kind"] = {
            "feed_forward": examine_feed_forward(feed_forward, twins),
            "recurrent": stopped(recurrent, twins, seed),
            "energy": stopped(energy, twins, seed),
        }
    return {"seed": seed, **found}, energy


def _train(
    name: str, call: Callable[[Callable[[float], None]], float], recipe: Recipe, seed: int, console: Console
) -> float:
    bar = Progress(
        TextColumn(f"seed {seed}, {LABELS[name]:12}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task("", total=recipe.updates, loss=float("nan"))
        return call(lambda loss: bar.update(task, advance=1, loss=loss))


def _headline(run: dict[str, Any], name: str) -> dict[str, float | None]:
    """What matters of one solver in one run, at the first tolerance."""
    solver = run[name]
    common = {key: solver[key] for key in ("seconds", "milliseconds")}
    if name == "feed_forward":
        return {"solved": solver["solved"], **common}
    first_rule = solver["stopped"][0]
    first, last = (first_rule["by_blanks"][i]["steps"] for i in (0, -1))
    return {
        **{key: first_rule[key] for key in ("solved", "steps", "correlation")},
        "steps_easiest": first,
        "steps_hardest": last,
        "hardest_over_easiest": last / first,
        **common,
    }


def _over(values: list[float | None]) -> dict[str, Any] | None:
    """Mean and, of several, standard deviation of those that are not None."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": statistics.fmean(known), "sd": statistics.stdev(known) if len(known) > 1 else None}


def _summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found = {}
    for name in SOLVERS:
        lines = [_headline(run, name) for run in runs]
        found[name] = {key: _over([line[key] for line in lines]) for key in lines[0]}
    return found


def _shown(over: dict[str, Any] | None, digits: int, times: float = 1.0) -> str:
    if over is None:
        return "-"
    return f"{times * over['mean']:.{digits}f}" + (f" ±{times * over['sd']:.{digits}f}" if over["sd"] else "")


def _mean(values: list[float | None], digits: int, times: float = 1.0) -> str:
    over = _over(values)
    return "-" if over is None else f"{times * over['mean']:.{digits}f}"


def _table(title: str, columns: list[str], caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _print(report: dict[str, Any], console: Console) -> None:
    runs = report["runs"]
    console.print(_comparison(report))
    console.print(_by_steps_allowed(runs))
    console.print(_by_tolerance(runs))
    console.print(_right_from_wrong(runs))
    if "of_any_kind" in runs[0]:
        shares = (
            f"{LABELS[name]} {_shown(_over([run['of_any_kind'][name]['solved'] for run in runs]), 1, 100)} %"
            for name in SOLVERS
        )
        console.print(
            f"Puzzles of the held-out grids that may have twins among those trained on: {', '.join(shares)} solved."
        )
    for line in _verdict(runs):
        console.print(line)


def _comparison(report: dict[str, Any]) -> Table:
    runs, summary = report["runs"], report["summary"]
    tolerances = {name: runs[0][name]["stopped"][0]["tolerance"] for name in ("recurrent", "energy")}
    blanks = [row["blanks"] for row in runs[0]["energy"]["stopped"][0]["by_blanks"]]
    seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
    names = ["", "train, s", "solved, %", "steps", f"at {blanks[0]}", f"at {blanks[-1]}", "r", "ms"]
    table = _table(
        f"{report['puzzles']['test']:,} held-out puzzles, {seeds}",
        names,
        f"Steps until the energy changes by no more than {tolerances['energy']:g}, or no probability of the recurrent network "
        f"by more than {tolerances['recurrent']:g}; the step that shows it counts. "
        f"At {blanks[0]}, at {blanks[-1]}: steps at so many blanks. r: correlation of steps and blanks. "
        "ms: to solve all puzzles as one batch.",
    )
    for name in SOLVERS:
        line = summary[name]
        table.add_row(
            f"{LABELS[name]} {runs[0][name]['parameters'] / 1000:.0f}k",
            f"{line['seconds']['mean']:.0f}",
            _shown(line["solved"], 1, 100),
            _shown(line.get("steps"), 1),
            *(
                "-" if line.get(key) is None else f"{line[key]['mean']:.1f}"
                for key in ("steps_easiest", "steps_hardest")
            ),
            "-" if line.get("correlation") is None else f"{line['correlation']['mean']:.2f}",
            f"{line['milliseconds']['mean']:.0f}",
            style="bold" if name == "energy" else None,
        )
    return table


def _by_steps_allowed(runs: list[dict[str, Any]]) -> Table:
    table = _table("Solved, %, after so many steps, nothing stopped before", ["", *map(str, ALLOWED)])
    for name in SOLVERS[1:]:
        shares = [[run[name]["allowed"][str(steps)] for run in runs] for steps in ALLOWED]
        table.add_row(LABELS[name], *(_mean(each, 1, 100) for each in shares))
    return table


def _by_tolerance(runs: list[dict[str, Any]]) -> Table:
    blanks = [row["blanks"] for row in runs[0]["energy"]["stopped"][0]["by_blanks"]]
    names = ["", "tolerance", "solved, %", "steps", f"at {blanks[0]} blanks", f"at {blanks[-1]}"]
    table = _table("Where the stop rule stops", names)
    for name in SOLVERS[1:]:
        by_tolerance = zip(
            *(sorted(run[name]["stopped"], key=lambda each: -each["tolerance"]) for run in runs), strict=True
        )
        for rows in by_tolerance:
            table.add_row(
                LABELS[name],
                f"{rows[0]['tolerance']:g}",
                _shown(_over([row["solved"] for row in rows]), 1, 100),
                _shown(_over([row["steps"] for row in rows]), 1),
                *(_shown(_over([row["by_blanks"][at]["steps"] for row in rows]), 1) for at in (0, -1)),
            )
    return table


def _right_from_wrong(runs: list[dict[str, Any]]) -> Table:
    first = runs[0]["energy"]["few_steps"]
    starts = list(next(iter(first.values()))["best_of"])
    table = _table(
        "Does the energy tell right from wrong?",
        ["at most", *(f"n = {n}" for n in starts), "wrong", "within", "alike", "across"],
        "n: solved, %, by the one of n random starts that ends with the lowest energy. Wrong: first answers, all seeds "
        "together. Then how often a right answer has less energy than a wrong one (1: always, 0.5: by chance): to the same "
        "puzzle, to another with as many blanks, to any other.",
    )
    for steps in first:
        few = [run["energy"]["few_steps"][steps] for run in runs]
        table.add_row(
            f"{steps} step{'s' if steps != '1' else ''}",
            *(_mean([each["best_of"][n] for each in few], 1, 100) for n in starts),
            str(sum(each["wrong"] for each in few)),
            *(_mean([each[key] for each in few], 2) for key in ("auc_within", "auc_alike", "auc_across")),
        )
    return table


COMPARED = (
    ("solved", "share solved, %", 1, 1, 100),
    ("steps", "steps", -1, 1, 1),
    ("milliseconds", "time to solve, ms", -1, 0, 1),
    ("seconds", "time to train, s", -1, 0, 1),
    ("hardest_over_easiest", "steps on the hardest for each on the easiest", 1, 1, 1),
)
"""Of the two solvers that iterate: what is compared, whether more is better (1) or worse (−1), decimals,
factor."""


def _verdict(runs: list[dict[str, Any]]) -> list[str]:
    """Say what the energy gains on the feed-forward network, and which of the two that iterate does better at what.

    Decided is what a 95 % interval over seeds shows; one seed decides nothing.
    """
    lines = {name: [_headline(run, name) for run in runs] for name in SOLVERS}

    def over(name: str, key: str) -> list[float]:
        return [float(value) for line in lines[name] if (value := line[key]) is not None]

    ours, theirs = over("energy", "solved"), over("feed_forward", "solved")
    gain = paired(ours, theirs)
    mean, other = 100 * statistics.fmean(ours), 100 * statistics.fmean(theirs)
    text = f"The energy solves {mean:.1f} %, the feed-forward network {other:.1f} %: {points(gain, 1)} points"
    found: dict[str, list[str]] = {
        "The energy does better": [],
        "The recurrent network does better": [],
        "": [],
    }
    for key, what, sign, digits, times in COMPARED:
        ours, theirs = over("energy", key), over("recurrent", key)
        difference = paired(ours, theirs)
        who = ""
        if difference.above or difference.below:
            who = "energy" if difference.above == (sign > 0) else "recurrent network"
        figures = f"{times * statistics.fmean(ours):.{digits}f} against {times * statistics.fmean(theirs):.{digits}f}"
        found[f"The {who} does better" if who else ""].append(f"{what} ({figures})")
    one = len(runs) == 1
    out = [f"{ONE_SEED}. {text}." if one else f"{text} ({said(gain, 'more', 'fewer')})."]
    for title, parts in found.items():
        if parts:
            undecided = ONE_SEED if one else "Not decided, the interval holds 0"
            out.append(f"{title or f'{undecided}: energy against recurrent network'}: {'; '.join(parts)}.")
    return out
