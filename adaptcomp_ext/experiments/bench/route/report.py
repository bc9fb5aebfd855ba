"""The report: tables, as Markdown for the file and on the screen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import rich.table
from rich.console import Console

from ..markdown import environment, milliseconds, neighbours, number, table
from .contenders import LABELS
from .measure import BLOCK, TOLERANCE
from .problem import DIM

__all__ = ["markdown", "show", "tables"]

RIVALS = ("masking", "boolean", "indexed")
HEAD = (
    "B",
    "hidden",
    "routed",
    "limit ms",
    "route ms",
    "route / limit",
    *(f"{LABELS[name]} / route" for name in RIVALS),
)
TITLES = {"infer": "Inference", "train": "Training: forward and backward"}

CONTENDERS = f"""\
The branch is a network of two linear layers with SiLU between, from {DIM} to {DIM} elements. Contenders, checked before timing to
give the same results and gradients within {TOLERANCE:.0e} of the largest element:

- *route*: `ac.route(mask, branch, x, otherwise=y)`.
- *masking*: `torch.where(mask[:, None], branch(x), y)`.
- *boolean indexing*: `out = y.clone(); out[mask] = branch(x[mask])`.
- *index_select*: `y.index_copy(0, i, branch(x.index_select(0, i)))` with `i` from one `nonzero`.
- *limit*: the branch alone on the routed rows, taken out beforehand. It has no result of B rows: 1 cannot be reached.

In training the gradients of the weights, of x and of y are wanted. Ratios of times in the same round, median over interleaved
rounds: a rival over 1 is slower than route. A call shorter than {BLOCK:g} ms is made as often as fits into that time."""


class Table(NamedTuple):
    """A section of the report."""

    title: str
    lines: list[list[str]]


def _line(row: Mapping[str, Any]) -> list[str]:
    config, times, ratios = row["config"], row["times_ms"], row["ratios"]
    return [
        str(config["batch"]),
        str(config["hidden"]),
        f"{100 * config['share']:g} %",
        milliseconds(times["limit"]["median"]),
        milliseconds(times["route"]["median"]),
        number(ratios["route/limit"]),
        *(number(ratios[f"{name}/route"]) for name in RIVALS),
    ]


def tables(report: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the modes that were measured, with one line for each configuration that has times."""
    for mode, title in TITLES.items():
        lines = [
            _line(row) for row in report["rows"] if row["error"] is None and row["config"]["mode"] == mode
        ]
        if lines:
            yield Table(title, lines)


def _errors(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    failed = [f"- {row['label']}: {row['error']}" for row in rows if row["error"] is not None]
    return ["## Errors", "", *failed, ""] if failed else []


def markdown(report: Mapping[str, Any]) -> str:
    """Write the report.

    Parameters
    ----------
    report : mapping
        The content of the JSON file.

    Returns
    -------
    str
        Markdown.
    """
    settings = report["settings"]
    timed = [row for row in report["rows"] if row["error"] is None]
    lines = [
        "# Routing benchmark",
        "",
        environment(report),
        "",
        f"{settings['seconds']:g} s for each configuration, seed {settings['seed']}; float32."
        + (" The allocator keeps freed memory." if settings["keeps_freed_memory"] else ""),
        "",
        *CONTENDERS.split("\n"),
        "",
        *neighbours(timed, report["machine"]["cores"]),
        *_errors(report["rows"]),
    ]
    for section in tables(report):
        lines += [f"## {section.title}", "", *table(HEAD, section.lines)]
    return "\n".join(lines)


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print the tables."""
    for text in (environment(report), *_errors(report["rows"])):
        console.print(text, markup=False, highlight=False)
    for section in tables(report):
        drawn = rich.table.Table(title=section.title, title_justify="left", title_style="bold")
        for name in HEAD:
            drawn.add_column(name, justify="right")
        for line in section.lines:
            drawn.add_row(*line)
        console.print(drawn)
