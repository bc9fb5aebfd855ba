"""The experiment: its options and cells, and its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data import COLOURS, Condition, StroopMNIST
from ..runs import Data, Epochs, FirstSeed, Listed, Quick, Results, Seeds, Setup, experiment, grid
from ..runs.report import Block, Column, Picture, Table, Verdicts, column, tabulate
from ..runs.statistics import Claim, Shown, estimate, form, interval, judged, points, said
from ..style import INK, MUTED, ORANGE, OTHERS, OURS, WIDTH, WRONG, bars, curve, legend, note, span_at_least
from ..vision import LARGE, recipe_for
from . import reaction
from .gates import BATCH, GATES, MIXED, RATES, RIVALS
from .measure import CONDITIONS, EFFORTS, measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["stroop"]

EFFORT_CONGRUENT = 0.95
TABLE_RATE, MAX_RATE = 0.2, 0.4
EQUAL = 0.005
"""Accuracy that a gated answer may lose against control everywhere."""
SAVED, DEARER = 0.3, 4.0
"""Share of the time that a gate has to save, and how many times as long as habit control has to take."""
LIGHT = "#6aa6d8"
GATE_LOOKS = {
    "value": (OURS, "-", "learned value"),
    "kl": (LIGHT, "-", "predicted KL"),
    "entropy": (ORANGE, "-", "normalised entropy"),
    "random": (OTHERS, "--", "random"),
    "batch-mean": (WRONG, ":", "one decision a batch"),
}
CONDITION_COLOURS = {"congruent": OURS, "neutral": OTHERS, "incongruent": WRONG}
TASK_LOOKS = {"read": (OURS, "Reading the digit"), "name": (ORANGE, "Naming the ink")}


@experiment(measure)
def stroop(
    data: Data = None,
    *,
    congruent: Annotated[
        Sequence[float],
        Listed(float, "numbers"),
        typer.Option(
            help="Proportions of the training items whose ink is their digit's, with commas between them."
        ),
    ] = (0.8, 0.95, 0.99, 0.995),
    seeds: Seeds = 1,
    first_seed: FirstSeed = 0,
    epochs: Epochs = None,
    quick: Quick = False,
    with_reaction: Annotated[
        bool,
        typer.Option(
            "--reaction/--no-reaction", help="Measure the steps of an observer as its reaction time."
        ),
    ] = True,
    with_effort: Annotated[
        bool, typer.Option("--effort/--no-effort", help="Compare prices of effort, with the first seed.")
    ] = True,
) -> Setup:
    """Read digits in misleading ink with habit and control, compare gates, measure steps as reaction time."""
    numbers = all(isinstance(p, (int, float)) and 0 <= p <= 1 for p in congruent)
    if not numbers or len(set(congruent)) != len(congruent):
        raise ValueError(f"congruent: expected different numbers from 0 to 1, got {congruent!r}")
    train = StroopMNIST(data, "train")
    recipe = asdict(recipe_for(len(train), quick))
    if epochs is not None:
        recipe["epochs"] = epochs
    practice = asdict(reaction.recipe_for(train.images.shape[-1] >= LARGE, quick))
    designs = reaction.designs_for(quick) if with_reaction else {}
    common = {"data": None if data is None else str(data), "timing_seconds": 0.5 if quick else 4.0}
    trained = {**common, "recipe": recipe}
    every = range(first_seed, first_seed + seeds)
    observers = {
        "reaction-" + name.replace(",", "").replace(" ", "-"): {"setting": name, "design": asdict(design)}
        for name, design in designs.items()
    }
    efforts = {
        f"effort-{i}": {"part": "effort", "effort": name, "congruent": EFFORT_CONGRUENT}
        for i, name in enumerate(EFFORTS if with_effort else ())
    }
    return Setup(
        config={
            "data": train.name,
            "train": len(train),
            "congruent": list(congruent),
            "seeds": list(every),
            "recipe": recipe,
            "reaction": practice if with_reaction else None,
            "effort": with_effort,
            "quick": quick,
        },
        cells=[
            *grid({f"main-{p:g}": {"part": "main", "congruent": p} for p in congruent}, every, trained),
            *grid(observers, every, {**common, "part": "reaction", "recipe": practice}),
            *grid(efforts, every[:1], trained),
        ],
        about=f"[bold]{train.name}[/]: {len(train):,} training images",
    )


class _Found:
    """The results under the names of the report."""

    def __init__(self, results: Results) -> None:
        self.main = {p: results.where(part="main", congruent=p) for p in results.config["congruent"]}
        self.shares = {_share(p): row for p, row in self.main.items()}
        self.value = {
            (_share(p), _share(rate)): row.at(_mixed("value", rate))
            for p, row in self.main.items()
            for rate in RATES
        }
        self.effort = {name: results.where(effort=name) for name in results.options("effort")}
        self.tasks = {
            (name, task): results.where(setting=name).at(f"final/{task}")
            for name in results.options("setting")
            for task in reaction.TASKS
        }

    def congruent(self, task: str) -> dict[float, Results]:
        """The observers by the proportion congruent in their practice."""
        start, tasks = "congruent ", self.tasks.items()
        return {float(n[len(start) :]): r for (n, t), r in tasks if t == task and n.startswith(start)}


def _share(p: float) -> str:
    return f"{100 * p:g} %"


def _mixed(gate: str, rate: float) -> str:
    """The path of what a gate that was calibrated on a mixed stream does on another one."""
    return f"gates/{MIXED}/{gate}/{rate:g}/{MIXED}"


def _trained(gate: str, quantity: str = "control", rate: float = TABLE_RATE) -> str:
    """The path of what a gate, calibrated on items as in training, does in the condition ``{c}``."""
    return f"gates/as trained/{gate}/{rate:g}/{{c}}/{quantity}"


def _less_cnn(path: str) -> Callable[[Results], Any]:
    """Accuracy on incongruent digits less that of the CNN."""
    return lambda row: row[path.format(c="incongruent")] - row["accuracy/cnn/incongruent"]


def _less(gate: str) -> Callable[[Results], Any]:
    """The value gate less another one at the same rate, or less control everywhere, on the mixed stream."""

    def less(row: Results) -> Any:
        other = f"always/{MIXED}" if gate == "always" else row.path.replace("/value/", f"/{gate}/")
        return row["control"] - row[f"/{other}/control"]

    return less


def _more_calls(row: Results) -> Any:
    return row["rate_incongruent"] - row["rate_congruent"]


def _rate(row: Results) -> str:
    """The call rate of a row whose path is one of `_mixed`."""
    return row.path.split("/")[3]


def _mcnemar(row: Results) -> float:
    """The largest p of a seed, against the random gate."""
    return float(row[f"/mcnemar/{_rate(row)}/value"].max())


def _left(gate: str) -> Callable[[Results], Any]:
    """What is right, with as many calls, under the gate that knows the truth, less what is under `gate`."""

    def left(row: Results) -> Any:
        return _under_truth(gate)(row) - row[f"/gates/{MIXED}/{gate}/{_rate(row)}/{MIXED}/control"]

    return left


def _under_truth(gate: str) -> Callable[[Results], Any]:
    """What is right, with as many calls as `gate` makes, under the gate that knows the truth."""
    return lambda row: row[f"/truth/{gate}/{_rate(row)}/control"]


def _beyond_weighting(path: str) -> Callable[[Results], Any]:
    """Accuracy on incongruent digits less that of the CNN that was trained with control's weights."""
    return lambda row: row[path.format(c="incongruent")] - row["accuracy/cnn_by_need/incongruent"]


