"""Figures as the reports write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .statistics import Difference, estimate, paired

__all__ = ["Shown", "counted", "form", "interval", "millions", "percent", "points", "table"]


class Shown(str):
    """A text that remembers the value that it shows.

    Attributes
    ----------
    value : Interval or Difference
        The value, unrounded.
    """

    value: Any

    def __new__(cls, text: str, value: Any) -> Shown:
        """Make it from the text and the value."""
        shown = super().__new__(cls, text)
        shown.value = value
        return shown


def counted(count: int, what: str) -> str:
    """A number of things: "1 seed", "3 seeds"."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def percent(value: float, digits: int = 1) -> str:
    """A share as a percentage."""
    return f"{100 * value:.{digits}f} %"


def interval(value: Any, digits: int = 1, scale: float = 100.0) -> Shown:
    """Mean ± half of the interval, of an Interval or of a Series over seeds; by default of a share, in per cent."""
    value = estimate(value)
    text = f"{scale * value.mean:.{digits}f}"
    return Shown(text if value.high is None else f"{text} ± {scale * value.half:.{digits}f}", value)


def points(value: Any, digits: int = 2, scale: float = 100.0) -> Shown:
    """A signed difference with its interval and p, of a Difference or of a Series over seeds; by default in points of per cent."""
    value = value if isinstance(value, Difference) else paired(value, [0.0] * len(value))
    text = f"{scale * value.mean:+.{digits}f}"
    if value.low is not None and value.high is not None and value.p is not None:
        text += f" [{scale * value.low:+.{digits}f}, {scale * value.high:+.{digits}f}], p = {value.p:.2g}"
    return Shown(text, value)


def form(digits: int = 1, scale: float = 100.0) -> Callable[[Any], Shown]:
    """The form of a column: `interval` with so many digits; of a share, in per cent, unless `scale` is 1."""
    return lambda value: interval(value, digits, scale)


def millions(value: Any) -> Shown:
    """A mean number of operations, such as multiply–adds, in millions."""
    value = estimate(value)
    return Shown(f"{value.mean / 1e6:.2f} M", value)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"
