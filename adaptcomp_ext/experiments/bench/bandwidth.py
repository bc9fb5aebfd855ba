"""Bytes per second of the kernels that move rows, against a device copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

import adaptcomp_ext as ac

from .harness import Columns, DisagreementError
from .timing import Call, median_ms

BANDWIDTH: Columns = {
    "kernel": "{kernel}",
    "row bytes": "{row_bytes}",
    "kept": "{kept:g}",
    "GB/s": "{gb_per_s:.0f}",
    "copy GB/s": "{copy_gb_per_s:.0f}",
    "of copy": "{of_copy:.0%}",
}


def bandwidth(
    device: torch.device,
    seconds: float = 1.0,
    block_bytes: int = 1 << 30,
    row_bytes: Sequence[int] = (4096, 16384, 65536),
    shares: Sequence[float] = (1.0, 0.5, 0.1),
) -> Iterator[dict[str, Any]]:
    """Measure compaction and the halting step.

    These kernels move rows and do next to no arithmetic, so that the copy is what they can hope for. The
    block is far larger than a GPU's last-level cache. Counted are the bytes that have to move: a copy reads
    and writes the block; a compaction reads the kept rows and writes the whole padded block; a weighted
    halting step reads the readout, and reads and writes the output.
    """
    for size in row_bytes:
        rows = block_bytes // size
        block = torch.randn(rows, size // 4, device=device)
        other = torch.zeros_like(block)
        calls: dict[str, Call] = {"copy": partial(other.copy_, block)}
        about: dict[str, tuple[str, float, int]] = {"copy": ("copy", 1.0, 2 * block_bytes)}
        for share in shares:
            keep = torch.rand(rows, device=device) < share
            compact = partial(ac.ops.compact_padded, keep, [block])
            (packed,), _, count = compact()
            if not torch.equal(packed[: int(count)], block[keep]):
                raise DisagreementError(f"compact_padded: the rows of {size} bytes are not the kept ones")
            calls[f"compact {share:g}"] = compact
            about[f"compact {share:g}"] = "compact_padded", share, int(keep.sum()) * size + block_bytes
        steps = torch.zeros(rows, dtype=torch.int64, device=device)
        status = torch.zeros(rows, dtype=torch.int8, device=device)
        results = ac.ops.halting.Results(steps=steps, status=status, leaves=[], output=other)
        goes_on = torch.zeros(rows, dtype=torch.bool, device=device)
        index, weight = torch.arange(rows, device=device), torch.full((rows,), 0.05, device=device)
        step = partial(ac.ops.halting.halt_rows, results, index, goes_on, [], weight=weight, readout=block)
        calls["halt"] = partial(step, step=1, min_steps=1, max_steps=16)
        about["halt"] = "halt_rows", 1.0, 3 * block_bytes
        took = median_ms(calls, device, seconds, block=10.0)
        rate = {name: moved / took[name] / 1e6 for name, (_, _, moved) in about.items()}
        for name, (kernel, share, _) in list(about.items())[1:]:
            row = {"kernel": kernel, "row_bytes": size, "kept": share, "gb_per_s": rate[name]}
            row |= {"copy_gb_per_s": rate["copy"], "of_copy": rate[name] / rate["copy"]}
            yield {**row, "ms": {n: took[n] for n in ("copy", name)}}
