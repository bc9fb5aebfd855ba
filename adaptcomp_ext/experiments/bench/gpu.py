"""A first look at a GPU in a few minutes: bandwidth, whole descents and recurrences, halting.

In the order of interest: the bandwidth of a device copy, of compaction and of the halting step; whole
descents against the same descent by autograd; whole recurrences against the loop that calls the cell step by
step; halting with and without compaction. Each line is printed, and
the file written, as soon as it is measured, so that a run that is cut short leaves what it had. Every form is
checked against the first one before it is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adaptcomp_ext as ac
from adaptcomp_ext.experiments.device import device_named
from adaptcomp_ext.experiments.files import write_json

from . import energy_forms as energy
from . import halting_forms as halting
from . import harness, machine
from . import recurrence_forms as recurrence
from .harness import Columns, DisagreementError
from .timing import Call, median_ms

TOLERANCE = 2e-3
"""Relative to the largest element: products of a BLAS round by the size of the batch; TF32 is off."""
Sizes = Sequence[tuple[int, int]]
REQUIRED: Mapping[tuple[int, int], float] = {(4096, 128): 5.0}
"""How many times as fast as the stepwise loop a whole recurrence has to be, by rows and width."""


def agree(outputs: Mapping[str, Tensor], what: str) -> None:
    """Raise unless all outputs are those of the first form up to rounding."""
    harness.compare({name: (out,) for name, out in outputs.items()}, (what,), next(iter(outputs)), TOLERANCE)


def moving(device: torch.device, seconds: float, block_bytes: int) -> Iterator[dict[str, Any]]:
    """Measure the bandwidth at several widths, half of the rows kept."""
    for row in bandwidth(device, seconds, block_bytes, (256, 4096, 65536), (0.5,)):
        rates = {"copy": row["copy_gb_per_s"], row["kernel"]: row["gb_per_s"]}
        ratio = {f"{row['kernel']} / copy": row["of_copy"]}
        what = f"bandwidth, rows of {row['row_bytes']} bytes"
        yield {"what": what, "ms": row["ms"], "gb_per_s": rates, "ratio": ratio}


def descents(device: torch.device, seconds: float, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Time all steps of a row in one kernel against a loop with autograd."""
    for batch, dim in sizes:
        for kind in ("mlp", "hopfield", "quadratic"):
            context, hidden = 0 if kind == "hopfield" else dim, () if kind == "quadratic" else (2 * dim,)
            config = energy.Config("all", batch, context, dim, hidden, activation="softplus", kind=kind)
            forms = energy.forms(energy.make_problem(config, device, seed=1), None)
            calls = {"autograd loop": forms["eager"], "kernel": forms["kernel"]}
            agree({name: call().y for name, call in calls.items()}, f"the descent on {kind}")
            took = median_ms(calls, device, seconds)
            ratio = {"autograd loop / kernel": took["autograd loop"] / took["kernel"]}
            yield {"what": f"whole descent, {kind}, B={batch}, D={dim}", "ms": took, "ratio": ratio}


