"""A descent on the kernels or on the reference, and what its gradient mode makes of it."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptcomp_ext import reference
from adaptcomp_ext.nn.descent.gradient import FinalEnergy, Unrolled, attach
from adaptcomp_ext.nn.descent.implicit import Implicit
from adaptcomp_ext.nn.descent.loop import descend
from adaptcomp_ext.nn.descent.problem import Ended, Problem
from adaptcomp_ext.nn.descent.snapshot import Seen
from adaptcomp_ext.nn.descent.stepwise import run_stepwise
from adaptcomp_ext.nn.descent.tape import Tape
from adaptcomp_ext.nn.result import EnergyResult, Trace


def run_reference(problem: Problem) -> EnergyResult:
    """Plain PyTorch, differentiable by plain autograd."""
    _check_watch(problem)
    watch, energy = problem.watch, problem.energy
    done = reference.energy_descent(
        *(
            energy if watch is None else watch.wrap("energy", energy),
            problem.y0,
            problem.context,
            problem.step_size,
            problem.sigma,
            problem.rule,
        ),
        *(problem.gradient, problem.last, problem.sample_ids),
    )
    trace = None
    if problem.keep_trace:
        outputs, row, step = done.trace
        trace = Trace(outputs, (done.steps[row] == step).to(torch.float32), row, step)
    return EnergyResult(done.y, done.energy, done.steps, done.status, trace)


def run_kernels(problem: Problem) -> EnergyResult:
    """The loop on the kernels, and the nodes that give its results their gradient."""
    _check_watch(problem)
    recording = torch.is_grad_enabled()
    if recording:
        problem.seen = Seen(problem.energy, problem.y0.device, problem.evaluate_once)
    if recording and problem.gradient == "stepwise":
        return finish(problem, *run_stepwise(problem))
    leaves: list[Tensor] = []
    numbers = [t if isinstance(t, Tensor) else None for t in (problem.step_size, problem.sigma)]
    given = [problem.y0, *numbers, *problem.context]

    def wanted(value: Tensor, own: list[Tensor]) -> Tape | None:
        if problem.seen is not None:
            leaves.extend(problem.seen.first(value, own))
        points = bool(
            recording
            and problem.gradient == "unrolled"
            and (leaves or any(t is not None and t.requires_grad for t in given))
        )
        return Tape(points, problem.keep_trace, problem.last) if points or problem.keep_trace else None

    state, tape = descend(problem, wanted)
    trace = tape.trace(state.y) if tape is not None and problem.keep_trace else None
    y = state.y
    if tape is not None and tape.records:
        inputs = [*given, *leaves]
        if trace is None:
            (y,) = attach(Unrolled(problem, tape, None), [y], inputs)
        else:
            y, outputs = attach(Unrolled(problem, tape, trace), [y, trace.outputs], inputs)
            trace = trace._replace(outputs=outputs)
    elif recording and problem.gradient == "implicit":
        inputs = [*problem.context, *leaves]
        if any(t is not None and t.requires_grad for t in inputs):
            (y,) = attach(Implicit(problem, state), [y], inputs)
    return finish(problem, state, y, trace, leaves)


def _check_watch(problem: Problem) -> None:
    """Raise inside ``vmap``, where no point can be made that needs a gradient, whatever has the batch."""
    if problem.watch is not None:
        problem.watch.refuse("vmap")


def finish(
    problem: Problem, ended: Ended, y: Tensor, trace: Trace | None, leaves: list[Tensor]
) -> EnergyResult:
    """The result, with the gradient of the energies."""
    energy = ended.energy
    inputs = [y, *problem.context, *leaves]
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        (energy,) = attach(FinalEnergy(problem, ended), [energy], inputs)
    return EnergyResult(y, energy, ended.steps, ended.status, trace)
