"""Descent with ``gradient="stepwise"``: a step's point carries the gradient of that step, and of no other.

The kernels judge and make the points as in every mode, and their values are the results. Beside them runs the
graph: the slope of the energy at each point with its own graph, and the points that rows have reached with
the gradient of the step that led there, attached once it is known that the step was accepted. No row that was
not finite has a part in it, so that none can make a gradient NaN: where one turns up, the slopes of its block
are made again without it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaptcomp_ext.nn.descent.compiled import check_not_compiled
from adaptcomp_ext.nn.descent.problem import Problem
from adaptcomp_ext.nn.descent.state import State, plain
from adaptcomp_ext.nn.descent.tape import Tape
from adaptcomp_ext.nn.result import Trace
from adaptcomp_ext.ops import descent
from adaptcomp_ext.ops._backend import compute_dtype


@dataclass(slots=True)
class _Block:
    """The rows that are still running, with graph but for `start` and `after`."""

    context: list[Tensor]
    start: Tensor
    """Where they are."""
    current: Tensor
    """The same, with the gradient of the last accepted step."""
    slope: Tensor
    """The gradient of the energy there."""
    after: Tensor
    """The velocity of the step that is being tried."""
    step_size: Tensor
    """Its step size, without dimensions or [n]."""
    noise: Tensor | None

    def select(self, index: Tensor) -> _Block:
        def some(t: Tensor) -> Tensor:
            return t.index_select(0, index)

        return _Block(
            context=[some(c) for c in self.context],
            start=some(self.start),
            current=some(self.current),
            slope=some(self.slope),
            after=some(self.after),
            step_size=some(self.step_size) if self.step_size.dim() else self.step_size,
            noise=None if self.noise is None else some(self.noise),
        )


def run_stepwise(problem: Problem) -> tuple[State, Tensor, Trace | None, list[Tensor]]:
    """The state at the end, y and the trace with their gradient, and the leaves that the energy reaches."""
    with problem.evaluating():
        return _Stepwise(problem).run()


class _Stepwise:
    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.state = State(problem, exact=True)
        self.state.context = []  # which goes with its graph here
        self.tape = Tape(points=False, trace=True)
        self.exits: list[tuple[Tensor, Tensor]] = []

    def run(self) -> tuple[State, Tensor, Trace | None, list[Tensor]]:
        problem, state, most = self.problem, self.state, self.problem.rule.max_steps
        context = [c.clone() if c.is_inference() else c for c in problem.context]
        point: Tensor | None = plain(problem.y0)
        block: _Block | None = None
        leaves: list[Tensor] = []
        live = False
        for step in range(most + 1):
            assert point is not None
            row = self._rows(point)
            assert problem.seen is not None
            problem.seen.before(step, point.shape[0])
            value = problem.evaluate(point.requires_grad_(), context)
            if step == 0:
                problem.check_rows(value, point)
                leaves = problem.seen.first(value, [point, *context])
                given = [*context, problem.step_size, problem.sigma, *leaves]
                live = any(isinstance(t, Tensor) and t.requires_grad for t in given)
                if live:  # torch itself goes through these slopes in the backward pass
                    check_not_compiled(value, [*context, *leaves])
            slope = None
            if step < most or problem.rule.on_gradient:
                slope = problem.slope(value, point, torch.ones_like(value), create_graph=live and step < most)
            accepted = torch.empty_like(value, dtype=torch.uint8, requires_grad=False)
            following = state.advance(point, value, slope, accepted, step)
            point = point.detach()
            current = start = point
            if block is not None:
                current, start = self._arrive(block, point, accepted)
                self.tape.ends.append((current, row))
            if following is None or slope is None:
                self.exits.append((row, current))
                break
            if block is not None and not state.took_all(point.shape[0]):
                slope = torch.where(_over(accepted.bool(), slope), slope, block.slope)
            if state.index is not None:
                self._leave(row, current, state.index)
                context = [c.index_select(0, state.index) for c in context]
                current, start, slope = (t.index_select(0, state.index) for t in (current, start, slope))
            if state.broken() and live:
                slope = self._slope(start, context)
            block = self._try(context, start, current, slope, step + 1)
            point = following
        return state, self._gather(), self._trace(), leaves

    def _rows(self, point: Tensor) -> Tensor:
        row = self.state.rows()
        return torch.arange(point.shape[0], device=point.device) if row is None else row

    def _slope(self, start: Tensor, context: list[Tensor]) -> Tensor:
        here = start.detach().requires_grad_()
        value = self.problem.evaluate(here, context)
        return self.problem.slope(value, here, torch.ones_like(value), create_graph=True)

    def _try(self, context: list[Tensor], start: Tensor, current: Tensor, slope: Tensor, step: int) -> _Block:
        """The block as it sets out on `step`."""
        problem, rule, state, row = self.problem, self.problem.rule, self.state, self._rows(start)
        wide = compute_dtype(start.dtype)
        size = problem.step_size
        size = (
            size.to(start.device, wide)
            if isinstance(size, Tensor)
            else torch.tensor(size, dtype=wide, device=start.device)
        )
        size = size.index_select(0, row) if size.dim() else size
        if state.scale is not None:
            size = size * state.scale.index_select(0, row)
        noise = None
        if rule.noisy:
            ids = problem.sample_ids
            sigma = (
                problem.sigma.to(start.device, wide) if isinstance(problem.sigma, Tensor) else problem.sigma
            )
            noise = sigma * descent.normals(
                rule, row if ids is None else ids.index_select(0, row), step, start
            )
        moving = None if state.velocity is None else state.velocity.index_select(0, row)
        after = descent.clipped(slope.detach(), rule) if moving is None else moving
        return _Block(context, start, current, slope, after, size, noise)

    def _arrive(self, block: _Block, point: Tensor, accepted: Tensor) -> tuple[Tensor, Tensor]:
        """Where the rows are after the step, with and without gradient."""
        index = None if self.state.took_all(point.shape[0]) else accepted.nonzero()[:, 0]
        some = block if index is None else block.select(index)
        if self.state.broken() and some.slope.requires_grad:
            some.slope = self._slope(some.start, some.context)
        taken = point if index is None else point.index_select(0, index)
        end, _ = descent.attach(
            taken, some.after, self.problem.rule, some.start, some.slope, some.step_size, None, some.noise
        )
        if index is None:
            return end, point
        return block.current.index_copy(0, index, end), block.start.index_copy(0, index, taken)

    def _leave(self, row: Tensor, current: Tensor, index: Tensor) -> None:
        gone = torch.ones_like(row, dtype=torch.bool).index_fill_(0, index, False).nonzero()[:, 0]
        self.exits.append((row.index_select(0, gone), current.index_select(0, gone)))

    def _gather(self) -> Tensor:
        rows = torch.cat([row for row, _ in self.exits])
        order = torch.empty_like(rows)
        order[rows] = torch.arange(rows.shape[0], device=rows.device)
        return torch.cat([end for _, end in self.exits]).index_select(0, order)

    def _trace(self) -> Trace | None:
        if not self.problem.keep_trace:
            return None
        self.tape.steps = self.state.steps
        return self.tape.trace(self.state.y)


def _over(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(-1, *(1 for _ in like.shape[1:]))
