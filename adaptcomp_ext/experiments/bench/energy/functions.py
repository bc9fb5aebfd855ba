"""The energies as one writes them in plain PyTorch, with the context's part computed at every evaluation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import adaptcomp_ext as ac

__all__ = ["ACTIVATIONS", "Energy", "hopfield", "mlp", "quadratic"]

Energy = Callable[..., Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": F.softplus,
    "silu": F.silu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
}


def mlp(energy: ac.MLPEnergy) -> Energy:
    """Return the network's energy, on the parameters of the module.

    Two products for the first layer and a sum are faster than one product of the concatenation [y, x], whose
    gradient would contain that of x.
    """
    act, ridge = ACTIVATIONS[energy.activation], energy.ridge
    weight_y, weight_x, bias1 = energy.weight_y, energy.weight_x, energy.bias1
    weight2, bias2, out, out_bias = energy.weight2, energy.bias2, energy.out, energy.out_bias
    assert weight_x is not None

    def evaluate(y: Tensor, x: Tensor) -> Tensor:
        hidden = act(F.linear(y, weight_y) + F.linear(x, weight_x, bias1))
        if weight2 is not None:
            hidden = act(F.linear(hidden, weight2, bias2))
        value = hidden @ out + out_bias
        return value if ridge == 0 else value + 0.5 * ridge * y.square().sum(dim=1)

    return evaluate


def hopfield(energy: ac.HopfieldEnergy) -> Energy:
    """Return −1/β·log Σ exp(β Xy) + ‖y‖²/2."""
    patterns, beta = energy.patterns, float(energy.beta)

    def evaluate(y: Tensor) -> Tensor:
        return 0.5 * y.square().sum(dim=1) - torch.logsumexp(beta * F.linear(y, patterns), dim=1) / beta

    return evaluate


def quadratic(energy: ac.QuadraticEnergy) -> Energy:
    """Return y'Ay/2 − b'y, b given by each row."""
    matrix = energy.A

    def evaluate(y: Tensor, b: Tensor) -> Tensor:
        return (y * (0.5 * (y @ matrix) - b)).sum(dim=1)

    return evaluate