def _slashed(path: str, keys: Sequence[str], digits: int) -> Callable[[Results], str]:
    return lambda row: " / ".join(f"{row[f'{path}/{key}'].mean():.{digits}f}" for key in keys)


def _observed(row: Results, key: str) -> Any:
    """What an observer did in the task with which the path of `row` ends; the key has slashes of its own."""
    where, task = row.path.rsplit("/", 1)
    return row[f"/{where}"].map(itemgetter(f"{task}/{key}"))


def _effect(row: Results, more: str = "incongruent", less: str = "congruent") -> Any:
    """Steps of one condition less those of another."""
    return _observed(row, f"{more}/steps") - _observed(row, f"{less}/steps")


def _practised(row: Results) -> dict[int, Any]:
    """Steps of incongruent less those of congruent items, by the number of updates."""
    task, updates = row.path.rsplit("/", 1)[1], row.first("/recipe/updates")
    epochs = range(len(row.first("/history")))
    return {updates * (i + 1): _effect(row.at(f"/history/{i}/{task}")) for i in epochs}


@stroop.reports
def report(results: Results) -> list[Block]:
    """What habit and control read, whom the gates call, and who takes the steps."""
    found, config = _Found(results), results.config
    blocks: list[Block] = [
        f"# Stroop: {config['data']}",
        f"{config['train']:,} training images; {results.opening} Times are medians, and their ratios are "
        "taken within "
        "interleaved rounds, because cells may have run side by side.",
    ]
    if found.main:
        blocks.append(column("stroop.png", "Stroop", found, _accuracy, _curves, _calls))
    blocks += ["## What was expected", Verdicts([*_sentences(found), *_reaction_sentences(found)])]
    if found.main:
        blocks += _main_tables(found)
        items = next(iter(found.main.values())).first("beliefs")
        if items:
            draw, size = partial(_draw_beliefs, found, items), (WIDTH, 1.9 * len(items) + 0.7)
            blocks.append(Picture("stroop_beliefs.png", "Beliefs", draw, size, 120))
    if found.effort:
        blocks += ["## The price of effort, 95 % congruent, one seed", _effort_table(found)]
    if found.tasks:
        steps = (partial(_steps, task="read"), partial(_steps, task="name"), _by_proportion, _by_practice)
        picture = column("stroop_reaction.png", "Steps", found, *steps)
        blocks += ["## Steps as reaction time (right answers)", picture, *_reaction_tables(found)]
    return blocks


