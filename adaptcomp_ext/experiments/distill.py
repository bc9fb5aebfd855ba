"""Distillation: online, after training, or none; and a System 1 whose dead units are gone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptcomp_ext as ac
from adaptcomp_ext.models.acc import EntropyGate, Objective
from adaptcomp_ext.models.acc.features import kl_divergence

from . import vision
from .data import find_images
from .runs import Cell, Data, Epochs, FirstSeed, Quick, Results, Seeds, Setup, Tick, experiment, grid, span
from .runs.report import Block, Column, Verdicts, column, tabulate
from .runs.statistics import ONE_SEED, Claim, form, interval, judged, millions, points
from .style import INK, MUTED, ORANGE, OTHERS, OURS, WRONG, curve, legend, note, span_at_least

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["distill"]

TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
SHARES = (0.3, 0.5, 0.6)
"""Shares of a layer's units that are removed."""
RATES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
FINE_TUNING = 2 / 3  # of the learning rate, for a third of the epochs
BATCH = 256
FORMS: dict[str, bool | dict[str, str]] = {
    "dense": False,
    "sparse": {"form": "sparse"},
    "units": {"form": "sparse", "per": "unit"},
}
"""The noise of π₁ in training: none, one for each weight, one for the weights of each unit."""
SHARE = 0.5
"""Share of the hidden units that the pair's π₁ loses."""
RATE = 0.05
"""Call rate of held-out images to which the timed gate is calibrated."""
ONLINE = (("dense", 1.0), ("dense", 4.0), ("units", 4.0), ("sparse", 4.0))
"""Form of π₁'s noise and temperature of the pairs that are trained together."""
EQUAL = (0.001, 0.005)
"""Differences of accuracy that count as equal: 0.1 and 0.5 points."""
LABELS = "students/labels"
NOISE = {"dense": "none", "units": "of units", "sparse": "of weights"}


