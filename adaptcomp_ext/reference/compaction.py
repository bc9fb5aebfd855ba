"""Compaction and its adjoint."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adaptcomp_ext.reference._broadcast import over


def compact_index(keep: Tensor) -> Tensor:
    """Return the indices of the true entries, ascending."""
    return keep.nonzero()[:, 0]


def compact_index_padded(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices of the true entries, padded with -1 to the length of `keep`, and their number."""
    index = compact_index(keep)
    return torch.nn.functional.pad(index, (0, keep.shape[0] - index.shape[0]), value=-1), keep.sum()


def gather_rows(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """Return ``t[index]`` of each tensor, with a row of zeros where the index is negative."""
    out = []
    for t in tensors:
        rows = t[index.clamp(min=0)] if t.shape[0] else t.new_zeros((index.shape[0], *t.shape[1:]))
        out.append(torch.where(over(index < 0, t), torch.zeros_like(rows), rows))
    return out


def scatter_rows(tensors: Sequence[Tensor], index: Tensor, size: int) -> list[Tensor]:
    """Return `size` rows of zeros for each tensor `t`, with row j of `t` at index[j]."""
    kept = index >= 0
    return [t.new_zeros((size, *t.shape[1:])).index_copy(0, index[kept], t[kept]) for t in tensors]