def recurrences(device: torch.device, seconds: float, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Time a GRU with ACT in one kernel call against the loop that calls the cell on its active rows."""
    for training in (False, True):
        for batch, dim in sizes:
            problem = recurrence.make_problem(recurrence.Config(batch, dim, training), device, 3)
            with torch.set_grad_enabled(training):
                made, ways = recurrence.forms(problem, None)
                if (ways["ours"].way, ways["loop"].way) != ("kernel", "loop"):
                    raise DisagreementError(f"expected a kernel and a loop, got {ways}")
                forms = {"kernel": made["ours"], "loop": made["loop"]}
                agree({name: form().output.detach() for name, form in forms.items()}, "the recurrence")
                calls: Mapping[str, Call] = forms
                if training:
                    calls = {
                        name: partial(harness.both_passes, partial(halting.loss, form), problem.leaves)
                        for name, form in forms.items()
                    }
                took = median_ms(calls, device, seconds)
            kind = "training" if training else "inference"
            row: dict[str, Any] = {"what": f"whole recurrence, GRU with ACT, {kind}, B={batch}, D={dim}"}
            row |= {"ms": took, "ratio": {"loop / kernel": took["loop"] / took["kernel"]}}
            if (batch, dim) in REQUIRED:
                row["required"] = {"loop / kernel": REQUIRED[batch, dim]}
            yield row


def dense(problem: halting.Problem) -> halting.Outcome:
    """Run all rows for all steps, and keep of each row the state at which it should have halted."""
    state, steps = problem.state, problem.steps
    out = state[0]
    for n in range(1, problem.config.max_steps + 1):
        state = problem.step(state, *problem.inputs)
        out = torch.where((steps == n)[:, None], state[0], out)
    return halting.Outcome(out, steps, steps.to(out.dtype))


def halts(device: torch.device, seconds: float, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Time a GRU whose rows take a quarter of the steps: without halting, masked, compacted with each lag."""
    for training in (False, True):
        for batch, dim in sizes:
            config = halting.Config("gru", batch, dim, training=training)
            problem = halting.make_problem(config, device, 3)
            forms: dict[str, Callable[[], halting.Outcome]] = {
                "dense": partial(dense, problem),
                "mask": halting.adaptive(problem, False),
                "compact": halting.adaptive(problem, True),
                "compact, lag 1": halting.adaptive(problem, True, lag=1),
                "compact, never waiting": halting.adaptive(problem, True, lag=None),
            }
            agree({name: form().output for name, form in forms.items()}, "the output")
            both = {name: halting.training(problem, form) for name, form in forms.items()}
            calls: Mapping[str, Call] = both if training else forms
            with torch.set_grad_enabled(training):
                took = median_ms(calls, device, seconds)
            kind = "training" if training else "inference"
            share = float(problem.steps.double().mean()) / config.max_steps
            what = f"halting, GRU, {kind}, B={batch}, D={dim}, mean steps {share:.0%} of {config.max_steps}"
            ratio = {f"{name} / compact": took[name] / took["compact"] for name in took if name != "compact"}
            yield {"what": what, "ms": took, "ratio": ratio}


def run(device: torch.device, out: Path | None, seconds: float, small: bool) -> dict[str, Any]:
    """Measure everything; `small`: sizes for a test on the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    about = machine.describe(device)["machine"]
    name = about["device"] if device.type == "cuda" else about["cpu"]
    record: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "build": ac.build_info(),
        "rows": [],
        "short": [],
    }
    print(f"{name}, torch {torch.__version__}, adaptcomp_ext {ac.__version__}", flush=True)
    tiny = ((64, 16),)
    sections = (
        moving(device, seconds, 1 << (20 if small else 30)),
        descents(device, seconds, tiny if small else ((256, 64), (1024, 128), (8192, 64))),
        recurrences(device, seconds, tiny if small else ((256, 64), (4096, 128), (16384, 256))),
        halts(device, seconds, tiny if small else ((256, 128), (1024, 256), (4096, 256), (16384, 512))),
    )
    for section in sections:
        for row in section:
            record["rows"].append(row)
            parts = [f"{k} {v:.3g} ms" for k, v in row["ms"].items()]
            parts += [f"{k} {v:.0f} GB/s" for k, v in row.get("gb_per_s", {}).items()]
            ratios = ", ".join(f"{k} = {v:.2f}" for k, v in row["ratio"].items())
            print(f"{row['what']}: {ratios}   ({', '.join(parts)})", flush=True)
            for name, least in row.get("required", {}).items():
                if row["ratio"][name] < least:
                    record["short"].append(
                        f"{row['what']}: {name} is {row['ratio'][name]:.2f}, not {least:g}"
                    )
            if out is not None:
                write_json(out, record)
    return record


def main() -> None:
    """Read the options and run."""
    about = "Bandwidth, whole descents and recurrences, and halting on a GPU, in a few minutes."
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--out", type=Path, default=None, help="JSON file of the results")
    parser.add_argument("--device", default="cuda", help="device of torch")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds for all rounds of one line")
    options = parser.parse_args()
    try:
        device = device_named(options.device)
    except ValueError as error:
        parser.exit(1, f"bench_gpu: {error}\n")
    record = run(device, options.out, options.seconds, small=device.type == "cpu")
    if record["short"]:
        parser.exit(1, "".join(f"short of what is required: {line}\n" for line in record["short"]))


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
