"""The experiment's own report: tables, and sentences that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptcomp_ext.experiments.runs import Difference, counted, interval, measured_over, points, said, table

from .cell import APART

__all__ = ["FIGURES", "verdicts", "write_markdown"]

FIGURES = {"main": "control.png", "strip": "control_episode.png"}
NAMES = {
    "always": "plans everywhere",
    "value": "plans where it pays",
    "never": "never plans",
    "random": "plans as often, at random",
}
Summary = Mapping[str, Any]


def _signed(difference: Difference) -> str:
    return points(difference, 0, 1.0)


def verdicts(summary: Summary, settings: Mapping[str, Any]) -> list[str]:
    """What the figures say."""
    out = []
    for name, found in summary["agents"].items():
        out.append(
            f"The agent that {NAMES[name]}: return {interval(found['return'], 0, 1.0)} after "
            f"{found['steps']:,} steps and {interval(found['seconds'], 0, 1.0)} s of training; it "
            f"planned {interval(found['training rate'])} % of the states while it learned, "
            f"{interval(found['rate'])} % at the end."
        )
    if "value − always" in summary:
        found = summary["value − always"]
        out.append(
            f"Against planning everywhere the gated agent's return differs by {_signed(found['return'])}: "
            f"{said(found['return'], 'higher', 'lower')}; its training takes {interval(found['saved'])} "
            "% less time."
        )
    if "value − random" in summary:
        found = summary["value − random"]
        out.append(
            f"Against planning as often at random, all through training: {_signed(found['return'])} at "
            f"the end ({said(found['return'], 'better', 'worse')}), {_signed(found['learning'])} over "
            f"the whole training ({said(found['learning'], 'better', 'worse')}). On the way: "
            + "; ".join(
                f"{_signed(difference)} after {entry['round']} rounds ({said(difference, 'better', 'worse')})"
                for entry, difference in zip(summary["on the way"], found["checks"], strict=True)
            )
            + "."
        )
    if "gates" in summary:
        found = summary["gates"]["random"]
        out.append(
            f"The trained agent, made to plan at random at {interval(found['rate'])} %: the gate's own "
            f"choice is worth {_signed(found['value −'])} ({said(found['value −'], 'more', 'less')})."
        )
        for entry in summary["prices"]:
            if entry["price"] in (settings["price"], settings["test_price"]):
                out.append(
                    f"Tested at a price of {entry['price']:g} it plans {interval(entry['rate'])} % of "
                    f"the states, and its return differs by {_signed(entry['− everywhere'])} from its "
                    f"own when it plans everywhere ({said(entry['− everywhere'], 'more', 'less')})."
                )
        early = summary["on the way"][0]
        for where, when in ((early, f"After {early['round']} rounds"), (summary["where"], "At the end")):
            low, _, high = where["rate by distance"]
            out.append(
                f"{when}, where habit and plan would do much the same (a third of the states) the gate "
                f"calls {interval(low)} %, where their actions are furthest apart {interval(high)} %: "
                f"{said(where['most − least distance'], 'more where they disagree', 'less there')}. Rank "
                "correlation of its score with the gain "
                f"{interval(where['rank correlation with gain'], 2, 1.0)}."
            )
        where = summary["where"]
        low, _, high = where["rate by gain"]
        out.append(
            "At the end, of the third of the states in which the plan's first action gains least the "
            f"gate calls {interval(low)} %, of the third in which it gains most {interval(high)} %: "
            f"{points(where['most − least gain'])} points "
            f"({said(where['most − least gain'], 'more', 'less')})."
        )
        for entry in summary["on the way"]:
            out.append(
                f"After {entry['round']} rounds, planning {interval(entry['rate'])} % of the states, "
                f"the gate's choice is worth {_signed(entry['− at random'])} against as many at random "
                f"({said(entry['− at random'], 'more', 'less')})."
            )
        rates = [r.mean for r in summary["agents"]["value"]["curve"]["rate"]]
        acted = [r for r in rates if r > 0]
        if acted:
            part = max(1, len(acted) // 4)
            first, last = sum(acted[:part]) / part, sum(acted[-part:]) / part
            out.append(
                f"The mean planning rate while the habit learns: {100 * first:.0f} % in the first quarter, "
                f"{100 * last:.0f} % in the last."
            )
    broken = sum(found["broken"] for found in summary["agents"].values())
    out.append(f"Episodes that the simulator ended with a number that is not one: {broken:.0f}.")
    return out


def write_markdown(summary: Summary, config: Mapping[str, Any], machine: str) -> str:
    """The whole report."""
    settings, seeds = config["settings"], len(config["seeds"])
    in_tests = (
        ""
        if settings["test_price"] is None
        else f" while it learns, {settings['test_price']:g} in evaluations"
    )
    parts = [
        f"# Planning on demand: {settings['task']}\n",
        f"{settings['envs']} environments, action repeat 2, {settings['rounds']} rounds of "
        f"{settings['episode']} decisions in each; "
        f"price {settings['price']:g} of the spread of values{in_tests}; {counted(seeds, 'seed')}; one "
        f"thread of {machine}. Evaluations are {config['episodes']} episodes of the suite's own length "
        "(a return of at most 1,000), without exploration. "
        f"{measured_over(seeds)}\n",
        f"![Learning and planning]({FIGURES['main']})\n",
        "\n".join(f"- {verdict}" for verdict in verdicts(summary, settings)) + "\n",
    ]
    if "strip" in summary:
        parts.append(f"![The episode that was planned most]({FIGURES['strip']})\n")
    parts.append("## Agents\n")
    rows = [
        [
            NAMES[name],
            interval(found["return"], 0, 1.0),
            interval(found["seconds"], 0, 1.0),
            interval(found["share of planning"]),
            interval(found["training rate"]),
            interval(found["rate"]),
            interval(found["iterations"], 2, 1.0),
        ]
        for name, found in summary["agents"].items()
    ]
    header = [
        "agent",
        "return",
        "training, s",
        "of it acting, %",
        "planned in training, %",
        "at the end, %",
        "iterations of a plan",
    ]
    parts.append(table(header, rows))
    if "gates" in summary:
        parts.append("## The gated agent, made to plan by other gates\n")
        rows = [
            [name, interval(found["rate"]), interval(found["return"], 0, 1.0), _signed(found["value −"])]
            for name, found in summary["gates"].items()
        ]
        parts.append(table(["gate", "planned, %", "return", "value gate −"], rows))
    if "prices" in summary:
        parts.append("## The gated agent, tested at other prices than it was trained at\n")
        rivals = [name for name in ("always", "random") if f"value − {name}" in summary]
        rows = [
            [
                f"{found['price']:g}",
                interval(found["rate"]),
                interval(found["return"], 0, 1.0),
                _signed(found["− everywhere"]),
                *(_signed(summary[f"value − {name}"]["prices"][i]) for name in rivals),
            ]
            for i, found in enumerate(summary["prices"])
        ]
        header = ["price", "planned, %", "return", "− itself, planning everywhere"]
        parts.append(table([*header, *(f"− one that {NAMES[name]}" for name in rivals)], rows))
    if "on the way" in summary:
        parts.append("## Where the gated agent plans while it learns\n")
        parts.append(
            "Thirds of the states, by how far the first actions of habit and plan are apart (distance "
            "of their means; KL divergence), measured where every state is planned.\n"
        )
        header = ["round", "planned, %", "return, − at random"]
        for name in APART:
            header += [f"by {name}: least, %", "between, %", "most, %", "most − least", f"score with {name}"]
        rows = []
        for entry in summary["on the way"]:
            row = [str(entry["round"]), interval(entry["rate"]), _signed(entry["− at random"])]
            for name in APART:
                row += [interval(rate) for rate in entry[f"rate by {name}"]]
                row += [
                    points(entry[f"most − least {name}"]),
                    interval(entry[f"rank correlation with {name}"], 2, 1.0),
                ]
            rows.append([*row, interval(entry["rank correlation with gain"], 2, 1.0)])
        parts.append(table([*header, "score with gain"], rows))
    parts.append("## Evaluations on the way\n")
    rows = [
        [NAMES[name], str(entry["round"]), interval(entry["return"], 0, 1.0), interval(entry["rate"])]
        for name, found in summary["agents"].items()
        for entry in found["checks"]
    ]
    parts.append(table(["agent", "round", "return", "planned, %"], rows))
    rivals = [name for name in NAMES if f"value − {name}" in summary]
    if rivals:
        rows = [
            [str(entry["round"]), *(_signed(summary[f"value − {name}"]["checks"][i]) for name in rivals)]
            for i, entry in enumerate(summary["on the way"])
        ]
        parts.append(table(["round", *(f"{NAMES['value']} − {NAMES[name]}" for name in rivals)], rows))
    return "\n".join(parts)
