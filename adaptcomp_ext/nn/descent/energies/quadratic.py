"""A quadratic energy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adaptcomp_ext.nn.descent.energies.closed_form import (
    ClosedFormEnergy,
    check_given,
    check_matrix,
    check_number_of_contexts,
    check_own,
    check_points,
    own_tensor,
)
from adaptcomp_ext.ops._checks import check_floating
from adaptcomp_ext.ops._fused_descent import ClosedForm
from adaptcomp_ext.ops.quadratic_energy import quadratic_closed_form


class QuadraticEnergy(ClosedFormEnergy):
    """E(y) = y'Ay/2 − b'y, whose minimum for a symmetric positive definite A solves Ay = b.

    Parameters
    ----------
    A : Tensor or Parameter
        [dim_y, dim_y]; float32, float64, bfloat16 or float16. Only its symmetric part counts. It is not
        checked to be positive definite: with a negative eigenvalue the energy has no lower bound.
    b : Tensor or Parameter, optional
        [dim_y]. Default: each row has its own b as context, ``energy(y, b)`` with b [n, dim_y].

    Notes
    -----
    The energy is differentiable to any order in y, A and b. A Parameter is learned. Another tensor becomes a
    buffer; gradients still reach the tensors that it was computed from. A descent converges for step sizes
    below 2 / (largest eigenvalue of A).

    Examples
    --------
    >>> energy = ac.QuadraticEnergy(A, b)
    >>> solve = ac.EnergyDescent(energy, step_size=0.1, max_steps=1000, tol=1e-6, stop="gradient")
    >>> x = solve(torch.zeros(1, 8)).y  # A x = b
    """

    def __init__(self, A: Tensor, b: Tensor | None = None) -> None:
        super().__init__()
        check_floating("A", A)
        if A.dim() != 2 or A.shape[0] != A.shape[1] or A.shape[0] == 0:
            raise ValueError(f"A: expected shape [dim_y, dim_y], got {list(A.shape)}")
        if b is not None:
            check_floating("b", b)
            if b.shape != A.shape[:1]:
                raise ValueError(f"b: expected shape [{A.shape[0]}], got {list(b.shape)}")
            if b.dtype != A.dtype:
                raise TypeError(f"b: expected {A.dtype}, the dtype of A, got {b.dtype}")
        self.A: Tensor
        self.b: Tensor | None
        for name, tensor in (("A", A), ("b", b)):
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def closed_form(
        self, y: Tensor, *context: Tensor, dtype: torch.dtype, kernels: bool = False
    ) -> ClosedForm:
        """Return the energy as its kernels take it."""
        matrix, b = own_tensor(self, "A"), own_tensor(self, "b")
        dim, _ = check_matrix("A", matrix)
        check_points(y, dim, "A", matrix)
        check_number_of_contexts(context, 0 if b is not None else 1)
        matrix = check_own("A", matrix, (dim, dim), y, dtype, kernels)
        if b is None:
            b = check_given("context", context[0], y.shape, y, dtype, kernels)
        else:
            b = check_own("b", b, (dim,), y, dtype, kernels)
        return quadratic_closed_form(matrix, b)

    def extra_repr(self) -> str:
        """Show the size."""
        return f"dim_y={self.A.shape[0]}, b={'given by each row' if self.b is None else 'shared'}"
