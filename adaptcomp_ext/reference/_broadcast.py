"""One number for each row, in a shape that broadcasts over the row's elements."""

from __future__ import annotations

from torch import Tensor


def over(rows: Tensor, like: Tensor) -> Tensor:
    """Return a tensor [n] in a shape that broadcasts over the rows of `like`, [n, ...]."""
    return rows.view(-1, *(1 for _ in like.shape[1:]))
