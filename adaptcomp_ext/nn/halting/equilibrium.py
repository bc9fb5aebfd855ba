"""The gradient of fixed points without the graph of the iterations that found them.

A run without a graph has found z* with z* = f(z*, x; θ) for each row. By the implicit function theorem the
gradient of a loss ℓ(z*) in x and θ is that of ⟨g, f(z*, x; θ)⟩ with z* constant, where g solves
g = Jᵀg + ∂ℓ/∂z* and J = ∂f/∂z. So the result gets the graph of one application of the step at z*. The
gradient v that arrives there is multiplied before it goes on: for ``"implicit"`` by (I − Jᵀ)⁻¹, as the series
g = Σₖ (Jᵀ)ᵏv of `adaptcomp_ext.nn.halting.series`, for ``"one_step"`` by nothing. Inputs and parameters get
their gradients by ordinary autograd.

The series of the rows end one by one, and the step is applied again to those that are left, so that the graph
has their size. In the backward pass it finds what it read at the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adaptcomp_ext.nn._modes import autocast_of, recording, without_autocast
from adaptcomp_ext.nn._snapshot import Snapshot
from adaptcomp_ext.nn._tree import flatten
from adaptcomp_ext.nn.halting.block import Problem
from adaptcomp_ext.nn.halting.calling import call_at, form_of
from adaptcomp_ext.nn.halting.first_step import search
from adaptcomp_ext.nn.halting.policies.convergence import Convergence
from adaptcomp_ext.nn.halting.series import Series
from adaptcomp_ext.nn.result import HaltResult, Status
from adaptcomp_ext.ops._backend import capturing, on_cuda
from adaptcomp_ext.ops._library import Function
from adaptcomp_ext.ops._plain import dressed, kinds_of, plain
from adaptcomp_ext.ops._transforms import check_gradients, enter


def is_wanted(policy: Any) -> bool:
    """Whether the result gets its gradient here."""
    return isinstance(policy, Convergence) and policy.gradient != "unrolled" and torch.is_grad_enabled()


def check(problem: Problem, halt: Any) -> None:
    """Raise, before the first step, unless the step is one function, whose fixed points are found."""
    gradient = problem.policy.gradient
    for role, function in (("step", halt.step), ("readout", halt.readout)):
        if isinstance(function, nn.ModuleList):
            raise ValueError(
                f'{role}: expected one function for all steps, for gradient="{gradient}", because layers of '
                "their own have no fixed point; got a ModuleList"
            )
        if function is not None and form_of(function).place is not None:
            raise ValueError(
                f'{role}: expected a function of the state alone and the inputs, for gradient="{gradient}", '
                "because one that changes with the step has no fixed point; got one with a parameter n"
            )
    if problem.keep_trace:
        raise ValueError(
            f'keep_trace: expected False for gradient="{gradient}", which keeps no graph of the steps, '
            "got True"
        )
    if on_cuda(problem.run.device) and capturing():
        raise RuntimeError(
            f'AdaptiveHalt with gradient="{gradient}" cannot be captured in a CUDA graph, because the host '
            "decides when a row has converged: capture it under torch.no_grad(), or the rest of the model"
        )


def run(halt: Any, problem: Problem, find: Callable[[], HaltResult]) -> HaltResult:
    """Return the fixed points that `find` returns without a graph, as functions of inputs and parameters.

    Parameters
    ----------
    halt : AdaptiveHalt
    problem : Problem
        The call, checked.
    find : callable
        Runs every row until it has ended.
    """
    check(problem, halt)
    called = f'AdaptiveHalt with gradient="{problem.policy.gradient}"'
    problem.watch = enter(called, (problem.state, problem.inputs), reference=())
    with torch.no_grad():
        found = find()
    points = _Points(halt, problem, found)
    after = points.apply_with_graph()
    values = points.attach(after)
    problem.kinds = points.kinds
    state = problem.tree(values)
    readout = halt.readout
    if readout is None:
        output = dressed(values[0], type(found.output))
    else:
        output = _read(readout, points, values, found.output)
    return found._replace(output=output, state=state)


def _read(readout: Any, points: _Points, values: list[Tensor], value: Tensor) -> Tensor:
    """Return the output with its graph: readouts of the rows that are finite."""
    problem = points.problem
    problem.kinds = points.kinds
    state = problem.tree([points.select(t) for t in values])
    read = call_at("readout", readout, state, problem.arguments(points.inputs), 0)
    if problem.watch is not None:
        problem.watch("readout", read)
    read = plain("readout", read)
    if problem.holder is not None:
        search(problem.holder, problem, [], read, ())
    kind = type(value)
    value = plain("readout", value)
    if not read.requires_grad:
        return dressed(value, kind)
    (output,) = _Attached.apply(None, points.row, [value], 1, read)
    return dressed(output, kind)


class _Points:
    """The fixed points of a run, and the step that has led to them.

    Of the rows that ended ``NONFINITE`` there is nothing here: they have no gradient.
    """

    def __init__(self, halt: Any, problem: Problem, found: HaltResult) -> None:
        policy: Any = problem.policy
        self.problem = problem
        self.implicit = policy.gradient == "implicit"
        self.tol: float = policy.tol
        leaves, _ = flatten(found.state)
        self.kinds = kinds_of(leaves)
        self.values = [plain("state", t) for t in leaves]
        broken = found.status == Status.NONFINITE
        self.row = (~broken).nonzero()[:, 0] if bool(broken.any()) else None
        self.inputs = [self.select(t) for t in problem.inputs]
        self.points = [self.select(t).detach() for t in self.values]
        self.moving = [i for i, t in enumerate(self.points) if t.is_floating_point()]
        """The leaves that the iteration has moved; the others are constants of it."""
        self.constant: dict[int, Tensor] = {}
        """Leaves that the step hands on as they are: inputs that travel in the state."""
        self._step = halt.step
        self._holder = problem.holder
        self._autocast = autocast_of(problem.run.device)
        dtypes = [dtype for _, dtype, enabled in self._autocast if enabled]
        dtypes += [self.points[i].dtype for i in self.moving]
        self._rounding = max([torch.finfo(dtype).eps for dtype in dtypes], default=0.0) ** 0.5
        self.max_steps = problem.run.max_steps
        self.fixed_size = problem.compact is False
        self.after: list[Tensor] = []
        self.snapshot: Snapshot | None = None

    def select(self, tensor: Tensor) -> Tensor:
        """Return the rows that are finite."""
        return tensor if self.row is None else tensor.index_select(0, self.row)

    def _apply(self, given: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
        """Apply the step to copies of the points, to which it may write."""
        problem = self.problem
        problem.kinds = self.kinds
        after = self._step(problem.tree(given), *problem.arguments(inputs))
        return problem.leaves(after, given[0].shape[0])

    def apply_with_graph(self) -> list[Tensor]:
        """Apply the step once, with a graph that reaches inputs, parameters and, if implicit, the points."""
        problem = self.problem
        if self.implicit:
            self.snapshot = Snapshot(self._step, problem.run.device, name="step")
        points = list(self.points)
        for i in self.moving if self.implicit else ():
            points[i] = points[i].requires_grad_()
        given = [t.clone() for t in points]
        after = self._apply(given, self.inputs)
        handed_on = [i for i in self.moving if after[i] is given[i] and not given[i]._version]
        if handed_on:
            self.moving = [i for i in self.moving if i not in handed_on]
            for i in handed_on:
                self.constant[i] = self.select(problem.state[i])
                given[i] = self.constant[i]
            after = self._apply(
                [given[i] if i in handed_on else t.clone() for i, t in enumerate(points)], self.inputs
            )
        if problem.watch is not None:
            problem.watch("step", after)
        if self._holder is not None:
            search(self._holder, problem, after, None, ())
        self.after = [t.detach() for t in after]
        snapshot = self.snapshot
        if snapshot is not None:
            for i in self.moving:
                # The last product of a backward pass ends here, in a gradient that nobody reads.
                points[i].register_post_accumulate_grad_hook(_drop)
            snapshot.find_sources(
                [after[i] for i in self.moving], [*points, *self.inputs, *self.constant.values()]
            )
            if snapshot.random:
                raise RuntimeError(
                    'step: expected the same result at every call, for gradient="implicit", got a step that '
                    "draws random numbers (dropout, for instance). Switch it to eval(), or give it the mask "
                    "as an input"
                )
        return after

    def attach(self, after: list[Tensor]) -> list[Tensor]:
        """Return the leaves of all rows as functions of what `after` is a function of."""
        problem, values = self.problem, list(self.values)
        starts = [t for i, t in enumerate(problem.state) if t.requires_grad and i in self.moving]
        known = [*self.inputs, *self.constant.values()]
        if self.snapshot is not None:
            known += self.snapshot.sources
        else:
            known += [after[i] for i in self.moving]
        if self.moving and any(t.requires_grad for t in (*known, *starts)):
            inner = [after[i] for i in self.moving]
            solver = Series(self) if self.implicit else None
            outer = _Attached.apply(
                solver, self.row, [values[i] for i in self.moving], len(inner), *inner, *starts
            )
            for i, t in zip(self.moving, outer, strict=True):
                values[i] = t
        for i, t in self.constant.items():
            if t.requires_grad:
                (values[i],) = _Attached.apply(None, self.row, [values[i]], 1, t)
        return values

    def apply_again(self, rows: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Apply the step to some of the points; return points and results that move, with their graph."""
        snapshot = self.snapshot
        assert snapshot is not None
        points = [t.detach().index_select(0, rows) for t in self.points]
        for i, t in self.constant.items():
            points[i] = t.detach().index_select(0, rows)
        inputs = [t.detach().index_select(0, rows) for t in self.inputs]
        with snapshot.restored(snapshot.sources, 0 if snapshot.marks else None), recording(self._autocast):
            for i in self.moving:
                points[i].requires_grad_()
            after = self._apply([t.clone() for t in points], inputs)
        for i in self.moving:
            then = self.after[i].index_select(0, rows)
            largest = then.abs().amax() if then.numel() else 0.0
            if not bool(((after[i].detach() - then).abs() <= self._rounding * largest).all()):
                raise snapshot.other_values("states")
        return [points[i] for i in self.moving], [after[i] for i in self.moving]


