"""The contenders of the benchmark, as functions without arguments that are ready to be timed.

===========  =====================================================================================
``route``    ``ac.route``
``masking``  the branch on all rows, then ``torch.where``
``boolean``  ``out[mask] = branch(x[mask])`` on a copy of the other rows
``indexed``  ``index_select``, the branch, ``index_copy``, with the index from one ``nonzero``
``limit``    the branch alone on the routed rows, taken out beforehand: no bookkeeping, no result
===========  =====================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import adaptcomp_ext as ac

from .problem import Problem

__all__ = ["LABELS", "contenders", "limit", "training_call"]

LABELS = {"route": "route", "masking": "masking", "boolean": "boolean indexing", "indexed": "index_select"}


def contenders(problem: Problem) -> dict[str, Callable[[], Tensor]]:
    """Return the forward pass of each."""
    branch, mask, x, otherwise = problem.branch, problem.mask, problem.x, problem.otherwise

    def route() -> Tensor:
        return ac.route(mask, branch, x, otherwise=otherwise)

    def masking() -> Tensor:
        return torch.where(mask[:, None], branch(x), otherwise)

    def boolean() -> Tensor:
        out = otherwise.clone()
        out[mask] = branch(x[mask])
        return out

    def indexed() -> Tensor:
        index = mask.nonzero()[:, 0]
        return otherwise.index_copy(0, index, branch(x.index_select(0, index)))

    return {"route": route, "masking": masking, "boolean": boolean, "indexed": indexed}


def _backward(
    forward: Callable[[], Tensor], leaves: Sequence[Tensor], upstream: Tensor
) -> Callable[[], tuple[Tensor | None, ...]]:
    def call() -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(forward(), leaves, upstream, allow_unused=True)

    return call


def training_call(problem: Problem, forward: Callable[[], Tensor]) -> Callable[[], tuple[Tensor | None, ...]]:
    """Return forward and backward pass together; None is the gradient of what the result does not depend on."""
    return _backward(forward, problem.leaves, problem.upstream)


def limit(problem: Problem) -> Callable[[], object]:
    """Return the branch alone on the routed rows."""
    rows = problem.x.detach()[problem.mask].requires_grad_(problem.x.requires_grad)

    def forward() -> Tensor:
        return problem.branch(rows)

    if problem.config.mode == "infer":
        return forward
    return _backward(forward, [*problem.branch.parameters(), rows], problem.upstream[problem.mask])
