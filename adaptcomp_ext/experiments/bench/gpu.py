"""A first look at a GPU in a few minutes: bandwidth, whole descents, halting.

In the order of interest: the bandwidth of a device copy, of compaction and of the halting step; whole
descents against the same descent by autograd; halting with and without compaction. Each line is printed, and
the file written, as soon as it is measured, so that a run that is cut short leaves what it had. Every form is
checked against the first one before it is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import adaptcomp_ext as ac
from adaptcomp_ext.experiments.files import write_json

from . import harness, machine
from .timing import Call, clock, interleave, summary

__all__ = ["BANDWIDTH", "bandwidth", "main", "run"]

TOLERANCE = 2e-3
"""Relative to the largest element: products of a BLAS round by the size of the batch; TF32 is off."""
Sizes = Sequence[tuple[int, int]]


def median_ms(
    calls: dict[str, Call], device: torch.device, seconds: float, block: float = 0.0
) -> dict[str, float]:
    """Return the median time of each call; the calls take turns."""
    times = interleave(calls, clock(device), seconds, few=5, fewest=5, block=block)
    return {name: summary(values)["median"] for name, values in times.items()}


def bandwidth(
    device: torch.device,
    seconds: float = 1.0,
    block_bytes: int = 1 << 30,
    row_bytes: Sequence[int] = (4096, 16384, 65536),
    shares: Sequence[float] = (1.0, 0.5, 0.1),
) -> Iterator[dict[str, Any]]:
    """Measure the bytes per second of compaction and of the halting step against a device copy.

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
            (packed,), _, count = ac.ops.compact_padded(keep, [block])
            if not torch.equal(packed[: int(count)], block[keep]):
                raise harness.DisagreementError(
                    f"compact_padded: the rows of {size} bytes are not the kept ones"
                )
            calls[f"compact {share:g}"] = partial(ac.ops.compact_padded, keep, [block])
            about[f"compact {share:g}"] = "compact_padded", share, int(keep.sum()) * size + block_bytes
        steps = torch.zeros(rows, dtype=torch.int64, device=device)
        status = torch.zeros(rows, dtype=torch.int8, device=device)
        results = ac.ops.halting.Results(steps=steps, status=status, leaves=[], output=other)
        goes_on = torch.zeros(rows, dtype=torch.bool, device=device)
        index, weight = torch.arange(rows, device=device), torch.full((rows,), 0.05, device=device)
        bounds: dict[str, Any] = {"step": 1, "min_steps": 1, "max_steps": 16}
        step = partial(
            ac.ops.halting.halt_rows, results, index, goes_on, [], **bounds, weight=weight, readout=block
        )
        calls["halt"], about["halt"] = step, ("halt_rows", 1.0, 3 * block_bytes)
        took = median_ms(calls, device, seconds, block=10.0)
        rate = {name: moved / took[name] / 1e6 for name, (_, _, moved) in about.items()}
        for name, (kernel, share, _) in list(about.items())[1:]:
            row = {
                "kernel": kernel,
                "row_bytes": size,
                "kept": share,
                "ms": {n: took[n] for n in ("copy", name)},
            }
            yield {
                **row,
                "gb_per_s": rate[name],
                "copy_gb_per_s": rate["copy"],
                "of_copy": rate[name] / rate["copy"],
            }


BANDWIDTH = {
    "kernel": "{kernel}",
    "row bytes": "{row_bytes}",
    "kept": "{kept:g}",
    "GB/s": "{gb_per_s:.0f}",
    "copy GB/s": "{copy_gb_per_s:.0f}",
    "of copy": "{of_copy:.0%}",
}


def moving(device: torch.device, seconds: float, block_bytes: int) -> Iterator[dict[str, Any]]:
    """`bandwidth` at several widths, half of the rows kept."""
    for row in bandwidth(device, seconds, block_bytes, (256, 4096, 65536), (0.5,)):
        rates = {"copy": row["copy_gb_per_s"], row["kernel"]: row["gb_per_s"]}
        what = f"bandwidth, rows of {row['row_bytes']} bytes"
        yield {
            "what": what,
            "ms": row["ms"],
            "gb_per_s": rates,
            "ratio": {f"{row['kernel']} / copy": row["of_copy"]},
        }


def energies(dim: int, device: torch.device) -> dict[str, nn.Module]:
    """Return an energy of each kind."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(dim, dim, generator=generator)
    patterns = torch.randn(2 * dim, dim, generator=generator)
    modules: dict[str, nn.Module] = {
        "mlp": ac.MLPEnergy(dim, dim, 2 * dim, "softplus"),
        "hopfield": ac.HopfieldEnergy(patterns, 1.0),
        "quadratic": ac.QuadraticEnergy(mixed @ mixed.T / dim + torch.eye(dim), torch.zeros(dim)),
    }
    return {name: module.to(device).requires_grad_(False) for name, module in modules.items()}


def by_autograd(energy: nn.Module, y: Tensor, context: tuple[Tensor, ...], steps: int, size: float) -> Tensor:
    """Take all steps of all rows with autograd's gradients, as one writes it without the package."""
    for _ in range(steps):
        y = y.detach().requires_grad_()
        (slope,) = torch.autograd.grad(energy(y, *context).sum(), y)
        y = y.detach() - size * slope
    return y


def agree(outputs: dict[str, Tensor], what: str, reference: str) -> None:
    """Raise unless all outputs are the reference's up to rounding."""
    harness.compare({name: (out.detach(),) for name, out in outputs.items()}, (what,), reference, TOLERANCE)


