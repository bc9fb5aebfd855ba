"""The experiment's own report: tables, and sentences that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptcomp_ext.experiments.runs import Claim, counted, interval, judged, measured_over, points, table

from .plan import RATE, SHARE
from .summary import EQUAL, LABELS

__all__ = ["FIGURE", "gated_cost", "verdicts", "write_markdown"]

FIGURE = "distill.png"
Summary = Mapping[str, Any]


def gated_cost(summary: Summary, rate: float) -> float:
    """Multiply–adds of an image for the shrunk π₁ and π₂ at a call rate."""
    units = summary["gated"]["units"]
    return sum(units) / len(units) + rate * summary["multiply_adds"]["control"]


def verdicts(summary: Summary) -> list[str]:
    """What was expected, and whether it holds: each sentence follows from the figures."""
    online = summary["online"]["dense, T = 4"]
    gap = online["control − default"]
    out = [
        judged(
            f"Distilled online, π₁ alone reads {interval(online['default'], 2)} % of the clean test digits, π₂ "
            f"{interval(online['control'], 2)} %: {points(gap)} points apart (1 allowed).",
            Claim(gap, 0.01, most=True),
        )
    ]
    d = summary["differences"]
    out.append(
        f"Online distillation less none {points(d['online, T = 4 − none'])} points; distillation after training less none "
        f"{points(d['after, T = 4 − none'])}; online less after {points(d['online − after, T = 4'])}."
    )
    small = summary["shrunk"]["units"][f"{SHARE:g}"]
    cut, loss, plain = small["− with noise, whole"], small["− dense"], small["− labels alone"]
    out.append(
        judged(
            f"Without {100 * SHARE:g} % of the units of every hidden layer, shrunk and tuned for an epoch, π₁ is "
            f"{interval(small['faster'], 2, 1.0)} times as fast (2 expected) and reads {interval(small['accuracy'], 2)} %: "
            f"{points(loss)} points against the dense π₁, {points(cut)} against the one it was cut from, "
            f"{points(plain)} against a dense one of the labels alone (0.5 allowed).",
            Claim(small["faster"], 2.0),
            *(Claim(difference, -0.005) for difference in (loss, cut, plain)),
        )
    )
    sparse, whole = summary["shrunk"]["sparse"]["as it is"], summary["online"]["sparse, T = 4"]
    out.append(
        f"Zeros that lie anywhere: {interval(whole['sparsity'])} % of the weights are pruned and "
        f"{interval(whole['default'], 2)} % of the digits are read right; what of the zeros is whole units makes π₁ "
        f"{interval(sparse['faster'], 2, 1.0)} times as fast."
    )
    for allowed in EQUAL:
        out.append(_equal(summary, allowed))
    gated = summary["gated"]
    out.append(
        f"On the clock, with {interval(gated['timed_rate'])} % of a batch called, the pair is "
        f"{interval(gated['control_over_gated'], 2, 1.0)} times as fast as π₂ everywhere."
    )
    return out


def _equal(summary: Summary, allowed: float) -> str:
    """The least rate of calls at which the pair is as good as π₂ everywhere: by its interval, or else by its mean."""
    rates = summary["gated"]["by_rate"]
    claims = {rate: Claim(found["− control"], -allowed) for rate, found in rates.items()}
    alone = all(claim.alone for claim in claims.values())
    where = "In the one seed, w" if alone else "W"
    within = f"ithin {100 * allowed:g} points of π₂ everywhere"
    held = [rate for rate, claim in claims.items() if claim.holds]
    met = held or [rate for rate, claim in claims.items() if claim.value.mean >= claim.bound]
    if not met:
        return f"{where}{within}: no call rate that was tried."
    rate, found = met[0], rates[met[0]]
    share = gated_cost(summary, found["rate"].mean) / summary["multiply_adds"]["control"]
    by_mean = "" if held or alone else " by the mean, not by the whole interval"
    return (
        f"{where}{within}{by_mean}: calling {interval(found['rate'])} % of the test digits (calibrated to "
        f"{100 * float(rate):g} % of held-out ones), {points(found['− control'])} points, at {100 * share:.0f} % of π₂'s "
        "multiply–adds."
    )


def write_markdown(summary: Summary, config: Mapping[str, Any], machine: str) -> str:
    """The whole report."""
    seeds = len(config["seeds"])
    cost = summary["multiply_adds"]
    parts = [
        f"# Distillation: {config['data']}\n",
        f"{config['train']:,} training images, a sixth of them held out; {counted(seeds, 'seed')}; {machine}. "
        f"{measured_over(seeds)} π₁ has "
        f"{cost['default']:,} multiply–adds before it is shrunk, π₂ {cost['control']:,}.\n",
        f"![Distillation]({FIGURE})\n",
        "## What was expected\n",
        "\n".join(f"- {verdict}" for verdict in verdicts(summary)) + "\n",
        "## π₁ alone, per cent right\n",
    ]
    rows = [["labels alone", "–", interval(summary["after"][LABELS], 2), "–", "–"]]
    for way, value in summary["after"].items():
        if way != LABELS:
            rows.append(
                [
                    f"after training, T = {way}",
                    "none",
                    interval(value, 2),
                    interval(summary["teacher"], 2),
                    "–",
                ]
            )
    for name, found in summary["online"].items():
        form, temperature = name.split(", ")
        noise = {"dense": "none", "units": "of units", "sparse": "of weights"}[form]
        values = [interval(found["default"], 2), interval(found["control"], 2), interval(found["sparsity"])]
        rows.append([f"online, {temperature}", noise, *values])
    parts.append(table(["distilled", "noise in training", "π₁", "its π₂", "pruned weights, %"], rows))
    parts.append("## Shrunk\n")
    rows = []
    for form, found in summary["shrunk"].items():
        for name, s in found.items():
            before = interval(s["before tuning"], 2) if "before tuning" in s else "–"
            share = name if name == "as it is" else f"without {100 * float(name):g} % of the units"
            rows.append(
                [
                    f"noise of {'units' if form == 'units' else 'weights'}, {share}",
                    "–".join(map(str, s["units"])),
                    f"{s['multiply_adds'].mean / 1000:,.0f} k",
                    interval(s["faster"], 2, 1.0),
                    before,
                    interval(s["accuracy"], 2),
                    points(s["− dense"]),
                ]
            )
    header = [
        "π₁",
        "units (first seed)",
        "multiply–adds",
        "times as fast",
        "before tuning, %",
        "right, %",
        "− dense π₁",
    ]
    parts.append(table(header, rows))
    parts.append(
        f"## The pair: π₁ without {100 * SHARE:g} % of its units, π₂ where π₁'s entropy is high\n\n"
        f"Thresholds from held-out images; the wall-clock sentence above is at the threshold for {100 * RATE:g} %.\n"
    )
    rows = [
        [
            f"{100 * float(rate):g} %",
            interval(found["rate"]),
            f"{gated_cost(summary, found['rate'].mean) / 1e6:.2f} M",
            interval(found["accuracy"], 2),
            points(found["− control"]),
        ]
        for rate, found in summary["gated"]["by_rate"].items()
    ]
    parts.append(table(["calibrated to", "called, %", "multiply–adds", "right, %", "− π₂ everywhere"], rows))
    return "\n".join(parts)
