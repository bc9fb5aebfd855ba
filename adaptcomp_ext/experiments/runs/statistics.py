"""Means with intervals over seeds: how they are computed, what they decide, and how a report writes them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import scipy  # scipy.stats, which is large, is imported at its first use
from torch import Tensor

__all__ = [
    "ONE_SEED",
    "Claim",
    "Interval",
    "Shown",
    "counted",
    "estimate",
    "form",
    "interval",
    "judged",
    "mcnemar",
    "mean_interval",
    "measured_over",
    "millions",
    "paired",
    "percent",
    "points",
    "rank_correlation",
    "said",
    "table",
    "wilson",
]

LEVEL = 0.95
ONE_SEED = "Not decided: one seed"
"""What stands for a verdict where there is no interval."""


class Interval(NamedTuple):
    """Return the mean of `n` values, its 95 % interval, and the two-sided p of mean 0 (not for one value)."""

    mean: float
    low: float | None
    high: float | None
    n: int
    p: float | None = None

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
    """Mean over seeds, Student's interval and t-test: these seeds as a sample of all."""
    values = [float(value) for value in values]  # JSON does not take NumPy's numbers
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Interval(mean, None, None, n)
    error = statistics.stdev(values) / n**0.5
    half = float(scipy.stats.t.ppf((1 + LEVEL) / 2, n - 1)) * error
    p = 2 * float(scipy.stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return Interval(mean, mean - half, mean + half, n, p)


def paired(a: Sequence[float], b: Sequence[float]) -> Interval:
    """a − b over the same seeds: the interval and the t-test are those of the pairs' differences."""
    return mean_interval([x - y for x, y in zip(a, b, strict=True)])


def estimate(value: Any) -> Interval:
    """The interval of a Series over seeds; a number stands for itself, and an interval is left as it is."""
    if isinstance(value, Interval):
        return value
    return mean_interval([value] if isinstance(value, (int, float)) else value)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's ρ of two tensors' elements; 0 where one of them is constant."""
    if float(a.min()) == float(a.max()) or float(b.min()) == float(b.max()):
        return 0.0
    return float(scipy.stats.spearmanr(a.flatten().cpu().numpy(), b.flatten().cpu().numpy()).statistic)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    ends = scipy.stats.binomtest(successes, trials).proportion_ci(LEVEL, method="wilson")
    return float(ends.low), float(ends.high)


def mcnemar(a: Tensor, b: Tensor) -> float:
    """Exact two-sided p of two classifiers being right equally often; [N] (bool): what each got right."""
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(scipy.stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


@dataclass(frozen=True)
class Claim:
    """That a quantity over seeds, an interval or a Series, is at least, or with `most` at most, a bound."""

    value: Any
    bound: float = 0.0
    most: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", estimate(self.value))

    def _margins(self) -> list[float]:
        """How far the interval's wrong end, the mean and the right end lie on the right side of the bound."""
        ends = (self.value.low, self.value.mean, self.value.high)
        return sorted((self.bound - end if self.most else end - self.bound) for end in ends)

    @property
    def alone(self) -> bool:
        """Whether there is one seed, and so no interval."""
        return self.value.low is None

    @property
    def holds(self) -> bool:
        """Whether the whole interval lies on the right side."""
        return not self.alone and self._margins()[0] > 0

    @property
    def fails(self) -> bool:
        """Whether the whole interval lies on the wrong side."""
        return not self.alone and self._margins()[2] < 0

    @property
    def mean_holds(self) -> bool:
        """Whether at least the mean lies on the right side, of several seeds."""
        return not self.alone and self._margins()[1] >= 0


def judged(text: str, *claims: Claim) -> str:
    """`text` with the verdict before it, in Markdown.

    "Holds" where every claim's interval lies on its right side, "Does not hold" where one lies on the wrong
    side; between them it says what the means say. Claims of one seed are not decided.
    """
    if any(claim.alone for claim in claims):
        verdict = ONE_SEED
    elif all(claim.holds for claim in claims):
        verdict = "Holds"
    elif any(claim.fails for claim in claims):
        verdict = "Does not hold"
    else:
        met = "met" if all(claim.mean_holds for claim in claims) else "missed"
        verdict = f"Not decided: {met} by the mean, not by the whole interval"
    return f"**{verdict}.** {text}"


def said(value: Any, more: str, less: str) -> str:
    """Return `more` where the whole interval lies above 0, `less` where it lies below, or "not decided"."""
    value = estimate(value)
    if value.low is None:
        return ONE_SEED[0].lower() + ONE_SEED[1:]
    return more if value.above else less if value.below else "not decided: the interval holds 0"


def measured_over(seeds: int, paired: bool = True) -> str:
    """How a report's figures come from its seeds, as a sentence."""
    if seeds == 1:
        return "One seed: its figures have no intervals and decide nothing."
    differences = "; differences are paired by seed, with their interval and p" if paired else ""
    return f"Means over seeds ± half of Student's 95 % interval{differences}."


class Shown(str):
    """A text that remembers the value that it shows, unrounded, for the JSON file."""

    value: Any

    def __new__(cls, text: str, value: Any) -> Shown:
        """Make it from the text and the value."""
        shown = super().__new__(cls, text)
        shown.value = value
        return shown


def interval(value: Any, digits: int = 1, scale: float = 100.0) -> Shown:
    """Mean ± half of the interval of a Series over seeds; by default of a share, in per cent."""
    value = estimate(value)
    text = f"{scale * value.mean:.{digits}f}"
    return Shown(text if value.high is None else f"{text} ± {scale * value.half:.{digits}f}", value)


def points(value: Any, digits: int = 2, scale: float = 100.0) -> Shown:
    """A signed difference with its interval and p; by default of shares, in percentage points."""
    value = estimate(value)
    text = f"{scale * value.mean:+.{digits}f}"
    if value.p is not None:
        text += f" [{scale * value.low:+.{digits}f}, {scale * value.high:+.{digits}f}], p = {value.p:.2g}"
    return Shown(text, value)


def form(digits: int = 1, scale: float = 100.0) -> Callable[[Any], Shown]:
    """The form of a column: `interval` with so many digits; of a share, in per cent, unless `scale` is 1."""
    return lambda value: interval(value, digits, scale)


def millions(value: Any) -> Shown:
    """A mean number of operations, such as multiply–adds, in millions."""
    value = estimate(value)
    return Shown(f"{value.mean / 1e6:.2f} M", value)


def percent(value: float, digits: int = 1) -> str:
    """A share as a percentage."""
    return f"{100 * value:.{digits}f} %"


def counted(count: int, what: str) -> str:
    """A number of things: "1 seed", "3 seeds"."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"
