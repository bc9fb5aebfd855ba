"""`EnergyDescent` on an energy in closed form: one kernel call for all steps of every row.

A second kernel call differentiates them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adaptcomp_ext import reference
from adaptcomp_ext.nn._snapshot import Snapshot
from adaptcomp_ext.nn.descent import adjoint
from adaptcomp_ext.nn.descent.adjoint import attach
from adaptcomp_ext.nn.descent.energies import ClosedFormEnergy
from adaptcomp_ext.nn.descent.implicit import Implicit
from adaptcomp_ext.nn.descent.modes import finish
from adaptcomp_ext.nn.descent.problem import Problem
from adaptcomp_ext.nn.result import EnergyResult, Status, Trace
from adaptcomp_ext.ops._backend import capturing, compute_dtype, on_cuda
from adaptcomp_ext.ops._fused_descent import ClosedForm, Descended
from adaptcomp_ext.ops.descent import normals
from adaptcomp_ext.reference import DescentRule

RESERVED = 2**28
"""Bytes that a descent may reserve for its points before the number of steps is known."""


def run_fused(problem: Problem, energy: ClosedFormEnergy) -> EnergyResult | None:
    """Run the descent in one kernel call. Returns None where rows are too long for the device's kernels."""
    y0 = problem.y0
    wide = compute_dtype(y0.dtype)
    if problem.watch is not None:
        problem.watch("", [*energy.parameters(), *energy.buffers()])  # before a kernel reads them
    if torch.is_autocast_enabled(y0.device.type):  # which would round what is computed for the kernels
        with torch.autocast(y0.device.type, enabled=False):
            form = energy.closed_form(y0, *problem.context, dtype=wide, kernels=True)
    else:
        form = energy.closed_form(y0, *problem.context, dtype=wide, kernels=True)
    if problem.watch is not None:
        problem.watch("energy", form.tensors)
    tensors = form.tensors
    start = y0 if y0.dtype == wide else y0.to(wide)
    start = start if start.is_contiguous() else start.contiguous()
    step_size = _number(problem.step_size, start)
    sigma = _number(problem.sigma, start) if problem.rule.noisy else None
    inputs = [start, step_size, sigma, *tensors]
    recording = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in inputs])
    through = recording and problem.gradient in ("unrolled", "stepwise")
    if not form.fits(start, through):
        return None
    plain = start, step_size, sigma
    if recording:
        form = form._replace(tensors=tuple([_plain(t) for t in tensors]))
        plain = start.detach(), step_size.detach(), _plain(sigma)
    run, rule = _descended(form, problem, *plain, keep=through or problem.keep_trace)
    places = trace_places(run.steps, rule.max_steps) if problem.keep_trace else None
    y, outputs = run.y, None if places is None or run.path is None else run.path[places]
    if through:
        work = Fused(form, problem, rule, run, places)
        y, *rest = attach(work, [y] if outputs is None else [y, outputs], inputs)
        outputs = rest[0] if rest else None
    value = run.energy
    if recording and problem.gradient != "implicit":
        (value,) = attach(FusedEnergy(form, run), [value], [y, *tensors])
    trace = None
    if places is not None and outputs is not None:
        row, step = places
        trace = Trace(outputs.to(y0.dtype), (run.steps[row] == step + 1).to(torch.float32), row, step + 1)
    if recording and problem.gradient == "implicit":
        return _implicit(problem, run._replace(y=y.to(y0.dtype)), trace)
    return EnergyResult(y if y0.dtype == wide else y.to(y0.dtype), value, run.steps, run.status, trace)


def _descended(
    form: ClosedForm, problem: Problem, start: Tensor, step_size: Tensor, sigma: Tensor | None, keep: bool
) -> tuple[Descended, DescentRule]:
    """Run the descent. Returns its result and its rule, whose `max_steps` is the length of the path.

    Where that would be much memory, a first descent finds the number of steps and a second one keeps their
    points.
    """
    rule, ids = problem.rule, problem.sample_ids
    if (
        not keep
        or start.numel() * start.element_size() * rule.max_steps <= RESERVED
        or (on_cuda(start.device) and capturing())
    ):
        return form.descend(rule, start, step_size, sigma, ids, keep), rule
    first = form.descend(rule, start, step_size, sigma, ids, False)
    steps = max(1, int(first.steps.max()))
    short = rule._replace(max_steps=steps)
    return form.descend(short, start, step_size, sigma, ids, True)._replace(status=first.status), short


def _implicit(problem: Problem, run: Descended, trace: Trace | None) -> EnergyResult:
    """Give the minima and their energies the gradients that treat the energy as any other module."""
    problem.snapshot = Snapshot(problem.energy, problem.y0.device)
    with problem.evaluating():
        point = run.y.detach().requires_grad_()
        value = problem.evaluate(point, problem.context)
        sources = problem.snapshot.find_sources([value], [point, *problem.context])
    (y,) = attach(Implicit(problem, run), [run.y], [*problem.context, *sources])
    return finish(problem, run, y, trace, sources)


def trace_places(steps: Tensor, max_steps: int) -> tuple[Tensor, Tensor]:
    """Return row and step, counted from 0, of every step that was taken, ordered by step and then by row."""
    taken = torch.arange(max_steps, device=steps.device)[:, None] < steps
    step, row = taken.nonzero().unbind(1)
    return row, step


