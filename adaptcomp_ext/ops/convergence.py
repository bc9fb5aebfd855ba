"""The test of a block of readouts against those of the step before."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptcomp_ext import _C, reference
from adaptcomp_ext.ops._backend import dtype_code, on_reference, place
from adaptcomp_ext.ops._library import register

# The codes of csrc/convergence/rows.h.
CRITERIA = {"relative": 0, "absolute": 1, "kl": 2}


def _kernel(now: Tensor, last: Tensor, still: Tensor, criterion: int, tolerance: float) -> Tensor:
    out = torch.empty_like(still)
    _C.convergence_step(
        [
            *(now.shape[0], now.shape[1], criterion, now, last, dtype_code(now.dtype), still, out),
            *place(now.device),
        ],
        tolerance,
    )
    return out


_convergence_step = register(
    "convergence_step(Tensor now, Tensor last, Tensor still, int criterion, float tolerance) -> Tensor",
    _kernel,
    lambda now, last, still, *rest: torch.empty_like(still),
    tensor_at=0,
)


def convergence_step_unchecked(
    now: Tensor, last: Tensor, still: Tensor, criterion: str, tolerance: float
) -> Tensor:
    """Run `reference.convergence_step` on the kernel: `now` and `last` are [n, K], `still` is int64 [n]."""
    if on_reference():
        return reference.convergence_step(now, last, still, criterion, tolerance)
    counted: Tensor = _convergence_step(now, last, still, CRITERIA[criterion], float(tolerance))
    return counted