def build_student(side: int) -> nn.Sequential:
    """π₁: two convolutions and two linear layers, with more units than it needs: some can be removed."""
    kernel, stride = (5, 2) if side >= vision.LARGE else (3, 1)
    left = ((side - kernel) // stride + 1 - 2) // 2
    first = nn.Conv2d(1, 32, kernel, stride=stride), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()
    linear = nn.Linear(32 * left * left, 64), nn.ReLU(), nn.Linear(64, vision.CLASSES)
    return nn.Sequential(*first, nn.MaxPool2d(2), nn.Flatten(), *linear)


def measure(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    """Do what the cell's options say: "after" or "online"."""
    recipe = vision.Recipe(**cell.options["recipe"])
    return (_after if cell.options["part"] == "after" else _online)(cell, recipe, folder, tick)


def _after(cell: Cell, recipe: vision.Recipe, folder: Path, tick: Tick) -> dict[str, Any]:
    """π₂ first; then students of its logits at each temperature, and one of the labels alone."""
    name, train, _, test = vision.load_grey(cell.options["data"])
    torch.manual_seed(cell.seed)
    teacher = nn.Sequential(vision.Scale(), vision.build_cnn(train.side, 1))
    spot = span(tick, "π₂", 0.0, 0.25)
    vision.train_classifier(teacher, train, recipe, cell.seed, folder / "teacher.safetensors", spot)
    soft = vision.logits(teacher, train.images)
    students: dict[str, float] = {}
    ways: list[float | None] = [None, *TEMPERATURES]
    for i, temperature in enumerate(ways):
        torch.manual_seed(cell.seed)
        student = nn.Sequential(vision.Scale(), build_student(train.side))
        label = "labels" if temperature is None else f"{temperature:g}"
        begin = 0.25 + 0.75 * i / len(ways)
        spot = span(tick, f"π₁ of {label}", begin, begin + 0.75 / len(ways))
        loss = None if temperature is None else _imitation(soft, temperature, train)
        file = folder / f"student-{label}.safetensors"
        vision.train_classifier(student, train, recipe, cell.seed, file, spot, loss=loss)
        students[label] = _right(student, test)
    return {"data": name, "teacher": _right(teacher, test), "students": students}


def _right(model: nn.Module, test: vision.Grey) -> float:
    return vision.accuracy(vision.logits(model, test.images), test.digits)


def _imitation(soft: Tensor, temperature: float, data: vision.Grey) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of labels and the teacher's logits with equal weight, as in ACC's objective."""

    def loss(index: Tensor, output: Tensor) -> Tensor:
        divergence = kl_divergence(soft[index], output, temperature).mean()
        return F.cross_entropy(output, data.digits[index]) + temperature**2 * divergence

    return loss


def _online(cell: Cell, recipe: vision.Recipe, folder: Path, tick: Tick) -> dict[str, Any]:
    """Both together; then what can be removed from π₁, and what the gated pair costs."""
    name, train, held, test = vision.load_grey(cell.options["data"])
    side, form, temperature = train.side, cell.options["form"], cell.options["temperature"]
    objective = Objective(temperature=temperature, need=False, beta=cell.options["beta"])
    torch.manual_seed(cell.seed)
    parts = vision.Scale(), build_student(side), vision.build_cnn(side, 1)
    pair = ac.models.ACC(*parts, vision.CLASSES, variational=FORMS[form], objective=objective)
    spot = span(tick, "π₁ and π₂", 0.0, 0.6)
    vision.train_acc(pair, train, recipe, cell.seed, folder / "pair.safetensors", spot)
    control = nn.Sequential(vision.Scale(), pair.control)
    found: dict[str, Any] = {
        "data": name,
        "default": _right(nn.Sequential(vision.Scale(), pair.default), test),
        "control": _right(control, test),
        "sparsity": ac.nn.sparsity(pair.default),
    }
    if form == "dense":
        return found
    shape, whole = (1, side, side), build_student(side).eval()
    both = {"default": whole, "control": pair.control}
    found["multiply_adds"] = {key: vision.multiply_adds(policy, shape) for key, policy in both.items()}
    found["shrunk"] = {"as it is": _judge(whole, ac.shrink(pair.default), test, cell)}
    if form == "units":
        noisy, soft = pair.default, vision.logits(control, train.images)
        epochs, rate = max(1, recipe.epochs // 3), FINE_TUNING * recipe.learning_rate
        tuning = replace(recipe, epochs=epochs, learning_rate=rate)
        loss = _imitation(soft, temperature, train)
        for i, share in enumerate(SHARES):
            small = _pruned(noisy, share)
            scaled = nn.Sequential(vision.Scale(), small)
            before = _right(scaled, test)
            spot = span(tick, f"π₁ less {100 * share:g} % of its units", 0.6 + 0.1 * i, 0.7 + 0.1 * i)
            file = folder / f"small-{share:g}.safetensors"
            vision.train_classifier(scaled, train, tuning, cell.seed + 1, file, spot, loss=loss)
            found["shrunk"][f"{share:g}"] = {**_judge(whole, small, test, cell), "before tuning": before}
            if share == cell.options["share"]:
                pair.default = small
        tick("the gated pair", 0.92)
        found["gated"] = _gated(pair, held, test, cell)
    return found


def _pruned(network: nn.Module, share: float) -> nn.Module:
    """A smaller copy, without the noisiest units of every layer but the last, whose units are the classes."""
    network = copy.deepcopy(network)
    layers = [part for part in network.modules() if isinstance(part, ac.VariationalDropout)]
    for layer in layers[:-1]:
        layer.prune(share)
    return ac.shrink(network)


@torch.no_grad()
def _judge(whole: nn.Module, small: nn.Module, test: vision.Grey, cell: Cell) -> dict[str, Any]:
    small.eval()
    images = test.images[:BATCH].float() / 255
    calls = {"whole": lambda: whole(images), "small": lambda: small(images)}
    milliseconds, over = vision.time_calls(calls, cell.options["timing_seconds"])
    return {
        "accuracy": _right(nn.Sequential(vision.Scale(), small), test),
        "multiply_adds": vision.multiply_adds(small, (1, test.side, test.side)),
        "units": [len(part.weight) for part in small.modules() if isinstance(part, (nn.Linear, nn.Conv2d))],
        "ms": milliseconds,
        "faster": over("whole", "small"),
    }


@torch.no_grad()
def _gated(pair: ac.models.ACC, held: vision.Grey, test: vision.Grey, cell: Cell) -> dict[str, Any]:
    """Accuracy and cost of the pair with a calibrated entropy gate."""
    pair.eval()
    gate = pair.gate = EntropyGate()
    habit, control = (nn.Sequential(pair.encoder, policy) for policy in (pair.default, pair.control))
    of_held, of_test = (vision.logits(habit, part.images) for part in (held, test))
    of_control = vision.logits(control, test.images)
    by_rate: dict[str, Mapping[str, float]] = {}
    for rate in RATES:
        gate.calibrate(of_held, rate)
        called = gate(of_test)
        answers = torch.where(called[:, None], of_control, of_test)
        by_rate[f"{rate:g}"] = {
            "rate": float(called.double().mean()),
            "accuracy": vision.accuracy(answers, test.digits),
        }
    gate.calibrate(of_held, cell.options["rate"])
    timing = vision.compare_gated(pair, test.images[:BATCH], cell.options["timing_seconds"])
    return {"by_rate": by_rate, "control": vision.accuracy(of_control, test.digits), "timing": timing}


@experiment(measure)
def distill(
    data: Data = None,
    *,
    seeds: Seeds = 1,
    first_seed: FirstSeed = 0,
    epochs: Epochs = None,
    quick: Quick = False,
) -> Setup:
    """Distil System 2 into System 1, during training and after it, and remove System 1's dead units."""
    images = find_images(data)
    rows = len(images.train_labels)
    recipe = asdict(vision.recipe_for(rows, quick))
    if epochs is not None:
        recipe["epochs"] = epochs
    common = {
        "data": None if data is None else str(data),
        "timing_seconds": 0.3 if quick else 3.0,
        "recipe": recipe,
        "share": SHARE,
        "rate": RATE,
        # On a few hundred images the description length outweighs the labels, and nothing is left.
        "beta": 1.0 if images.side >= vision.LARGE else 0.02,
    }
    parts: dict[str, dict[str, Any]] = {"after": {"part": "after"}}
    for noise, temperature in ONLINE:
        pair = {"part": "online", "form": noise, "temperature": temperature}
        parts[f"online-{noise}-{temperature:g}"] = pair
    every = range(first_seed, first_seed + seeds)
    return Setup(
        config={"data": images.name, "train": rows, "seeds": list(every), "recipe": recipe, "quick": quick},
        cells=grid(parts, every, common),
        about=f"[bold]{images.name}[/]: {rows:,} training images",
    )


class _Found:
    """The results under the names of the report."""

    def __init__(self, results: Results) -> None:
        self.after = results.where(part="after")
        self.online = {(n, t): results.where(part="online", form=n, temperature=t) for n, t in ONLINE}
        self.dense, self.units = self.online["dense", 4.0]["default"], self.online["units", 4.0]
        self.labels = self.after[LABELS]
        self.students = {f"{t:g}": self.after[f"students/{t:g}"] for t in TEMPERATURES}
        cuts = [("units", "as it is"), *(("units", f"{s:g}") for s in SHARES), ("sparse", "as it is")]
        self.shrunk = {(noise, cut): self.online[noise, 4.0].at(f"shrunk/{cut}") for noise, cut in cuts}
        self.gated = {rate: self.units.at(f"gated/by_rate/{rate:g}") for rate in RATES}

    def cost(self, row: Results) -> Any:
        """Multiply–adds of an image for the shrunk π₁, and π₂ where it is called."""
        small = self.units[f"shrunk/{SHARE:g}/multiply_adds"].mean()
        return small + row["rate"] * self.units.first("multiply_adds/control")

    def less_control(self, row: Results) -> Any:
        """Accuracy of the gated pair less that of π₂ everywhere."""
        return row["accuracy"] - row["/gated/control"]


@distill.reports
def report(results: Results) -> list[Block]:
    """How π₁ learns from π₂, what can be removed from it, and what the pair then costs."""
    found = _Found(results)
    cost = found.units.first("multiply_adds")
    reads = form(2)
    alone: dict[tuple[str, str], Results] = {("labels alone", "–"): found.after.at(LABELS)}
    alone |= {(f"after training, T = {t:g}", "none"): found.after.at(f"students/{t:g}") for t in TEMPERATURES}
    alone |= {(f"online, T = {t:g}", NOISE[noise]): row for (noise, t), row in found.online.items()}
    shrunk = {
        f"noise of {'units' if noise == 'units' else 'weights'}, "
        + (share if share == "as it is" else f"without {100 * float(share):g} % of the units"): row
        for (noise, share), row in found.shrunk.items()
    }

    def own(row: Results) -> Any:
        return row["default" if "default" in row else ""]

    def less_labels(row: Results) -> Any:
        return None if row.path == LABELS else own(row) - found.labels

    def teacher(row: Results) -> Any:
        if "control" in row:
            return row["control"]
        return None if row.path == LABELS else row["/teacher"]

    return [
        f"# Distillation: {results.config['data']}",
        f"{results.config['train']:,} training images, a sixth of them held out; {results.opening} π₁ has "
        f"{cost['default']:,} multiply–adds before it is shrunk, π₂ {cost['control']:,}.",
        column("distill.png", "Distillation", found, _ways, _shrinking, _pair),
        "## What was expected",
        Verdicts(_sentences(found)),
        "## π₁ alone, per cent right",
        tabulate(
            ("distilled", "noise in training"),
            alone,
            Column("π₁", own, reads),
            Column(
                "− labels alone", lambda row: own(row) - found.labels if row.path != LABELS else None, points
            ),
            Column("its π₂", teacher, reads),
            Column("π₂ − π₁", lambda row: row["control"] - row["default"], points),
            Column("pruned weights, %", "sparsity", form()),
        ),
        "## Shrunk",
        tabulate(
            "π₁",
            shrunk,
            Column("units (first seed)", lambda row: "–".join(map(str, row.first("units")))),
            Column("multiply–adds", "multiply_adds", lambda v: f"{v.mean() / 1000:,.0f} k"),
            Column("times as fast", "faster", form(2, 1.0)),
            Column("before tuning, %", "before tuning", reads),
            Column("right, %", "accuracy", reads),
            Column("− dense π₁", lambda row: row["accuracy"] - found.dense, points),
            Column("− labels alone", lambda row: row["accuracy"] - found.labels, points),
            Column("− before it was cut", lambda row: row["accuracy"] - row["/default"], points),
        ),
        f"## The pair: π₁ without {100 * SHARE:g} % of its units, π₂ where π₁'s entropy is high",
        "The thresholds come from held-out images; the sentence on the clock above is at the threshold for "
        f"{100 * RATE:g} %.",
        tabulate(
            "calibrated to",
            {f"{100 * rate:g} %": row for rate, row in found.gated.items()},
            Column("called, %", "rate", form()),
            Column("multiply–adds", found.cost, millions),
            Column("right, %", "accuracy", reads),
            Column("− π₂ everywhere", found.less_control, points),
        ),
    ]


def _sentences(found: _Found) -> list[str]:
    """What was expected, and whether it holds: each sentence follows from the figures."""
    online, whole = found.online["dense", 4.0], found.online["sparse", 4.0]
    small, sparse = found.shrunk["units", f"{SHARE:g}"], found.shrunk["sparse", "as it is"]
    gap = online["control"] - online["default"]
    loss = small["accuracy"] - found.dense
    cut, plain = small["accuracy"] - small["/default"], small["accuracy"] - found.labels
    times = found.units.at("gated/timing")
    return [
        judged(
            f"Distilled online, π₁ alone reads {interval(online['default'], 2)} % of the clean test "
            f"digits, π₂ {interval(online['control'], 2)} %: {points(gap)} points apart (1 allowed).",
            Claim(gap, 0.01, most=True),
        ),
        f"Online distillation less none {points(found.dense - found.labels)} points; distillation after "
        f"training less none {points(found.students['4'] - found.labels)}; online less after "
        f"{points(found.dense - found.students['4'])}.",
        judged(
            f"Without {100 * SHARE:g} % of the units of every hidden layer, shrunk and tuned for an "
            f"epoch, π₁ is {interval(small['faster'], 2, 1.0)} times as fast (2 expected) and reads "
            f"{interval(small['accuracy'], 2)} %: {points(loss)} points against the dense π₁, "
            f"{points(cut)} against the one it was cut from, {points(plain)} against a dense one of the "
            "labels alone (0.5 allowed).",
            Claim(small["faster"], 2.0),
            *(Claim(difference, -0.005) for difference in (loss, cut, plain)),
        ),
        f"Zeros that lie anywhere: {interval(whole['sparsity'])} % of the weights are pruned and "
        f"{interval(whole['default'], 2)} % of the digits are read right; what of the zeros is whole "
        f"units makes π₁ {interval(sparse['faster'], 2, 1.0)} times as fast.",
        *(_equal(found, allowed) for allowed in EQUAL),
        f"On the clock, with {interval(times['rate'])} % of a batch called, the pair is "
        f"{interval(times['ms/control'] / times['ms/gated'], 2, 1.0)} times as fast as π₂ everywhere.",
    ]


def _equal(found: _Found, allowed: float) -> str:
    """The least call rate at which the pair is as good as π₂ everywhere: by its interval or its mean."""
    claims = {rate: Claim(found.less_control(row), -allowed) for rate, row in found.gated.items()}
    alone = all(claim.alone for claim in claims.values())
    where = f"{ONE_SEED}; in it, w" if alone else "W"
    within = f"ithin {100 * allowed:g} points of π₂ everywhere"
    held = [rate for rate, claim in claims.items() if claim.holds]
    met = held or [rate for rate, claim in claims.items() if claim.value.mean >= claim.bound]
    if not met:
        return f"{where}{within}: no call rate that was tried."
    row = found.gated[met[0]]
    share = found.cost(row).mean() / found.units.first("multiply_adds/control")
    by_mean = "" if held or alone else " by the mean, not by the whole interval"
    return (
        f"{where}{within}{by_mean}: calling {interval(row['rate'])} % of the test digits (calibrated to "
        f"{100 * met[0]:g} % of held-out ones), {points(found.less_control(row))} points, at "
        f"{100 * share:.0f} % of π₂'s multiply–adds."
    )


def _ways(axes: Axes, found: _Found) -> None:
    named: list[tuple[str, Any, str]] = [("labels alone", found.labels, OTHERS)]
    named += [(f"after, T = {t}", values, "#6aa6d8") for t, values in found.students.items()]
    named += [
        (f"online, T = {t:g}", row["default"], OURS) for (n, t), row in found.online.items() if n == "dense"
    ]
    for i, (_, values, colour) in enumerate(named):
        curve(axes, [100 * values], [i], x_bars=True, color=colour, ms=7, lw=2)
    teacher = 100 * found.after["teacher"].mean()
    axes.axvline(teacher, color=MUTED, lw=1)
    axes.annotate("π₂ alone", (teacher, -0.75), color=MUTED, fontsize=11, ha="right", va="center")
    axes.set_yticks(range(len(named)), [name for name, _, _ in named])
    axes.set_ylim(len(named) - 0.4, -1.1)
    axes.set_xlabel("right, %")
    axes.set_title("π₁ alone, by what it learned from")
    span_at_least(axes, "x", 2.0)


def _shrinking(axes: Axes, found: _Found) -> None:
    curve(axes, [1], [found.dense], "dense", scale=100, color=OTHERS, ms=7)
    for noise, colour, label in (("sparse", WRONG, "noise of weights"), ("units", OURS, "noise of units")):
        rows = {share: row for (n, share), row in found.shrunk.items() if n == noise}
        x, y = [row["faster"] for row in rows.values()], [row["accuracy"] for row in rows.values()]
        curve(axes, x, y, label, scale=100, x_bars=True, color=colour, ms=5)
        for share, a, b in zip(rows, x, y, strict=True):
            text = "whole" if share == "as it is" else f"−{100 * float(share):g} %"
            offset = (6, 5) if text != "whole" else (4, -16) if noise == "units" else (9, -3)
            note(axes, text, (a.mean(), 100 * b.mean()), offset, color=INK, fontsize=10)
    axes.set_xlabel("times as fast, shrunk")
    axes.set_ylabel("right, %")
    axes.set_title("Units removed from π₁")
    span_at_least(axes, "y", 2.0)
    legend(axes, 3)


def _pair(axes: Axes, found: _Found) -> None:
    whole, everywhere = found.units.first("multiply_adds/control"), found.units["gated/control"]
    x = [100 * found.cost(row).mean() / whole for row in found.gated.values()]
    y = [row["accuracy"] for row in found.gated.values()]
    curve(axes, x, y, "π₁, and π₂ where called", scale=100, color=OURS, ms=5)
    curve(axes, [100], [everywhere], "π₂ everywhere", scale=100, color=ORANGE, marker="s", ms=6)
    for rate, a, b in zip(found.gated, x, y, strict=True):
        note(axes, f"{100 * rate:g} %", (a, 100 * b.mean()), (4, -15), fontsize=10)
    axes.set_xscale("log")
    axes.set_xticks([10, 20, 50, 100], ["10", "20", "50", "100"])
    axes.minorticks_off()
    axes.set_xlabel("multiply–adds, % of π₂'s")
    axes.set_ylabel("right, %")
    axes.set_title("The pair, by calls of held-out images")
    span_at_least(axes, "y", 2.0)
    legend(axes)
