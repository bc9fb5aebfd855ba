"""The masked form: all B rows run every step until the last one has halted; ``torch.where`` freezes the halted ones.

Each policy has one module for what happens in a step (step, head and masking together), which is run as it is
or handed to ``torch.compile``, and one short loop around it that leaves as soon as no row is active.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .cores import CLASSES
from .problem import ACT_THRESHOLD, CONFIDENCE_THRESHOLD, Problem

__all__ = ["Outcome", "masked_step", "run_masked"]

State = tuple[Tensor, ...]


class Outcome(NamedTuple):
    """What every contender returns: output [B, …], steps int64 [B], cost [B]."""

    output: Tensor
    steps: Tensor
    cost: Tensor


def _freeze(active: Tensor, new: State, old: State) -> State:
    return tuple(
        torch.where(active.view(-1, *(1,) * (n.dim() - 1)), n, o) for n, o in zip(new, old, strict=True)
    )


class FixedStep(nn.Module):
    """One masked step of rows whose number of steps is known."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, state: State, inputs: State, left: Tensor) -> tuple[State, Tensor]:
        return _freeze(left > 0, self.step(state, *inputs), state), left - 1


class ConfidenceStep(nn.Module):
    """One masked step that exits once the largest class probability reaches the threshold."""

    def __init__(self, step: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.step, self.head = step, head

    def forward(
        self, state: State, inputs: State, active: Tensor, output: Tensor, steps: Tensor
    ) -> tuple[State, Tensor, Tensor, Tensor]:
        new = self.step(state, *inputs)
        logits = self.head(new)
        output = torch.where(active[:, None], logits, output)
        sure = torch.softmax(logits.detach(), dim=-1).amax(dim=-1) >= CONFIDENCE_THRESHOLD
        return _freeze(active, new, state), active & ~sure, output, steps + active


class ACTStep(nn.Module):
    """One masked ACT step: weights h_n, and the remainder R at the step that halts."""

    def __init__(self, step: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.step, self.head = step, head

    def forward(
        self,
        state: State,
        inputs: State,
        active: Tensor,
        spent: Tensor,
        remainder: Tensor,
        output: Tensor,
        steps: Tensor,
        threshold: Tensor,
    ) -> tuple[State, Tensor, Tensor, Tensor, Tensor, Tensor]:
        new = self.step(state, *inputs)
        total = spent + torch.sigmoid(self.head(new)).squeeze(-1)
        halts = active & (total >= threshold)
        remainder = torch.where(halts, 1 - spent, remainder)
        weight = torch.where(halts, 1 - spent, total - spent) * active
        h = new[0]
        output = output + weight.view(-1, *(1,) * (h.dim() - 1)) * h
        return _freeze(active, new, state), active & ~halts, total, remainder, output, steps + active


def masked_step(policy: str, step: nn.Module, head: nn.Module | None) -> nn.Module:
    """Return the module that does one masked step of the policy."""
    if policy == "fixed" or head is None:
        return FixedStep(step)
    return ConfidenceStep(step, head) if policy == "confidence" else ACTStep(step, head)


def _run_fixed(problem: Problem, advance: Callable[..., tuple]) -> Outcome:
    state, left = problem.state, problem.steps
    for _ in range(int(problem.steps.max())):
        state, left = advance(state, problem.inputs, left)
    return Outcome(state[0], problem.steps, problem.steps.to(state[0].dtype))


def _run_confidence(problem: Problem, advance: Callable[..., tuple]) -> Outcome:
    state, rows = problem.state, problem.config.batch
    active = torch.ones(rows, dtype=torch.bool, device=state[0].device)
    output = state[0].new_zeros(rows, CLASSES)
    steps = torch.zeros(rows, dtype=torch.int64, device=state[0].device)
    for _ in range(problem.config.max_steps):
        state, active, output, steps = advance(state, problem.inputs, active, output, steps)
        if not active.any():
            break
    return Outcome(output, steps, steps.to(output.dtype))


def _run_act(problem: Problem, advance: Callable[..., tuple]) -> Outcome:
    state, rows, last = problem.state, problem.config.batch, problem.config.max_steps
    active = torch.ones(rows, dtype=torch.bool, device=state[0].device)
    spent = remainder = state[0].new_zeros(rows)
    output = torch.zeros_like(state[0])
    steps = torch.zeros(rows, dtype=torch.int64, device=state[0].device)
    # A tensor, so that the compiled step serves the last step too, at which every row halts.
    threshold, none = state[0].new_full((), ACT_THRESHOLD), state[0].new_full((), float("-inf"))
    for n in range(1, last + 1):
        state, active, spent, remainder, output, steps = advance(
            state, problem.inputs, active, spent, remainder, output, steps, threshold if n < last else none
        )
        if n < last and not active.any():
            break
    return Outcome(output, steps, steps + remainder)


_RUN = {"fixed": _run_fixed, "confidence": _run_confidence, "act": _run_act}


def run_masked(problem: Problem, advance: Callable[..., tuple]) -> Outcome:
    """Run the masked loop of the problem's policy with the given masked step."""
    return _RUN[problem.config.policy](problem, advance)
