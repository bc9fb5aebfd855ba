"""The experiment: its options and cells, and its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from operator import itemgetter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..runs import Cell, FirstSeed, Later, Quick, Results, Seeds, Setup, experiment, grid
from ..runs.report import Block, Column, Picture, Table, Verdicts, column, tabulate
from ..runs.statistics import form, interval, mean_interval, points, said
from ..style import GREEN, INK, MUTED, ORANGE, OTHERS, OURS, WIDTH, WRONG, band, curve, legend, span_at_least

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PRICE = 0.0009
OTHER_MAZES = ((17, 0.3), (23, 0.3), (11, 0.2), (11, 0.4))
"""Sizes and densities that no agent is trained on."""
LARGER = "17 x 17, 0.3"
NAMES = {
    "priced": "learned K, priced",
    "free": "learned K, no price",
    "fixed-8": "trained with K = 8",
    "fixed-16": "trained with K = 16",
    "habit": "habit alone (K = 0)",
}


@experiment(Later(f"{__package__}.measure"))
def maze(
    *,
    seeds: Seeds = 1,
    first_seed: FirstSeed = 0,
    updates: Annotated[
        int | None, typer.Option(min=1, help="Updates of each agent. Default: 600, or 60 with --quick.")
    ] = None,
    price: Annotated[float, typer.Option(min=0.0, help="Price of one sweep; the goal is worth 1.")] = PRICE,
    quick: Quick = False,
) -> Setup:
    """Walk through mazes, planning as long as a state is worth. Ten minutes per seed."""
    from .training import Settings

    common: dict[str, Any] = {"updates": updates or (60 if quick else 600)}
    agents = {
        "priced": Settings(price=price, **common),
        "free": Settings(price=0.0, **common),
        "fixed-8": Settings(price=0.0, sweeps=8, **common),
        "fixed-16": Settings(price=0.0, sweeps=16, **common),
        "habit": Settings(price=0.0, sweeps=0, **common),
    }
    if quick:
        agents = {name: agents[name] for name in ("priced", "free")}
    every = list(range(first_seed, first_seed + seeds))
    measured: dict[str, Any] = {
        "mazes": 300 if quick else 2000,
        "larger": 100 if quick else 1000,
        "others": [list(other) for other in (OTHER_MAZES[:1] if quick else OTHER_MAZES)],
    }
    timed: dict[str, Any] = {
        "timed": [[256, 11]] if quick else [[256, 11], [2048, 11], [8192, 11], [2048, 17]],
        "timing_seconds": 0.3 if quick else 8.0,
    }
    density, settings = agents["priced"].density, {name: asdict(of) for name, of in agents.items()}
    parts = {name: {"agent": name, "settings": of} for name, of in settings.items()}
    return Setup(
        config={"agents": settings, "seeds": every, "quick": quick, **measured, **timed},
        cells=grid(parts, every, measured),
        # On the clock, when nothing else runs any more.
        then=lambda _: [
            Cell(f"timing-seed-{seed}", {"of": f"priced-seed-{seed}", **timed, "density": density}, seed)
            for seed in every
        ],
        then_alone=True,
    )


class _Found:
    """The results under the names of the report."""

    def __init__(self, results: Results) -> None:
        config = results.config
        agents = {name: results.where(agent=name) for name in config["agents"]}
        self.priced, self.free = agents["priced"], agents["free"]
        self.agents = {name: row.at("own") for name, row in agents.items()}
        self.shuffled, self.at_mean = self.priced.at("shuffled"), self.priced.at("fixed at the mean")
        self.fixed = {k: self.priced.at(f"fixed/{k}") for k in self.priced.keys("fixed")}
        self.others = {where: self.priced.at(f"others/{where}") for where in self.priced.keys("others")}
        self.distances = {
            "priced": _by_distance(self.priced, "by_distance"),
            "priced, larger": _by_distance(self.priced, "by_distance_larger"),
            "free": _by_distance(self.free, "by_distance"),
        }
        clock = results.where(timed=config["timed"])
        self.clock = {tuple(case): clock.at(f"timing/{i}") for i, case in enumerate(config["timed"])}


def _by_distance(row: Results, path: str) -> dict[tuple[int, int], dict[str, Any]]:
    """Sweeps, and share of the states without any, by distances that every seed met."""
    met = [{(entry["low"], entry["high"]): entry for entry in entries} for entries in row[path]]
    shared = [distance for distance in met[0] if all(distance in entries for entries in met)]
    return {
        distance: {
            quantity: mean_interval([entries[distance][quantity] for entries in met])
            for quantity in ("sweeps", "none")
        }
        for distance in shared
    }


def _ratio(name: str) -> Any:
    """Time of an episode with `name` over the time with the gate; the key itself has a slash."""
    return lambda row: row[""].map(itemgetter(f"{name} / gated"))


@maze.reports
def report(results: Results) -> list[Block]:
    """What a sweep is worth, who gets sweeps, and what they cost on the clock."""
    found = _Found(results)
    settings = results.config["agents"]["priced"]
    plain = form(1, 1.0)
    columns = [
        Column("arrive, %", "success", form()),
        Column("path efficiency", "efficiency", form(3, 1.0)),
        Column("sweeps a step", "sweeps_per_step", plain),
        Column("sweeps an episode", "sweeps_per_episode", form(0, 1.0)),
        Column("r(sweeps, distance)", "correlation", form(2, 1.0)),
    ]
    trials = {
        **{NAMES[name]: row for name, row in found.agents.items()},
        "priced, shuffled": found.shuffled,
        "priced, fixed at the mean": found.at_mean,
        **{f"priced, made to do K = {k}": row for k, row in found.fixed.items()},
    }
    elsewhere = {
        f"{where} walls, {label}": row.at(key)
        for where, row in found.others.items()
        for label, key in (("own K", "own"), ("K = 16", "fixed 16"))
    }
    return [
        "# Mazes: a price for each sweep",
        f"{settings['size']} × {settings['size']} cells, {settings['density']:g} of them walls; "
        f"{settings['mazes']} mazes side by side, {settings['updates']} updates of "
        f"{settings['horizon']} steps in each; price of a sweep {settings['price']:g}; "
        f"{results.config['mazes']} unseen mazes for each trial; {results.opening}",
        "The habit reads the walls around it and the direction of the goal. Before it acts, the agent "
        "may run K sweeps of value iteration on the known map, and K is chosen for each state. A plan "
        "is not kept from one step to the next: an agent that remembered it would need one long plan "
        "for an episode. Choices and moves are sampled.",
        column("maze.png", "Mazes", found, _pareto, _distance, _practice),
        Verdicts(_sentences(found)),
        Picture("maze_example.png", "An episode", lambda figure: _example(figure, found), (WIDTH, 8.5)),
        "## Agents on unseen mazes",
        tabulate("agent", trials, *columns),
        "## Other mazes (priced)",
        tabulate("agent", elsewhere, *columns),
        "## Sweeps by distance",
        *(
            Table(
                [f"{name}: steps to go", *(f"{a}–{b}" if a != b else f"{a}" for a, b in entries)],
                [
                    ["sweeps", *(plain(entry["sweeps"]) for entry in entries.values())],
                    ["none, %", *(interval(entry["none"]) for entry in entries.values())],
                ],
            )
            for name, entries in found.distances.items()
        ),
        "## On the clock",
        tabulate(
            "ms an episode",
            {f"{mazes} mazes, {size} x {size}": row for (mazes, size), row in found.clock.items()},
            Column("gated", "ms/gated", form(3, 1.0)),
            Column("masked", "ms/masked", form(3, 1.0)),
            Column("K = 16", "ms/fixed 16", form(3, 1.0)),
            Column("masked / gated", _ratio("masked"), form(2, 1.0)),
            Column("K = 16 / gated", _ratio("fixed 16"), form(2, 1.0)),
        ),
    ]


def _sentences(found: _Found) -> list[str]:
    own, free = found.agents["priced"], found.agents["free"]
    larger = found.others[LARGER]["own/correlation"]
    sentences = [
        f"With a price: path efficiency {interval(own['efficiency'], 3, 1.0)} at "
        f"{interval(own['sweeps_per_step'], 1, 1.0)} sweeps a step, {interval(own['success'])} % "
        f"arrive. Without: {interval(free['efficiency'], 3, 1.0)} at "
        f"{interval(free['sweeps_per_step'], 1, 1.0)}."
    ]
    for control, row in (
        ("the same sweeps dealt at random among the states", found.shuffled),
        ("the same agent with K fixed at the mean", found.at_mean),
    ):
        gain = own["efficiency"] - row["efficiency"]
        sentences.append(
            f"Against {control} ({interval(row['sweeps_per_step'], 1, 1.0)} a step), path efficiency "
            f"differs by {points(gain)} points: {said(gain, 'better', 'worse')}. "
            f"Arrivals differ by {points(own['success'] - row['success'])} points."
        )
    sentences.append(
        f"Sweeps follow distance: r = {interval(own['correlation'], 2, 1.0)}; on 17 × 17 mazes, never "
        f"seen in training, {interval(larger, 2, 1.0)}; without a price "
        f"{interval(free['correlation'], 2, 1.0)}."
    )
    for (mazes, size), row in found.clock.items():
        sentences.append(
            f"On the clock, {mazes} mazes of side {size} at once: an episode with K = 16 takes "
            f"{interval(_ratio('fixed 16')(row), 2, 1.0)} times as long as with the K of the gate, one "
            f"whose halted rows are masked {interval(_ratio('masked')(row), 2, 1.0)} times."
        )
    for k in (8, 16):
        if f"fixed-{k}" in found.agents:
            rival = found.agents[f"fixed-{k}"]
            sentences.append(
                f"Against an agent trained with K = {k} everywhere, which spends "
                f"{interval(rival['sweeps_per_episode'], 0, 1.0)} sweeps on an episode instead of "
                f"{interval(own['sweeps_per_episode'], 0, 1.0)}: "
                f"{points(own['success'] - rival['success'])} points of arrivals, "
                f"{points(own['efficiency'] - rival['efficiency'])} of path efficiency."
            )
    return sentences


def _pareto(axes: Axes, found: _Found) -> None:
    def draw(rows: Mapping[Any, Results], label: str, **look: Any) -> None:
        x, y = zip(*((row["sweeps_per_step"], row["efficiency"]) for row in rows.values()), strict=True)
        curve(axes, x, y, label, x_bars=len(rows) == 1, **{"ls": "", "ms": 8, **look})

    draw(found.fixed, "K fixed", color=OTHERS, ls="-", ms=4.5)
    draw({0: found.shuffled}, "the gate's K, dealt at random", color=OURS, mfc="white")
    draw({0: found.agents["priced"]}, "the gate's K, with a price", color=OURS)
    draw({0: found.agents["free"]}, "the gate's K, no price", color=ORANGE, marker="s")
    for name, marker in (("fixed-8", "^"), ("fixed-16", "v")):
        if name in found.agents:
            draw({0: found.agents[name]}, NAMES[name], color=WRONG, marker=marker)
    axes.set(xlabel="sweeps a step", ylabel="shortest way / way taken")
    axes.set_title("What thinking is worth")
    span_at_least(axes, "y", 0.1)
    legend(axes)


def _distance(axes: Axes, found: _Found) -> None:
    looks = {
        "priced": (OURS, "o", "11 × 11, with a price"),
        "priced, larger": (GREEN, "D", "17 × 17, never seen"),
        "free": (ORANGE, "s", "11 × 11, no price"),
    }
    for name, (color, marker, label) in looks.items():
        entries = found.distances[name]
        middle = [(low + high) / 2 for low, high in entries]
        curve(axes, middle, [e["sweeps"] for e in entries.values()], label, color=color, marker=marker)
    axes.set(xlabel="steps to the goal", ylabel="sweeps", ylim=(0, 34))
    axes.set_title("Who gets the sweeps")
    legend(axes)


def _practice(axes: Axes, found: _Found) -> None:
    for row, color, label in ((found.priced, OURS, "with a price"), (found.free, ORANGE, "no price")):
        sweeps = row.each("curve", "sweeps")
        x = [row.first("every") * (i + 1) for i in range(len(sweeps))]
        band(axes, x, sweeps, label, color=color)
    axes.set(xlabel="updates", ylabel="sweeps a step", ylim=(0, 34))
    axes.set_title("Effort over practice")
    legend(axes)


def _example(figure: Figure, found: _Found) -> None:
    """A maze, the way taken, and the sweeps of each step: on the map, and below it in time."""
    example = found.priced.first("example")
    chart, time = figure.subplots(2, 1, height_ratios=(1.6, 1))
    sweeps, goal = example["sweeps"], example["goal"]
    rows, columns = zip(*example["positions"], strict=True)
    chart.imshow(example["walls"], cmap="gray_r", vmin=0, vmax=1.6, interpolation="nearest")
    chart.plot([*columns, goal[1]], [*rows, goal[0]], color=MUTED, lw=1.2, zorder=1)
    chart.scatter(columns, rows, [12 + 7 * k for k in sweeps], color=OURS, alpha=0.8, zorder=2, lw=0)
    chart.scatter(goal[1], goal[0], 110, marker="*", color=ORANGE, zorder=3)
    chart.set_title("Sweeps along the way (area)")
    chart.set_axis_off()
    time.bar(range(1, len(sweeps) + 1), sweeps, 0.7, color=OURS)
    time.set(xlabel="step", ylabel="sweeps")
    time.set_title("The same in time")
    time.tick_params(colors=INK)
