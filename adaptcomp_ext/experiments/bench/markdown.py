"""What the reports have in common: tables, numbers, and what was measured on what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["QUICK", "environment", "milliseconds", "neighbours", "number", "table"]

QUICK = "Quick run (--quick): a small grid with little time for each point, so that its figures are rough."
"""What every report of a quick benchmark says of itself."""


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table and an empty one; "None." where there is nothing in it."""
    body = ["| " + " | ".join(line) + " |" for line in lines]
    return ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *body, ""] if body else ["None.", ""]


def number(value: float | None, digits: int = 2) -> str:
    """Return the number with so many decimals, or a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def milliseconds(value: float) -> str:
    """Return three digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def environment(report: Mapping[str, Any]) -> str:
    """Return the sentence on the machine, the versions and the date."""
    machine, versions = report["machine"], report["versions"]
    mark = f"**{QUICK}** " if report.get("quick") else ""
    return (
        f"{mark}{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, device {machine['device']}; "
        f"Python {versions['python']}, torch {versions['torch']}; {report['date']}."
    )


def neighbours(rows: Sequence[Mapping[str, Any]], cores: int) -> list[str]:
    """Return a warning if others were at work on the machine, going by the load of the rows."""
    load = max((row["load"] or 0.0 for row in rows), default=0.0)
    if load <= cores + 0.5:
        return []
    return [
        f"**The machine was not quiet**: its load average reached {load:.1f} on {cores} cores. The JSON file has the "
        "ratios of the fastest repeats as well, which suffer less.",
        "",
    ]
