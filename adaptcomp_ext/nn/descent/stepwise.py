"""Descent with ``gradient="stepwise"``: a point carries the gradient of its own step only.

The kernel judges and makes the points as in every mode, and its values are the results. The graph is built
beside it: the slope of the energy at each point has its own graph, and the points that rows have reached get
the gradient of the step that led there, once that step is known to be accepted. A row that is not finite
takes no part in the graph, so that it cannot make a gradient NaN: where such a row turns up, the slopes of
its block are computed again without it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaptcomp_ext.nn.descent.compiled import check_not_compiled
from adaptcomp_ext.nn.descent.loop import State, plain
from adaptcomp_ext.nn.descent.problem import Problem
from adaptcomp_ext.nn.result import Trace
from adaptcomp_ext.ops import descent
from adaptcomp_ext.ops._backend import compute_dtype
from adaptcomp_ext.reference._broadcast import over


@dataclass(slots=True)
class _Block:
    """The rows that are still running. All tensors but `start` and `after` have a graph."""

    context: list[Tensor]
    start: Tensor
    """The points of the rows."""
    current: Tensor
    """The same points with the gradient of the last accepted step."""
    slope: Tensor
    """The gradient of the energy there."""
    after: Tensor
    """The velocity of the proposed step."""
    step_size: Tensor
    """The step size of the proposed step, without dimensions or [n]."""
    noise: Tensor | None

    def select(self, index: Tensor) -> _Block:
        def rows(t: Tensor) -> Tensor:
            return t.index_select(0, index)

        return _Block(
            context=[rows(c) for c in self.context],
            start=rows(self.start),
            current=rows(self.current),
            slope=rows(self.slope),
            after=rows(self.after),
            step_size=rows(self.step_size) if self.step_size.dim() else self.step_size,
            noise=None if self.noise is None else rows(self.noise),
        )


def run_stepwise(problem: Problem) -> tuple[State, Tensor, Trace | None, list[Tensor]]:
    """Run the descent. Returns the last state, y and the trace with gradients, and the energy's sources."""
    with problem.evaluating():
        return _Stepwise(problem).run()


class _Stepwise:
    def __init__(self, problem: Problem) -> None:
        assert problem.snapshot is not None
        self.problem = problem
        self.snapshot = problem.snapshot
        self.state = State(problem, exact=True)
        self.state.context = []  # the block keeps the context with its graph
        self.tape = self.state.tape(points=False, trace=True)
        self.exits: list[tuple[Tensor, Tensor]] = []

    def run(self) -> tuple[State, Tensor, Trace | None, list[Tensor]]:
        problem, state, most = self.problem, self.state, self.problem.rule.max_steps
        context = [c.clone() if c.is_inference() else c for c in problem.context]
        point = plain(problem.y0)
        block: _Block | None = None
        sources: list[Tensor] = []
        live = False
        for step in range(most + 1):
            row = self._rows(point)
            if self.snapshot.changing:
                self.snapshot.mark()
            value = problem.evaluate(point.requires_grad_(), context)
            if step == 0:
                problem.check_first(value, point, context)
                sources = self.snapshot.find_sources([value], [point, *context])
                given = [*context, problem.step_size, problem.sigma, *sources]
                live = any(isinstance(t, Tensor) and t.requires_grad for t in given)
                if live:  # torch itself differentiates these slopes in the backward pass
                    check_not_compiled(value, [*context, *sources])
            slope = None
            if step < most or problem.rule.on_gradient:
                slope = problem.slope(value, point, torch.ones_like(value), create_graph=live and step < most)
            accepted = torch.empty_like(value, dtype=torch.uint8, requires_grad=False)
            following = state.advance(point, value, slope, accepted, step)
            point = point.detach()
            current = start = point
            if block is not None:
                current, start = self._arrive(block, point, accepted)
                self.tape.add(None, current, row, None)
            if following is None or slope is None:
                self.exits.append((row, current))
                break
            if block is not None and not state.took_all(point.shape[0]):
                slope = torch.where(over(accepted.bool(), slope), slope, block.slope)
            if state.index is not None:
                self._leave(row, current, state.index)
                context = [c.index_select(0, state.index) for c in context]
                current, start, slope = (t.index_select(0, state.index) for t in (current, start, slope))
            if state.broken() and live:
                slope = self._slope(start, context)
            block = self._try(context, start, current, slope, step + 1)
            point = following
        trace = self.tape.make_trace(state.y) if problem.keep_trace else None
        return state, self._gather(), trace, sources

    def _rows(self, point: Tensor) -> Tensor:
        row = self.state.rows()
        return torch.arange(point.shape[0], device=point.device) if row is None else row

    def _slope(self, start: Tensor, context: list[Tensor]) -> Tensor:
        here = start.detach().requires_grad_()
        value = self.problem.evaluate(here, context)
        return self.problem.slope(value, here, torch.ones_like(value), create_graph=True)

    def _try(self, context: list[Tensor], start: Tensor, current: Tensor, slope: Tensor, step: int) -> _Block:
        """Make the block as it proposes `step`."""
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
        """Return the points of the rows after the step, with and without gradient."""
        index = None if self.state.took_all(point.shape[0]) else accepted.nonzero()[:, 0]
        movers = block if index is None else block.select(index)
        if self.state.broken() and movers.slope.requires_grad:
            movers.slope = self._slope(movers.start, movers.context)
        taken = point if index is None else point.index_select(0, index)
        end, _ = descent.attach(
            *(taken, movers.after, self.problem.rule, movers.start, movers.slope, movers.step_size),
            *(None, movers.noise),
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
