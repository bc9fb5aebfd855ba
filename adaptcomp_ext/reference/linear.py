"""A linear layer."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from adaptcomp_ext.reference._precision import wide


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W' + b in the dtype of x: half precision is computed in float32 and rounded once."""
    return F.linear(wide(x), wide(weight), None if bias is None else wide(bias)).to(x.dtype)
