"""What habit and control believe of single incongruent items."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .gates import Stream

__all__ = ["FIVE", "YELLOW", "choose"]

FIVE, YELLOW = 5, 2
COUNT = 4


def choose(stream: Stream) -> list[dict[str, Any]]:
    """Choose incongruent items that habit answers by ink and control by digit, a yellow 5 first if possible.

    Returns
    -------
    list of dict
        At most four, each of another digit: ``item`` (its place in the test split), ``digit``, ``ink``, and
        both beliefs.
    """
    default, control = stream.default.softmax(1), stream.control.softmax(1)
    habit = default.argmax(1) == stream.inks
    right = control.argmax(1) == stream.digits
    doubt = default.gather(1, stream.inks[:, None])[:, 0] + control.gather(1, stream.digits[:, None])[:, 0]
    doubt = torch.where(habit & right, doubt, torch.full_like(doubt, -1.0))
    asked = (stream.digits == FIVE) & (stream.inks == YELLOW) & habit & right
    order = torch.cat((_best(doubt, asked), doubt.argsort(descending=True)))
    chosen: list[dict[str, Any]] = []
    for item in order.tolist():
        digit, ink = int(stream.digits[item]), int(stream.inks[item])
        if doubt[item] < 0 or len(chosen) == COUNT:
            break
        if digit not in {c["digit"] for c in chosen} and ink not in {c["ink"] for c in chosen}:
            beliefs = {"default": default[item].tolist(), "control": control[item].tolist()}
            chosen.append({"item": item, "digit": digit, "ink": ink, **beliefs})
    return chosen


def _best(score: Tensor, among: Tensor) -> Tensor:
    items = among.nonzero()[:, 0]
    return items[score[items].argmax()][None] if len(items) else items
