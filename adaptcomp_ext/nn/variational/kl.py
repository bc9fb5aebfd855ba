"""KL(q ‖ p) of a weight's posterior from the log-uniform prior, which depends on α = σ²/θ² alone.

    q(w) = N(θ, αθ²),   p(log|w|) ∝ 1:   KL(α) = −½ log α + E_ε log|1 + √α ε| + c,   ε ~ N(0, 1)

The prior is improper, so that c is free. It is chosen such that KL → 0 as α → ∞, where a weight is pure
noise: c = −E log|ε| = (γ + log 2)/2 with Euler's constant γ. The expectation has no elementary form; both
papers approximate it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CONSTANT", "kingma_kl", "molchanov_kl"]

CONSTANT = (0.57721566490153286 + math.log(2)) / 2


def molchanov_kl(log_alpha: Tensor) -> Tensor:
    """Compute eq. 14 of Molchanov, Ashukha & Vetrov 2017, elementwise: within 0.01 nats of KL for every α."""
    k1, k2, k3 = 0.63576, 1.87320, 1.48695
    # ½ log(1 + 1/α) as softplus, and 1 − σ(x) as σ(−x): neither overflows, and no clamp cuts a gradient.
    return k1 * torch.sigmoid(-(k2 + k3 * log_alpha)) + 0.5 * F.softplus(-log_alpha)


def kingma_kl(log_alpha: Tensor) -> Tensor:
    """Compute eq. 14 of Kingma, Salimans & Welling 2015, elementwise: within 0.05 nats of KL for α ≤ 1."""
    c1, c2, c3 = 1.16145124, -1.50204118, 0.58629921
    alpha = log_alpha.exp()
    return CONSTANT - 0.5 * log_alpha - alpha * (c1 + alpha * (c2 + alpha * c3))
