"""The experiment's own report: tables, and sentences that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adaptcomp_ext.experiments.runs import counted, interval, measured_over, points, said, table

__all__ = ["FIGURE", "verdicts", "write_markdown"]

FIGURE = "horizon.png"
Found = Mapping[str, Any]


def verdicts(summary: Found) -> list[str]:
    """What the figures say."""
    fixed = summary["fixed"]
    best = max(fixed, key=lambda h: fixed[h]["return"].mean)
    out = [
        "Return by horizon, the same in all states: "
        + ", ".join(f"H = {h}: {interval(f['return'], 0, 1.0)}" for h, f in fixed.items())
        + f". The largest mean is that of H = {best}.",
    ]
    for price, found in summary["adaptive"].items():
        used = sum(1 for share in found["share"].values() if share.mean > 0.02)
        out.append(
            f"At price {price} the states choose H = {interval(found['horizon'], 2, 1.0)} on average, {used} "
            "different ones in more "
            f"than 2 % of the states; return {interval(found['return'], 0, 1.0)} for "
            f"{interval(found['steps imagined'], 1, 1.0)} steps "
            f"of each candidate imagined; the same depths dealt at random: {points(found['− shuffled'], 0, 1.0)} "
            f"in favour of the choice ({said(found['− shuffled'], 'better', 'worse')})."
        )
    return out


def write_markdown(summary: Found, config: Mapping[str, Any], machine: str) -> str:
    """The whole report."""
    settings, seeds = config["settings"], len(config["seeds"])
    parts = [
        f"# How far to look ahead: {settings['task']}\n",
        f"Agents that plan everywhere while they learn ({settings['rounds']} rounds of {settings['episode']} decisions in "
        f"{settings['envs']} environments); afterwards {config['episodes']} whole episodes for each row; "
        f"{counted(seeds, 'seed')}; {machine}. {measured_over(seeds)} Dealt at random: "
        "among the episodes of the same moment.\n",
        f"![Horizons]({FIGURE})\n",
        "\n".join(f"- {verdict}" for verdict in verdicts(summary)) + "\n",
    ]
    shares = list(next(iter(summary["fixed"].values()))["share"])
    rows = []
    for h, found in summary["fixed"].items():
        rows.append([f"H = {h} everywhere", *_row(found, shares), "–"])
    for price, found in summary["adaptive"].items():
        rows.append([f"chosen, price {price}", *_row(found, shares), points(found["− shuffled"], 0, 1.0)])
    header = [
        "horizon",
        "return",
        "mean H",
        "imagined",
        *(f"H = {h}, %" for h in shares),
        "− dealt at random",
    ]
    parts.append(table(header, rows))
    parts.append("## What a level gains\n")
    parts.append(
        f"By the model, over the level before it, in {config['states']} states of the last quarter of the training: what its "
        "first action is worth when all that follows is planned to the deepest horizon; in thousandths of the spread of "
        "values. The gate's expectation is compared in a fifth of the states, which it did not learn from.\n"
    )
    gains = zip(config["levels"], summary["mean gain"], summary["rank correlation with gain"], strict=True)
    rows = [
        [f"H = {level}", interval(gain, 3, 1000.0), interval(known, 2, 1.0)] for level, gain, known in gains
    ]
    parts.append(table(["level", "mean gain", "rank correlation of the gate's expectation"], rows))
    parts.append("## What the chosen horizon goes with (rank correlation)\n")
    names = list(next(iter(summary["adaptive"].values()))["correlations"])
    rows = [
        [p, *(interval(f["correlations"][n], 2, 1.0) for n in names)] for p, f in summary["adaptive"].items()
    ]
    parts.append(table(["price", *names], rows))
    return "\n".join(parts)


def _row(found: Found, shares: Sequence[str]) -> list[str]:
    return [
        interval(found["return"], 0, 1.0),
        interval(found["horizon"], 2, 1.0),
        interval(found["steps imagined"], 1, 1.0),
        *(interval(found["share"][h], 0) for h in shares),
    ]
