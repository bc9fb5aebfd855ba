"""The gradient of a descent that has run without a graph: through its steps, and of the energies at its end.

With v = ∂ℓ/∂y_k and the step y_k = clamp(y_{k-1} + σ η − α s m_k), m_k = μ m_{k-1} + clip(∇E(y_{k-1}; θ)),
one step back is a vector times the Jacobian of the update, and one product of a vector with the second
derivatives of E. Only that step's graph exists at the time. Each row takes part from its own last step on, in
the steps that it took: a rejected step, and a step that was not finite, pass v on unchanged.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adaptcomp_ext import reference
from adaptcomp_ext.nn.descent import adjoint
from adaptcomp_ext.nn.descent.check import Check
from adaptcomp_ext.nn.descent.problem import Ended, Problem
from adaptcomp_ext.nn.descent.tape import Taken, Tape, taken
from adaptcomp_ext.nn.result import Status, Trace
from adaptcomp_ext.ops import descent
from adaptcomp_ext.ops._backend import compute_dtype
from adaptcomp_ext.reference._broadcast import over


def select(tensor: Tensor, row: Tensor | None) -> Tensor:
    """Return the rows `row` of a tensor of the batch; all rows for None."""
    return tensor if row is None else tensor.index_select(0, row)


def add_rows(total: Tensor | None, rows: Tensor, row: Tensor | None, batch: int) -> Tensor:
    """Add `rows` at the places `row` (None: all in order) of `total` [batch, ...] (None: zero)."""
    if row is None:
        return rows.clone() if total is None else total + rows
    if total is None:
        total = rows.new_zeros((batch, *rows.shape[1:]))
    return total.index_add_(0, row, rows)


def add(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    """Return the sum of two tensors; None stands for zero."""
    if total is None or term is None:
        return term if total is None else total
    return total + term


class Unrolled:
    """The derivatives of y, the result of a descent, and of the trace's outputs if there is a trace.

    The inputs of the node are y0, the step size, σ, the context, and the sources of the energy. Step size and
    σ are None where they are numbers.
    """

    def __init__(self, problem: Problem, tape: Tape, trace: Trace | None) -> None:
        self.problem = problem
        assert problem.snapshot is not None
        self._snapshot = problem.snapshot
        self._given = 3 + len(problem.context)
        self._tape = tape
        self._trace = None if trace is None else (trace.row, trace.step)
        self._taken: list[Taken] | None = None

    @property
    def own(self) -> int:
        """Return the number of inputs of which the functions take copies."""
        return self._given + self._snapshot.copied()

    def function(self, inputs: adjoint.Inputs) -> list[Tensor]:
        """Run the descent again with a graph of all its steps. Each row takes the steps that it took."""
        with self._snapshot.restored(inputs[self._given :]):
            return self._function(inputs)

    def _function(self, inputs: adjoint.Inputs) -> list[Tensor]:
        problem, rule = self.problem, self.problem.rule
        y0, step_size, sigma, *context = inputs[: self._given]
        sources = inputs[self._given :]
        assert y0 is not None
        y = y0 if problem.last is None else torch.where(self._cut(y0), y0.detach(), y0)
        velocity = torch.zeros_like(y0, dtype=compute_dtype(y0.dtype)) if rule.momentum > 0 else None
        segments, ends = self._segments(), [y0[:0]]
        for step in self._steps():
            row = step.row
            if velocity is not None and step.rejected is not None:
                velocity = velocity.index_fill(0, step.rejected, 0.0)
            if step.start.shape[0] > 0:
                here, before = select(y, row), None if velocity is None else select(velocity, row)
                if step.first is not None:
                    here = torch.where(over(step.first, here), step.start, here)
                here = here if here.requires_grad else here.detach().requires_grad_()
                with self._evaluation(step, sources):
                    there = [select(c, row) for c in context if c is not None]
                    _, slope = problem.evaluate_again(here, there)
                if step.first is not None and before is not None and step.velocity is not None:
                    constant = (step.velocity - reference.clipped(slope.detach(), rule.clip)) / rule.momentum
                    before = torch.where(over(step.first, before), constant, before)
                noise = self._noise(step) * _number(sigma, problem.sigma, here) if rule.noisy else None
                sizes = self._sizes(step_size, step)
                point, after = reference.descent_update(here, slope, sizes, before, noise, rule)
                y = point if row is None else y.index_copy(0, row, point)
                if velocity is not None:
                    velocity = after if row is None else velocity.index_copy(0, row, after)
            if segments is not None:
                of = segments[step.step][0]
                ends.append(self._heeded(y[of], step.step, of))
        return [y] if segments is None else [y, torch.cat(ends)]

    def gradients(
        self, inputs: adjoint.Inputs, upstream: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Differentiate one step at a time, the last step first."""
        given, snapshot = self._given, self._snapshot
        sources = adjoint.copies(inputs[given:], snapshot.copied(), needed[given:])
        with snapshot.restored(sources):
            return self._gradients([*inputs[:given], *sources], upstream, needed)

    def _gradients(
        self, inputs: adjoint.Inputs, upstream: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        problem, rule, own = self.problem, self.problem.rule, self._given
        check = Check(self._snapshot, self._tape.first, problem.autocast_dtypes())
        y0, step_size, sigma, *context = (None if t is None else t.detach() for t in inputs[:own])
        assert y0 is not None
        leaves = inputs[own:]
        batch, wide = y0.shape[0], compute_dtype(y0.dtype)
        g_y, g_trace = upstream[0], upstream[1] if len(upstream) > 1 else None
        v = torch.zeros_like(y0, dtype=wide) if g_y is None else g_y.to(wide, copy=True).contiguous()
        w = torch.zeros_like(v) if rule.momentum > 0 else None  # of the velocity
        segments = None if g_trace is None else self._segments()
        g_sizes: Tensor | None = None
        g_sigma: Tensor | None = None
        g_context: list[Tensor | None] = [None] * len(context)
        g_leaves: list[Tensor | None] = [None] * len(leaves)
        bounded = rule.low > -math.inf or rule.high < math.inf
        checked = False
        for step in reversed(self._steps()):
            row = step.row
            if segments is not None and g_trace is not None:
                of, begin, end = segments[step.step]
                v.index_add_(0, of, self._heeded(g_trace[begin:end], step.step, of).to(wide))
            if w is not None and step.rejected is not None:
                w.index_fill_(0, step.rejected, 0.0)
            if step.start.shape[0] == 0:
                continue
            here = step.start.detach().requires_grad_()
            rows = [
                select(c, row).detach().requires_grad_(need)
                for c, need in zip(context, needed[3:own], strict=True)
                if c is not None
            ]
            with self._evaluation(step, leaves):
                value, slope = problem.evaluate_again(here, rows)
            if step.energy is not None or not checked:
                check.evaluation(value, [here, *rows], leaves, step.energy, step.partial)
                checked = True
            with torch.no_grad():
                noise = eta = None
                if rule.noisy and (bounded or needed[2]):
                    eta = self._noise(step)
                    noise = eta * _number(sigma, problem.sigma, here)
                sizes = self._sizes(step_size, step)
                g_here, g_slope, g_size, g_before = reference.descent_update_backward(
                    *(here.detach(), slope.detach(), sizes, step.velocity, noise, rule),
                    *(select(v, row), None if w is None else select(w, row)),
                )
                if needed[1]:
                    g_sizes = add_rows(
                        g_sizes, g_size if step.scale is None else g_size * step.scale, row, batch
                    )
                if needed[2] and eta is not None:
                    g_sigma = add(g_sigma, (g_here * eta).sum())
            targets = [here, *(t for t in rows if t.requires_grad)]
            targets += [t for t, need in zip(leaves, needed[own:], strict=True) if need and t is not None]
            parts = iter(_grad(slope, targets, g_slope.to(slope.dtype)))
            curved = next(parts)
            g_here = g_here if curved is None else g_here + curved
            for i, need in enumerate(needed[3:own]):
                part = next(parts) if need else None
                if part is not None:
                    g_context[i] = add_rows(g_context[i], part, row, batch)
            for i, need in enumerate(needed[own:]):
                g_leaves[i] = add(g_leaves[i], next(parts)) if need else None
            v = _put(v, g_here, row)
            w = None if w is None else _put(w, g_before, row)
        check.done()
        if problem.last is not None:
            v.masked_fill_(self._cut(v), 0.0)
        g_step: Tensor | None = None
        if g_sizes is not None and step_size is not None:
            g_step = (g_sizes if step_size.dim() else g_sizes.sum()).to(step_size)
        g_noise = None if g_sigma is None or sigma is None else g_sigma.to(sigma)
        return [v.to(y0.dtype) if needed[0] else None, g_step, g_noise, *g_context, *g_leaves]

    def _steps(self) -> list[Taken]:
        if self._taken is None:
            self._taken = taken(self._tape, self.problem.last)
        return self._taken

    def _evaluation(self, step: Taken, sources: adjoint.Inputs) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the energy is as it was at the evaluation before a step."""
        snapshot = self._snapshot
        if not snapshot.changing:
            return contextlib.nullcontext()
        if self.problem.rule.if_lower or (snapshot.random and step.partial):
            raise RuntimeError(
                "energy: expected one that gives the same values at every evaluation, got one that "
                + ("draws random numbers" if snapshot.random else "changes its own buffers or attributes")
                + " (dropout or batch statistics, for instance): it can be differentiated only with "
                'accept="always"'
                + (
                    " and where all rows take the same number of steps, as with tol=0"
                    if snapshot.random
                    else ""
                )
                + ". Switch the energy to eval()"
            )
        return snapshot.restored(sources, step.step - 1)

    def _noise(self, step: Taken) -> Tensor:
        row = torch.arange(step.start.shape[0], device=step.start.device) if step.row is None else step.row
        ids = self.problem.sample_ids
        return descent.normals(self.problem.rule, row if ids is None else ids[row], step.step, step.start)

    def _sizes(self, step_size: Tensor | None, step: Taken) -> Tensor | float:
        size = _number(step_size, self.problem.step_size, step.start)
        if isinstance(size, Tensor) and size.dim():
            size = select(size, step.row)
        return size if step.scale is None else size * step.scale

    def _segments(self) -> dict[int, tuple[Tensor, int, int]] | None:
        """Return, for each step, its rows in the trace and the places where they begin and end."""
        if self._trace is None:
            return None
        row, step = self._trace
        segments, begin = {}, 0
        for k, count in enumerate(torch.bincount(step, minlength=len(self._tape.records) + 1).tolist()):
            segments[k] = (row[begin : begin + count], begin, begin + count)
            begin += count
        return segments

    def _cut(self, like: Tensor) -> Tensor:
        """Return which rows are not differentiated from y0 on, in a shape that broadcasts over `like`."""
        assert self.problem.last is not None
        return over(self._tape.steps >= self.problem.last, like)

    def _heeded(self, ends: Tensor, step: int, row: Tensor) -> Tensor:
        """Return points after a step, or their gradients, with zeros where the gradient does not reach."""
        if self.problem.last is None:
            return ends
        return ends.masked_fill(over(self._tape.steps[row] - self.problem.last >= step, ends), 0.0)


class FinalEnergy:
    """The derivatives of ``result.energy``, the energies at the last points.

    The inputs of the node are y, the context, and the sources of the energy.
    """

    def __init__(self, problem: Problem, ended: Ended) -> None:
        self.problem = problem
        assert problem.snapshot is not None
        self._snapshot = problem.snapshot
        self._given = 1 + len(problem.context)
        self._ended = (ended.status, ended.steps)
        self._rows: Tensor | None = None
        self._energy = ended.energy.detach().clone()  # the caller may write to the other

    @property
    def own(self) -> int:
        """Return the number of inputs of which the functions take copies."""
        return self._given + self._snapshot.copied()

    def rows(self) -> Tensor:
        """Return the rows that have an energy: all rows whose starting point was finite."""
        if self._rows is None:
            status, steps = self._ended
            self._rows = ((status != Status.NONFINITE) | (steps > 0)).nonzero()[:, 0]
        return self._rows

    def function(self, inputs: adjoint.Inputs) -> list[Tensor]:
        """Evaluate the energies again; they are zero where a row has none."""
        y, *context = (t for t in inputs[: self._given] if t is not None)
        sources, wide = inputs[self._given :], compute_dtype(y.dtype)
        check = Check(self._snapshot, self._energy, self.problem.autocast_dtypes())
        total = torch.zeros(y.shape[0], dtype=wide, device=y.device)
        for rows, evaluation in self._evaluations():
            with self._snapshot.restored(sources, evaluation), self.problem.evaluating():
                here = y[rows]
                here = here if here.requires_grad else here.detach().requires_grad_()
                there = [c[rows] for c in context]
                value = self.problem.evaluate(here, there)
            check.evaluation(value, [here, *there], sources, self._energy[rows], partial=True)
            total = total.index_copy(0, rows, value.to(wide))
        check.done()
        return [total]

    def _evaluations(self) -> list[tuple[Tensor, int | None]]:
        """Return rows that are evaluated together, and the evaluation's number if evaluations differ."""
        rows, snapshot, (status, steps) = self.rows(), self._snapshot, self._ended
        if not snapshot.changing:
            return [(rows, None)]
        if snapshot.random or self.problem.rule.if_lower:
            raise RuntimeError(
                "result.energy: expected an energy that gives the same values at every evaluation, got one "
                "that draws random numbers or changes what it reads (dropout, for instance). Switch it to "
                "eval(), or evaluate it at result.y"
            )
        at = steps - (status == Status.NONFINITE).to(steps.dtype)
        return [(rows[at[rows] == k], k) for k in at[rows].unique().tolist()]

    def gradients(
        self, inputs: adjoint.Inputs, upstream: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Differentiate one evaluation."""
        with torch.enable_grad():
            inputs = adjoint.copies(inputs, self.own, needed)
            (value,) = self.function(inputs)
        targets = [t for t, need in zip(inputs, needed, strict=True) if need and t is not None]
        gradients = iter(_grad(value, targets, upstream[0]))
        return [next(gradients) if need else None for need in needed]


def _grad(value: Tensor, targets: list[Tensor], upstream: Tensor | None) -> Sequence[Tensor | None]:
    if upstream is None or not value.requires_grad or value.grad_fn is None:
        return [None] * len(targets)
    # The graph is kept: part of it may lie behind a source of the energy and serve the other steps too.
    return torch.autograd.grad(value, targets, upstream, retain_graph=True, allow_unused=True)


def _number(given: Tensor | None, otherwise: float | Tensor, like: Tensor) -> Tensor | float:
    """Return a setting in the compute dtype: the tensor among the inputs, or the number."""
    if given is not None:
        return given.to(like.device, compute_dtype(like.dtype))
    return (
        otherwise.detach().to(like.device, compute_dtype(like.dtype))
        if isinstance(otherwise, Tensor)
        else otherwise
    )


def _put(total: Tensor, rows: Tensor, row: Tensor | None) -> Tensor:
    return rows if row is None else total.index_copy_(0, row, rows)