def _sentences(found: _Found) -> list[str]:
    """What was expected of habit and control, and whether it holds."""
    sentences = []
    if 0.8 in found.main:
        cnn = found.main[0.8]["accuracy/cnn/incongruent"]
        text = (
            f"The CNN trained at 80 % congruent reads {interval(cnn)} % of the incongruent test digits "
            "(94 % expected)."
        )
        sentences.append(judged(text, Claim(cnn, 0.94)))
    for p, row in found.main.items():
        at = f"{_share(p)} congruent"
        ours, alone = _less_cnn(_trained("value"))(row), _less_cnn("accuracy/control/incongruent")(row)
        text = (
            f"{at}, incongruent digits: the gated pair reads {points(ours)} points more than the CNN of "
            f"equal size; control alone {points(alone)}."
        )
        sentences.append(judged(text, Claim(ours)) if p in (0.8, 0.99) else text)
        if "cnn_by_need" in row.keys("accuracy"):
            weighting = _less_cnn("accuracy/cnn_by_need/incongruent")(row)
            pair = _beyond_weighting(_trained("value"))(row)
            more, less = "the second system adds to the weighting", "the second system takes from it"
            sentences.append(
                f"{at}, incongruent digits: a single CNN of equal size whose rows are weighted as control's "
                f"are reads {points(weighting)} points more than the CNN. The gated pair reads "
                f"{points(pair)} points more than that, control alone "
                f"{points(_beyond_weighting('accuracy/control/incongruent')(row))}; of the pair: "
                f"{said(pair, more, less)}."
            )
        value = found.value[_share(p), _share(MAX_RATE)]
        loss, calls, gain = _less("always")(value), _more_calls(value), _less("random")(value)
        text = (
            f"{at}, mixed stream: with {interval(value['rate'])} % of calls the answers are {points(loss)} "
            "points from control everywhere (a loss of 0.5 is allowed at 40 %); incongruent items are "
            f"called {points(calls, 1)} points more often."
        )
        sentences.append(judged(text, Claim(loss, -EQUAL), Claim(calls)))
        text = (
            f"{at}: the value gate reads {points(gain)} points more than a random one at the same rate "
            f"(largest McNemar p of a seed {_mcnemar(value):.2g})."
        )
        sentences.append(judged(text, Claim(gain)))
        if p in (0.95, 0.99):
            gains = {r: _less("entropy")(found.value[_share(p), _share(r)]) for r in RATES}
            listed = "; ".join(f"at {_share(rate)} {points(gain)}" for rate, gain in gains.items())
            text = f"{at}: the value gate less normalised entropy at equal call rates, in points: {listed}."
            sentences.append(judged(text, *map(Claim, gains.values())))
        if "truth" in row.keys():  # noqa: SIM118 (not a dict)
            listed = "; ".join(
                f"{gate}, "
                + ", ".join(
                    f"at {_share(rate)} {points(_left(gate)(found.value[_share(p), _share(rate)]))}"
                    for rate in RATES
                )
                for gate in RIVALS
            )
            sentences.append(
                f"{at}, mixed stream: with as many calls a gate that knows who is right reads so many points "
                f"more than the gate: {listed}."
            )
        saved, dearer = row["timing/saved"], row["timing/control_over_default"]
        text = (
            f"{at}: at {interval(row['timing/rate'])} % of calls a batch takes {interval(saved)} % less "
            f"time than with control everywhere (30 % expected); control takes "
            f"{interval(dearer, 1, 1.0)} times as long as habit."
        )
        sentences.append(judged(text, Claim(saved, SAVED), Claim(dearer, DEARER)))
    return sentences


