"""The contenders of the benchmark, as functions without arguments that are ready to be timed.

================
==================================================================================================== ``eager``
the loop with ``torch.autograd.grad``; in training with ``create_graph=True`` and a graph of all steps
``compiled``      the loop with its step, ``torch.func.grad`` within, under ``torch.compile``; not in training
``analytic``      the loop with the gradient as a formula, in place; in training the formula, recorded by
autograd ``private``       the same with the activations' derivatives from torch's private operations;
networks only, not in training ``generic``       ``EnergyDescent`` on the energy as a function, which it
differentiates by autograd ``kernel``        ``EnergyDescent`` on the energy's module, for which it has a
kernel ``kernel_all``    where rows stop: the kernel with all steps of all rows ================
====================================================================================================

Where rows stop, the first four run all of them until the last one has, and the stopped ones stand still
behind a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import adaptcomp_ext as ac

from ..compiling import CompileCache
from . import analytic, loops
from .loops import Outcome
from .problem import Problem

__all__ = ["LABELS", "contenders", "training_calls", "training_forwards"]

LABELS = {
    "eager": "eager autograd",
    "compiled": "compiled",
    "analytic": "analytic",
    "private": "analytic, aten",
    "generic": "generic",
    "kernel": "kernel",
    "kernel_all": "kernel, all steps",
}


def _no_grad(call: Callable[[], Outcome]) -> Callable[[], Outcome]:
    def without() -> Outcome:
        with torch.no_grad():
            return call()

    return without


def _with_energy(problem: Problem, call: Callable[[], Outcome]) -> Callable[[], Outcome]:
    """The loops' results with their energies, which `EnergyDescent` returns as well."""

    def both() -> Outcome:
        with torch.no_grad():
            outcome = call()
            return outcome._replace(energy=problem.function(outcome.y, *problem.context))

    return both


def _ours(problem: Problem, energy: Callable[..., Any], tol: float) -> Callable[[], Outcome]:
    stop = "gradient" if tol > 0 else "energy"
    descent = ac.EnergyDescent(energy, problem.step_size, problem.config.steps, tol, stop)

    def call() -> Outcome:
        result = descent(problem.y0, *problem.context)
        return Outcome(result.y, result.steps if tol > 0 else None, result.energy)

    return call


def _eager(problem: Problem) -> Outcome:
    function, config = problem.function, problem.config
    if config.mode == "all":
        return Outcome(
            loops.descend(function, problem.y0, problem.context, problem.step_size, config.steps), None
        )

    def slope(y: Tensor) -> Tensor:
        return loops.autograd_slope(function, y, *problem.context)

    advance = loops.masked_advance(slope, problem.step_size, problem.tol)
    return loops.masked_descend(advance, problem.y0, slope(problem.y0), config.steps)


def _compile(
    cache: CompileCache, problem: Problem, name: str, function: Callable[..., Any]
) -> Callable[..., Any]:
    if problem.y0.device.type != "cuda":
        return cache.get(problem.config, name, function, dynamic=False)
    compiled = cache.get(problem.config, name, function, dynamic=False, mode="reduce-overhead")

    def replayed(*arguments: Tensor) -> Any:
        # The next replay of the CUDA graph overwrites what this one returns, and reads it.
        torch.compiler.cudagraph_mark_step_begin()
        result = compiled(*arguments)
        return result.clone() if isinstance(result, Tensor) else tuple(t.clone() for t in result)

    return replayed


def _compiled(problem: Problem, cache: CompileCache) -> Callable[[], Outcome]:
    function, config, size, tol = problem.function, problem.config, problem.step_size, problem.tol
    y0, context = problem.y0, problem.context
    slope = torch.func.grad(lambda y, *context: function(y, *context).sum())

    if config.mode == "all":
        step = _compile(cache, problem, "step", lambda y, *context: y - size * slope(y, *context))

        def all_steps() -> Outcome:
            y = y0
            for _ in range(config.steps):
                y = step(y, *context)
            return Outcome(y, None)

        return _no_grad(all_steps)

    def masked(y: Tensor, g: Tensor, active: Tensor, steps: Tensor, *context: Tensor) -> Any:
        return loops.masked_advance(lambda y: slope(y, *context), size, tol)(y, g, active, steps)

    first = _compile(cache, problem, "slope", slope)
    move = _compile(cache, problem, "masked", masked)

    def stopping() -> Outcome:
        def advance(*state: Tensor) -> Any:
            return move(*state, *context)

        return loops.masked_descend(advance, y0, first(y0, *context), config.steps)

    return _no_grad(stopping)


def contenders(problem: Problem, cache: CompileCache | None) -> dict[str, Callable[[], Outcome]]:
    """Return every contender of a configuration without training; the compiled one only with a cache."""
    stops = problem.config.mode == "stop"
    calls: dict[str, Callable[[], Outcome]] = {"eager": _with_energy(problem, lambda: _eager(problem))}
    if cache is not None:
        calls["compiled"] = _with_energy(problem, _compiled(problem, cache))
    by_hand = analytic.stopping if stops else analytic.all_steps
    calls["analytic"] = _with_energy(problem, by_hand(problem))
    if isinstance(problem.energy, ac.MLPEnergy):
        calls["private"] = _with_energy(problem, by_hand(problem, analytic.private))
    calls["generic"] = _no_grad(_ours(problem, problem.function, problem.tol))
    calls["kernel"] = _no_grad(_ours(problem, problem.energy, problem.tol))
    if stops:
        calls["kernel_all"] = _no_grad(_ours(problem, problem.energy, 0.0))
    return calls


def training_forwards(problem: Problem) -> dict[str, Callable[[], Tensor]]:
    """Return the contenders in training: each gives the loss, the mean square of y − target after all steps."""
    energy, size, steps = problem.energy, problem.step_size, problem.config.steps
    y0, context = problem.y0, problem.context
    assert isinstance(energy, ac.MLPEnergy)
    (x,) = context
    generic, kernel = _ours(problem, problem.function, 0.0), _ours(problem, energy, 0.0)
    ends: dict[str, Callable[[], Tensor]] = {
        "eager": lambda: loops.unrolled(problem.function, y0, context, size, steps),
        "analytic": lambda: analytic.unrolled(energy, y0, x, size, steps),
        "generic": lambda: generic().y,
        "kernel": lambda: kernel().y,
    }

    def loss(end: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: (end() - problem.target).square().mean()

    return {name: loss(end) for name, end in ends.items()}


def training_calls(problem: Problem) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Return forward and backward of the contenders: the gradients of all leaves."""
    leaves = problem.leaves

    def both(forward: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(forward(), leaves, allow_unused=True, materialize_grads=True)

    return {name: both(forward) for name, forward in training_forwards(problem).items()}
