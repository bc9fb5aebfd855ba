"""One configuration: verify that all contenders agree, then time them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..agreement import DisagreementError, difference, require
from ..compiling import CompileCache
from ..timing import clock, interleave, ratio, summary
from . import loops
from .contenders import contenders, training_calls
from .loops import Outcome
from .problem import Config, Problem, make_problem

__all__ = ["PRODUCT", "PRODUCT_FLOPS", "measure", "ratios", "verify", "verify_gradients"]

TOLERANCE = 1e-4
PRODUCT = 1024
PRODUCT_FLOPS = 2.0 * PRODUCT**3
BLOCK = 10.0
"""Milliseconds of calls in a row; see `interleave`."""


def verify(problem: Problem, outcomes: Mapping[str, Outcome]) -> float:
    """Compare all contenders with the eager loop, and their steps with those that were wanted.

    Returns
    -------
    float
        The largest difference relative to the largest element.

    Raises
    ------
    DisagreementError
        If a point differs by more than 1e-4, or a row took another number of steps.
    """
    worst = 0.0
    stopped = outcomes["eager"].y
    everything = loops.descend(
        problem.function, problem.y0, problem.context, problem.step_size, problem.config.steps
    )
    for name, outcome in outcomes.items():
        if outcome.steps is not None and (
            problem.steps is None or not torch.equal(outcome.steps, problem.steps)
        ):
            raise DisagreementError(f"{name}: rows stopped after other numbers of steps than they should")
        found = difference(outcome.y, everything if outcome.steps is None else stopped)
        require(name, "y", found, TOLERANCE, "eager")
        worst = max(worst, found)
        if outcome.steps is not None or problem.steps is None:
            assert outcome.energy is not None and outcomes["eager"].energy is not None
            require(
                name, "the energy", difference(outcome.energy, outcomes["eager"].energy), TOLERANCE, "eager"
            )
    return worst


def verify_gradients(gradients: Mapping[str, tuple[Tensor, ...]]) -> float:
    """Compare all contenders' gradients with the eager loop's; as `verify`."""
    worst = 0.0
    for name, found in gradients.items():
        for got, want in zip(found, gradients["eager"], strict=True):
            apart = difference(got, want)
            require(name, f"a gradient of shape {list(want.shape)}", apart, TOLERANCE, "eager")
            worst = max(worst, apart)
    return worst


def ratios(times: Mapping[str, list[float]], flops: float) -> dict[str, float]:
    """Return what the contenders' times are over the kernel's, eager's over the generic form's, and the kernel's rate.

    Parameters
    ----------
    times : mapping
        Milliseconds of each round; "matmul", if it is there, is the matrix product of `PRODUCT_FLOPS`
        operations.
    flops : float
        Operations of the configuration.

    Returns
    -------
    dict
        Medians over the rounds: ``"NAME/kernel"``, ``"eager/generic"``, and ``"kernel/matmul"``, the share
        that the rate of the kernel has of the product's rate.
    """
    found = {
        f"{name}/kernel": ratio(times, name, "kernel") for name in times if name not in ("kernel", "matmul")
    }
    found["eager/generic"] = ratio(times, "eager", "generic")
    if "matmul" in times:
        found["kernel/matmul"] = ratio(times, "matmul", "kernel") * flops / PRODUCT_FLOPS
    return found


def _product(device: torch.device) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(PRODUCT, PRODUCT, generator=generator).to(device) for _ in range(2))
    out = torch.empty_like(a)
    return partial(torch.mm, a, b, out=out)


def measure(
    config: Config, device: torch.device, seed: int, seconds: float, cache: CompileCache | None
) -> dict[str, Any]:
    """Verify and time one configuration.

    Parameters
    ----------
    config : Config
        The point of the grid.
    device : torch.device
        Where to run.
    seed : int
        Seed of weights and tensors.
    seconds : float
        Time for the repeats.
    cache : CompileCache, optional
        Of the compiled contender; None leaves it out.

    Returns
    -------
    dict
        One row of the report. ``error`` is None, or says which contender disagreed; then there are no times.
    """
    problem = make_problem(config, device, seed)
    steps = problem.steps
    row: dict[str, Any] = {
        "config": config.as_dict(),
        "label": config.label,
        "error": None,
        "steps": None,
        "gflops": None,
    }
    if steps is not None:
        row["steps"] = {"mean": float(steps.double().mean()), "longest": int(steps.max()), "tol": problem.tol}
    calls: dict[str, Callable[[], Any]]
    try:
        if config.mode == "train":
            calls = dict(training_calls(problem))
            row["agreement"] = verify_gradients({name: call() for name, call in calls.items()})
        else:
            calls = dict(contenders(problem, cache))
            if cache is not None:
                cache.first_call(config.label, calls["compiled"])
            row["agreement"] = verify(problem, {name: Outcome(*call()) for name, call in calls.items()})
    except DisagreementError as error:
        row["error"] = str(error)
        return row
    # The rate of a backward pass is not reported: how many products it needs is up to each contender.
    timed = calls if config.mode == "train" else {**calls, "matmul": _product(device)}
    times = interleave(timed, clock(device), seconds, block=BLOCK)
    row["times_ms"] = {name: summary(values) for name, values in times.items()}
    flops = config.flops if steps is None else config.flops * row["steps"]["mean"] / config.steps
    row["ratios"] = ratios(times, flops)
    # On a machine with neighbours the fastest repeats are the undisturbed ones.
    row["ratios_of_minima"] = ratios({name: [min(values)] for name, values in times.items()}, flops)
    if "matmul" in times:
        row["gflops"] = {
            "kernel": flops / row["times_ms"]["kernel"]["median"] / 1e6,
            "matmul": PRODUCT_FLOPS / row["times_ms"]["matmul"]["median"] / 1e6,
        }
    row["load"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return row
