"""What only a GPU can show: no synchronisation inside the loop, and the bandwidth of the row kernels.

The kernels move rows and do next to no arithmetic, so the bandwidth of a plain device copy is what they can
hope for. Rows are 4 KB and larger, blocks far larger than the last-level cache, and many launches are timed
between two events, so that neither launches nor caches flatter the result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import adaptcomp_ext as ac

from .contenders import forward_contenders
from .problem import POLICIES, Config, make_model, make_problem

__all__ = ["bandwidth_rows", "sync_rows"]

BLOCK_BYTES = 1 << 30
ROW_BYTES = (4096, 16384, 65536)
LAUNCHES = 20


def _seconds(call: Callable[[], Any]) -> float:
    """Best of five batches of launches between two events, per launch."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(3):
        call()
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        begin.record()
        for _ in range(LAUNCHES):
            call()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3 / LAUNCHES)
    return best


def bandwidth_rows(device: torch.device) -> list[dict[str, Any]]:
    """Measure bytes per second of compaction and of the halting step against a device copy.

    Bytes are those that have to move: a copy reads and writes the block; a compaction reads the kept rows and
    writes the whole padded block; a weighted halting step reads the readout, and reads and writes the output.
    """
    found = []
    for row_bytes in ROW_BYTES:
        rows, width = BLOCK_BYTES // row_bytes, row_bytes // 4
        block = torch.randn(rows, width, device=device)
        other = torch.empty_like(block)
        copy = 2 * BLOCK_BYTES / _seconds(partial(other.copy_, block))
        for kept in (1.0, 0.5, 0.1):
            keep = torch.rand(rows, device=device) < kept
            seconds = _seconds(partial(ac.ops.compact_padded, keep, [block]))
            moved = int(keep.sum()) * row_bytes + BLOCK_BYTES
            found.append(_row("compact_padded", row_bytes, kept, moved / seconds, copy))
        results = ac.ops.halting.Results(
            steps=torch.zeros(rows, dtype=torch.int64, device=device),
            status=torch.zeros(rows, dtype=torch.int8, device=device),
            leaves=[],
            output=other.zero_(),
        )
        index = torch.arange(rows, device=device)
        goes_on = torch.zeros(rows, dtype=torch.bool, device=device)
        weight = torch.full((rows,), 0.05, device=device)
        step = partial(
            ac.ops.halting.halt_rows,
            results,
            index,
            goes_on,
            [],
            step=1,
            min_steps=1,
            max_steps=16,
            weight=weight,
            readout=block,
        )
        found.append(_row("halt_rows", row_bytes, 1.0, 3 * BLOCK_BYTES / _seconds(step), copy))
    return found


def _row(kernel: str, row_bytes: int, kept: float, rate: float, copy: float) -> dict[str, Any]:
    return {
        "kernel": kernel,
        "row_bytes": row_bytes,
        "kept": kept,
        "gb_per_s": rate / 1e9,
        "copy_gb_per_s": copy / 1e9,
        "of_copy": rate / copy,
    }


def sync_rows(device: torch.device, seed: int) -> list[dict[str, Any]]:
    """Run the halting loop where any host synchronisation raises, for every policy and form.

    ``error`` is None where the loop never waited for the device.
    """
    found = []
    for policy in POLICIES:
        config = Config("gru", 1024, 256, policy=policy)
        problem = make_problem(config, make_model(config, device, seed), device, seed)
        with torch.inference_mode():
            calls = forward_contenders(problem, None)
            for name in ("auto", "compact", "mask"):
                for _ in range(3):
                    calls[name]()
                torch.cuda.synchronize(device)
                error = None
                torch.cuda.set_sync_debug_mode("error")
                try:
                    calls[name]()
                except RuntimeError as problem_found:
                    error = str(problem_found).splitlines()[0]
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                found.append({"policy": policy, "form": name, "error": error})
    return found
