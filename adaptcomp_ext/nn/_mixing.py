"""The test whether a row's result depends on other rows, by the gradient of one row's result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SEED = 0x5EED


def mixed_row(
    results: Sequence[Tensor], given: Sequence[Tensor], along: Sequence[int] | None = None
) -> int | None:
    """Return a row of `results` whose gradient reaches another row of `given`; None if none was found.

    The row in the middle is tested, because a running sum over the rows reaches from there to both ends; of
    two rows, both are. Its cotangent is random, so that no terms cancel. The graph is kept.

    Parameters
    ----------
    results : sequence of Tensor
        Floating-point tensors with a graph, n rows each.
    given : sequence of Tensor
        Tensors of this graph, n rows each in the first dimension.
    along : sequence of int, optional
        The dimension of the rows in each of `results`. Default: the first.
    """
    along = [0] * len(results) if along is None else along
    if not results or not given:
        return None
    rows = results[0].shape[along[0]]
    for row in (0, 1) if rows == 2 else (rows // 2,) if rows > 2 else ():
        cotangents = [_cotangent(t, dim, row) for t, dim in zip(results, along, strict=True)]
        gradients = torch.autograd.grad(results, given, cotangents, retain_graph=True, allow_unused=True)
        for gradient in gradients:
            # NaN in another row says nothing: it is zero times the infinity of that row's own derivative.
            if gradient is not None and any(
                bool(((part != 0) & part.isfinite()).any()) for part in (gradient[:row], gradient[row + 1 :])
            ):
                return row
    return None


def _cotangent(result: Tensor, dim: int, row: int) -> Tensor:
    cotangent = torch.zeros_like(result)
    # A generator of its own: the caller's random numbers stay as they are.
    random = torch.Generator().manual_seed(_SEED)
    part = cotangent.select(dim, row)
    part.copy_(torch.randn(part.shape, generator=random, device="cpu"))
    return cotangent
