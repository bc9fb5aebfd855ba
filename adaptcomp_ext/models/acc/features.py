"""What class logits tell about themselves: the confidence of a habit, without any label."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adaptcomp_ext.models._precision import wide
from adaptcomp_ext.ops._checks import check_floating

__all__ = [
    "check_logits",
    "confidence_features",
    "feature_count",
    "kl_divergence",
    "margin",
    "normalised_entropy",
]

LARGEST = 3
"""How many of the largest log-probabilities are features of their own."""
LEAST_LOG = -87.0
"""Of a feature: the logarithm of the smallest float32 that is not subnormal, in the place of log 0."""


def check_logits(name: str, value: object, classes: int | None = None) -> Tensor:
    """Require floating-point class logits [n, C], C ≥ 2."""
    logits = check_floating(name, value)
    if logits.dim() != 2 or logits.shape[1] < 2 or (classes is not None and logits.shape[1] != classes):
        expected = "[n, C] with C >= 2" if classes is None else f"[n, {classes}]"
        raise ValueError(f"{name}: expected class logits of shape {expected}, got {list(logits.shape)}")
    return logits


def normalised_entropy(logits: Tensor) -> Tensor:
    """H(softmax) / log C of each row, in [0, 1]: [n, C] → [n], float32 (float64 for float64). Differentiable.

    It does not depend on the number of classes as H does. A class whose logit is −∞ counts in C and has no
    part in H: 0 log 0 = 0. NaN for a row in which no class is left.
    """
    log_p = wide(check_logits("logits", logits)).log_softmax(dim=1)
    p = log_p.exp()
    return -(p * log_p.masked_fill(p == 0, 0)).sum(dim=1) / math.log(logits.shape[1])


def margin(logits: Tensor) -> Tensor:
    """p₁ − p₂, the two largest probabilities' difference: [n, C] → [n], float32 (float64 for float64). Differentiable."""
    two = wide(check_logits("logits", logits)).softmax(dim=1).topk(2, dim=1).values
    return two[:, 0] - two[:, 1]


def kl_divergence(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p ‖ q) of each row in nats, both softened by the temperature: two [n, C] → [n], float32 (float64 for float64).

    Differentiable in both. A class that p excludes (its logit is −∞) has no part in it. Infinite where q
    excludes a class that p does not; the gradient is then finite in q only.
    """
    log_p = (wide(p_logits) / temperature).log_softmax(dim=1)
    log_q = (wide(q_logits) / temperature).log_softmax(dim=1)
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(dim=1)


def feature_count(classes: int) -> int:
    """How many `confidence_features` there are for C classes: 4 + min(3, C) + 2·C."""
    return 4 + min(LARGEST, classes) + 2 * classes


def confidence_features(logits: Tensor) -> Tensor:
    """What a gate may know about a habit's answer.

    Parameters
    ----------
    logits : Tensor
        [n, C].

    Returns
    -------
    Tensor
        [n, F], float32 (float64 for float64): normalised entropy; largest probability; margin of the two
        largest log-probabilities; log-sum-exp of the logits; the three largest log-probabilities (fewer where
        C < 3), at least −87; all logits less their mean; all probabilities. A class of probability 0, as one
        whose logit is −∞, has no part in the mean, and 0 for its distance from it.
    """
    logits = wide(check_logits("logits", logits))
    log_p = logits.log_softmax(dim=1)
    p = log_p.exp()
    largest = log_p.topk(min(LARGEST, logits.shape[1]), dim=1).values.clamp(min=LEAST_LOG)
    gone = p == 0
    mean = logits.masked_fill(gone, 0).sum(dim=1, keepdim=True) / (~gone).sum(dim=1, keepdim=True)
    return torch.cat(
        (
            normalised_entropy(logits)[:, None],
            largest[:, :1].exp(),
            largest[:, :1] - largest[:, 1:2],
            logits.logsumexp(dim=1, keepdim=True),
            largest,
            (logits - mean).masked_fill(gone, 0),
            p,
        ),
        dim=1,
    )
