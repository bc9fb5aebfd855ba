"""A quadratic energy."""

from __future__ import annotations

from torch import Tensor

from adaptcomp_ext.reference._precision import wide


def quadratic_energy(y: Tensor, matrix: Tensor, linear: Tensor) -> Tensor:
    """Compute E(y) = y'Ay/2 − b'y of each row, [n], in float32 (float64 for float64).

    The shapes are y [n, dim], matrix A [dim, dim], linear b [dim] or [n, dim].
    """
    y, matrix, linear = wide(y), wide(matrix), wide(linear)
    return 0.5 * ((y @ matrix) * y).sum(dim=1) - (y * linear).sum(dim=1)
