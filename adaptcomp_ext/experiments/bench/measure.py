"""One configuration: verify that all contenders agree, then time them."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .agreement import DisagreementError, difference, require
from .compiling import CompileCache
from .contenders import Call, forward_contenders, limit, training_call
from .masked import Outcome
from .problem import Config, Problem, make_problem
from .schedule import active_counts
from .timing import clock, interleave, ratio, summary

__all__ = ["Model", "measure"]

# Block shapes change how matrix products are summed, and up to 32 steps carry the differences on.
OUTPUT_TOLERANCE = 1e-3
GRADIENT_TOLERANCE = 1e-3

Model = tuple[Any, Any]


def verify(
    problem: Problem, outcomes: dict[str, Outcome], gradients: dict[str, tuple[Tensor, ...]]
) -> dict[str, float]:
    """Compare all contenders with the masked form, and its steps with the script.

    Returns
    -------
    dict
        The largest relative difference of outputs and, in training, of gradients, over all contenders.

    Raises
    ------
    DisagreementError
        If any result differs beyond rounding, or any step count at all.
    """
    worst = {"output": 0.0}
    reference = outcomes["masked"]
    for name, outcome in outcomes.items():
        if not torch.equal(outcome.steps, problem.steps):
            raise DisagreementError(f"{name}: the steps are not the scripted ones")
        found = difference(outcome.output, reference.output)
        require(name, "output", found, OUTPUT_TOLERANCE, "masked")
        worst["output"] = max(worst["output"], found)
        if problem.config.policy == "act":
            require(name, "ponder cost", difference(outcome.cost, reference.cost), OUTPUT_TOLERANCE, "masked")
    for name, grads in gradients.items():
        for got, want in zip(grads, gradients["masked"], strict=True):
            found = difference(got, want)
            require(name, f"a gradient of shape {list(want.shape)}", found, GRADIENT_TOLERANCE, "masked")
            worst["gradient"] = max(worst.get("gradient", 0.0), found)
    return worst


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Return every contender over the limit, auto over each of its rivals, and their speed-ups."""
    found = {f"{name}/limit": ratio(times, name, "limit") for name in times if name != "limit"}
    found["auto/best"] = max(ratio(times, "auto", "masked"), ratio(times, "auto", "boolean"))
    for rival in ("masked", "boolean", "masked_compile"):
        if rival in times:
            found[f"{rival}/auto"] = ratio(times, rival, "auto")
    return found


def measure(
    config: Config,
    model: Model,
    device: torch.device,
    seed: int,
    seconds: float,
    compiled: CompileCache | None,
) -> dict[str, Any]:
    """Verify and time one configuration.

    Parameters
    ----------
    config : Config
        The point of the grid.
    model : tuple
        Its step and head.
    device : torch.device
        Where to run.
    seed : int
        Seed of tensors and script.
    seconds : float
        Time for the repeats.
    compiled : CompileCache, optional
        Compiled steps; None leaves the compiled contenders out.

    Returns
    -------
    dict
        One row of the report. ``error`` is None, or says which contender disagreed; then there are no times.
    """
    problem = make_problem(config, model, device, seed)
    steps = problem.steps
    row: dict[str, Any] = {
        "config": config.as_dict(),
        "rows": {
            "mean_steps": float(steps.double().mean()),
            "longest": int(steps.max()),
            "row_steps": int(steps.sum()),
            "active": active_counts(steps),
        },
        "error": None,
    }
    # The limit makes leaves that require gradients, and inference tensors could not.
    floor, counts = limit(problem)
    with nullcontext() if config.training else torch.inference_mode():
        forward = forward_contenders(problem, compiled)
        calls: dict[str, Call] = dict(forward)
        if config.training:
            calls = {name: training_call(problem, call) for name, call in forward.items()}
        try:
            if compiled is not None:
                label = "/".join(str(part) for part in config.model_key[:3]) + (
                    "/train" if config.training else "/infer"
                )
                for name in ("masked_compile", "auto_compile"):
                    compiled.first_call(f"{label}/{name}", calls[name])
            outcomes = {name: call() for name, call in forward.items()}
            gradients = {name: call() for name, call in calls.items()} if config.training else {}
            row["agreement"] = verify(problem, outcomes, gradients)
            if counts != active_counts(outcomes["auto"].steps):
                raise DisagreementError("limit: its rows per step are not those that ran")
        except DisagreementError as error:
            row["error"] = str(error)
            return row
        del outcomes, gradients
        times = interleave({**calls, "limit": floor}, clock(device), seconds)
    row["times_ms"] = {name: summary(values) for name, values in times.items()}
    row["ratios"] = ratios(times)
    # On a machine with neighbours the fastest repeats are the undisturbed ones.
    row["ratios_of_minima"] = ratios({name: [min(values)] for name, values in times.items()})
    row["load"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return row
