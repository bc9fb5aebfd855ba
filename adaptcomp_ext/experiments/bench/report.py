"""The Markdown report: the required points first, then where compaction loses, training, memory, and everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .grid import is_required
from .markdown import environment, milliseconds, neighbours, number, table
from .problem import Config

__all__ = ["LABELS", "markdown"]

LABELS = {
    "auto": "auto",
    "compact": "compact=True",
    "mask": "compact=False",
    "auto_compile": "auto, compiled step",
    "boolean": "boolean indexing",
    "masked": "masked eager",
    "masked_compile": "masked compile",
}
WORST = 12

Row = Mapping[str, Any]


def _where(row: Row, mode: bool = True) -> list[str]:
    c = row["config"]
    cells = [
        c["core"],
        c["policy"],
        str(c["batch"]),
        str(c["dim"]),
        str(c["max_steps"]),
        f"{c['fraction']:g}",
    ]
    return [*cells, "train" if c["training"] else "infer"] if mode else cells


WHERE = ["core", "policy", "B", "D", "M", "mean/M"]


def _over_limit(row: Row) -> list[str]:
    ratios = row["ratios"]
    return [
        milliseconds(row["times_ms"]["limit"]["median"]),
        *(number(ratios.get(f"{n}/limit")) for n in LABELS),
    ]


def _worst(rows: Sequence[Row]) -> list[str]:
    lines = ["## Where auto loses", ""]
    if not rows:
        return [*lines, "Nothing was timed.", ""]
    ordered = sorted(rows, key=lambda row: -row["ratios"]["auto/best"])
    label = Config(**ordered[0]["config"]).label
    lines += [
        f"Worst case of auto against the better of masked eager and boolean indexing: "
        f"**{ordered[0]['ratios']['auto/best']:.2f}** times its time ({label}).",
    ]
    compiled = [row for row in rows if "masked_compile/auto" in row["ratios"]]
    if compiled:
        slowest = min(compiled, key=lambda row: row["ratios"]["masked_compile/auto"])
        label = Config(**slowest["config"]).label
        lines += [
            f"Against masked torch.compile, whose compile time is not counted: "
            f"**{1 / slowest['ratios']['masked_compile/auto']:.2f}** times its time ({label}).",
        ]
    lines += ["", "Over 1 means that auto is slower.", ""]
    return lines + table(
        [
            *WHERE,
            "mode",
            "auto / best of both",
            "auto / masked eager",
            "auto / boolean",
            "auto / masked compile",
        ],
        (
            [
                *_where(row),
                number(row["ratios"]["auto/best"]),
                number(1 / row["ratios"]["masked/auto"]),
                number(1 / row["ratios"]["boolean/auto"]),
                number(
                    1 / row["ratios"]["masked_compile/auto"]
                    if "masked_compile/auto" in row["ratios"]
                    else None
                ),
            ]
            for row in ordered[:WORST]
        ),
    )


def _memory(rows: Sequence[Row]) -> list[str]:
    names = ("masked", "boolean", "mask", "compact", "auto")
    head = [
        *WHERE,
        "sum of steps",
        "of masked",
        *(f"{LABELS[n]} MB" for n in names),
        "auto B / row-step",
        "masked / auto",
    ]
    return table(
        head,
        (
            [
                *_where(row, mode=False),
                str(row["row_steps"]),
                f"{100 * row['row_steps'] / row['masked_row_steps']:.0f} %",
                *(f"{row['bytes'][n] / 1e6:.2f}" for n in names),
                f"{row['bytes']['auto'] / row['row_steps']:.0f}",
                f"{row['bytes']['masked'] / row['bytes']['auto']:.2f}",
            ]
            for row in rows
        ),
    )


def _cuda(section: Mapping[str, Any]) -> list[str]:
    lines = ["## On the GPU", "", "Bandwidth of the row kernels against a device copy of the same block.", ""]
    lines += table(
        ["kernel", "row bytes", "kept", "GB/s", "copy GB/s", "of copy"],
        (
            [
                r["kernel"],
                str(r["row_bytes"]),
                f"{r['kept']:g}",
                f"{r['gb_per_s']:.0f}",
                f"{r['copy_gb_per_s']:.0f}",
                f"{100 * r['of_copy']:.0f} %",
            ]
            for r in section["bandwidth"]
        ),
    )
    lines += ['Under `torch.cuda.set_sync_debug_mode("error")`:', ""]
    return lines + table(
        ["policy", "compact", "host synchronisation"],
        ([r["policy"], r["form"], r["error"] or "none"] for r in section["synchronisation"]),
    )


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
    failed = [row for row in report["rows"] if row["error"] is not None]
    lines = [
        "# Halting benchmark",
        "",
        environment(report),
        "",
        "Ratios of times in the same round, median over interleaved rounds. *Limit*: core and head alone on tensors of "
        "each step's true number of active rows, without any bookkeeping. All contenders were checked to give the "
        "same outputs, steps and, in training, gradients."
        + (" The allocator keeps freed memory." if report["settings"]["keeps_freed_memory"] else ""),
        "",
        *neighbours(timed, report["machine"]["cores"]),
    ]
    if failed:
        lines += [
            "## Errors",
            "",
            *(f"- {Config(**row['config']).label}: {row['error']}" for row in failed),
            "",
        ]
    lines += ["## Over the limit: the required points", "", "Time over the limit's; 1 cannot be beaten.", ""]
    required = [row for row in timed if is_required(Config(**row["config"]))]
    lines += table(
        [*WHERE, "mode", "limit ms", *LABELS.values()], ([*_where(r), *_over_limit(r)] for r in required)
    )
    lines += _worst(timed)
    lines += [
        "## Training",
        "",
        "Forward and backward: how many times faster auto is; its time over the limit's.",
        "",
    ]
    lines += table(
        [*WHERE, "auto ms", "over masked eager", "over boolean", "over masked compile", "auto / limit"],
        (
            [
                *_where(row, mode=False),
                milliseconds(row["times_ms"]["auto"]["median"]),
                *(
                    number(row["ratios"].get(f"{rival}/auto"))
                    for rival in ("masked", "boolean", "masked_compile")
                ),
                number(row["ratios"]["auto/limit"]),
            ]
            for row in timed
            if row["config"]["training"]
        ),
    )
    if report["memory"]:
        lines += [
            "## Training memory",
            "",
            "Distinct storages kept for the backward pass, without weights and inputs. *Of masked*: the sum of steps "
            "as a share of B times the longest row.",
            "",
            *_memory(report["memory"]),
        ]
    if report["cuda"] is not None:
        lines += _cuda(report["cuda"])
    lines += ["## All configurations", "", "Limit in milliseconds, all others over the limit.", ""]
    lines += table(
        [*WHERE, "mode", "limit ms", *LABELS.values()], ([*_where(r), *_over_limit(r)] for r in timed)
    )
    if report["compile_seconds"]:
        lines += [
            "## Compile times",
            "",
            "Once per model, shared by all batch sizes; not in the times above.",
            "",
        ]
        lines += table(["model", "s"], ([name, f"{s:.1f}"] for name, s in report["compile_seconds"].items()))
    if report["skipped"]:
        lines += ["## Left out", "", "The masked form would have taken too long.", ""]
        lines += [*(f"- {Config(**config).label}" for config in report["skipped"]), ""]
    return "\n".join(lines)
