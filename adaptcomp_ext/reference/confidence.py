"""The confidence of a row of class logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def confidence(logits: Tensor, measure: str) -> Tensor:
    """Return the largest probability, the margin of the two largest, or one minus the normalised entropy."""
    wide = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    p = torch.softmax(wide, dim=1)
    if measure == "max_prob":
        return p.amax(dim=1)
    if measure == "margin":
        first, second = p.topk(2, dim=1).values.unbind(dim=1)
        return first - second
    entropy = -torch.special.xlogy(p, p).sum(dim=1)
    certainty: Tensor = 1 - entropy / math.log(logits.shape[1])
    return certainty
