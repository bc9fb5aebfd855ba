"""A descent on the reference or on the kernels, and the gradient that its mode gives the results."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptcomp_ext import reference
from adaptcomp_ext.nn._snapshot import Snapshot
from adaptcomp_ext.nn.descent.adjoint import attach
from adaptcomp_ext.nn.descent.gradient import FinalEnergy, Unrolled
from adaptcomp_ext.nn.descent.implicit import Implicit
from adaptcomp_ext.nn.descent.loop import descend
from adaptcomp_ext.nn.descent.problem import Ended, Problem
from adaptcomp_ext.nn.descent.stepwise import run_stepwise
from adaptcomp_ext.nn.result import EnergyResult, Trace


def run_reference(problem: Problem) -> EnergyResult:
    """Run the descent in plain PyTorch; plain autograd differentiates it."""
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
    """Run the loop on the kernels; autograd nodes give the results their gradient."""
    _check_watch(problem)
    recording = torch.is_grad_enabled()
    if recording:
        problem.snapshot = Snapshot(problem.energy, problem.y0.device, problem.evaluate_once)
    if recording and problem.gradient == "stepwise":
        return finish(problem, *run_stepwise(problem))
    sources: list[Tensor] = []
    numbers = [t if isinstance(t, Tensor) else None for t in (problem.step_size, problem.sigma)]
    given = [problem.y0, *numbers, *problem.context]

    def needs_points(value: Tensor, but: list[Tensor]) -> bool:
        if problem.snapshot is None:
            return False
        sources.extend(problem.snapshot.find_sources([value], but))
        if problem.gradient != "unrolled":
            return False
        return bool(sources) or any(t is not None and t.requires_grad for t in given)

    state, tape = descend(problem, needs_points)
    trace = tape.make_trace(state.y) if tape is not None and problem.keep_trace else None
    y = state.y
    if tape is not None and tape.records:
        inputs = [*given, *sources]
        if trace is None:
            (y,) = attach(Unrolled(problem, tape, None), [y], inputs)
        else:
            y, outputs = attach(Unrolled(problem, tape, trace), [y, trace.outputs], inputs)
            trace = trace._replace(outputs=outputs)
    elif recording and problem.gradient == "implicit":
        inputs = [*problem.context, *sources]
        if any(t is not None and t.requires_grad for t in inputs):
            (y,) = attach(Implicit(problem, state), [y], inputs)
    return finish(problem, state, y, trace, sources)


def _check_watch(problem: Problem) -> None:
    """Raise inside ``vmap``, where no point can be made that needs a gradient."""
    if problem.watch is not None:
        problem.watch.refuse("vmap")


def finish(
    problem: Problem, ended: Ended, y: Tensor, trace: Trace | None, sources: list[Tensor]
) -> EnergyResult:
    """Make the result, and give its energies their gradient."""
    energy = ended.energy
    inputs = [y, *problem.context, *sources]
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        (energy,) = attach(FinalEnergy(problem, ended), [energy], inputs)
    return EnergyResult(y, energy, ended.steps, ended.status, trace)
