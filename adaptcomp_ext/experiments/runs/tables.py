"""Figures as the reports write them."""

from __future__ import annotations

from collections.abc import Sequence

from .statistics import Difference, Interval

__all__ = ["counted", "interval", "percent", "points", "table"]


def counted(count: int, what: str) -> str:
    """A number of things: "1 seed", "3 seeds"."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def percent(value: float, digits: int = 1) -> str:
    """A share as a percentage."""
    return f"{100 * value:.{digits}f} %"


def interval(value: Interval, digits: int = 1, scale: float = 100.0) -> str:
    """Mean ± half of the interval; by default of a share, in per cent."""
    text = f"{scale * value.mean:.{digits}f}"
    return text if value.high is None else f"{text} ± {scale * value.half:.{digits}f}"


def points(value: Difference, digits: int = 2, scale: float = 100.0) -> str:
    """A signed difference with its interval; by default of shares, in percentage points."""
    text = f"{scale * value.mean:+.{digits}f}"
    if value.low is None or value.high is None or value.p is None:
        return text
    return f"{text} [{scale * value.low:+.{digits}f}, {scale * value.high:+.{digits}f}], p = {value.p:.2g}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"
