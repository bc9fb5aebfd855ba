"""The loop of `EnergyDescent` for an energy that PyTorch evaluates: one kernel call between two evaluations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adaptcomp_ext.nn.descent.problem import Problem
from adaptcomp_ext.nn.descent.state import State, plain
from adaptcomp_ext.nn.descent.tape import Tape


def descend(
    problem: Problem, wanted: Callable[[Tensor, list[Tensor]], Tape | None]
) -> tuple[State, Tape | None]:
    """Run every row until it has ended. `wanted` is given the first energies and what is not to be taken for their leaves."""
    rule = problem.rule
    tape = None
    with problem.evaluating():
        state = State(problem)
        point: Tensor | None = plain(problem.y0)
        ones = torch.ones(0, device=problem.y0.device)
        for step in range(rule.max_steps + 1):
            assert point is not None
            rows = point.shape[0]
            if problem.seen is not None:
                problem.seen.before(step, rows)
            value = problem.evaluate(point.requires_grad_(), state.context)
            if step == 0:
                problem.check_rows(value, point)
                tape = wanted(value, [point, *state.context])
            if ones.shape[0] != rows or ones.dtype != value.dtype:
                ones = torch.ones_like(value)
            last = step == rule.max_steps and not rule.on_gradient
            gradient = None if last else problem.slope(value, point, ones)
            accepted = None if tape is None else tape.allocate(step, value)
            following = state.advance(point, value, gradient, accepted, step)
            if tape is not None:
                tape.record(state, step, point, value, accepted, following)
            if following is None:
                break
            point = following
    return state, tape
