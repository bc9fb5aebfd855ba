"""The report: tables, as Markdown for the file and on the screen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import rich.table
from rich.console import Console

from ..markdown import environment, milliseconds, neighbours, number, table
from .bars import growth
from .contenders import LABELS
from .measure import BLOCK, PRODUCT, TOLERANCE
from .problem import FRACTION

__all__ = ["markdown", "show", "tables"]

Row = Mapping[str, Any]

RIVALS = ("eager", "compiled", "analytic", "private", "generic")
WHERE = ("energy", "B", "context", "y", "hidden", "M")


class Table(NamedTuple):
    """A section of the report."""

    title: str
    text: str
    head: tuple[str, ...]
    lines: list[list[str]]


def _where(row: Row) -> list[str]:
    c = row["config"]
    energy = f"{c['kind']}, {c['activation']}" if c["kind"] == "mlp" else c["kind"]
    widths = "×".join(map(str, c["hidden"])) or "–"
    return [energy, str(c["batch"]), str(c["context"] or "–"), str(c["dim"]), widths, str(c["steps"])]


def _kernel(row: Row) -> str:
    return milliseconds(row["times_ms"]["kernel"]["median"])


def _over(row: Row, names: Sequence[str]) -> list[str]:
    return [number(row["ratios"].get(f"{name}/kernel")) for name in names]


def _times(title: str, text: str, rows: Sequence[Row], names: Sequence[str]) -> Table:
    head = (*WHERE, "kernel ms", *(f"{LABELS[name]} / kernel" for name in names), "eager / generic")
    lines = [[*_where(r), _kernel(r), *_over(r, names), number(r["ratios"]["eager/generic"])] for r in rows]
    return Table(title, text, head, lines)


def _stopping(rows: Sequence[Row]) -> Table:
    names = (*RIVALS, "kernel_all")
    section = _times(
        f"Rows that stop on their own, mean/M = {FRACTION:g}",
        "Each row starts at the point of its trajectory from which its gradient's norm reaches the tolerance after as many steps "
        "as a clipped geometric schedule asks for. All but generic and kernel run all rows until the last one has stopped, "
        "behind a mask; generic and kernel drop each row where it stops. The network has a ridge of 1. *Kernel, all steps*: the "
        "kernel without a tolerance, from the same points.",
        rows,
        names,
    )
    lines = [
        [*line, number(s["mean"] / row["config"]["steps"], 3), str(s["longest"]), number(s["tol"], 3)]
        for line, row in zip(section.lines, rows, strict=True)
        if (s := row["steps"])
    ]
    return section._replace(head=(*section.head, "mean/M", "longest", "tol"), lines=lines)


def _rates(rows: Sequence[Row]) -> Table:
    return Table(
        "Rate of the arithmetic",
        "Operations of the products with y, forth and back (4·B·y·hidden for each step of a network with one layer, and where "
        "rows stop of the steps that they took), over the kernel's time, which includes the context's part, the activations and "
        f"the energies. Next to it the rate of a {PRODUCT} × {PRODUCT} × {PRODUCT} matrix product in the same rounds.",
        ("mode", *WHERE, "kernel GFLOP/s", "product GFLOP/s", "share"),
        [
            [
                row["config"]["mode"],
                *_where(row),
                number(row["gflops"]["kernel"], 1),
                number(row["gflops"]["matmul"], 1),
                f"{100 * row['ratios']['kernel/matmul']:.0f} %",
            ]
            for row in rows
            if row["gflops"] is not None
        ],
    )


def _memory(rows: Sequence[Row]) -> Table:
    names = ("eager", "analytic", "generic", "kernel")
    lines = []
    for i, row in enumerate(rows):
        before = rows[i - 1] if i and rows[i - 1]["size"] == row["size"] else None
        lines.append(
            [
                *(str(row["size"][k]) for k in (0, 2, 3)),
                str(row["steps"]),
                f"{row['points'] / 1e6:.3f}",
                *(f"{row['bytes'][name]['kept'] / 1e6:.3f}" for name in names),
                number(None if before is None else growth(before, row), 3),
                *(f"{row['bytes'][name]['peak'] / 1e6:.3f}" for name in names),
            ]
        )
    return Table(
        "Training memory",
        "MB of the tensors that live between forward and backward, beyond weights and inputs, and at most at any time. "
        "*Points*: y after every step, which the kernel stores. *Per point*: how much more the kernel keeps than with fewer "
        "steps, over how much more the points take. What a kernel allocates and frees within one call is not seen.",
        (
            *("B", "y", "hidden", "steps", "points"),
            *(f"{LABELS[name]}, kept" for name in names),
            "per point",
            *(f"{LABELS[name]}, peak" for name in names),
        ),
        lines,
    )


def _bars(report: Mapping[str, Any]) -> Table:
    threads = report["machine"]["threads"]
    lines = []
    for v in report["bars"]:
        found = f"{100 * v['found']:.0f} %" if v["bar"].endswith("%") else number(v["found"])
        lines.append([v["what"], v["where"], v["bar"], found, "PASS" if v["passed"] else "short"])
    run = "" if threads == 2 else f" This run used {threads}."
    return Table(
        "The bars",
        "What the kernel is meant to reach on two CPU cores, with two threads, in float32." + run,
        ("ratio", "where", "bar", "found", ""),
        lines,
    )


def tables(report: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the sections that have something to say.

    Parameters
    ----------
    report : mapping
        The content of the JSON file.
    """
    timed = [row for row in report["rows"] if row["error"] is None]
    by_mode = {
        mode: [row for row in timed if row["config"]["mode"] == mode] for mode in ("all", "stop", "train")
    }
    found = [
        _bars(report),
        _times(
            "All rows, all steps",
            "Inference: the point after M steps. Without a tolerance.",
            by_mode["all"],
            RIVALS,
        ),
        _stopping(by_mode["stop"]),
        _times(
            "Training",
            "Forward and backward through all steps: the gradients of mean (y − target)² in weights, y₀ and context.",
            by_mode["train"],
            ("eager", "analytic", "generic"),
        ),
        _rates(timed),
        _memory(report["memory"]),
        Table(
            "Compile times",
            "Of the compiled contender, as far as the compiler's cache did not have it; not in the times above.",
            ("configuration", "s"),
            [[name, f"{seconds:.1f}"] for name, seconds in report["compile_seconds"].items()],
        ),
    ]
    yield from (section for section in found if section.lines)


