"""Merging the rows of a branch with the rows that did not take it, and the adjoint."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def merge_rows(rows: Sequence[Tensor], otherwise: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """Return `otherwise` with row j of `rows` in place of row index[j]; a negative index leaves it out."""
    kept = index >= 0
    return [o.contiguous().index_copy(0, index[kept], r[kept]) for r, o in zip(rows, otherwise, strict=True)]


def split_rows(grads: Sequence[Tensor], index: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the adjoint: ``g[index]``, 0 where the index is negative; and `g` with 0 in rows `index`."""
    kept = index >= 0
    rows = [g.new_zeros((index.shape[0], *g.shape[1:])) for g in grads]
    return (
        [r.index_copy(0, kept.nonzero()[:, 0], g[index[kept]]) for r, g in zip(rows, grads, strict=True)],
        [g.contiguous().index_fill(0, index[kept], 0) for g in grads],
    )
