"""What the cells found together: means and intervals over seeds, and what differences there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adaptcomp_ext.experiments.runs import Cell, mean_interval, paired

__all__ = ["summarise"]

Found = Mapping[str, Any]


def summarise(cells: Sequence[Cell], found: Mapping[str, Found]) -> dict[str, Any]:
    """Means, intervals and differences over seeds."""
    some = [found[cell.name] for cell in cells]
    prices = list(some[0]["adaptive"])
    return {
        **{
            key: [mean_interval(values) for values in zip(*(c[key] for c in some), strict=True)]
            for key in ("mean gain", "rank correlation with gain")
        },
        "fixed": {h: _of([c["fixed"][h] for c in some]) for h in some[0]["fixed"]},
        "adaptive": {
            price: {
                **_of([c["adaptive"][price] for c in some]),
                "shuffled": _of([c["adaptive"][price]["shuffled"] for c in some]),
                "− shuffled": paired(
                    [c["adaptive"][price]["return"] for c in some],
                    [c["adaptive"][price]["shuffled"]["return"] for c in some],
                ),
                "correlations": {
                    name: mean_interval([c["adaptive"][price]["correlations"][name] for c in some])
                    for name in some[0]["adaptive"][price]["correlations"]
                },
            }
            for price in prices
        },
        "strip": some[0]["adaptive"][prices[0]]["strip"],
    }


def _of(parts: Sequence[Found]) -> dict[str, Any]:
    return {
        **{key: mean_interval([p[key] for p in parts]) for key in ("return", "horizon", "steps imagined")},
        "share": {h: mean_interval([p["share"][h] for p in parts]) for h in parts[0]["share"]},
    }
