"""Intervals over seeds and tests on items."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from scipy import stats
from torch import Tensor

__all__ = [
    "Difference",
    "Interval",
    "estimate",
    "mcnemar",
    "mean_interval",
    "paired",
    "rank_correlation",
    "wilson",
]

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and its 95 % interval; without one (`low` and `high` None) where there is one value only."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half(self) -> float:
        """Half of the interval's width; 0 where there is none."""
        return 0.0 if self.high is None else self.high - self.mean


class Difference(NamedTuple):
    """A mean difference of pairs, its 95 % interval, and the two-sided p of its being 0; None where there is one pair only."""

    mean: float
    low: float | None
    high: float | None
    p: float | None
    n: int

    @property
    def half(self) -> float:
        """Half of the interval's width; 0 where there is none."""
        return 0.0 if self.high is None else self.high - self.mean

    @property
    def above(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.low is not None and self.low > 0

    @property
    def below(self) -> bool:
        """Whether the whole interval lies below 0."""
        return self.high is not None and self.high < 0


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean over seeds and Student's interval: these seeds as a sample of all."""
    values = [float(value) for value in values]  # NumPy's numbers are not for JSON
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Interval(mean, None, None, n)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * statistics.stdev(values) / n**0.5
    return Interval(mean, mean - half, mean + half, n)


def estimate(value: Any) -> Interval | Difference:
    """The interval of a Series over seeds; a number stands for itself, and an interval is left as it is."""
    if isinstance(value, (Interval, Difference)):
        return value
    return mean_interval([value] if isinstance(value, (int, float)) else value)


def paired(a: Sequence[float], b: Sequence[float]) -> Difference:
    """a − b over the same seeds: Student's interval and t-test of the pairs."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean, low, high, n = mean_interval(differences)
    if n < 2:
        return Difference(mean, None, None, None, n)
    spread = statistics.stdev(differences)
    if spread == 0:
        return Difference(mean, low, high, 1.0 if mean == 0 else 0.0, n)
    p = 2 * float(stats.t.sf(abs(mean) / (spread / n**0.5), n - 1))
    return Difference(mean, low, high, p, n)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's ρ of two tensors' elements; 0 where one of them is constant."""
    if float(a.min()) == float(a.max()) or float(b.min()) == float(b.max()):
        return 0.0
    return float(stats.spearmanr(a.flatten().numpy(), b.flatten().numpy()).statistic)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    interval = stats.binomtest(successes, trials).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(a: Tensor, b: Tensor) -> float:
    """Exact two-sided p of two classifiers being right equally often, from which of the same items [N] (bool) each got right."""
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