def _reaction_sentences(found: _Found) -> list[str]:
    effects = {where: _effect(row) for where, row in found.tasks.items()}
    practised = {name for name, _ in effects}
    sentences = []
    if {"congruent 0.8", "congruent 0.2"} <= practised:
        for task, verb in (("read", "Reading digits"), ("name", "Naming inks")):
            high, low = effects["congruent 0.8", task], effects["congruent 0.2", task]
            text = (
                f"{verb} takes {points(high, 2, 1.0)} more steps for incongruent than for congruent items "
                f"at 80 % congruent, {points(low, 2, 1.0)} at 20 %; the difference of these is "
                f"{points(high - low, 2, 1.0)}."
            )
            sentences.append(judged(text, Claim(high), Claim(high - low)))
    most, least = (f"unbiased items, congruent {p}" for p in (0.8, 0.2))
    if {most, least} <= practised:
        grows = {task: points(effects[most, task] - effects[least, task], 2, 1.0) for task in reaction.TASKS}
        listed = "; ".join(f"{more} steps ({task})" for task, more in grows.items())
        sentences.append(
            "On items whose own proportion stays at one half, the effect at 80 % less that at 20 % is "
            f"{listed}."
        )
    if {"reading 0.9", "reading 0.1"} <= practised:
        listed = "; ".join(
            f"{effects[f'reading {share}', task].mean():.2f} steps to {task} after {_share(share)} reading "
            "practice"
            for share in (0.9, 0.1)
            for task in reaction.TASKS
        )
        sentences.append(f"By practice, incongruent less congruent is {listed}.")
    return sentences


