"""
A first look at a GPU in a few minutes: ``python benchmarks/bench_gpu.py --out bench.json``.

Needs torch and the package, none of its extras. In the order of interest: the bandwidth of a device copy and
of compaction, whole descents against the same descent by autograd, halting with and without compaction. Each
line is printed, and the file written, as soon as it is measured, so that a run that is cut short leaves what
it had.

Every contender is checked against the first one before it is timed. Times are medians of calls in turn.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import adaptcomp_ext as ac

Call = Callable[[], Any]

TOLERANCE = (
    2e-3  # relative to the largest element: products of a BLAS round by the size of the batch, TF32 is off
)


def milliseconds(calls: dict[str, Call], device: torch.device, seconds: float) -> dict[str, float]:
    """Median time of each call, until its end on the device; the calls take turns."""

    def once(call: Call) -> float:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    for call in calls.values():
        once(call), once(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, call in calls.items():
            times[name].append(once(call))
    return {name: statistics.median(t) for name, t in times.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def agree(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Raise unless the two are equal up to rounding."""
    difference = float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
    if not difference <= TOLERANCE:
        raise SystemExit(
            f"bench_gpu: {name} differs from the first contender by {difference:.1e} of the largest element"
        )


# --- bandwidth ----------------------------------------------------------------------------------------------
def bandwidth(device: torch.device, seconds: float, block_bytes: int) -> Iterator[dict[str, Any]]:
    """Measure the bandwidth of a device copy, and of compacting half of a block's rows at several widths."""
    for row_bytes in (256, 4096, 65536):
        rows = block_bytes // row_bytes
        block = torch.randn(rows, row_bytes // 4, device=device)
        other = torch.empty_like(block)
        keep = torch.arange(rows, device=device) % 2 == 0
        (packed,), _, count = ac.ops.compact_padded(keep, [block])
        agree("compact_padded", packed[: int(count)], block[keep])
        calls = {
            "copy": lambda b=block, o=other: o.copy_(b),
            "compact": lambda b=block, k=keep: ac.ops.compact_padded(k, [b]),
        }
        took = milliseconds(calls, device, seconds)
        moved = {
            "copy": 2 * block_bytes,
            "compact": block_bytes + block_bytes // 2,
        }  # reads half, writes the padded block
        rate = {name: moved[name] / took[name] / 1e6 for name in took}
        label = f"bandwidth, rows of {row_bytes} bytes"
        yield {
            "what": label,
            "ms": took,
            "gb_per_s": rate,
            "ratio": {"compact / copy": rate["compact"] / rate["copy"]},
        }


# --- whole descents -----------------------------------------------------------------------------------------
def energies(dim: int, device: torch.device) -> dict[str, nn.Module]:
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(dim, dim, generator=generator)
    return {
        "mlp": ac.MLPEnergy(dim, dim, (2 * dim,), "softplus").to(device),
        "hopfield": ac.HopfieldEnergy(torch.randn(2 * dim, dim, generator=generator).to(device), 1.0),
        "quadratic": ac.QuadraticEnergy(
            (mixed @ mixed.T / dim + torch.eye(dim)).to(device), torch.zeros(dim, device=device)
        ),
    }


def by_autograd(
    energy: nn.Module, y: torch.Tensor, context: tuple[torch.Tensor, ...], steps: int, size: float
) -> torch.Tensor:
    """What one writes without the package: all steps of all rows."""
    for _ in range(steps):
        y = y.detach().requires_grad_()
        (slope,) = torch.autograd.grad(energy(y, *context).sum(), y)
        y = y.detach() - size * slope
    return y


def whole_descents(
    device: torch.device, seconds: float, sizes: tuple[tuple[int, int], ...]
) -> Iterator[dict[str, Any]]:
    """All steps of a row in one kernel, against a loop with autograd."""
    steps, size = 20, 0.01
    for batch, dim in sizes:
        for name, energy in energies(dim, device).items():
            generator = torch.Generator().manual_seed(2)
            y0 = torch.randn(batch, dim, generator=generator).to(device)
            context = (torch.randn(batch, dim, generator=generator).to(device),) if name == "mlp" else ()
            for p in energy.parameters():
                p.requires_grad_(False)
            descend = ac.EnergyDescent(energy, size, steps, tol=0.0, gradient="detached")
            calls = {
                "autograd loop": lambda e=energy, y=y0, c=context: by_autograd(e, y, c, steps, size),
                "kernel": lambda d=descend, y=y0, c=context: d(y, *c).y,
            }
            agree(f"the descent on {name}", calls["kernel"](), calls["autograd loop"]())
            took = milliseconds(calls, device, seconds)
            ratio = {"autograd loop / kernel": took["autograd loop"] / took["kernel"]}
            yield {"what": f"whole descent, {name}, B={batch}, D={dim}", "ms": took, "ratio": ratio}


# --- halting ------------------------------------------------------------------------------------------------
def halting(
    device: torch.device, seconds: float, sizes: tuple[tuple[int, int], ...]
) -> Iterator[dict[str, Any]]:
    """Time a GRU whose rows take a quarter of the steps: without halting, masked, and compacted."""
    max_steps = 16
    for training in (False, True):
        for batch, dim in sizes:
            torch.manual_seed(3)
            cell = nn.GRUCell(dim, dim).to(device)
            h0, x = torch.randn(batch, dim, device=device), torch.randn(batch, dim, device=device)
            hazard = torch.full((batch,), 0.25)
            steps = (
                (1 + torch.distributions.Geometric(hazard).sample().long()).clamp(max=max_steps).to(device)
            )

            def step(h: torch.Tensor, x: torch.Tensor, cell: nn.Module = cell) -> torch.Tensor:
                return cell(x, h)

            def dense(h0=h0, x=x, steps=steps, step=step):
                h = out = h0
                for n in range(1, max_steps + 1):
                    h = step(h, x)
                    out = torch.where((steps == n)[:, None], h, out)
                return out

            calls = {"dense": dense}
            for label, options in {
                "mask": {"compact": False},
                "compact": {"compact": True},
                "compact, lag 1": {"compact": True, "lag": 1},
                "compact, never waiting": {"compact": True, "lag": None},
            }.items():
                halt = ac.AdaptiveHalt(step, ac.FixedSteps(steps), max_steps, **options)
                calls[label] = lambda halt=halt, h0=h0, x=x: halt(h0, x).output

            def train(call: Call, cell: nn.Module = cell) -> None:
                cell.zero_grad()
                call().square().mean().backward()

            for label, call in calls.items():
                agree(f"halting, {label}", call().detach(), calls["dense"]().detach())
            if training:
                calls = {label: (lambda call=call, train=train: train(call)) for label, call in calls.items()}
            with torch.set_grad_enabled(training):
                took = milliseconds(calls, device, seconds)
            ratio = {
                f"{other} / compact": took[other] / took["compact"] for other in took if other != "compact"
            }
            share = float(steps.float().mean()) / max_steps
            kind = "training" if training else "inference"
            yield {
                "what": f"halting, GRU, {kind}, B={batch}, D={dim}, mean steps {share:.0%} of {max_steps}",
                "ms": took,
                "ratio": ratio,
            }


# --- the run ------------------------------------------------------------------------------------------------
def run(device: torch.device, out: Path | None, seconds: float, small: bool) -> dict[str, Any]:
    """Measure everything; `small`: sizes for a test on the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    record: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "build": ac.build_info(),
        "rows": [],
    }
    print(f"{name}, torch {torch.__version__}, adaptcomp_ext {record['build']['version']}", flush=True)
    descents = ((64, 16),) if small else ((256, 64), (1024, 128), (8192, 64))
    cells = ((64, 16),) if small else ((256, 128), (1024, 256), (4096, 256), (16384, 512))
    sections = (
        bandwidth(device, seconds, 1 << (20 if small else 30)),
        whole_descents(device, seconds, descents),
        halting(device, seconds, cells),
    )
    for section in sections:
        for row in section:
            record["rows"].append(row)
            parts = [f"{k} {v:.3g} ms" for k, v in row["ms"].items()]
            parts += [f"{k} {v:.0f} GB/s" for k, v in row.get("gb_per_s", {}).items()]
            ratios = ", ".join(f"{k} = {v:.2f}" for k, v in row["ratio"].items())
            print(f"{row['what']}: {ratios}   ({', '.join(parts)})", flush=True)
            if out is not None:
                out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(
        description="Bandwidth, whole descents and halting on a GPU, in a few minutes."
    )
    parser.add_argument("--out", type=Path, default=None, help="JSON file of the results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each line")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("bench_gpu: torch sees no CUDA device")
        device = torch.device("cuda", device.index or 0)
    run(device, options.out, options.seconds, small=device.type == "cpu")


if __name__ == "__main__":
    main()
