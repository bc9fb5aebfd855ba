"""The energy of a modern Hopfield network."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from adaptcomp_ext.nn.descent.energies.closed_form import (
    ClosedFormEnergy,
    check_matrix,
    check_number_of_contexts,
    check_own,
    check_points,
    own_tensor,
)
from adaptcomp_ext.ops._checks import check_floating, describe
from adaptcomp_ext.ops._fused_descent import ClosedForm
from adaptcomp_ext.ops._plain import check_initialized
from adaptcomp_ext.ops.descent import check_number
from adaptcomp_ext.ops.hopfield_energy import hopfield_closed_form


class HopfieldEnergy(ClosedFormEnergy):
    """The energy of a modern Hopfield network: E(y) = −1/β·log Σⱼ exp(β xⱼ·y) + ‖y‖²/2, with patterns xⱼ.

    Ramsauer et al. 2021, "Hopfield Networks is All You Need". The gradient is y − softmax(βXy)·X, so one step
    of size 1 from a query is attention over the patterns. A descent retrieves a pattern, or the mean of
    patterns whose distance is small for this β.

    Parameters
    ----------
    patterns : Tensor or Parameter
        X, [N, dim_y], N ≥ 1; float32, float64, bfloat16 or float16. A Parameter is learned. Another tensor
        becomes a buffer; gradients still reach the tensors that it was computed from.
    beta : float or Parameter
        β > 0, the inverse temperature. A Parameter without dimensions or [1] is learned; its sign is not
        checked.

    Notes
    -----
    ``energy(y) -> [n]`` for y [n, dim_y]; differentiable to any order in y, the patterns and β. It takes no
    context. The constant terms of the paper's equation (4) are left out.

    Examples
    --------
    >>> retrieve = ac.EnergyDescent(ac.HopfieldEnergy(patterns, beta=8.0), step_size=1.0, max_steps=10)
    >>> memory = retrieve(query).y
    """

    beta: Tensor

    def __init__(self, patterns: Tensor, beta: float | nn.Parameter) -> None:
        super().__init__()
        check_floating("patterns", patterns)
        if patterns.dim() != 2 or 0 in patterns.shape:
            raise ValueError(f"patterns: expected shape [N, dim_y] with N >= 1, got {list(patterns.shape)}")
        self.patterns: Tensor
        if isinstance(patterns, nn.Parameter):
            self.patterns = patterns
        else:
            self.register_buffer("patterns", patterns)
        if isinstance(beta, Tensor):
            check_initialized("beta", beta)
            if not isinstance(beta, nn.Parameter) or beta.numel() != 1:
                raise TypeError(
                    f"beta: expected a float, or a Parameter of one element, got {describe(beta)}"
                )
            self.beta = beta
        else:
            number = check_number("beta", beta, 0, math.inf, ends="()")
            self.register_buffer("beta", torch.tensor(number, dtype=patterns.dtype, device=patterns.device))

    def closed_form(
        self, y: Tensor, *context: Tensor, dtype: torch.dtype, kernels: bool = False
    ) -> ClosedForm:
        """Return the energy as its kernels take it."""
        patterns, beta = own_tensor(self, "patterns"), own_tensor(self, "beta")
        size = check_matrix("patterns", patterns)
        check_points(y, size[1], "patterns", patterns)
        check_number_of_contexts(context, 0)
        one = (1,) if isinstance(beta, Tensor) and beta.ndim == 1 else ()
        patterns = check_own("patterns", patterns, size, y, dtype, kernels)
        return hopfield_closed_form(patterns, check_own("beta", beta, one, y, dtype, kernels))

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"patterns={self.patterns.shape[0]}, dim_y={self.patterns.shape[1]}"