def _main_tables(found: _Found) -> list[Block]:
    weights = next(iter(found.main.values())).first("parameters")
    answers = {
        f"CNN ({weights['cnn']:,} weights)": "accuracy/cnn/{c}",
        "CNN, its rows weighted as control's": "accuracy/cnn_by_need/{c}",
        "habit π₁ alone": "accuracy/default/{c}",
        f"control π₂ alone (ACC: {weights['acc']:,} weights)": "accuracy/control/{c}",
        f"ACC, value gate, {_share(TABLE_RATE)} of held-out items called": _trained("value"),
        "… answering with the mixture": _trained("value", "mixture"),
        "ACC, entropy gate": _trained("entropy"),
        "ACC, one decision for each batch": _trained("batch-mean"),
        "ACC, random gate": _trained("random"),
        "calls of the value gate": _trained("value", "rate"),
    }
    read = [
        [share, who, *(interval(row[path.format(c=c)]) for c in CONDITIONS)]
        for share, row in found.shares.items()
        for who, path in answers.items()
        if not path.startswith("accuracy/") or path.split("/")[1] in row.keys("accuracy")
    ]
    gates: dict[tuple[str, str], Results] = {}
    for share, row in found.shares.items():
        gates |= {(share, gate): row.at(f"gates/{MIXED}/{gate}") for gate in GATES}
        gates[share, "always"] = row.at(f"always/{MIXED}")
    of, both = "congruent in training", ("default", "control")
    return [
        "## Accuracy on the test digits, per cent",
        Table([of, "who", *CONDITIONS], read),
        "Incongruent digits, less the CNN:",
        tabulate(
            of,
            found.shares,
            Column("control π₂ alone", _less_cnn("accuracy/control/incongruent"), points),
            *(
                Column(f"ACC, {_share(r)} called", _less_cnn(_trained("value", rate=r)), points)
                for r in (TABLE_RATE, MAX_RATE)
            ),
        ),
        "The same, less the CNN whose rows were weighted as control's are (by the loss of a habit that was "
        "trained beside it and thrown away); before it what the weighting alone is worth:",
        tabulate(
            of,
            found.shares,
            Column("that CNN − the CNN", _less_cnn("accuracy/cnn_by_need/incongruent"), points),
            Column("control π₂ alone", _beyond_weighting("accuracy/control/incongruent"), points),
            *(
                Column(f"ACC, {_share(r)} called", _beyond_weighting(_trained("value", rate=r)), points)
                for r in (TABLE_RATE, MAX_RATE)
            ),
        ),
        "## Gates at equal call rates on the mixed stream (half congruent, half incongruent), per cent right",
        tabulate(
            (of, "gate"),
            gates,
            *(Column(f"{_share(r)} called", f"{r:g}/{MIXED}/control", form(2)) for r in RATES),
            Column("all called", "control", form(2)),
            Column("all called, mixture", "mixture", form(2)),
        ),
        "The value gate less the others at equal call rates:",
        tabulate(
            (of, "called"),
            found.value,
            *(Column(f"− {gate}", _less(gate), points) for gate in ("entropy", "random", "always")),
            Column("largest McNemar p against random", _mcnemar, lambda p: Shown(f"{p:.2g}", p)),
            Column("calls, incongruent − congruent", _more_calls, points),
        ),
        "A gate that knows who is right calls first what control mends, then what calls do not change, last "
        "what control would spoil, each in random order, until it has made as many calls on the mixed stream "
        "as the other gate:",
        tabulate(
            (of, "called"),
            found.value,
            *(Column(f"per cent right, calls of {gate}", _under_truth(gate), form(2)) for gate in RIVALS),
            *(Column(f"− {gate}", _left(gate), points) for gate in RIVALS),
        ),
        "Shares of the mixed stream on which control is right and habit wrong, and the other way round:",
        tabulate(
            of,
            found.shares,
            Column("control mends, %", "truth/helped", form(2)),
            Column("control spoils, %", "truth/spoiled", form(2)),
        ),
        "## Normalised entropy, and time",
        tabulate(
            of,
            found.shares,
            *(Column(f"π₁ / π₂, {c}", _slashed(f"entropy/{c}", both, 3)) for c in CONDITIONS),
            Column(
                f"ms of {BATCH} rows: both / gated / π₁ / π₂",
                _slashed("timing/ms", ("both", "gated", *both), 1),
            ),
            Column("saved, %", "timing/saved", form()),
        ),
    ]


def _effort_table(found: _Found) -> Table:
    whose = {
        f"{p} {c}": f"accuracy/{who}/{c}"
        for p, who in (("π₁", "default"), ("π₂", "control"))
        for c in CONDITIONS
    }

    def prices(row: Results) -> str:
        return ", ".join(interval(price, 2, 1.0) for price in row.each("training", "effort"))

    columns = [Column(header, path, form()) for header, path in whose.items()]
    return tabulate("price of effort", found.effort, *columns, Column("mean λ, epoch by epoch", prices))


