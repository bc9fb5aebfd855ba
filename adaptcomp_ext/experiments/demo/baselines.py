"""The same reader four ways: what halting is worth on the clock.

==========  ================================================================================
masked      all rows run until the last one has halted; ``torch.where`` freezes the halted ones
indexed     ``state = state[active]`` after every step at which a row halts
adaptive    `AdaptiveHalt`, as the reader is
limit       the lower bound: step, readout and head alone on each step's true number of rows: no bookkeeping
==========  ================================================================================

All but the lower bound give logits and steps; the lower bound does not know which rows are which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..bench.timing import clock, interleave, ratio, summary
from .model import GlimpseReader


class Outcome(NamedTuple):
    """Class logits [B, C] and steps int64 [B]."""

    logits: Tensor
    steps: Tensor


def masked(reader: GlimpseReader, images: Tensor) -> Outcome:
    """ACT without compaction."""
    threshold, rows = reader.threshold, len(images)
    state = reader.start(rows)
    spent, steps = torch.zeros(rows), torch.zeros(rows, dtype=torch.int64)
    active = torch.ones(rows, dtype=torch.bool)
    logits = torch.zeros(rows, reader.readout.out_features)
    for n in range(1, reader.max_steps + 1):
        state = torch.where(active[:, None], reader.step(state, images), state)
        total = spent + torch.sigmoid(reader.head(state)[:, 0])
        halts = total >= threshold if n < reader.max_steps else active
        weight = torch.where(halts, 1 - spent, total - spent) * active
        logits = logits + weight[:, None] * reader.readout(state)
        steps += active
        active = active & ~halts
        spent = total
        if not active.any():
            break
    return Outcome(logits, steps)


def indexed(reader: GlimpseReader, images: Tensor) -> Outcome:
    """Run ACT on the remaining rows by ``nonzero`` and `index_select`, several times faster than a mask."""
    threshold, rows = reader.threshold, len(images)
    state, spent, row = reader.start(rows), torch.zeros(rows), torch.arange(rows)
    logits = torch.zeros(rows, reader.readout.out_features)
    steps = torch.zeros(rows, dtype=torch.int64)
    for n in range(1, reader.max_steps + 1):
        state = reader.step(state, images)
        total = spent + torch.sigmoid(reader.head(state)[:, 0])
        halts = total >= threshold if n < reader.max_steps else torch.ones_like(total, dtype=torch.bool)
        weight = torch.where(halts, 1 - spent, total - spent)
        logits.index_add_(0, row, weight[:, None] * reader.readout(state))
        active = (~halts).nonzero()[:, 0]
        if len(active) < len(row):
            steps[row[halts]] = n
            state, images, total, row = (t.index_select(0, active) for t in (state, images, total, row))
        spent = total
        if len(row) == 0:
            break
    return Outcome(logits, steps)


def adaptive(reader: GlimpseReader, images: Tensor) -> Outcome:
    """ACT as the package does it."""
    result = reader(images)
    return Outcome(result.output, result.steps)


def limit(reader: GlimpseReader, images: Tensor, steps: Tensor) -> Callable[[], None]:
    """Return the lower bound of every way: the networks on blocks of the right sizes, made beforehand.

    The blocks are prefixes of one tensor, as warm in the caches as a well-kept active block.
    """
    state, images = reader.start(len(images)).clone(), images.clone()
    blocks = [(state[:n], images[:n]) for n in active_rows(steps)]

    def run() -> None:
        for states, seen in blocks:
            new = reader.step(states, seen)
            reader.readout(new)
            reader.head(new)

    return run


def active_rows(steps: Tensor) -> list[int]:
    """How many rows go through step 1, 2, …: ``[3, 1, 2] -> [3, 2, 1]``."""
    return [int((steps >= n).sum()) for n in range(1, int(steps.max()) + 1)] if len(steps) else []


def ways(reader: GlimpseReader, images: Tensor) -> dict[str, Callable[[], Outcome]]:
    """Return all but the lower bound, ready to be called."""
    return {
        "masked": lambda: masked(reader, images),
        "indexed": lambda: indexed(reader, images),
        "adaptive": lambda: adaptive(reader, images),
    }


def agreement(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """In how many rows any outcome differs from the masked one, and the largest difference of ``logits``."""
    reference, others = outcomes["masked"], outcomes.values()
    classes = reference.logits.argmax(dim=1)
    predictions = torch.stack([outcome.logits.argmax(dim=1) != classes for outcome in others])
    steps = torch.stack([outcome.steps != reference.steps for outcome in others])
    return {
        "predictions": int(predictions.any(dim=0).sum()),
        "steps": int(steps.any(dim=0).sum()),
        "logits": max(float((outcome.logits - reference.logits).abs().max()) for outcome in others),
    }


def compare(
    reader: GlimpseReader, images: Tensor, seconds: float
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Time the four in turn on one batch, for `seconds` in all, and check that they agree.

    Returns the times of each in milliseconds (median and quartiles, and the medians of its ratios within a
    round), and what `agreement` says.
    """
    with torch.inference_mode():
        calls: dict[str, Callable[[], Any]] = dict(ways(reader, images))
        outcomes = {name: call() for name, call in calls.items()}
        calls["limit"] = limit(reader, images, outcomes["adaptive"].steps)
        times = interleave(calls, clock(images.device), seconds)
    timings = {}
    for name in calls:
        of = summary(times[name])
        timings[name] = {
            "median": of["median"],
            "low": of["q25"],
            "high": of["q75"],
            "over_masked": ratio(times, name, "masked"),
            "over_limit": ratio(times, name, "limit"),
        }
    return timings, agreement(outcomes)
