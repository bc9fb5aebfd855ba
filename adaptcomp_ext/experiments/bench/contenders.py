"""The contenders of the halting benchmark, as functions without arguments that are ready to be timed.

========================
========================================================================================== ``masked``
all rows run until the last one has halted; ``torch.where`` freezes the halted ones ``masked_compile``
the same with its step (core, head, masking) under ``torch.compile(dynamic=True)`` ``boolean``
the rows that remain are gathered after every step with index tensors ``auto``
``AdaptiveHalt(compact="auto")`` ``compact``               ``AdaptiveHalt(compact=True)`` ``mask``
``AdaptiveHalt(compact=False)`` ``auto_compile``          ``AdaptiveHalt(compact="auto")`` around a compiled
step ``limit``                 core and head alone on tensors of each step's true number of rows: no
bookkeeping at all ========================
==========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import adaptcomp_ext as ac

from .compiling import CompileCache
from .indexed import run_indexed
from .masked import Outcome, masked_step, run_masked
from .problem import ACT_THRESHOLD, CONFIDENCE_THRESHOLD, Problem
from .schedule import active_counts

__all__ = ["forward_contenders", "limit", "ours", "training_call"]

Call = Callable[[], Any]


def ours(
    problem: Problem, compact: bool | str, step: Callable[..., Any] | None = None
) -> Callable[[], Outcome]:
    """Return a call of AdaptiveHalt on the problem."""
    policy: nn.Module
    readout = None
    if problem.config.policy == "fixed":
        policy = ac.FixedSteps(problem.steps)
    elif problem.config.policy == "confidence":
        policy, readout = ac.Confidence(CONFIDENCE_THRESHOLD), problem.head
    else:
        policy = ac.ACT(problem.head, threshold=ACT_THRESHOLD)
    halt = ac.AdaptiveHalt(
        problem.step if step is None else step,
        policy,
        max_steps=problem.config.max_steps,
        readout=readout,
        compact=compact,
    )

    def call() -> Outcome:
        result = halt(problem.state, *problem.inputs)
        return Outcome(result.output, result.steps, result.cost)

    return call


def forward_contenders(problem: Problem, compiled: CompileCache | None) -> dict[str, Callable[[], Outcome]]:
    """Return every contender but the limit; the compiled ones only with a cache."""
    config = problem.config
    plain = masked_step(config.policy, problem.step, problem.head)
    calls: dict[str, Callable[[], Outcome]] = {
        "masked": lambda: run_masked(problem, plain),
        "boolean": lambda: run_indexed(problem),
        "auto": ours(problem, "auto"),
        "compact": ours(problem, True),
        "mask": ours(problem, False),
    }
    if compiled is not None:
        # The batch is a dynamic dimension, so one compilation serves every B and M.
        advance = compiled.get(config.model_key, "masked", plain, dynamic=True)
        calls["masked_compile"] = lambda: run_masked(problem, advance)
        step = compiled.get(config.model_key, "step", problem.step, dynamic=True)
        calls["auto_compile"] = ours(problem, "auto", step)
    return calls


def training_call(problem: Problem, call: Callable[[], Outcome]) -> Callable[[], tuple[Tensor, ...]]:
    """Return forward and backward of the contender: the gradients of output² and a hundredth of the ponder cost."""
    leaves = problem.leaves

    def train() -> tuple[Tensor, ...]:
        result = call()
        loss = result.output.square().mean() + 0.01 * result.cost.mean()
        return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    return train


def limit(problem: Problem) -> tuple[Call, list[int]]:
    """Return the call no implementation can beat, and its number of rows per step.

    Core and head run on contiguous tensors of each step's true size, made beforehand as prefixes of one
    block, so that they are as warm in the caches as a well-kept active block. In training every step's
    gradient of its true size comes from outside as well, and every step returns those of h and x and the
    weights.
    """
    config, head = problem.config, problem.head
    counts = active_counts(problem.steps)

    def prefixes(tensor: Tensor) -> list[Tensor]:
        own = tensor.detach().clone()
        return [own[:n].detach().requires_grad_(tensor.requires_grad) for n in counts]

    states = list(zip(*(prefixes(t) for t in problem.state), strict=True))
    inputs = list(zip(*(prefixes(t) for t in problem.inputs), strict=True)) or [()] * len(counts)

    def forward() -> None:
        # Nothing is kept, so that every step finds the memory that the one before has freed.
        for state, context in zip(states, inputs, strict=True):
            new = problem.step(state, *context)
            if head is not None:
                head(new)

    if not config.training:
        return forward, counts

    def graph() -> list[Tensor]:
        outputs = []
        for state, context in zip(states, inputs, strict=True):
            new = problem.step(state, *context)
            outputs.append(new[0])
            if head is not None:
                outputs.append(head(new))
        return outputs

    with torch.no_grad():
        gradients = [torch.randn_like(out) for out in graph()]
    weights = [p for m in (problem.step, head) if m is not None for p in m.parameters()]
    leaves = weights + [state[0] for state in states] + [x for context in inputs for x in context]

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(graph(), leaves, gradients)

    return forward_backward, counts
