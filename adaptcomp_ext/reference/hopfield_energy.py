"""The energy of a modern Hopfield network (Ramsauer et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptcomp_ext.reference._precision import wide


def hopfield_energy(y: Tensor, patterns: Tensor, beta: Tensor) -> Tensor:
    """Compute E(y) = −1/β·log Σⱼ exp(β xⱼ·y) + ‖y‖²/2 of each row.

    The shapes are y [n, dim], patterns [N, dim], beta [] or [1]; the energies are [n], float32 (float64 for
    float64).
    """
    y, patterns, beta = wide(y), wide(patterns), wide(beta)
    return 0.5 * y.square().sum(dim=1) - torch.logsumexp(beta * (y @ patterns.T), dim=1) / beta