class Fused:
    """The derivatives of y, the result of a fused descent, and of the trace's outputs if there is a trace.

    The inputs of the node are y0, the step size, σ and the energy's tensors.
    """

    def __init__(
        self,
        form: ClosedForm,
        problem: Problem,
        rule: DescentRule,
        run: Descended,
        places: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.own = 3 + len(form.tensors)
        self._form = form._replace(tensors=())  # the node keeps them, and sees when they are changed
        self._rule = rule
        self._ids = problem.sample_ids
        self._run = run
        self._places = places
        self._stepwise = problem.gradient == "stepwise"
        self._last = 0 if self._stepwise else (problem.last or rule.max_steps + 1)

    def gradients(
        self, inputs: adjoint.Inputs, upstream: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Run the kernel of the gradient."""
        if all(g is None for g in upstream):
            return [None for _ in needed]
        start, step_size, sigma, *tensors = inputs
        assert start is not None and step_size is not None
        g_y, g_outputs = upstream[0], upstream[1] if len(upstream) > 1 else None
        g_path = None
        if g_outputs is not None and self._places is not None:
            assert self._run.path is not None
            g_path = torch.zeros_like(self._run.path)
            g_path[self._places] = g_outputs
        form = self._form._replace(tensors=tuple(map(_plain, tensors)))
        gradients = form.differentiate(
            *(self._rule, start.detach(), step_size.detach(), _plain(sigma), self._ids, self._run),
            *(self._last, None if g_y is None else g_y.contiguous(), g_path),
        )
        grads = list(gradients.tensors)
        at = form.kernels.rows_at
        shared = None if at is None else tensors[at]
        if at is not None and shared is not None and shared.dim() == 1:
            rows = grads[at]
            grads[at] = None if rows is None else rows.sum(dim=0)
        g_step = gradients.step_size if step_size.dim() else gradients.step_size.sum()
        g_y0 = None if self._stepwise else gradients.y0
        all_gradients = [g_y0, g_step, None if gradients.noise is None else gradients.noise.sum(), *grads]
        return [g if need else None for g, need in zip(all_gradients, needed, strict=True)]

    def function(self, inputs: adjoint.Inputs) -> list[Tensor]:
        """Run the descent again in plain PyTorch, each row with the steps that it took, with a graph."""
        start, step_size, sigma, *tensors = inputs
        assert start is not None and step_size is not None
        rule, run, form = self._rule, self._run, self._form
        assert run.scale is not None
        y = start.detach() if self._stepwise else start
        velocity = torch.zeros_like(start)
        ends = [y[:0]]
        for k in range(int(run.steps.max()) if len(start) else 0):
            took = run.steps > k
            scale = torch.where(took, run.scale[:, k], 0)
            rows = (scale != 0).nonzero()[:, 0]
            if not self._stepwise:
                first = (run.steps - self._last == k)[:, None]
                y, velocity = (
                    torch.where(first, y.detach(), y),
                    torch.where(first, velocity.detach(), velocity),
                )
            here, before = y[rows], velocity[rows]
            if self._stepwise:
                here, before = here.detach(), before.detach()
            here = here if here.requires_grad else here.requires_grad_()
            own = _of_rows(form, tensors, rows)
            (slope,) = torch.autograd.grad(form.function(here, *own).sum(), here, create_graph=True)
            noise = None
            if sigma is not None:
                sample = rows if self._ids is None else self._ids[rows]
                noise = sigma * normals(rule, sample, k + 1, here.detach())
            sizes = (step_size[rows] if step_size.dim() else step_size) * scale[rows]
            point, after = reference.descent_update(
                here, slope, sizes, before if rule.momentum > 0 else None, noise, rule
            )
            y = y.index_copy(0, rows, point)
            if rule.momentum > 0:
                velocity = torch.zeros_like(velocity).index_copy(0, rows, after)
            ends.append(y[took.nonzero()[:, 0]])
        return [y] if self._places is None else [y, torch.cat(ends)]


class FusedEnergy:
    """The derivatives of ``result.energy``, the energies at the last points.

    The inputs of the node are y and the energy's tensors.
    """

    def __init__(self, form: ClosedForm, run: Descended) -> None:
        self.own = 1 + len(form.tensors)
        self._form = form._replace(tensors=())
        self._ended = (run.status, run.steps)

    def function(self, inputs: adjoint.Inputs) -> list[Tensor]:
        """Evaluate the energies again; they are zero where the starting point was not finite."""
        y, *tensors = inputs
        assert y is not None
        status, steps = self._ended
        rows = ((status != Status.NONFINITE) | (steps > 0)).nonzero()[:, 0]
        value = self._form.function(y[rows], *_of_rows(self._form, tensors, rows))
        return [value.new_zeros(y.shape[0]).index_copy(0, rows, value)]

    def gradients(
        self, inputs: adjoint.Inputs, upstream: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Differentiate one evaluation."""
        if upstream[0] is None:
            return [None for _ in needed]
        with torch.enable_grad():
            inputs = adjoint.copies(inputs, self.own, needed)
            (value,) = self.function(inputs)
        targets = [t for t, need in zip(inputs, needed, strict=True) if need and t is not None]
        gradients = iter(torch.autograd.grad(value, targets, upstream[0], allow_unused=True))
        return [next(gradients) if need else None for need in needed]


def _number(value: float | Tensor, like: Tensor) -> Tensor:
    """Return a setting as a tensor with the dtype and device of `like`, without dimensions or [B]."""
    if isinstance(value, Tensor):
        return value.to(like.device, like.dtype).contiguous()
    return like.new_full((), value)


def _of_rows(form: ClosedForm, tensors: Sequence[Tensor | None], rows: Tensor) -> list[Tensor | None]:
    """Return the energy's tensors for the batch rows `rows`."""
    own = list(tensors)
    at = form.kernels.rows_at
    if at is not None and (given := tensors[at]) is not None and given.dim() == 2:
        own[at] = given[rows]
    return own


def _plain(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
