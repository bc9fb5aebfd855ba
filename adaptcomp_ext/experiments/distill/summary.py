"""What the cells found together: means and intervals over seeds, and whether what was expected holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adaptcomp_ext.experiments.runs import Cell, mean_interval, paired

from .cell import RATES, SHARES, TEMPERATURES
from .plan import ONLINE

__all__ = ["EQUAL", "LABELS", "summarise"]

LABELS = "labels"
EQUAL = (0.001, 0.005)
"""Accuracy that counts as equal: 0.1 and 0.5 points."""

Found = Mapping[str, Any]


def summarise(cells: Sequence[Cell], found: Mapping[str, Found]) -> dict[str, Any]:
    """Means, intervals and differences; named tuples, which become lists in JSON."""

    def of(part: str, **options: Any) -> list[Found]:
        chosen = [
            c
            for c in cells
            if c.options["part"] == part and all(c.options.get(k) == v for k, v in options.items())
        ]
        return [found[c.name] for c in sorted(chosen, key=lambda c: c.seed)]

    after = of("after")
    ways = [LABELS, *(f"{t:g}" for t in TEMPERATURES)]
    pairs = {f"{form}, T = {t:g}": of("online", form=form, temperature=t) for form, t in ONLINE}
    dense = pairs["dense, T = 4"]
    labels = [cell["students"][LABELS] for cell in after]
    return {
        "teacher": mean_interval([cell["teacher"] for cell in after]),
        "after": {way: mean_interval([cell["students"][way] for cell in after]) for way in ways},
        "online": {
            name: {
                "default": mean_interval([cell["default"] for cell in some]),
                "control": mean_interval([cell["control"] for cell in some]),
                "control − default": paired([c["control"] for c in some], [c["default"] for c in some]),
                "sparsity": mean_interval([cell["sparsity"] for cell in some]),
            }
            for name, some in pairs.items()
        },
        "differences": {
            "online, T = 4 − none": paired([cell["default"] for cell in dense], labels),
            "after, T = 4 − none": paired([cell["students"]["4"] for cell in after], labels),
            "online − after, T = 4": paired(
                [cell["default"] for cell in dense], [cell["students"]["4"] for cell in after]
            ),
        },
        "shrunk": {
            "units": _shrunk(pairs["units, T = 4"], dense, labels, ["as it is", *(f"{s:g}" for s in SHARES)]),
            "sparse": _shrunk(pairs["sparse, T = 4"], dense, labels, ["as it is"]),
        },
        "gated": _gated(pairs["units, T = 4"]),
        "multiply_adds": pairs["units, T = 4"][0]["multiply_adds"],
    }


def _shrunk(
    some: Sequence[Found], dense: Sequence[Found], labels: Sequence[float], names: Sequence[str]
) -> dict[str, Any]:
    def over(name: str, get: Callable[[Found], float]) -> Any:
        return mean_interval([float(get(cell["shrunk"][name])) for cell in some])

    out = {}
    for name in names:
        out[name] = {
            "accuracy": over(name, lambda s: s["accuracy"]),
            "faster": over(name, lambda s: s["faster"]),
            "multiply_adds": over(name, lambda s: s["multiply_adds"]),
            "units": some[0]["shrunk"][name]["units"],
            "− with noise, whole": paired(
                [c["shrunk"][name]["accuracy"] for c in some], [c["default"] for c in some]
            ),
            "− labels alone": paired([c["shrunk"][name]["accuracy"] for c in some], labels),
            "− dense": paired([c["shrunk"][name]["accuracy"] for c in some], [c["default"] for c in dense]),
        }
        if "before tuning" in some[0]["shrunk"][name]:
            out[name]["before tuning"] = over(name, lambda s: s["before tuning"])
    return out


def _gated(some: Sequence[Found]) -> dict[str, Any]:
    by_rate = {}
    for rate in (f"{r:g}" for r in RATES):
        cells = [cell["gated"]["by_rate"][rate] for cell in some]
        by_rate[rate] = {
            "rate": mean_interval([cell["rate"] for cell in cells]),
            "accuracy": mean_interval([cell["accuracy"] for cell in cells]),
            "− control": paired(
                [cell["accuracy"] for cell in cells], [cell["gated"]["control"] for cell in some]
            ),
        }
    return {
        "by_rate": by_rate,
        "control": mean_interval([cell["gated"]["control"] for cell in some]),
        "timed_rate": mean_interval([cell["gated"]["timing"]["rate"] for cell in some]),
        "control_over_gated": mean_interval(
            [
                cell["gated"]["timing"]["ms"]["control"] / cell["gated"]["timing"]["ms"]["gated"]
                for cell in some
            ]
        ),
        "saved": mean_interval([cell["gated"]["timing"]["saved"] for cell in some]),
        "units": [cell["shrunk"]["0.5"]["multiply_adds"] for cell in some],
    }
