"""Routing: the rows of a branch put in their places among the others, and its adjoint."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def merge_rows(rows: Sequence[Tensor], otherwise: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """`otherwise`, with row j of `rows` in place of row index[j]; rows whose index is negative are left out."""
    kept = index >= 0
    return [o.contiguous().index_copy(0, index[kept], r[kept]) for r, o in zip(rows, otherwise, strict=True)]


def split_rows(grads: Sequence[Tensor], index: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The adjoint: ``g[index]``, zero where the index is negative; and `g` with zeros in the rows that `index` names."""
    kept = index >= 0
    rows = [g.new_zeros((index.shape[0], *g.shape[1:])) for g in grads]
    return (
        [r.index_copy(0, kept.nonzero()[:, 0], g[index[kept]]) for r, g in zip(rows, grads, strict=True)],
        [g.contiguous().index_fill(0, index[kept], 0) for g in grads],
    )
