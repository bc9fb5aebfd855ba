"""What the cells found together: means and intervals over seeds, and what differences there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from adaptcomp_ext.experiments.runs import Cell, mean_interval, paired

from .cell import DEPTHS, RATES, THRESHOLDS

__all__ = ["GATES", "summarise"]

GATES = ("value", "entropy")
Found = Mapping[str, Any]


def summarise(cells: Sequence[Cell], found: Mapping[str, Found]) -> dict[str, Any]:
    """Means, intervals and differences; named tuples, which become lists in JSON.

    Compute is in multiply–adds of an image: steps times what a look costs, or the habit's and the called
    share of control's.
    """

    def of(part: str, **options: Any) -> list[Found]:
        chosen = [
            c
            for c in cells
            if c.options["part"] == part and all(c.options.get(k) == v for k, v in options.items())
        ]
        return [found[c.name] for c in sorted(chosen, key=lambda c: c.seed)]

    def values(part: str, key: str) -> list[Any]:
        return list(dict.fromkeys(c.options[key] for c in cells if c.options["part"] == part))

    depth, pair = of("depth"), of("acc")
    return {
        "act": {f"{v:g}": _reader(of("act", price=v)) for v in values("act", "price")},
        "ponder": {f"{v:g}": _reader(of("ponder", prior=v)) for v in values("ponder", "prior")},
        "fixed": {str(n): _steps(depth, lambda cell, n=n: cell["fixed"][str(n)]) for n in DEPTHS},  # type: ignore[misc]
        "confidence": {
            f"{t:g}": _steps(depth, partial(_at_threshold, threshold=f"{t:g}")) for t in THRESHOLDS
        },
        "confidence timing": _timing(depth),
        "acc": {gate: {f"{r:g}": _gated(pair, gate, f"{r:g}") for r in RATES} for gate in GATES},
        "acc timing": {
            "saved": mean_interval([cell["timing"]["saved"] for cell in pair]),
            "rate": mean_interval([cell["timing"]["rate"] for cell in pair]),
        },
        "multiply_adds": {"look": depth[0]["step"], **pair[0]["multiply_adds"]},
    }


def _at_threshold(cell: Found, threshold: str) -> Found:
    return dict(cell["confidence"][threshold])


def _steps(cells: Sequence[Found], get: Callable[[Found], Found]) -> dict[str, Any]:
    """Of one policy on one reader per seed."""
    some = [get(cell) for cell in cells]
    out: dict[str, Any] = {
        "accuracy": mean_interval([s["accuracy"] for s in some]),
        "steps": mean_interval([s["steps"] for s in some]),
        "multiply_adds": mean_interval(
            [s["steps"] * cell["step"] for s, cell in zip(some, cells, strict=True)]
        ),
        "by_class": [mean_interval([s["by_class"][d] for s in some]) for d in range(10)],
    }
    if all("rank_correlation" in s for s in some):
        out["rank_correlation"] = mean_interval([s["rank_correlation"] for s in some])
        out["shuffled"] = mean_interval([s["shuffled"] for s in some])
        out["− shuffled"] = paired([s["own steps"] for s in some], [s["shuffled"] for s in some])
    return out


def _timing(cells: Sequence[Found]) -> dict[str, Any]:
    return {
        key: mean_interval([cell["timing"][key] for cell in cells])
        for key in ("masked_over_compacted", "all_steps_over_compacted")
    }


def _reader(cells: Sequence[Found]) -> dict[str, Any]:
    return {**_steps(cells, lambda cell: cell["own"]), **_timing(cells)}


def _gated(cells: Sequence[Found], gate: str, rate: str) -> dict[str, Any]:
    some = [cell["gates"][gate][rate] for cell in cells]
    cost = [cell["multiply_adds"] for cell in cells]
    return {
        "accuracy": mean_interval([s["accuracy"] for s in some]),
        "rate": mean_interval([s["rate"] for s in some]),
        "multiply_adds": mean_interval(
            [c["default"] + s["rate"] * c["control"] for c, s in zip(cost, some, strict=True)]
        ),
        "by_class": [mean_interval([s["by_class"][d] for s in some]) for d in range(10)],
        "− always": paired(
            [s["accuracy"] for s in some], [cell["gates"][gate]["1"]["accuracy"] for cell in cells]
        ),
    }
