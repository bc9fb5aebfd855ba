"""What the cells found together: means and intervals over seeds, and what differences there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adaptcomp_ext.experiments.runs import Cell, mean_interval, paired

__all__ = ["summarise"]

Found = Mapping[str, Any]
FIGURES = ("success", "efficiency", "sweeps_per_step", "sweeps_per_episode", "correlation")


def summarise(cells: Sequence[Cell], found: Mapping[str, Found]) -> dict[str, Any]:
    """Means, intervals and differences; named tuples, which become lists in JSON."""

    def of(agent: str) -> list[Found]:
        return [found[c.name] for c in sorted(cells, key=lambda c: c.seed) if c.options["agent"] == agent]

    names = list(dict.fromkeys(c.options["agent"] for c in cells))
    priced = of("priced")
    timed = [found[name]["timing"] for name in found if name.startswith("timing-")]
    out: dict[str, Any] = {
        "agents": {name: _trial([cell["own"] for cell in of(name)]) for name in names},
        "controls": {},
        "fixed": {k: _trial([cell["fixed"][k] for cell in priced]) for k in priced[0]["fixed"]},
        "others": {
            where: {
                who: _trial([cell["others"][where][who] for cell in priced]) for who in ("own", "fixed 16")
            }
            for where in priced[0]["others"]
        },
        "by_distance": {
            name: _by_distance([cell[key] for cell in of(agent)])
            for name, agent, key in (
                ("priced", "priced", "by_distance"),
                ("priced, larger", "priced", "by_distance_larger"),
                ("free", "free", "by_distance"),
            )
        },
        "timing": [_timing(cases) for cases in zip(*timed, strict=True)],
        "curves": {name: _curve(of(name)) for name in names},
        "example": priced[0]["example"],
    }
    for control in ("shuffled", "fixed at the mean"):
        out["controls"][control] = {
            **_trial([cell[control] for cell in priced]),
            "own −": paired(
                [cell["own"]["efficiency"] for cell in priced],
                [cell[control]["efficiency"] for cell in priced],
            ),
            "own − success": paired(
                [cell["own"]["success"] for cell in priced], [cell[control]["success"] for cell in priced]
            ),
        }
    for rival in ("fixed-8", "fixed-16"):
        if rival in names:
            out[f"own − {rival}"] = {
                key: paired([cell["own"][key] for cell in priced], [cell["own"][key] for cell in of(rival)])
                for key in ("efficiency", "success")
            }
    return out


def _trial(trials: Sequence[Found]) -> dict[str, Any]:
    return {key: mean_interval([trial[key] for trial in trials]) for key in FIGURES}


def _by_distance(cells: Sequence[Sequence[Found]]) -> list[dict[str, Any]]:
    """Only distances that every seed met."""
    met = [{(entry["low"], entry["high"]): entry for entry in cell} for cell in cells]
    common = [key for key in met[0] if all(key in cell for cell in met)]
    return [
        {
            "low": low,
            "high": high,
            "sweeps": mean_interval([cell[low, high]["sweeps"] for cell in met]),
            "none": mean_interval([cell[low, high]["none"] for cell in met]),
        }
        for low, high in common
    ]


def _timing(cells: Sequence[Found]) -> dict[str, Any]:
    out: dict[str, Any] = {key: cells[0][key] for key in ("mazes", "size")}
    for key in ("masked / gated", "fixed 16 / gated"):
        out[key] = mean_interval([cell[key] for cell in cells])
    out["ms"] = {name: mean_interval([cell["ms"][name] for cell in cells]) for name in cells[0]["ms"]}
    return out


def _curve(cells: Sequence[Found]) -> dict[str, Any]:
    points = range(min(len(cell["curve"]) for cell in cells))
    return {
        "every": cells[0]["every"],
        **{
            key: [mean_interval([cell["curve"][i][key] for cell in cells]) for i in points]
            for key in ("sweeps", "efficiency", "success", "correlation")
        },
    }
