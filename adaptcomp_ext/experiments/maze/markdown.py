"""The experiment's own report: tables, and sentences that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptcomp_ext.experiments.runs import counted, interval, measured_over, points, said, table

__all__ = ["FIGURES", "LARGER", "verdicts", "write_markdown"]

FIGURES = {"main": "maze.png", "example": "maze_example.png"}
LARGER = "17 x 17, 0.3"
NAMES = {
    "priced": "learned K, priced",
    "free": "learned K, no price",
    "fixed-8": "trained with K = 8",
    "fixed-16": "trained with K = 16",
    "habit": "habit alone (K = 0)",
}
Summary = Mapping[str, Any]


def verdicts(summary: Summary) -> list[str]:
    """What the figures say."""
    priced, free = summary["agents"]["priced"], summary["agents"]["free"]
    out = [
        f"With a price: path efficiency {interval(priced['efficiency'], 3, 1.0)} at "
        f"{interval(priced['sweeps_per_step'], 1, 1.0)} "
        f"sweeps a step, {interval(priced['success'])} % arrive. Without: {interval(free['efficiency'], 3, 1.0)} at "
        f"{interval(free['sweeps_per_step'], 1, 1.0)}.",
    ]
    for name, found in summary["controls"].items():
        what = (
            "the same sweeps dealt at random among the states"
            if name == "shuffled"
            else "the same agent with K fixed at the mean"
        )
        out.append(
            f"Against {what} ({interval(found['sweeps_per_step'], 1, 1.0)} a step), path efficiency differs by "
            f"{points(found['own −'])} points: {said(found['own −'], 'better', 'worse')}."
        )
    larger = summary["others"][LARGER]["own"]
    out.append(
        f"Sweeps follow distance: r = {interval(priced['correlation'], 2, 1.0)}; on 17 × 17 mazes, never seen in training, "
        f"{interval(larger['correlation'], 2, 1.0)}; without a price {interval(free['correlation'], 2, 1.0)}."
    )
    for timing in summary["timing"]:
        out.append(
            f"On the clock, {timing['mazes']} mazes of side {timing['size']} at once: an episode with K = 16 takes "
            f"{interval(timing['fixed 16 / gated'], 2, 1.0)} times as long as with K as the gate decides, one "
            "whose halted rows are "
            f"masked {interval(timing['masked / gated'], 2, 1.0)} times."
        )
    if "own − fixed-16" in summary:
        rival = summary["own − fixed-16"]
        spent = summary["agents"]["fixed-16"]["sweeps_per_episode"]
        out.append(
            f"Against an agent trained with K = 16 everywhere, which spends {interval(spent, 0, 1.0)} sweeps on an "
            "episode instead of "
            f"{interval(priced['sweeps_per_episode'], 0, 1.0)}: {points(rival['success'])} points of arrivals, "
            f"{points(rival['efficiency'])} of path efficiency."
        )
    return out


def write_markdown(summary: Summary, config: Mapping[str, Any], machine: str) -> str:
    """The whole report."""
    seeds = len(config["seeds"])
    settings = config["agents"]["priced"]
    parts = [
        "# Mazes: a price for each sweep\n",
        f"{settings['size']} × {settings['size']} cells, {settings['density']:g} of them walls; "
        f"{settings['mazes']} mazes side by "
        f"side, {settings['updates']} updates of {settings['horizon']} steps in each; price of a sweep {settings['price']:g}; "
        f"{config['mazes']} unseen mazes for each trial; {counted(seeds, 'seed')}; {machine}. "
        f"{measured_over(seeds)}\n",
        "The habit reads the walls around it and where the goal lies. Before it acts, the agent may run K sweeps "
        "of value iteration "
        "on the known map, and K is chosen for each state. A plan is not kept from one step to the next: an agent "
        "that remembered "
        "it would need one long plan for an episode. Everything is sampled, choices and moves.\n",
        f"![Mazes]({FIGURES['main']})\n",
        "\n".join(f"- {verdict}" for verdict in verdicts(summary)) + "\n",
        f"![An episode]({FIGURES['example']})\n",
        "## Agents on unseen mazes\n",
    ]
    rows = [_row(NAMES[name], found) for name, found in summary["agents"].items()]
    rows += [_row(f"priced, {name}", found) for name, found in summary["controls"].items()]
    rows += [_row(f"priced, made to do K = {k}", found) for k, found in summary["fixed"].items()]
    header = [
        "agent",
        "arrive, %",
        "path efficiency",
        "sweeps a step",
        "sweeps an episode",
        "r(sweeps, distance)",
    ]
    parts.append(table(header, rows))
    parts.append("## Other mazes (priced)\n")
    rows = []
    for where, found in summary["others"].items():
        rows += [
            _row(f"{where} walls, own K", found["own"]),
            _row(f"{where} walls, K = 16", found["fixed 16"]),
        ]
    parts.append(table(header, rows))
    parts.append("## Sweeps by distance\n")
    for name, found in summary["by_distance"].items():
        cells = [f"{e['low']}–{e['high']}" if e["low"] != e["high"] else f"{e['low']}" for e in found]
        rows = [
            ["sweeps", *(interval(e["sweeps"], 1, 1.0) for e in found)],
            ["none, %", *(interval(e["none"]) for e in found)],
        ]
        parts.append(table([f"{name}: steps to go", *cells], rows))
    parts.append("## On the clock\n")
    rows = [
        [
            f"{t['mazes']} mazes, {t['size']} x {t['size']}",
            *(interval(t["ms"][name], 3, 1.0) for name in ("gated", "masked", "fixed 16")),
            interval(t["masked / gated"], 2, 1.0),
            interval(t["fixed 16 / gated"], 2, 1.0),
        ]
        for t in summary["timing"]
    ]
    parts.append(
        table(["ms an episode", "gated", "masked", "K = 16", "masked / gated", "K = 16 / gated"], rows)
    )
    return "\n".join(parts)


def _row(name: str, found: Summary) -> list[str]:
    return [
        name,
        interval(found["success"]),
        interval(found["efficiency"], 3, 1.0),
        interval(found["sweeps_per_step"], 1, 1.0),
        interval(found["sweeps_per_episode"], 0, 1.0),
        interval(found["correlation"], 2, 1.0),
    ]
