"""The experiment's own report: tables, and sentences that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptcomp_ext.experiments.runs import counted, interval, measured_over, points, table

from .summary import GATES

__all__ = ["FIGURES", "verdicts", "write_markdown"]

FIGURES = {"main": "digits.png", "examples": "digits_examples.png"}
SHOWN = "0.9"
Summary = Mapping[str, Any]


def verdicts(summary: Summary) -> list[str]:
    """What the figures say."""
    act, shown = summary["act"], summary["confidence"][SHOWN]
    prices, readers = list(act), list(act.values())
    priced = "; ".join(
        f"{interval(found['steps'], 2, 1.0)} steps at price {price} ({interval(found['accuracy'], 2)} % right)"
        for price, found in act.items()
    )
    fixed = min(summary["fixed"].values(), key=lambda f: abs(f["steps"].mean - shown["steps"].mean))
    out = [
        f"Under ACT {priced}.",
        f"Stopping at a confidence of {SHOWN} takes {interval(shown['steps'], 2, 1.0)} steps and reads "
        f"{interval(shown['accuracy'], 2)} %. That is {points(shown['− shuffled'])} points more than the same steps dealt at "
        f"random among the images; a fixed depth of {fixed['steps'].mean:g} reads {interval(fixed['accuracy'], 2)} %.",
    ]
    timing = summary["confidence timing"]
    out.append(
        f"On the clock, stopping at {SHOWN}: masked inference takes {interval(timing['masked_over_compacted'], 2, 1.0)} times as "
        f"long, all steps {interval(timing['all_steps_over_compacted'], 2, 1.0)} times."
    )
    for name, found in (("confidence", shown), (f"ACT at {prices[-1]}", readers[-1])):
        if "rank_correlation" in found:
            out.append(
                f"Rank correlation of steps ({name}) with how hard an image is for a linear classifier: "
                f"{interval(found['rank_correlation'], 2, 1.0)}."
            )
    pair, always = summary["acc"]["value"]["0.1"], summary["acc"]["value"]["1"]
    out.append(
        f"Habit and control: calling {interval(pair['rate'])} % reads {interval(pair['accuracy'], 2)} %, "
        f"{points(pair['− always'])} points against control everywhere, at {pair['multiply_adds'].mean / 1e6:.2f} M "
        f"multiply–adds an image instead of {always['multiply_adds'].mean / 1e6:.2f} M; a batch takes "
        f"{interval(summary['acc timing']['saved'])} % less time."
    )
    return out


def write_markdown(summary: Summary, config: Mapping[str, Any], machine: str) -> str:
    """The whole report."""
    seeds = len(config["seeds"])
    cost = summary["multiply_adds"]
    parts = [
        f"# Digits: {config['data']}\n",
        f"{config['train']:,} training images, a sixth of them held out; {counted(seeds, 'seed')}; {machine}. "
        f"{measured_over(seeds)}\n",
        "The readers look at an image (of MNIST at its halved size) through a window, a look at "
        f"{cost['look']:,} multiply–adds. Habit and control read the whole image, at {cost['default']:,} and "
        f"{cost['control']:,}.\n",
        f"![Accuracy against compute]({FIGURES['main']})\n",
        "\n".join(f"- {verdict}" for verdict in verdicts(summary)) + "\n",
        f"![Fewest and most steps]({FIGURES['examples']})\n",
        "## Accuracy against compute\n",
    ]
    rows = []
    named = [(f"ACT, price of a step {p}", f) for p, f in summary["act"].items()]
    named += [(f"PonderNet, prior {p}", f) for p, f in summary["ponder"].items()]
    named += [(f"confidence {t}", f) for t, f in summary["confidence"].items()]
    named += [(f"fixed depth {n}", f) for n, f in summary["fixed"].items()]
    for name, found in named:
        rows.append(
            [
                name,
                interval(found["steps"], 2, 1.0),
                f"{found['multiply_adds'].mean / 1e6:.2f} M",
                interval(found["accuracy"], 2),
                points(found["− shuffled"]) if "− shuffled" in found else "–",
                interval(found["rank_correlation"], 2, 1.0) if "rank_correlation" in found else "–",
                interval(found["masked_over_compacted"], 2, 1.0) if "masked_over_compacted" in found else "–",
            ]
        )
    header = [
        "reader",
        "steps",
        "multiply–adds",
        "right, %",
        "− same steps at random",
        "rank correlation with difficulty",
    ]
    parts.append(table([*header, "masked / compacted time"], rows))
    rows = [
        [
            f"ACC, {gate} gate, {100 * float(rate):g} %",
            interval(found["rate"]),
            f"{found['multiply_adds'].mean / 1e6:.2f} M",
            interval(found["accuracy"], 2),
            points(found["− always"]),
        ]
        for gate in GATES
        for rate, found in summary["acc"][gate].items()
    ]
    parts.append(
        table(["habit and control", "called, %", "multiply–adds", "right, %", "− control everywhere"], rows)
    )
    parts.append("## Who gets the steps\n")
    digits = [str(d) for d in range(10)]
    last = list(summary["act"])[-1]
    rows = [
        [f"ACT, price {last}: steps", *(interval(v, 2, 1.0) for v in summary["act"][last]["by_class"])],
        [
            f"confidence {SHOWN}: steps",
            *(interval(v, 2, 1.0) for v in summary["confidence"][SHOWN]["by_class"]),
        ],
        [
            "ACC, value gate, 10 %: calls, %",
            *(interval(v) for v in summary["acc"]["value"]["0.1"]["by_class"]),
        ],
    ]
    parts.append(table(["digit", *digits], rows))
    return "\n".join(parts)
