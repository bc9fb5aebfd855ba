"""What is asked of the ratios, and whether they reach it. The bars are for two CPU cores and float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .grid import SIZES, at

__all__ = ["BARS", "Verdict", "judge"]

Row = Mapping[str, Any]


class Bar(NamedTuple):
    """A ratio of one configuration, and what it should be at least."""

    mode: str
    size: int
    key: str
    least: float


BARS = (
    *(Bar("all", size, "eager/kernel", least) for size, least in enumerate((20.0, 5.0, 3.0, 2.0))),
    *(Bar("all", size, "compiled/kernel", least) for size, least in enumerate((3.0, 2.0))),
    Bar("all", 2, "analytic/kernel", 1.5),
    Bar("all", 3, "analytic/kernel", 1.2),
    *(Bar("all", size, "kernel/matmul", 0.6) for size in (1, 2, 3)),
    *(Bar("stop", size, "kernel_all/kernel", 3.0) for size in (0, 1, 2)),
    *(Bar("train", size, "eager/kernel", 5.0) for size in (0, 1)),
)

GENERIC = 1.0
"""eager/generic, in inference."""

MEMORY = 1.05
"""What the kernel keeps for the backward pass of more steps, over what the points of those steps take."""

_MEANINGS = {
    "eager/kernel": "eager over kernel",
    "compiled/kernel": "compiled over kernel",
    "analytic/kernel": "analytic over kernel",
    "kernel_all/kernel": "all steps over stopping, kernel",
    "kernel/matmul": "share of the matrix product's rate",
}


class Verdict(NamedTuple):
    """A bar, what was found, and whether it is reached. What was not measured has no verdict."""

    what: str
    where: str
    bar: str
    found: float
    passed: bool


def judge(rows: Iterable[Row], memory: Sequence[Row] = ()) -> list[Verdict]:
    """Compare the rows of the report with the bars.

    Parameters
    ----------
    rows, memory : sequence
        Of the report.

    Returns
    -------
    list of Verdict
        One for each bar that has a measured ratio.
    """
    timed = [row for row in rows if row["error"] is None]
    by_config = {_key(row["config"]): row["ratios"] for row in timed}
    verdicts = []
    for mode, size, key, least in BARS:
        config = at(mode, size)
        found = by_config.get(_key(config.as_dict()), {}).get(key)
        if found is not None:
            bar = f"≥ {100 * least:.0f} %" if key == "kernel/matmul" else f"≥ {least:g}"
            verdicts.append(Verdict(_MEANINGS[key], config.label, bar, found, found >= least))
    inferring = [row for row in timed if row["config"]["mode"] != "train"]
    if inferring:
        slowest = min(inferring, key=lambda row: row["ratios"]["eager/generic"])
        found = slowest["ratios"]["eager/generic"]
        verdicts.append(
            Verdict(
                "eager over generic, worst in inference",
                slowest["label"],
                f"≥ {GENERIC:g}",
                found,
                found >= GENERIC,
            )
        )
    for shape in SIZES:
        kept = [row for row in memory if tuple(row["size"]) == shape]
        if len(kept) > 1:
            found = growth(kept[0], kept[-1])
            where = f"B={shape[0]} y={shape[2]}, {kept[0]['steps']} → {kept[-1]['steps']} steps"
            verdicts.append(
                Verdict(
                    "kernel: bytes kept per byte of points", where, f"≤ {MEMORY:g}", found, found <= MEMORY
                )
            )
    return verdicts


def growth(few: Row, many: Row) -> float:
    """Return by how much more the kernel keeps for more steps, over what the points of those steps take."""
    more = many["bytes"]["kernel"]["kept"] - few["bytes"]["kernel"]["kept"]
    return float(more / (many["points"] - few["points"]))


def _key(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two configurations the same measurement."""
    return tuple(
        tuple(value) if name == "hidden" else value
        for name, value in sorted(config.items())
        if name != "compiled"
    )
