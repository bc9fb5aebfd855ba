"""What the cells found together: means and intervals over seeds, and whether what was expected holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adaptcomp_ext.experiments.data import Condition
from adaptcomp_ext.experiments.runs import Cell, Difference, Interval, mean_interval, paired

from .gates import GATES, RATES

__all__ = ["CONDITIONS", "EQUAL", "MAX_RATE", "Results", "gate_values", "summarise"]

CONDITIONS = tuple(condition.name.lower() for condition in Condition)
MIXED = "mixed"
CALIBRATIONS = ("as trained", MIXED)
MAX_RATE = "0.4"
TABLE_RATE = "0.2"
EQUAL = 0.005
"""Accuracy that a gated answer may lose against control everywhere."""
TASKS = ("read", "name")

Found = Mapping[str, Any]


class Results:
    """The cells' results by part, and in the order of the seeds."""

    def __init__(self, cells: Sequence[Cell], found: Mapping[str, Found]) -> None:
        self.cells, self.found = cells, found

    def of(self, part: str, **options: Any) -> list[Found]:
        """The results of the cells with these options, in the order of their seeds."""
        chosen = [
            c
            for c in self.cells
            if c.options["part"] == part and all(c.options.get(k) == v for k, v in options.items())
        ]
        return [self.found[c.name] for c in sorted(chosen, key=lambda c: c.seed)]

    def values(self, part: str, key: str) -> list[Any]:
        """The values of an option among the cells of a part, each once, in their order."""
        return list(dict.fromkeys(c.options[key] for c in self.cells if c.options["part"] == part))


def gate_values(
    cells: Sequence[Found], how: str, gate: str, rate: str, stream: str, what: str
) -> list[float]:
    """One figure of a gate at one rate, for each seed."""
    return [float(cell["gates"][how][gate][rate][stream][what]) for cell in cells]


def summarise(results: Results) -> dict[str, Any]:
    """Means, intervals and differences; named tuples, which become lists in JSON."""
    summary: dict[str, Any] = {"main": {}, "reaction": {}, "effort": {}}
    for p in results.values("main", "congruent"):
        summary["main"][f"{p:g}"] = _main(results.of("main", congruent=p))
    for setting in results.values("reaction", "setting"):
        summary["reaction"][setting] = _reaction(results.of("reaction", setting=setting))
    for effort in results.values("effort", "effort"):
        (cell,) = results.of("effort", effort=effort)
        summary["effort"][effort] = {
            "accuracy": cell["accuracy"],
            "entropy": cell["entropy"],
            "price": [epoch["effort"] for epoch in cell["training"]],
        }
    return summary


def _main(cells: Sequence[Found]) -> dict[str, Any]:
    def over(get: Callable[[Found], float]) -> Interval:
        return mean_interval([float(get(cell)) for cell in cells])

    def gated(how: str, gate: str, rate: str, stream: str, what: str) -> list[float]:
        return gate_values(cells, how, gate, rate, stream, what)

    out: dict[str, Any] = {
        "accuracy": {
            who: {c: over(lambda cell, who=who, c=c: cell["accuracy"][who][c]) for c in CONDITIONS}  # type: ignore[misc]
            for who in ("cnn", "default", "control")
        },
        "gates": {
            how: {
                gate: {
                    f"{rate:g}": {
                        f"{stream}/{what}": mean_interval(gated(how, gate, f"{rate:g}", stream, what))
                        for stream in (*CONDITIONS, MIXED)
                        for what in ("rate", "control", "mixture")
                    }
                    for rate in RATES
                }
                for gate in GATES
            }
            for how in CALIBRATIONS
        },
        "always": {s: over(lambda cell, s=s: cell["always"][s]["control"]) for s in (*CONDITIONS, MIXED)},  # type: ignore[misc]
        "always_mixture": {
            s: over(lambda cell, s=s: cell["always"][s]["mixture"])  # type: ignore[misc]
            for s in (*CONDITIONS, MIXED)
        },
        "entropy": {
            c: {
                who: over(lambda cell, c=c, who=who: cell["entropy"][c][who])  # type: ignore[misc]
                for who in ("default", "control")
            }
            for c in CONDITIONS
        },
        "parameters": cells[0]["parameters"],
        "multiply_adds": cells[0]["multiply_adds"],
        "saved": over(lambda cell: cell["timing"]["saved"]),
        "control_over_default": over(lambda cell: cell["timing"]["control_over_default"]),
        "timed_rate": over(lambda cell: cell["timing"]["rate"]),
        "ms": {k: over(lambda cell, k=k: cell["timing"]["ms"][k]) for k in cells[0]["timing"]["ms"]},  # type: ignore[misc]
        "seconds": over(lambda cell: cell["seconds"]),
    }
    cnn = [cell["accuracy"]["cnn"]["incongruent"] for cell in cells]
    always = [cell["always"][MIXED]["control"] for cell in cells]
    differences: dict[str, Difference] = {
        "control − CNN, incongruent": paired([c["accuracy"]["control"]["incongruent"] for c in cells], cnn),
    }
    for rate in (TABLE_RATE, MAX_RATE):
        share = f"{100 * float(rate):g} %"
        differences[f"ACC calling {share} of held-out items − CNN, incongruent"] = paired(
            gated("as trained", "value", rate, "incongruent", "control"), cnn
        )
    for rate in (f"{r:g}" for r in RATES):
        share = f"{100 * float(rate):g} %"
        value = gated(MIXED, "value", rate, MIXED, "control")
        entropy = gated(MIXED, "entropy", rate, MIXED, "control")
        random = gated(MIXED, "random", rate, MIXED, "control")
        differences[f"value − entropy gate at {share}, mixed"] = paired(value, entropy)
        differences[f"value − random gate at {share}, mixed"] = paired(value, random)
        differences[f"value gate at {share} − always, mixed"] = paired(value, always)
        differences[f"calls of incongruent − congruent items at {share}, value gate"] = paired(
            gated(MIXED, "value", rate, MIXED, "rate_incongruent"),
            gated(MIXED, "value", rate, MIXED, "rate_congruent"),
        )
    out["differences"] = differences
    out["mcnemar"] = {
        f"{rate:g}": max(cell["mcnemar"][f"{rate:g}"]["value"] for cell in cells) for rate in RATES
    }
    return out


def _reaction(cells: Sequence[Found]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for task in TASKS:
        steps = {c: [cell["final"][f"{task}/{c}/steps"] for cell in cells] for c in CONDITIONS}
        out[task] = {
            "steps": {c: mean_interval(values) for c, values in steps.items()},
            "right": {
                c: mean_interval([cell["final"][f"{task}/{c}/right"] for cell in cells]) for c in CONDITIONS
            },
            "effect": paired(steps["incongruent"], steps["congruent"]),
            "interference": paired(steps["incongruent"], steps["neutral"]),
            "facilitation": paired(steps["neutral"], steps["congruent"]),
            "effects": [a - b for a, b in zip(steps["incongruent"], steps["congruent"], strict=True)],
            "practice": [
                paired(
                    [cell["history"][epoch][f"{task}/incongruent/steps"] for cell in cells],
                    [cell["history"][epoch][f"{task}/congruent/steps"] for cell in cells],
                )
                for epoch in range(len(cells[0]["history"]))
            ],
        }
    out["masked_over_compacted"] = mean_interval([cell["timing"]["masked_over_compacted"] for cell in cells])
    out["updates"] = cells[0]["recipe"]["updates"]
    out["seconds"] = mean_interval([cell["seconds"] for cell in cells])
    return out
