"""Whether a backward pass of a descent evaluates the energy that the call has descended."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adaptcomp_ext.nn.descent import adjoint
from adaptcomp_ext.nn.descent.problem import Problem
from adaptcomp_ext.ops._backend import on_cuda


class Check:
    """Whether the evaluations of a backward pass are those of the call: by their energies and the sources of their graph.

    Bitwise equality is not asked for: rows that are evaluated in other company may be rounded otherwise.
    `typical`: energies whose size rounding errors are compared with.
    """

    def __init__(self, problem: Problem, typical: Tensor | None) -> None:
        self._problem = problem
        self._typical = typical
        self._size: Tensor | None = None
        self._rounding = (0.0, 0.0)  # of a whole block, and of a part of one
        self._other: list[Tensor] = []
        self._sources_checked = False

    def evaluation(
        self,
        value: Tensor,
        but: Sequence[Tensor],
        sources: adjoint.Inputs,
        then: Tensor | None,
        partial: bool,
    ) -> None:
        """One evaluation, and its energies then. `partial`: more rows were evaluated then."""
        seen = self._problem.seen
        assert seen is not None
        if not self._sources_checked:
            seen.check_sources(value, but, sources, partial)
            self._sources_checked = True
        if then is None or then.shape[0] == 0 or self._typical is None:
            return
        if value.dtype == then.dtype and not on_cuda(value.device) and torch.equal(value, then):
            return  # the usual case, in one operation instead of ten
        with torch.no_grad():
            if self._size is None:
                rounding = math.sqrt(max(torch.finfo(d).eps for d in (value.dtype, *self._autocast())))
                self._size = (
                    self._typical.to(then.dtype).abs().nan_to_num(0.0, 0.0).amax().clamp(min=rounding)
                )
                self._rounding = rounding, max(rounding, 0.05)
            allowed = self._rounding[partial] * torch.maximum(self._size, then.abs().amax())
            self._other.append(~((value.to(then.dtype) - then).abs().amax() <= allowed))

    def _autocast(self) -> list[torch.dtype]:
        return [dtype for _, dtype, enabled in self._problem.autocast or [] if enabled]

    def done(self) -> None:
        """Raise where one was another. On CUDA the host waits here."""
        if self._other and bool(torch.stack(self._other).any()):
            assert self._problem.seen is not None
            raise self._problem.seen.other_values()


def copied(problem: Problem) -> int:
    """How many of the energy's sources, the first ones, an evaluation is given copies of."""
    assert problem.seen is not None
    return problem.seen.placed if problem.seen.apart() else 0


def apart(problem: Problem, sources: adjoint.Inputs, needed: Sequence[bool]) -> list[Tensor | None]:
    """The sources as an evaluation is given them."""
    return adjoint.copies(sources, copied(problem), needed)
