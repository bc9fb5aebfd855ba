"""What a gate saves on the clock."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

import adaptcomp_ext as ac
from adaptcomp_ext.experiments.bench.machine import keep_freed_memory
from adaptcomp_ext.experiments.bench.timing import clock, interleave, ratio

__all__ = ["compare_gated"]


@torch.no_grad()
def compare_gated(model: ac.models.ACC, images: Tensor, seconds: float) -> dict[str, Any]:
    """Time one batch in inference: everything, gated, habit alone, control alone.

    Parameters
    ----------
    model : ACC
        In evaluation mode, its gate calibrated.
    images : Tensor
        The batch.
    seconds : float
        For all repeats.

    Returns
    -------
    dict
        Medians in milliseconds (``ms``) and medians of ratios within interleaved rounds: ``saved``, the share
        of the time of "both" that "gated" saves; ``control_over_default``; and the call rate on this batch.
    """
    keep_freed_memory()

    def both() -> Tensor:
        default, control = model.both(images)
        called = model.gate(default)
        return torch.where(called[:, None], control, default).log_softmax(dim=1)

    calls = {
        "both": both,
        "gated": lambda: model(images).output,
        "default": lambda: model.default(model.encoder(images)),
        "control": lambda: model.control(model.encoder(images)),
    }
    difference = float((calls["both"]() - calls["gated"]()).abs().max())
    times = interleave(calls, clock(torch.device("cpu")), seconds)
    return {
        "rows": len(images),
        "rate": float(model.gate(model.both(images)[0]).double().mean()),
        "ms": {name: statistics.median(values) for name, values in times.items()},
        "saved": 1 - ratio(times, "gated", "both"),
        "control_over_default": ratio(times, "control", "default"),
        "largest_difference": difference,
    }