def _drop(point: Tensor) -> None:
    point.grad = None


class _Attached(Function):
    """The node of values that were found without a graph; `inner` are functions with the gradient to take.

    With a `solver`, the gradient is that of the fixed point: see the head of this module. `starts`, the
    tensors of the initial state, have a gradient of zero.
    """

    @staticmethod
    def forward(
        ctx: Any,
        solver: Series | None,
        row: Tensor | None,
        values: list[Tensor],
        count: int,
        *tensors: Tensor,
    ) -> Any:
        ctx.solver, ctx.row = solver, row
        ctx.starts = [(t.shape, t.dtype, t.device) for t in tensors[count:]]
        ctx.save_for_backward(*(tensors[:count] if solver is not None else ()))
        ctx.set_materialize_grads(False)
        # Copies, because the graph has kept the values, and the caller may write to its results.
        return tuple(t.clone() for t in values)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        check_gradients("AdaptiveHalt", upstream)
        row = ctx.row
        inner = [g if g is None or row is None else g.index_select(0, row) for g in upstream]
        if ctx.solver is not None:
            after = ctx.saved_tensors
            with torch.no_grad(), without_autocast():
                solved = ctx.solver.solve(after, inner)
            if torch.is_grad_enabled():
                present = [t for t in (*after, *inner) if t is not None]
                solved = _Once.apply(len(solved), *solved, *present)
            inner = list(solved)
        starts = [
            torch.zeros(shape, dtype=dtype, device=device) if need else None
            for (shape, dtype, device), need in zip(
                ctx.starts, ctx.needs_input_grad[4 + len(inner) :], strict=True
            )
        ]
        return (None, None, None, None, *inner, *starts)


class _Once(Function):
    """The node of a solution; it has no derivative."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Any:
        return tuple(t.detach() for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError(
            'gradient: "implicit" can be differentiated once; use "unrolled" for second derivatives'
        )
