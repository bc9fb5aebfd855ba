"""Routing: rows that took a branch, merged with those that did not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_rows(rows: Sequence[Tensor], index: Tensor, otherwise: Sequence[Tensor]) -> list[Tensor]:
    """``otherwise``, with row j of ``rows`` at index[j]; negative entries of the index are left out."""
    kept = index >= 0
    return [base.index_copy(0, index[kept], some[kept]) for some, base in zip(rows, otherwise, strict=True)]


def split_rows(grads: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """The adjoint of `merge_rows`: the gradients of all ``rows``, then those of all ``otherwise``."""
    kept = index >= 0
    taken, rest = [], []
    for grad in grads:
        blank = (~kept).view(-1, *(1 for _ in grad.shape[1:]))
        some = grad[index.clamp(min=0)] if len(grad) else grad.new_zeros((len(index), *grad.shape[1:]))
        taken.append(torch.where(blank, torch.zeros_like(some), some))
        rest.append(grad.index_fill(0, index[kept], 0))
    return taken + rest
