"""The gradient of a minimum as a function of context and parameters: ``gradient="implicit"``.

Where ∇E(y*; θ) = 0 and v = ∂ℓ/∂y*: H w = v, θ̄ = −(∂²E/∂θ∂y) w. The Hessian H is never formed: conjugate
gradients need products with it, which are second derivatives of one evaluation. Each row solves its own
system and leaves when it is done. An element at a bound of the clamp does not move with θ and takes no part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adaptcomp_ext.nn.descent import adjoint
from adaptcomp_ext.nn.descent.check import Check
from adaptcomp_ext.nn.descent.problem import Ended, Problem
from adaptcomp_ext.nn.result import Status
from adaptcomp_ext.ops._backend import compute_dtype
from adaptcomp_ext.reference._broadcast import over

MAX_ITERATIONS = 500  # without rounding, as many iterations as a row has elements are enough


class Implicit:
    """The derivatives of y, a minimum, in the context and the sources of the energy."""

    def __init__(self, problem: Problem, ended: Ended) -> None:
        assert problem.snapshot is not None
        self.problem = problem
        self._snapshot = problem.snapshot
        self._given = len(problem.context)
        self._y = ended.y.clone()
        self._status = ended.status
        self._energy = ended.energy.detach().clone()

    @property
    def own(self) -> int:
        """Return the number of inputs of which the functions take copies."""
        return self._given + self._snapshot.copied()

    def function(self, inputs: adjoint.Inputs) -> list[Tensor]:
        """Raise: no graph follows the solution of the system."""
        raise NotImplementedError(
            'gradient: "implicit" can be differentiated once; use "unrolled" for second derivatives'
        )

    def gradients(
        self, inputs: adjoint.Inputs, upstream: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Solve for w, and differentiate ⟨∇E, −w⟩."""
        snapshot = self._snapshot
        if snapshot.random:
            raise RuntimeError(
                'energy: expected the same values at every evaluation, for gradient="implicit", got an '
                "energy that draws random numbers (dropout, for instance). Switch it to eval()"
            )
        inputs = adjoint.copies(inputs, self.own, needed)
        last = len(snapshot.marks) - 1 if snapshot.marks else None
        with snapshot.restored(inputs[self._given :], last):
            return self._gradients(inputs, upstream[0], needed)

    def _gradients(
        self, inputs: adjoint.Inputs, g_y: Tensor | None, needed: Sequence[bool]
    ) -> list[Tensor | None]:
        context = [c for c in inputs[: self._given] if c is not None]
        targets = [t for t, need in zip(inputs, needed, strict=True) if need and t is not None]
        rows = (self._status != Status.NONFINITE).nonzero()[:, 0]
        if g_y is None or rows.shape[0] == 0:
            return [None] * len(inputs)
        y, rule = self._y[rows], self.problem.rule
        free = (y > rule.low) & (y < rule.high)
        with torch.enable_grad():
            here = y.requires_grad_()
            there = [c[rows] for c in context]
            value, slope = self.problem.evaluate_again(here, there)
        check = Check(self._snapshot, self._energy, self.problem.autocast_dtypes())
        check.evaluation(value, [here, *there], inputs[self._given :], self._energy[rows], partial=True)
        check.done()
        if slope.grad_fn is None:
            return [None] * len(inputs)
        with torch.no_grad():
            v = torch.where(free, g_y[rows].to(compute_dtype(y.dtype)), 0.0)
            w = _solve(self.problem, slope, here, [c[rows].detach() for c in context], v, free)
        gradients = iter(
            torch.autograd.grad(slope, targets, -w.to(slope.dtype), retain_graph=True, allow_unused=True)
        )
        return [next(gradients) if need else None for need in needed]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).unsqueeze(-1).flatten(1).sum(dim=1)


def _solve(
    problem: Problem, slope: Tensor, here: Tensor, context: list[Tensor], v: Tensor, free: Tensor
) -> Tensor:
    """Solve H w = v in the free elements, row by row, and return w.

    A row is done when its residual is small beside v. It is also done where it meets a direction without
    positive curvature, in which it has no minimum; it keeps the w that it has, zero at the first direction.
    """
    eps = torch.finfo(v.dtype).eps
    w = torch.zeros_like(v)
    at = torch.arange(v.shape[0], device=v.device)  # places in v of the rows at work; `place`: in the graph
    place = at
    r, p = v, v
    rho = _dot(r, r)
    enough = rho * eps**1.5
    going = rho > 0
    for _ in range(min(2 * math.prod(v.shape[1:]), MAX_ITERATIONS) + 1):
        if not bool(going.all()):
            index = going.nonzero()[:, 0]
            at, place, r, p, rho, enough = (t.index_select(0, index) for t in (at, place, r, p, rho, enough))
            if at.shape[0] == 0:
                break
            if 2 * at.shape[0] <= here.shape[0]:
                # From here on the rows that are done cost more than a new graph.
                here = here.detach().index_select(0, place).requires_grad_()
                context = [c.index_select(0, place) for c in context]
                _, slope = problem.evaluate_again(here, context)
                place = torch.arange(at.shape[0], device=v.device)
        direction = torch.zeros_like(slope).index_copy_(0, place, p.to(slope.dtype))
        (product,) = torch.autograd.grad(slope, here, direction, retain_graph=True, allow_unused=True)
        if product is None:
            break
        q = torch.where(free.index_select(0, at), product.index_select(0, place).to(v.dtype), 0.0)
        curvature = _dot(p, q)
        going = curvature > eps * (_dot(p, p) * _dot(q, q)).sqrt()
        length = over(torch.where(going, rho / torch.where(going, curvature, 1.0), 0.0), p)
        w.index_add_(0, at, length * p)
        r = r - length * q
        before, rho = rho, _dot(r, r)
        going = going & (rho > enough)
        p = r + over(rho / torch.where(before > 0, before, 1.0), p) * p
    return w
