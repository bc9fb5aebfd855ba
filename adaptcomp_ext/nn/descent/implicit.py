"""The gradient of a minimum as a function of context and parameters: ``gradient="implicit"``.

Where ∇E(y*; θ) = 0 and v = ∂ℓ/∂y*: H w = v, θ̄ = −(∂²E/∂θ∂y) w. H is never formed: conjugate gradients need
products with it, which are second derivatives of one evaluation. Every row solves its own system, and leaves
when it is done. An element at a bound of the clamp does not move with θ, and takes no part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adaptcomp_ext.nn.descent import adjoint
from adaptcomp_ext.nn.descent.check import Check, copied
from adaptcomp_ext.nn.descent.problem import Ended, Problem
from adaptcomp_ext.nn.result import Status
from adaptcomp_ext.ops._backend import compute_dtype

MOST = 500  # iterations; without rounding, as many as a row has elements are enough


class Implicit:
    """Inputs: the context, and the sources of the energy. Output: y."""

    def __init__(self, problem: Problem, ended: Ended) -> None:
        self.problem = problem
        self._given = len(problem.context)
        self._y = ended.y.clone()
        self._status = ended.status
        self._energy = ended.energy.detach().clone()

    @property
    def own(self) -> int:
        """How many inputs the functions take copies of."""
        return self._given + copied(self.problem)

    def function(self, inputs: adjoint.Inputs) -> list[Tensor]:
        """Not available: the solution of the system is not followed by a graph."""
        raise NotImplementedError(
            'gradient: "implicit" can be differentiated once; use "unrolled" for second derivatives'
        )

    def gradients(
        self, inputs: adjoint.Inputs, upstream: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Solve for w, and differentiate ⟨∇E, −w⟩."""
        seen = self.problem.seen
        assert seen is not None
        if seen.random:
            raise RuntimeError(
                'energy: expected the same values at every evaluation, for gradient="implicit", got an energy that draws random '
                "numbers (dropout, for instance). Switch it to eval()"
            )
        inputs = adjoint.copies(inputs, self.own, needed)
        with self.problem.again(inputs[self._given :], len(seen.marks) - 1 if seen.marks else None):
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
            with self.problem.evaluating():
                there = [c[rows] for c in context]
                value = self.problem.evaluate(here, there)
                slope = self.problem.slope(value, here, torch.ones_like(value), create_graph=True)
        check = Check(self.problem, self._energy)
        check.evaluation(value, [here, *there], inputs[self._given :], self._energy[rows], partial=True)
        check.done()
        if slope.grad_fn is None:
            return [None] * len(inputs)
        with torch.no_grad():
            v = torch.where(free, g_y[rows].to(compute_dtype(y.dtype)), 0.0)
            w = _solve(self.problem, slope, here, [c[rows].detach() for c in context], v, free)
        found = iter(
            torch.autograd.grad(slope, targets, -w.to(slope.dtype), retain_graph=True, allow_unused=True)
        )
        return [next(found) if need else None for need in needed]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).unsqueeze(-1).flatten(1).sum(dim=1)


def _solve(
    problem: Problem, slope: Tensor, here: Tensor, context: list[Tensor], v: Tensor, free: Tensor
) -> Tensor:
    """H w = v in the free elements, row by row.

    A row is done when its residual is small beside v, and where it meets a direction without positive
    curvature, in which it has no minimum: it keeps what it has, which is nothing if that is the first.
    """
    eps = torch.finfo(v.dtype).eps
    w = torch.zeros_like(v)
    at = torch.arange(v.shape[0], device=v.device)  # of the rows at work, their places in v, and in the graph
    place = at
    r, p = v, v
    rho = _dot(r, r)
    enough = rho * eps**1.5
    going = rho > 0
    for _ in range(min(2 * math.prod(v.shape[1:]), MOST) + 1):
        if not bool(going.all()):
            index = going.nonzero()[:, 0]
            at, place, r, p, rho, enough = (t.index_select(0, index) for t in (at, place, r, p, rho, enough))
            if at.shape[0] == 0:
                break
            if (
                2 * at.shape[0] <= here.shape[0]
            ):  # from here on the rows that are done cost more than a new graph
                with problem.evaluating():
                    here = here.detach().index_select(0, place).requires_grad_()
                    context = [c.index_select(0, place) for c in context]
                    value = problem.evaluate(here, context)
                    slope = problem.slope(value, here, torch.ones_like(value), create_graph=True)
                place = torch.arange(at.shape[0], device=v.device)
        direction = torch.zeros_like(slope).index_copy_(0, place, p.to(slope.dtype))
        (product,) = torch.autograd.grad(slope, here, direction, retain_graph=True, allow_unused=True)
        if product is None:
            break
        q = torch.where(free.index_select(0, at), product.index_select(0, place).to(v.dtype), 0.0)
        curvature = _dot(p, q)
        going = curvature > eps * (_dot(p, p) * _dot(q, q)).sqrt()
        length = _over(torch.where(going, rho / torch.where(going, curvature, 1.0), 0.0), p)
        w.index_add_(0, at, length * p)
        r = r - length * q
        before, rho = rho, _dot(r, r)
        going = going & (rho > enough)
        p = r + _over(rho / torch.where(before > 0, before, 1.0), p) * p
    return w


def _over(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(-1, *(1 for _ in like.shape[1:]))
