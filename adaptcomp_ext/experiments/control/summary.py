"""What the cells found together: means and intervals over seeds, and what differences there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adaptcomp_ext.experiments.runs import Cell, mean_interval, paired

from .cell import APART, KINDS

__all__ = ["summarise"]

Found = Mapping[str, Any]


def summarise(cells: Sequence[Cell], found: Mapping[str, Found]) -> dict[str, Any]:
    """Means, intervals and differences; named tuples, which become lists in JSON."""

    def of(agent: str) -> list[Found]:
        return [
            found[c.name]
            for c in sorted(cells, key=lambda c: c.seed)
            if c.options["settings"]["gate"] == agent
        ]

    names = list(dict.fromkeys(c.options["settings"]["gate"] for c in cells))
    out: dict[str, Any] = {"agents": {name: _agent(of(name)) for name in names}}
    if "value" in names:
        value = of("value")
        out["gates"] = {kind: _gate(value, kind) for kind in KINDS}
        out["prices"] = [
            _price([c["prices"][i] for c in value], value) for i in range(len(value[0]["prices"]))
        ]
        out["where"] = _where([c["where"] for c in value], (*APART, "gain"))
        out["on the way"] = [
            {
                "round": entry["round"],
                "rate": mean_interval([c["checks"][i]["rate"] for c in value]),
                "− at random": paired(
                    [c["checks"][i]["return"] for c in value], [c["checks"][i]["at random"] for c in value]
                ),
                **_where([c["checks"][i]["where"] for c in value], APART),
            }
            for i, entry in enumerate(value[0]["checks"])
        ]
        out["strip"] = value[0]["strip"]
        for rival in ("always", "random"):
            if rival in names:
                others = of(rival)
                out[f"value − {rival}"] = {
                    "return": paired(
                        [c["own"]["return"] for c in value], [c["own"]["return"] for c in others]
                    ),
                    "learning": paired(
                        [_over_training(c) for c in value], [_over_training(c) for c in others]
                    ),
                    "checks": [
                        paired(
                            [c["checks"][i]["return"] for c in value],
                            [c["checks"][i]["return"] for c in others],
                        )
                        for i in range(len(value[0]["checks"]))
                    ],
                    "prices": [
                        paired(
                            [c["prices"][i]["return"] for c in value], [c["own"]["return"] for c in others]
                        )
                        for i in range(len(value[0]["prices"]))
                    ],
                    "saved": mean_interval(
                        [1 - _seconds(a) / _seconds(b) for a, b in zip(value, others, strict=True)]
                    ),
                }
    return out


def _seconds(cell: Found) -> float:
    return float(sum(cell["training"].values()))


def _over_training(cell: Found) -> float:
    """Mean return over all rounds: how fast it was learned."""
    return float(sum(r["return"] for r in cell["history"]) / len(cell["history"]))


def _agent(cells: Sequence[Found]) -> dict[str, Any]:
    rounds = range(len(cells[0]["history"]))
    acted = [c["history"][c["warm"] :] for c in cells]
    return {
        "return": mean_interval([c["own"]["return"] for c in cells]),
        "rate": mean_interval([c["own"]["rate"] for c in cells]),
        "training rate": mean_interval([sum(r["rate"] for r in some) / len(some) for some in acted]),
        "iterations": mean_interval([c["own"]["iterations"] for c in cells]),
        "seconds": mean_interval([_seconds(c) for c in cells]),
        "share of planning": mean_interval([c["training"]["act"] / _seconds(c) for c in cells]),
        "broken": sum(c["own"]["broken"] for c in cells)
        + sum(r["broken"] for c in cells for r in c["history"]),
        "steps": cells[0]["steps"],
        "curve": {
            key: [mean_interval([c["history"][i][key] for c in cells]) for i in rounds]
            for key in ("return", "rate", "divergence", "gain")
        },
        "checks": [
            {
                "round": entry["round"],
                **{key: mean_interval([c["checks"][i][key] for c in cells]) for key in ("return", "rate")},
            }
            for i, entry in enumerate(cells[0]["checks"])
        ],
    }


def _gate(cells: Sequence[Found], kind: str) -> dict[str, Any]:
    some = [c["gates"][kind] for c in cells]
    return {
        "return": mean_interval([s["return"] for s in some]),
        "rate": mean_interval([s["rate"] for s in some]),
        "value −": paired([c["gates"]["value"]["return"] for c in cells], [s["return"] for s in some]),
    }


def _price(some: Sequence[Found], cells: Sequence[Found]) -> dict[str, Any]:
    return {
        "price": some[0]["price"],
        "return": mean_interval([s["return"] for s in some]),
        "rate": mean_interval([s["rate"] for s in some]),
        "− everywhere": paired([s["return"] for s in some], [c["gates"]["always"]["return"] for c in cells]),
    }


def _where(some: Sequence[Found], names: Sequence[str]) -> dict[str, Any]:
    out: dict[str, Any] = {
        f"rank correlation with {key}": mean_interval([s[f"rank correlation with {key}"] for s in some])
        for key in ("gain", *APART)
    }
    for name in names:
        rates = [s[f"rate by {name}"] for s in some]
        out[f"rate by {name}"] = [mean_interval([rate[i] for rate in rates]) for i in range(3)]
        out[f"most − least {name}"] = paired([rate[2] for rate in rates], [rate[0] for rate in rates])
    return out
