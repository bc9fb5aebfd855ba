"""What figures decide: a claim holds where the whole interval over seeds says so, and one seed decides nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .statistics import Difference, estimate, paired

__all__ = ["ONE_SEED", "Claim", "judged", "measured_over", "said"]

ONE_SEED = "Not decided: one seed"
"""What stands for a verdict where there is no interval."""


@dataclass(frozen=True)
class Claim:
    """A figure over seeds, an interval or a Series, is at least, or with ``most`` at most, a bound."""

    value: Any
    bound: float = 0.0
    most: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", estimate(self.value))

    def _distances(self) -> tuple[float, float, float]:
        """How far mean and both ends lie on the right side of the bound: mean, nearest, farthest."""
        low, high = self.value.low, self.value.high
        assert low is not None and high is not None
        sign = -1.0 if self.most else 1.0
        ends = sorted((sign * (low - self.bound), sign * (high - self.bound)))
        return sign * (self.value.mean - self.bound), ends[0], ends[1]

    @property
    def alone(self) -> bool:
        """Whether there is one seed, and so no interval."""
        return self.value.low is None

    @property
    def holds(self) -> bool:
        """Whether the whole interval lies on the right side."""
        return not self.alone and self._distances()[1] > 0

    @property
    def fails(self) -> bool:
        """Whether the whole interval lies on the wrong side."""
        return not self.alone and self._distances()[2] < 0

    @property
    def mean_holds(self) -> bool:
        """Whether at least the mean lies on the right side, of several seeds."""
        return not self.alone and self._distances()[0] >= 0


def judged(text: str, *claims: Claim) -> str:
    """`text` with the verdict before it, in Markdown.

    "Holds" where every claim's interval lies on its right side, "Does not hold" where one lies on the wrong
    side; between them what the means say, as that. Claims of one seed are not decided.
    """
    if any(claim.alone for claim in claims):
        verdict = ONE_SEED
    elif all(claim.holds for claim in claims):
        verdict = "Holds"
    elif any(claim.fails for claim in claims):
        verdict = "Does not hold"
    elif all(claim.mean_holds for claim in claims):
        verdict = "Not decided: met by the mean, not by the whole interval"
    else:
        verdict = "Not decided: missed by the mean, not by the whole interval"
    return f"**{verdict}.** {text}"


def said(difference: Any, more: str, less: str) -> str:
    """What the interval of a Difference or of a Series says: `more` where it lies above 0, `less` where it lies below."""
    if not isinstance(difference, Difference):
        difference = paired(difference, [0.0] * len(difference))
    if difference.low is None:
        return ONE_SEED[0].lower() + ONE_SEED[1:]
    if difference.above:
        return more
    return less if difference.below else "not decided: the interval holds 0"


def measured_over(seeds: int, paired: bool = True) -> str:
    """How a report's figures come from its seeds, as a sentence."""
    if seeds == 1:
        return "One seed: its figures have no intervals and decide nothing."
    differences = "; differences are paired by seed, with their interval and p" if paired else ""
    return f"Means over seeds ± half of Student's 95 % interval{differences}."