CONTENDERS = f"""\
Contenders, checked before timing to give the same points, steps and gradients within {TOLERANCE:.0e} of the largest element:

- *eager autograd*: `y = y − α·grad(energy(y, x).sum(), y)` with `torch.autograd.grad`, the energy written with `linear` on y
  and on x at every step, weights without `requires_grad`; in training `create_graph=True`, and the graph of all steps is kept.
- *compiled*: that step with `torch.func.grad` under `torch.compile`, static shapes; on CUDA with `mode="reduce-overhead"`.
- *analytic*: the gradient as a formula in torch's public operations. The context's part once, `addmm` into buffers allocated
  beforehand, everything in place, no autograd; for a quadratic energy the step as one product. In training the formula recorded
  by autograd, which needs no second-order graph.
- *analytic, aten*: the same with the activation's derivative from the private operations of torch's own backward passes, such as
  `aten.silu_backward`: one pass over memory instead of five.
- *generic*: `EnergyDescent` on the eager energy as a function.
- *kernel*: `EnergyDescent` on `MLPEnergy`, `HopfieldEnergy` or `QuadraticEnergy`.

All of them return the last points and their energies.

Ratios of times in the same round, median over interleaved rounds: over 1 the kernel, or the generic form, is the faster. In each
round a call shorter than {BLOCK:g} ms is made as often as fits into that time, and its mean counts; a call that comes once, after
something else has had the caches and the threads, takes longer, most of all the shortest ones."""


def _notes(report: Mapping[str, Any]) -> list[str]:
    notes = []
    if report["compiler"] is not None:
        notes += [f"The compiled contender was left out: {report['compiler']}.", ""]
    if report["settings"]["keeps_freed_memory"]:
        notes += ["The allocator keeps freed memory.", ""]
    return notes


def _errors(report: Mapping[str, Any]) -> list[str]:
    failed = [f"- {row['label']}: {row['error']}" for row in report["rows"] if row["error"] is not None]
    return ["## Errors", "", *failed, ""] if failed else []


def markdown(report: Mapping[str, Any]) -> str:
    """Render the report.

    Parameters
    ----------
    report : mapping
        The content of the JSON file.

    Returns
    -------
    str
        Markdown.
    """
    timed = [row for row in report["rows"] if row["error"] is None]
    settings = report["settings"]
    lines = [
        "# Energy descent benchmark",
        "",
        environment(report),
        "",
        f"{settings['seconds']:g} s for each configuration, seed {settings['seed']}; float32.",
        "",
        *CONTENDERS.split("\n"),
        "",
        *_notes(report),
        *neighbours(timed, report["machine"]["cores"]),
        *_errors(report),
    ]
    for section in tables(report):
        lines += [f"## {section.title}", "", section.text, "", *table(section.head, section.lines)]
    return "\n".join(lines)


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print the tables."""
    for text in (environment(report), *_notes(report), *_errors(report)):
        console.print(text, markup=False, highlight=False)
    for section in tables(report):
        drawn = rich.table.Table(title=section.title, title_justify="left", title_style="bold")
        for i, name in enumerate(section.head):
            drawn.add_column(name, justify="left" if i == 0 else "right")
        for line in section.lines:
            drawn.add_row(*line)
        console.print(drawn)