def _reaction_tables(found: _Found) -> list[Block]:
    of, signed = ("practised", "task"), partial(points, digits=2, scale=1.0)

    def right(row: Results) -> str:
        return " / ".join(f"{100 * _observed(row, f'{c}/right').mean():.1f}" for c in CONDITIONS)

    def after(count: int) -> Callable[[Results], Any]:
        return lambda row: _practised(row)[count]

    return [
        tabulate(
            of,
            found.tasks,
            *(Column(c, partial(_observed, key=f"{c}/steps"), form(2, 1.0)) for c in CONDITIONS),
            Column("interference", partial(_effect, less="neutral"), signed),
            Column("facilitation", partial(_effect, more="neutral"), signed),
            Column("incongruent − congruent", _effect, signed),
            Column("% right", right),
            Column("masked / compacted time", "/timing/masked_over_compacted", form(2, 1.0)),
        ),
        "Interference: incongruent less neutral; facilitation: neutral less congruent. *Unbiased items*: the "
        "proportion was that of responses 0 to 2 alone, and the steps are those of responses 3 and 4, "
        "congruent half of the time whatever the proportion: an effect of the proportion here cannot come "
        "from which inks go with which digits.",
        "Steps of incongruent less congruent items, as practice goes on:",
        tabulate(
            of,
            found.tasks,
            *(
                Column(f"{count:,} updates", after(count), form(2, 1.0))
                for count in _practised(next(iter(found.tasks.values())))
            ),
        ),
    ]


def _grouped(
    axes: Axes, ticks: Sequence[str], groups: Mapping[str, tuple[str, Sequence[Any]]], scale: float = 100.0
) -> None:
    """Draw a bar of each group, which has a colour and a value for each tick, beside those of the others."""
    width = 0.8 / len(groups)
    for i, (label, (color, values)) in enumerate(groups.items()):
        means = [estimate(v) for v in values]
        x, y = (
            [at + (i - (len(groups) - 1) / 2) * width for at in range(len(ticks))],
            [scale * v.mean for v in means],
        )
        axes.bar(x, y, 0.92 * width, color=color, label=label)
        axes.errorbar(x, y, bars(means, scale), fmt="none", ecolor=INK, elinewidth=1)
    axes.set_xticks(range(len(ticks)), ticks)


def _by_share(
    axes: Axes, found: _Found, ylabel: str, title: str, bars_of: Mapping[str, tuple[str, str]]
) -> None:
    """Draw quantities, given by label, colour and path, of each proportion congruent in training."""
    rows = found.shares.values()
    _grouped(
        axes,
        list(found.shares),
        {name: (color, [r[path] for r in rows]) for name, (color, path) in bars_of.items()},
    )
    axes.set(xlabel="congruent in training", ylabel=ylabel, ylim=(0, 105))
    axes.set_title(title)
    legend(axes, 2 if len(bars_of) > 3 else 3)


def _accuracy(axes: Axes, found: _Found) -> None:
    bars_of = {
        "the CNN alone": (OTHERS, "accuracy/cnn/incongruent"),
        "the CNN, weighted as control": (MUTED, "accuracy/cnn_by_need/incongruent"),
        "habit π₁ alone": (LIGHT, "accuracy/default/incongruent"),
        f"ACC, {_share(TABLE_RATE)} called": (OURS, _trained("value").format(c="incongruent")),
        "control π₂ alone": (ORANGE, "accuracy/control/incongruent"),
    }
    _by_share(axes, found, "right, %", "Incongruent test digits", bars_of)


def _calls(axes: Axes, found: _Found) -> None:
    bars_of = {c: (color, _trained("value", "rate").format(c=c)) for c, color in CONDITION_COLOURS.items()}
    _by_share(axes, found, "rows that call control, %", "Who calls control (value gate)", bars_of)


