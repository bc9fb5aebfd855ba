"""Training memory: what is there between forward and backward, and at most, as a function of the number of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..live import LiveBytes
from .contenders import training_forwards
from .grid import MEMORY_STEPS, at
from .problem import Config, make_problem

__all__ = ["MEMORY_SIZES", "kept_and_peak", "memory_rows"]

MEMORY_SIZES = (1, 2)


def kept_and_peak(forward: Callable[[], Tensor], leaves: Sequence[Tensor]) -> dict[str, int]:
    """Return the bytes that live between forward and backward, and the most at any time.

    Parameters
    ----------
    forward : callable
        Gives the loss.
    leaves : sequence of Tensor
        What it is differentiated in; their gradients count, they themselves do not.
    """
    with LiveBytes() as live:
        loss = forward()
        kept = live.now
        torch.autograd.grad(loss, list(leaves), allow_unused=True)
    return {"kept": kept, "peak": live.peak}


def memory_rows(
    device: torch.device,
    seed: int,
    sizes: Sequence[Config] | None = None,
    steps: Sequence[int] = MEMORY_STEPS,
) -> list[dict[str, Any]]:
    """Measure all training contenders.

    Returns
    -------
    list of dict
        For each size and number of steps: ``bytes``, by contender, and ``points``, the bytes of y after every
        step.
    """
    found = []
    for config in [at("train", size) for size in MEMORY_SIZES] if sizes is None else sizes:
        for count in steps:
            problem = make_problem(replace(config, steps=count), device, seed)
            forwards = training_forwards(problem)
            forwards["generic"]()  # looks once at whether the energy mixes rows
            found.append(
                {
                    "size": [config.batch, config.context, config.dim, *config.hidden],
                    "steps": count,
                    "points": count * problem.y0.numel() * problem.y0.element_size(),
                    "bytes": {name: kept_and_peak(call, problem.leaves) for name, call in forwards.items()},
                }
            )
    return found
