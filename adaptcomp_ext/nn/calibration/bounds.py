"""Learn-then-Test: p-values for "the risk is above α", and the sequence of tests that chooses a threshold.

Angelopoulos, Bates, Candès, Jordan, Lei (2021). A p-value is at most u with probability at most u whenever
the risk, the expected loss of a row, is above α. The thresholds are tested in an order that is fixed before
the data are seen, each at level δ, until the first one that is not certified. A threshold with a risk above α
is then certified with probability at most δ: it would take a false rejection of the first such threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["certified", "p_value", "rows_needed"]


def log_binomial_tail(successes: int, rows: int, alpha: float) -> float:
    """Return log P(X ≤ successes) for X ~ Binomial(rows, alpha)."""
    if successes >= rows:
        return 0.0
    k = torch.arange(successes + 1, dtype=torch.float64)
    log_choose = math.lgamma(rows + 1) - torch.lgamma(k + 1) - torch.lgamma(rows - k + 1)
    terms = log_choose + k * math.log(alpha) + (rows - k) * math.log1p(-alpha)
    return min(0.0, float(terms.logsumexp(0)))


def p_value(total: float, rows: int, alpha: float, binary: bool) -> float:
    """Return a p-value of the hypothesis that the expected loss of a row is above `alpha`.

    Parameters
    ----------
    total : float
        The sum of the losses of all rows, each in [0, 1].
    rows : int
        The number of rows, independent and identically distributed.
    alpha : float
        In (0, 1).
    binary : bool
        Whether a loss is 0 or 1 by definition: the binomial tail is then exact. Otherwise the p-value is that
        of Hoeffding and Bentkus, which holds for every loss in [0, 1].
    """
    if rows == 0:
        return 1.0
    if binary:
        return math.exp(log_binomial_tail(round(total), rows, alpha))
    mean = min(total / rows, alpha)
    divergence = 0.0 if mean == 0 else mean * math.log(mean / alpha)
    divergence += (1 - mean) * math.log((1 - mean) / (1 - alpha))
    bentkus = 1 + log_binomial_tail(math.ceil(total), rows, alpha)
    return math.exp(min(0.0, -rows * divergence, bentkus))


def certified(p_values: Sequence[float], delta: float) -> int:
    """Return how many hypotheses, in this order, are rejected before the first that is not."""
    count = 0
    while count < len(p_values) and p_values[count] <= delta:
        count += 1
    return count


def rows_needed(alpha: float, delta: float) -> int:
    """Return the least number of rows with which a threshold without any loss is certified."""
    return math.ceil(math.log(delta) / math.log1p(-alpha))