def _curves(axes: Axes, found: _Found) -> None:
    p, row = next(iter(found.main.items()))
    for gate, (color, line, label) in GATE_LOOKS.items():
        at = [row.at(_mixed(gate, rate)) for rate in RATES]
        x, y = [100 * r["rate"] for r in at], [r["control"] for r in at]
        curve(axes, x, y, label, scale=100, color=color, ls=line)
    if "truth" in row.keys():  # noqa: SIM118 (not a dict)
        at = [row.at(f"truth/value/{rate:g}") for rate in RATES]
        x, y = [100 * r["rate"] for r in at], [r["control"] for r in at]
        curve(axes, x, y, "knows who is right", scale=100, color=INK, ls=":")
    always = 100 * row[f"always/{MIXED}/control"].mean()
    axes.axhline(always, color=MUTED, lw=1)
    note(axes, "control everywhere", (0, always), (3, 3), color=MUTED, fontsize=11)
    axes.set(xlabel="rows that call control, %", ylabel="right, %")
    axes.set_xlim(left=0)
    axes.set_title(f"Mixed stream ({_share(p)} in training)")
    span_at_least(axes, "y", 2.0)
    legend(axes)


def _draw_beliefs(found: _Found, items: Sequence[Mapping[str, Any]], figure: Figure) -> None:
    """Both beliefs about single incongruent items, side by side, under the first seed."""
    p, row = next(iter(found.main.items()))
    images, _ = StroopMNIST(row.cells[0].options["data"], "test").recoloured(Condition.INCONGRUENT)
    names = list(COLOURS)
    axes = figure.subplots(len(items), 3, width_ratios=(1.4, 3, 3), squeeze=False)
    for (picture, *others), item in zip(axes, items, strict=True):
        picture.imshow(images[item["item"]].permute(1, 2, 0).numpy(), interpolation="nearest")
        picture.set_axis_off()
        picture.set_title(f"{names[item['ink']]} {item['digit']}", fontsize=11)
        colours = {**dict.fromkeys(range(10), OTHERS), item["ink"]: WRONG, item["digit"]: OURS}
        for one, who, name in zip(others, ("default", "control"), ("habit π₁", "control π₂"), strict=True):
            belief = item[who]
            one.bar(range(10), belief, color=[colours[digit] for digit in range(10)])
            one.set(xticks=range(10), ylim=(0, 1), yticks=(0, 1))
            one.set_title(f"{name} says {belief.index(max(belief))}", fontsize=12)
    key = "blue: the digit; red: the digit of the ink"
    title = f"Belief in each digit ({_share(p)} congruent in training)\n{key}"
    figure.suptitle(title, color=INK, x=0.01, ha="left", fontsize=12)


def _steps(axes: Axes, found: _Found, task: str) -> None:
    rows = found.congruent(task)
    groups = {
        c: (color, [_observed(row, f"{c}/steps") for row in rows.values()])
        for c, color in CONDITION_COLOURS.items()
    }
    _grouped(axes, list(map(_share, rows)), groups, 1.0)
    axes.set(xlabel="congruent in practice", ylabel="steps until halting")
    axes.set_title(TASK_LOOKS[task][1])
    legend(axes, 3)


def _by_proportion(axes: Axes, found: _Found) -> None:
    for task, (color, label) in TASK_LOOKS.items():
        rows = found.congruent(task)
        curve(axes, [100 * p for p in rows], list(map(_effect, rows.values())), label, color=color)
    _finish_effects(axes, "congruent in practice, %", "Extra steps of incongruent items, by proportion")


def _by_practice(axes: Axes, found: _Found) -> None:
    high = max(found.congruent("read"))
    for task, (color, label) in TASK_LOOKS.items():
        effects = _practised(found.congruent(task)[high])
        curve(axes, list(effects), list(effects.values()), label, color=color)
    _finish_effects(axes, "updates", f"Extra steps with practice ({_share(high)} congruent)")


def _finish_effects(axes: Axes, xlabel: str, title: str) -> None:
    axes.axhline(0, color=MUTED, lw=0.6)
    axes.set(xlabel=xlabel, ylabel="extra steps")
    axes.set_xlim(left=0)
    axes.set_title(title)
    span_at_least(axes, "y", 0.5)
    legend(axes)
