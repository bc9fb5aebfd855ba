"""Features of class logits that measure a habit's confidence without a label."""

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
"""Number of largest log-probabilities among the features."""
LEAST_LOG = -87.0
"""Lower bound of a log-probability feature: the logarithm of the smallest normal float32."""


def check_logits(name: str, value: object, classes: int | None = None) -> Tensor:
    """Require floating-point class logits [n, C], C ≥ 2."""
    logits = check_floating(name, value)
    if logits.dim() != 2 or logits.shape[1] < 2 or (classes is not None and logits.shape[1] != classes):
        expected = "[n, C] with C >= 2" if classes is None else f"[n, {classes}]"
        raise ValueError(f"{name}: expected class logits of shape {expected}, got {list(logits.shape)}")
    return logits


def normalised_entropy(logits: Tensor) -> Tensor:
    """Compute H(softmax) / log C of each row, in [0, 1]: [n, C] → [n], float32 (float64 for float64).

    Its range does not depend on the number of classes. It is differentiable. A class whose logit is −∞ counts
    in C and adds 0 log 0 = 0 to H. A row without any class left gives NaN.
    """
    log_p = wide(check_logits("logits", logits)).log_softmax(dim=1)
    p = log_p.exp()
    return -(p * log_p.masked_fill(p == 0, 0)).sum(dim=1) / math.log(logits.shape[1])


def margin(logits: Tensor) -> Tensor:
    """Compute p₁ − p₂ of the two largest probabilities, differentiably: [n, C] → [n], float32 or float64."""
    two = wide(check_logits("logits", logits)).softmax(dim=1).topk(2, dim=1).values
    return two[:, 0] - two[:, 1]


def kl_divergence(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute KL(p ‖ q) of each row in nats, both softened by the temperature: two [n, C] → [n].

    It is float32 (float64 for float64) and differentiable in both. A class that p masks (its logit is −∞)
    adds nothing. KL is infinite where q masks a class that p does not; only its gradient in q is then finite.
    """
    log_p = (wide(p_logits) / temperature).log_softmax(dim=1)
    log_q = (wide(q_logits) / temperature).log_softmax(dim=1)
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(dim=1)


def feature_count(classes: int) -> int:
    """Return the number of `confidence_features` for C classes: 4 + min(3, C) + 2·C."""
    return 4 + min(LARGEST, classes) + 2 * classes


def confidence_features(logits: Tensor) -> Tensor:
    """Compute the features of a habit's logits that gates read; differentiable.

    Parameters
    ----------
    logits : Tensor
        [n, C].

    Returns
    -------
    Tensor
        [n, F], float32 (float64 for float64): normalised entropy; largest probability; margin of the two
        largest log-probabilities; log-sum-exp of the logits; the three largest log-probabilities (two if
        C = 2), at least −87; all logits minus their mean; all probabilities. A class of probability 0, such
        as one whose logit is −∞, is left out of the mean, and its difference from the mean is 0.
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
