"""The energy of a small network. The context's part of the first layer is an argument."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptcomp_ext.reference._precision import wide

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": F.softplus,
    "silu": F.silu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
}


def mlp_energy(
    y: Tensor,
    weight1: Tensor,
    context: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    out: Tensor,
    out_bias: Tensor,
    activation: str,
    ridge: float,
) -> Tensor:
    """Compute E(y) = w·act(a) + b_o + ρ/2·‖y‖², a = W₁y + c, or a = W₂ act(W₁y + c) + b₂ with a second layer.

    The shapes are y [n, dim], weight1 W₁ [hidden1, dim], context c [n, hidden1] or [hidden1], weight2 W₂
    [hidden2, hidden1], bias2 b₂ [hidden2], out w [hidden1] or [hidden2], out_bias b_o [1]; ridge is ρ. The
    energies are [n], float32 (float64 for float64).
    """
    y, weight1, context, out, out_bias = (wide(t) for t in (y, weight1, context, out, out_bias))
    act = ACTIVATIONS[activation]
    hidden = act(F.linear(y, weight1) + context)
    if weight2 is not None:
        hidden = act(F.linear(hidden, wide(weight2), None if bias2 is None else wide(bias2)))
    energy = hidden @ out + out_bias
    return energy if ridge == 0 else energy + 0.5 * ridge * y.square().sum(dim=1)
