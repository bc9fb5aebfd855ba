"""One configuration: verify that all contenders agree, then time them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..agreement import DisagreementError, difference, require
from ..timing import clock, interleave, ratio, summary
from .contenders import contenders, limit, training_call
from .problem import Config, Problem, make_problem

__all__ = ["BLOCK", "TOLERANCE", "measure", "ratios", "verify"]

TOLERANCE = 1e-4
BLOCK = 10.0
"""Milliseconds of calls in a row; see `interleave`."""


def verify(
    problem: Problem, outputs: Mapping[str, Tensor], gradients: Mapping[str, tuple[Tensor | None, ...]]
) -> dict[str, float]:
    """Compare all contenders with masking.

    Returns
    -------
    dict
        The largest difference relative to the largest element, of outputs and, in training, of gradients.

    Raises
    ------
    DisagreementError
        If anything differs by more than 1e-4: products over other numbers of rows are summed in other orders.
    """
    worst = {"output": 0.0}
    for name, out in outputs.items():
        found = difference(out, outputs["masking"])
        require(name, "the result", found, TOLERANCE, "masking")
        worst["output"] = max(worst["output"], found)
    for name, grads in gradients.items():
        for leaf, got, want in zip(problem.leaves, grads, gradients["masking"], strict=True):
            assert want is not None
            found = difference(torch.zeros_like(leaf) if got is None else got, want)
            require(name, f"a gradient of shape {list(leaf.shape)}", found, TOLERANCE, "masking")
            worst["gradient"] = max(worst.get("gradient", 0.0), found)
    return worst


def ratios(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Return each contender's time over the limit's, and each rival's over the route's: medians over the rounds."""
    found = {f"{name}/limit": ratio(times, name, "limit") for name in times if name != "limit"}
    found.update(
        {f"{name}/route": ratio(times, name, "route") for name in times if name not in ("limit", "route")}
    )
    return found


def measure(config: Config, device: torch.device, seed: int, seconds: float) -> dict[str, Any]:
    """Verify and time one configuration.

    Parameters
    ----------
    config : Config
        The point of the grid.
    device : torch.device
        Where to run.
    seed : int
        Seed of weights, tensors and routed rows.
    seconds : float
        Time for the repeats.

    Returns
    -------
    dict
        One row of the report. ``error`` is None, or says which contender disagreed; then there are no times.
    """
    problem = make_problem(config, device, seed)
    row: dict[str, Any] = {
        "config": config.as_dict(),
        "label": config.label,
        "routed": config.routed,
        "error": None,
    }
    forward = contenders(problem)
    calls: dict[str, Callable[[], Any]] = dict(forward)
    with torch.set_grad_enabled(config.mode == "train"):
        if config.mode == "train":
            calls = {name: training_call(problem, call) for name, call in forward.items()}
        try:
            outputs = {name: call() for name, call in forward.items()}
            gradients = {name: call() for name, call in calls.items()} if config.mode == "train" else {}
            row["agreement"] = verify(problem, outputs, gradients)
        except DisagreementError as error:
            row["error"] = str(error)
            return row
        del outputs, gradients
        times = interleave({**calls, "limit": limit(problem)}, clock(device), seconds, block=BLOCK)
    row["times_ms"] = {name: summary(values) for name, values in times.items()}
    row["ratios"] = ratios(times)
    # On a machine with neighbours the fastest repeats are the undisturbed ones.
    row["ratios_of_minima"] = ratios({name: [min(values)] for name, values in times.items()})
    row["load"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return row
