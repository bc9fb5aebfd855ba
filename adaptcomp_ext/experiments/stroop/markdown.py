"""The experiment's own report: tables, and sentences that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptcomp_ext.experiments.runs import (
    Claim,
    Difference,
    counted,
    interval,
    judged,
    measured_over,
    paired,
    percent,
    points,
    table,
)

from .gates import GATES, RATES
from .summary import CONDITIONS, EQUAL, MAX_RATE, MIXED, TABLE_RATE, TASKS

__all__ = ["FIGURES", "verdicts", "write_markdown"]

FIGURES = {"main": "stroop.png", "beliefs": "stroop_beliefs.png", "reaction": "stroop_reaction.png"}
BASE_RATE = 0.3  # of wall-clock that a gate has to save
Summary = Mapping[str, Any]


def verdicts(summary: Summary) -> list[str]:
    """What was expected, and whether it holds: each sentence follows from the figures."""
    out = []
    main = summary["main"]
    if "0.8" in main:
        cnn = main["0.8"]["accuracy"]["cnn"]["incongruent"]
        share = f"{interval(cnn)} % of the incongruent test digits"
        text = f"The CNN trained at 80 % congruent reads {share} (94 % expected)."
        out.append(judged(text, Claim(cnn, 0.94)))
    for p, found in main.items():
        share, d = percent(float(p), 3).replace(".000", "").replace("00 %", " %"), found["differences"]
        ours = d[f"ACC calling {100 * float(TABLE_RATE):g} % of held-out items − CNN, incongruent"]
        alone = d["control − CNN, incongruent"]
        text = (
            f"{share} congruent, incongruent digits: gated ACC less the CNN of equal size "
            f"{points(ours)} points; control alone {points(alone)}."
        )
        out.append(judged(text, Claim(ours)) if p in ("0.8", "0.99") else text)
        loss = d[f"value gate at {100 * float(MAX_RATE):g} % − always, mixed"]
        calls = d[f"calls of incongruent − congruent items at {100 * float(MAX_RATE):g} %, value gate"]
        rate = found["gates"][MIXED]["value"][MAX_RATE][f"{MIXED}/rate"]
        text = (
            f"{share} congruent, mixed stream: with {interval(rate)} % of calls the answers lose "
            f"{points(loss)} points against control everywhere (0.5 allowed at 40 %); incongruent items "
            f"are called {points(calls, 1)} points more often."
        )
        out.append(judged(text, Claim(loss, -EQUAL), Claim(calls)))
        random = d[f"value − random gate at {100 * float(MAX_RATE):g} %, mixed"]
        text = (
            f"{share} congruent: the value gate less a random one at the same rate {points(random)} points "
            f"(largest McNemar p of a seed {found['mcnemar'][MAX_RATE]:.2g})."
        )
        out.append(judged(text, Claim(random)))
        if p in ("0.95", "0.99"):
            each = [d[f"value − entropy gate at {100 * rate:g} %, mixed"] for rate in RATES]
            listed = "; ".join(f"at {100 * r:g} % {points(e)}" for r, e in zip(RATES, each, strict=True))
            gates = "value gate less normalised entropy at equal call rates"
            text = f"{share} congruent: the {gates}, points: {listed}."
            out.append(judged(text, *(Claim(e) for e in each)))
        saved = found["saved"]
        text = (
            f"{share} congruent: at {interval(found['timed_rate'])} % of calls a batch takes "
            f"{interval(saved)} % less time than with control everywhere (30 % expected); control takes "
            f"{interval(found['control_over_default'], 1, 1.0)} times as long as habit."
        )
        out.append(judged(text, Claim(saved, BASE_RATE), Claim(found["control_over_default"], 4.0)))
    out += _reaction_verdicts(summary["reaction"])
    return out


def _reaction_verdicts(reaction: Summary) -> list[str]:
    out = []
    high, low = reaction.get("congruent 0.8"), reaction.get("congruent 0.2")
    for task in TASKS if high and low else ():
        assert high and low
        effect: Difference = high[task]["effect"]
        grows = paired(high[task]["effects"], low[task]["effects"])
        verb = "Reading digits" if task == "read" else "Naming inks"
        text = (
            f"{verb} takes {points(effect, 2, 1.0)} more steps for incongruent than for congruent items "
            f"at 80 % congruent, {points(low[task]['effect'], 2, 1.0)} at 20 %; the difference of these "
            f"is {points(grows, 2, 1.0)}."
        )
        out.append(judged(text, Claim(effect), Claim(grows)))
    high, low = reaction.get("unbiased items, congruent 0.8"), reaction.get("unbiased items, congruent 0.2")
    if high and low:
        parts = []
        for task in TASKS:
            grows = paired(high[task]["effects"], low[task]["effects"])
            parts.append(f"{points(grows, 2, 1.0)} steps ({task})")
        out.append(
            "On items whose own proportion stays at one half, the effect at 80 % less that at 20 %: "
            f"{'; '.join(parts)}."
        )
    much, little = reaction.get("reading 0.9"), reaction.get("reading 0.1")
    if much and little:
        listed = [
            f"{f[task]['effect'].mean:.2f} steps to {task} after {share} % reading practice"
            for share, f in ((90, much), (10, little))
            for task in TASKS
        ]
        out.append(f"By practice, incongruent less congruent is {'; '.join(listed)}.")
    return out


def write_markdown(summary: Summary, config: Mapping[str, Any], machine: str) -> str:
    """The whole report."""
    seeds = len(config["seeds"])
    parts = [
        f"# Stroop: {config['data']}\n",
        f"{config['train']:,} training images; {counted(seeds, 'seed')}; {machine}. {measured_over(seeds)} "
        "Times are medians, and their ratios are taken within interleaved rounds, because cells may "
        "have run side by side.\n",
        f"![Stroop]({FIGURES['main']})\n",
        "## What was expected\n",
        "\n".join(f"- {verdict}" for verdict in verdicts(summary)) + "\n",
    ]
    if summary["main"]:
        parts += _main_tables(summary["main"])
        parts.append(f"![Beliefs]({FIGURES['beliefs']})\n")
    if summary["effort"]:
        parts.append(_effort_table(summary["effort"], config))
    if summary["reaction"]:
        parts += _reaction_tables(summary["reaction"])
    return "\n".join(parts)


def _main_tables(main: Summary) -> list[str]:
    parts = ["## Accuracy on the test digits, per cent\n"]
    rows = []
    first = next(iter(main.values()))
    for p, found in main.items():
        acc, how = found["accuracy"], found["gates"]["as trained"]
        named = {
            f"CNN ({first['parameters']['cnn']:,} weights)": [acc["cnn"][c] for c in CONDITIONS],
            "habit π₁ alone": [acc["default"][c] for c in CONDITIONS],
            f"control π₂ alone (ACC: {first['parameters']['acc']:,} weights)": [
                acc["control"][c] for c in CONDITIONS
            ],
            f"ACC, value gate, {100 * float(TABLE_RATE):g} % of held-out items called": [
                how["value"][TABLE_RATE][f"{c}/control"] for c in CONDITIONS
            ],
            "… answering with the mixture": [how["value"][TABLE_RATE][f"{c}/mixture"] for c in CONDITIONS],
            "ACC, entropy gate": [how["entropy"][TABLE_RATE][f"{c}/control"] for c in CONDITIONS],
            "ACC, one decision for each batch": [
                how["batch-mean"][TABLE_RATE][f"{c}/control"] for c in CONDITIONS
            ],
            "ACC, random gate": [how["random"][TABLE_RATE][f"{c}/control"] for c in CONDITIONS],
        }
        for name, values in named.items():
            rows.append([f"{float(p) * 100:g} %", name, *(interval(v) for v in values)])
        calls = [interval(how["value"][TABLE_RATE][f"{c}/rate"]) for c in CONDITIONS]
        rows.append([f"{float(p) * 100:g} %", "calls of the value gate", *calls])
    parts.append(table(["congruent in training", "who", *CONDITIONS], rows))
    parts.append(
        "## Gates at equal call rates on the mixed stream (half congruent, half incongruent), per cent "
        "right\n"
    )
    rows = []
    for p, found in main.items():
        for gate in GATES:
            values = [found["gates"][MIXED][gate][f"{r:g}"] for r in RATES]
            rows.append(
                [f"{float(p) * 100:g} %", gate, *(interval(v[f"{MIXED}/control"], 2) for v in values)]
            )
        always = interval(found["always"][MIXED], 2)
        mixture = interval(found["always_mixture"][MIXED], 2)
        rows.append(
            [f"{float(p) * 100:g} %", f"always: π₂ {always}, mixture {mixture}", *("" for _ in RATES)]
        )
    parts.append(table(["congruent in training", "gate", *(f"{100 * r:g} % called" for r in RATES)], rows))
    parts.append("## Normalised entropy, and time\n")
    rows = []
    for p, found in main.items():
        entropies = [f"{v['default'].mean:.3f} / {v['control'].mean:.3f}" for v in found["entropy"].values()]
        ms = {k: f"{v.mean:.1f}" for k, v in found["ms"].items()}
        times = f"{ms['both']} / {ms['gated']} / {ms['default']} / {ms['control']}"
        rows.append([f"{float(p) * 100:g} %", *entropies, times, interval(found["saved"])])
    header = ["congruent in training", *(f"π₁ / π₂, {c}" for c in CONDITIONS)]
    parts.append(table([*header, "ms of 256 rows: both / gated / π₁ / π₂", "saved, %"], rows))
    return parts


def _effort_table(effort: Summary, config: Mapping[str, Any]) -> str:
    rows = []
    for name, found in effort.items():
        acc = found["accuracy"]
        prices = ", ".join(f"{price:.2f}" for price in found["price"])
        rows.append(
            [name, *(f"{100 * acc[w][c]:.1f}" for w in ("default", "control") for c in CONDITIONS), prices]
        )
    header = [
        "price of effort",
        *(f"π₁ {c}" for c in CONDITIONS),
        *(f"π₂ {c}" for c in CONDITIONS),
        "mean λ, epoch by epoch",
    ]
    return "## The price of effort, 95 % congruent, one seed\n\n" + table(header, rows)


def _reaction_tables(reaction: Summary) -> list[str]:
    parts = ["## Steps as reaction time (right answers)\n", f"![Steps]({FIGURES['reaction']})\n"]
    rows = []
    for name, found in reaction.items():
        for task in TASKS:
            t = found[task]
            rows.append(
                [
                    name,
                    task,
                    *(interval(t["steps"][c], 2, 1.0) for c in CONDITIONS),
                    *(points(t[k], 2, 1.0) for k in ("interference", "facilitation", "effect")),
                    " / ".join(f"{100 * t['right'][c].mean:.1f}" for c in CONDITIONS),
                    interval(found["masked_over_compacted"], 2, 1.0),
                ]
            )
    header = [
        "practised",
        "task",
        *CONDITIONS,
        "interference",
        "facilitation",
        "incongruent − congruent",
        "% right",
    ]
    parts.append(table([*header, "masked / compacted time"], rows))
    parts.append(
        "Interference: incongruent less neutral; facilitation: neutral less congruent. *Unbiased "
        "items*: the proportion was that of responses 0 to 2 alone, and the steps are those of "
        "responses 3 and 4, congruent half of the time whatever the proportion: an effect of the "
        "proportion here cannot come from which inks go with which digits.\n"
    )
    return parts
