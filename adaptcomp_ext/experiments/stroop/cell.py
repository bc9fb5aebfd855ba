"""One setting and one seed: train the CNN and ACC, evaluate both, try all gates, and measure times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from adaptcomp_ext.experiments.data import Condition, StroopMNIST
from adaptcomp_ext.experiments.runs import Cell, Tick, span
from adaptcomp_ext.experiments.vision import (
    Recipe,
    accuracy,
    compare_gated,
    logits,
    multiply_adds,
    train_acc,
    train_classifier,
    weights,
)
from adaptcomp_ext.models.acc import Objective, normalised_entropy

from . import beliefs, gates
from .networks import CHANNELS, build_acc, build_baseline
from .reaction import measure_reaction

__all__ = ["EFFORTS", "TIMED_RATE", "run_cell"]

TIMED_RATE = 0.3
EFFORTS: dict[str, Objective] = {
    "λ = 1": Objective(),
    "λ = 0": Objective(effort=0.0),
    "λ(s), literal": Objective(effort="literal"),
    "λ(s), value": Objective(effort="value"),
    "λ = 1, control pays too": Objective(mutual=True),
    "λ = 1, all rows alike to control": Objective(need=False),
}
"""The prices of effort that are compared."""


def run_cell(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    """Do what the cell's options say: "main", "effort" or "reaction"."""
    parts = {"main": _main, "effort": _effort, "reaction": measure_reaction}
    return parts[cell.options["part"]](cell, folder, tick)


def _data(cell: Cell, split: str) -> StroopMNIST:
    congruent = None if split == "test" else cell.options["congruent"]
    return StroopMNIST(cell.options["data"], split, congruent, seed=cell.seed)


def _main(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    recipe = Recipe(**cell.options["recipe"])
    train, held, test = (_data(cell, split) for split in ("train", "held-out", "test"))
    side = train.images.shape[-1]
    torch.manual_seed(cell.seed)
    acc = build_acc(side, Objective())
    history = train_acc(
        acc, train, recipe, cell.seed, folder / "acc.safetensors", span(tick, "ACC", 0.0, 0.45)
    )
    torch.manual_seed(cell.seed)
    cnn = build_baseline(side, weights(acc))
    train_classifier(
        cnn, train, recipe, cell.seed, folder / "cnn.safetensors", span(tick, "the CNN alone", 0.45, 0.85)
    )

    tick("gates", 0.85)
    streams = gates.read_test(acc, test)
    fitting, calibrating, mixed = gates.held_out(acc, held)
    built = gates.build_gates(fitting, cell.seed)
    found = gates.survey(built, calibrating, mixed, streams, cell.seed)
    conditions = [condition.name.lower() for condition in Condition]
    alone = {
        "default": {c: accuracy(streams[c].default, streams[c].digits) for c in conditions},
        "control": {c: accuracy(streams[c].control, streams[c].digits) for c in conditions},
        "cnn": {
            c: accuracy(logits(cnn, test.recoloured(Condition[c.upper()])[0]), test.digits)
            for c in conditions
        },
    }

    tick("timing", 0.95)
    acc.gate = built["value"]
    acc.gate.calibrate(mixed.default, TIMED_RATE)
    half = gates.BATCH // 2
    sides = [test.recoloured(c)[0] for c in (Condition.CONGRUENT, Condition.INCONGRUENT)]
    batch = torch.cat((sides[0][:half], sides[1][half : 2 * half]))
    shape = (CHANNELS, side, side)
    return {
        "data": train.name,
        "accuracy": alone,
        "parameters": {"acc": weights(acc), "cnn": weights(cnn)},
        "multiply_adds": {
            "default": multiply_adds(acc.default, shape),
            "control": multiply_adds(acc.control, shape),
        },
        "training": history,
        "timing": compare_gated(acc, batch, cell.options["timing_seconds"]),
        "beliefs": beliefs.choose(streams["incongruent"]),
        **found,
    }


def _effort(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    train, test = _data(cell, "train"), _data(cell, "test")
    torch.manual_seed(cell.seed)
    acc = build_acc(train.images.shape[-1], EFFORTS[cell.options["effort"]])
    recipe = Recipe(**cell.options["recipe"])
    history = train_acc(
        acc, train, recipe, cell.seed, folder / "acc.safetensors", span(tick, "ACC", 0.0, 0.95)
    )
    streams = gates.read_test(acc, test)
    conditions = [condition.name.lower() for condition in Condition]
    return {
        "training": history,
        "accuracy": {
            "default": {c: accuracy(streams[c].default, streams[c].digits) for c in conditions},
            "control": {c: accuracy(streams[c].control, streams[c].digits) for c in conditions},
        },
        "entropy": {c: float(normalised_entropy(streams[c].default).mean()) for c in conditions},
    }