def descents(device: torch.device, seconds: float, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """All steps of a row in one kernel, against a loop with autograd."""
    steps, size = 20, 0.01
    for batch, dim in sizes:
        for name, energy in energies(dim, device).items():
            generator = torch.Generator().manual_seed(2)
            y0, x = (torch.randn(batch, dim, generator=generator).to(device) for _ in range(2))
            context = (x,) if name == "mlp" else ()
            descend = ac.EnergyDescent(energy, size, steps, tol=0.0, gradient="detached")
            calls: dict[str, Call] = {
                "autograd loop": partial(by_autograd, energy, y0, context, steps, size),
                "kernel": lambda d=descend, y=y0, c=context: d(y, *c).y,  # type: ignore[misc]
            }
            agree({name: call() for name, call in calls.items()}, f"the descent on {name}", "autograd loop")
            took = median_ms(calls, device, seconds)
            ratio = {"autograd loop / kernel": took["autograd loop"] / took["kernel"]}
            yield {"what": f"whole descent, {name}, B={batch}, D={dim}", "ms": took, "ratio": ratio}


FORMS: dict[str, dict[str, Any]] = {
    "mask": {"compact": False},
    "compact": {"compact": True},
    "compact, lag 1": {"compact": True, "lag": 1},
    "compact, never waiting": {"compact": True, "lag": None},
}


def halting(
    device: torch.device, seconds: float, sizes: Sizes, max_steps: int = 16
) -> Iterator[dict[str, Any]]:
    """A GRU whose rows take a quarter of the steps: no halting, a mask, compaction with each lag."""
    for training in (False, True):
        for batch, dim in sizes:
            torch.manual_seed(3)
            cell = nn.GRUCell(dim, dim).to(device)
            h0, x = torch.randn(batch, dim, device=device), torch.randn(batch, dim, device=device)
            drawn = 1 + torch.distributions.Geometric(torch.full((batch,), 0.25)).sample().long()
            steps = drawn.clamp(max=max_steps).to(device)

            def step(h: Tensor, x: Tensor, cell: nn.Module = cell) -> Tensor:
                return cell(x, h)

            def dense(
                h: Tensor, x: Tensor, steps: Tensor = steps, step: Callable[..., Tensor] = step
            ) -> Tensor:
                out = h
                for n in range(1, max_steps + 1):
                    h = step(h, x)
                    out = torch.where((steps == n)[:, None], h, out)
                return out

            def train(call: Call, cell: nn.Module = cell) -> None:
                cell.zero_grad()
                call().square().mean().backward()

            calls: dict[str, Call] = {"dense": partial(dense, h0, x)}
            for label, options in FORMS.items():
                halt = ac.AdaptiveHalt(step, ac.FixedSteps(steps), max_steps, **options)
                calls[label] = lambda halt=halt, h=h0, x=x: halt(h, x).output  # type: ignore[misc]
            agree({label: call() for label, call in calls.items()}, "the output", "dense")
            if training:
                calls = {label: partial(train, call) for label, call in calls.items()}
            with torch.set_grad_enabled(training):
                took = median_ms(calls, device, seconds)
            share, kind = float(steps.float().mean()) / max_steps, "training" if training else "inference"
            what = f"halting, GRU, {kind}, B={batch}, D={dim}, mean steps {share:.0%} of {max_steps}"
            yield {
                "what": what,
                "ms": took,
                "ratio": {f"{n} / compact": took[n] / took["compact"] for n in took if n != "compact"},
            }


def run(device: torch.device, out: Path | None, seconds: float, small: bool) -> dict[str, Any]:
    """Measure everything; `small`: sizes for a test on the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    about = machine.describe(device)
    name = about["machine"]["device"] if device.type == "cuda" else about["machine"]["cpu"]
    record: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "build": ac.build_info(),
        "rows": [],
    }
    print(f"{name}, torch {torch.__version__}, adaptcomp_ext {ac.__version__}", flush=True)
    wide: Sizes = ((64, 16),) if small else ((256, 64), (1024, 128), (8192, 64))
    cells: Sizes = ((64, 16),) if small else ((256, 128), (1024, 256), (4096, 256), (16384, 512))
    for section in (
        moving(device, seconds, 1 << (20 if small else 30)),
        descents(device, seconds, wide),
        halting(device, seconds, cells),
    ):
        for row in section:
            record["rows"].append(row)
            parts = [f"{k} {v:.3g} ms" for k, v in row["ms"].items()]
            parts += [f"{k} {v:.0f} GB/s" for k, v in row.get("gb_per_s", {}).items()]
            ratios = ", ".join(f"{k} = {v:.2f}" for k, v in row["ratio"].items())
            print(f"{row['what']}: {ratios}   ({', '.join(parts)})", flush=True)
            if out is not None:
                write_json(out, record)
    return record


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(
        description="Bandwidth, whole descents and halting on a GPU, in a few minutes."
    )
    parser.add_argument("--out", type=Path, default=None, help="JSON file of the results")
    parser.add_argument("--device", default="cuda", help="device of torch")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds for all rounds of one line")
    options = parser.parse_args()
    try:
        device = machine.device_named(options.device)
    except ValueError as error:
        parser.exit(1, f"bench_gpu: {error}\n")
    run(device, options.out, options.seconds, small=device.type == "cpu")
