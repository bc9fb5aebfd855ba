"""Time a recurrence in one kernel call against loops, torch's own layer and the steps alone.

A GRU of width D with ACT, 16 steps at most. The head is a linear layer with twice its initial weights; its
bias is the one at which rows take 4 steps on average. What a row computes decides when it halts; rows that
rounding could decide are drawn anew. For a few sizes an LSTM as well, whose rows halt after given numbers of
steps (`FixedSteps`), since no linear layer reads its pair of tensors.

Forms that are timed, after a check that they give the same outputs, steps and, in training, gradients:

- *ours*: `AdaptiveHalt` on the cell of `ac.cells`. *Way* is what `AdaptiveHalt.plan` says of it: "kernel"
  where one call runs all steps of all rows, "loop" where the step is called.
- *loop*: the same on a subclass of the cell, which no kernel knows: the step is called on the active rows.
- *hoisted*: a loop by hand that computes the product with the input once, before the first step, and moves
  the active rows together after each step in which a row has halted.
- *torch's layer*: `nn.GRU` or `nn.LSTM` on the input repeated 16 times, and ACT on all its outputs.
- *masked*: all rows run until the last one has halted; `torch.where` freezes those that have.
- *masked compile*: the same with its step (cell, head, masking) under `torch.compile(dynamic=True)`.
- *steps alone*: cell and head alone on tensors of each step's true number of active rows, without any
  bookkeeping: no loop that calls the step is faster.

Ratios of times in the same round, median over interleaved rounds: over 1 ours is the faster. In each round a
call shorter than 10 ms is made as often as fits into that time, and its mean counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import product
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

import adaptcomp_ext as ac

from . import harness, machine
from .energy import PRODUCT, PRODUCT_FLOPS, matrix_product
from .halting import verify
from .halting_forms import loss
from .harness import Columns, Report, Row, Table
from .recurrence_forms import Config, forms, make_problem, matmul, steps_alone
from .timing import Call, Times, clock, interleave, ratio, ratios_over, summary

THREADS = (1, 2)
BATCHES, WIDTHS = (1, 8, 32, 256, 1024, 4096), (32, 64, 128, 256)
SIZES = ((1, 64), (16, 64), (32, 64), (256, 128), (1024, 256))
LSTM_SIZES = ((32, 64), (256, 128), (1024, 256))
KEPT_SIZES = ((1, 64), (32, 64), (256, 128), (1024, 256))
LARGE = 256
"""Rows from which the rate of the square product is measured; a smaller run is short against that product."""
LINEAR = ((1, 32, 256, 1024), (64, 256))
"""Rows and widths at which `ac.ops.linear` is timed."""


# --- configurations -----------------------------------------------------------------------------------------
def grid(sizes: Iterable[tuple[int, int]], threads: Sequence[int], **others: Any) -> list[Config]:
    """Return the product of threads, modes and sizes (B, D), those of one model side by side."""
    by_width = sorted(sizes, key=lambda size: size[1])
    axes = product(threads, (False, True), by_width)
    return [Config(*size, training, count, **others) for count, training, size in axes]


def configs_of(name: str, threads: Sequence[int]) -> list[Config]:
    """Return the configurations of a grid."""
    if name == "quick":
        return grid([(32, 64), (256, 128)], threads, compiled=False)
    if name == "required":
        # Compiling takes as long as everything else, so that it is done for one number of threads.
        return [replace(c, compiled=c.threads == max(threads)) for c in grid(SIZES, threads)]
    sizes = dict.fromkeys([*product(BATCHES, WIDTHS), *SIZES])
    return [*grid(sizes, threads), *grid(LSTM_SIZES, threads, cell="lstm", compiled=False)]


GRIDS = ("default", "quick", "required")


# --- what is measured ---------------------------------------------------------------------------------------
def check_ways(ways: Mapping[str, Any]) -> None:
    """Raise unless the loop is one."""
    if ways["loop"].way != "loop":
        raise harness.DisagreementError(f"loop: expected the way to be a loop, got {ways['loop']}")


def ratios(times: Times, operations: float, of_product: float) -> dict[str, float]:
    """Return each form's time over ours, and our rate as a share of the rates of torch's products.

    ``operations`` is what a run needs, ``of_product`` what the product of the run's own shape needs.
    """
    found = ratios_over(times, "ours", "product", "square")
    for name, work in (("product", of_product), ("square", PRODUCT_FLOPS)):
        if name in times:
            found[f"ours/{name}"] = ratio(times, name, "ours") * operations / work
    return found


def memory_rows(device: torch.device, seed: int) -> Iterator[dict[str, Any]]:
    """Measure what the forms keep between the forward and the backward pass."""
    for batch, dim in KEPT_SIZES:
        config = Config(batch, dim, training=True)
        problem = make_problem(config, device, seed)
        calls, ways = forms(problem, None)
        kept = {name: harness.kept_on_heap(partial(loss, call)) for name, call in calls.items()}
        if None not in kept.values():
            yield {"config": asdict(config), "way": ways["ours"].way, "bytes": kept}


def linear_rows(
    device: torch.device, seed: int, threads: Sequence[int], seconds: float
) -> Iterator[dict[str, Any]]:
    """Time `ac.ops.linear` against `torch.nn.functional.linear`, in inference and in training."""
    generator = torch.Generator().manual_seed(seed)
    for count, training, width, rows in product(threads, (False, True), LINEAR[1], LINEAR[0]):
        shapes = (rows, width), (width, width), (width,)
        x, weight, bias = (torch.randn(s, generator=generator).to(device) for s in shapes)
        leaves = [t.requires_grad_(training) for t in (x, weight, bias)]
        upstream = torch.randn(rows, width, generator=generator).to(device)

        def call(
            function: Callable[..., Any], leaves: Sequence[Any] = leaves, upstream: Any = upstream
        ) -> Any:
            out = function(*leaves)
            return torch.autograd.grad(out, leaves, upstream) if out.requires_grad else out

        calls = {"ours": partial(call, ac.ops.linear), "torch": partial(call, F.linear)}
        with machine.threads(count), nullcontext() if training else torch.inference_mode():
            times = interleave(calls, clock(device), seconds, block=RecurrenceBenchmark.block)
        yield {
            "threads": count,
            "mode": "train" if training else "infer",
            "rows": rows,
            "width": width,
            "ms": {name: summary(values)["median"] for name, values in times.items()},
            "price": ratio(times, "ours", "torch"),
        }


# --- report -------------------------------------------------------------------------------------------------
LABELS = {
    "loop": "loop",
    "hoisted": "hoisted",
    "alone": "steps alone",
    "layer": "torch's layer",
    "masked": "masked",
    "masked_compile": "masked compile",
}
STYLES = {
    "masked": ("tab:gray", "o-"),
    "masked_compile": ("black", "s--"),
    "layer": ("tab:red", "d-"),
    "loop": ("tab:blue", "D-"),
    "hoisted": ("tab:orange", "^-"),
    "alone": ("tab:cyan", "v:"),
}
TITLES = {"infer": "Inference", "train": "Training: forward and backward"}
LOSES = "For each form, the configuration at which it is best against ours: below 1 it is the faster one."
RATES = f"""\
Operations of the products that a run needs, over the time of the whole run: 6·D² for each step that a row
takes and for its input; three times that in training, where what is computed again is not counted. Next to it
torch's matrix product of the shape of one step of all rows, B × D by D × 3·D, and from {LARGE} rows on that
of {PRODUCT} × {PRODUCT} by {PRODUCT} × {PRODUCT}, in the same rounds."""
KEPT = """\
MB by which the heap has grown between the forward and the backward pass, autograd's nodes included, on one
thread. *Ours / loop* and *ours / hoisted*: share of what these two keep."""
PRICE = """\
`ac.ops.linear`, in which a row has the same bits in any batch, against `torch.nn.functional.linear`, with as
many outputs as inputs. *Price*: time of ours over torch's."""
TWO = "Time on one thread over the time on two threads, from different rounds."
SIZE: Columns = {"B": "{config[batch]}", "D": "{config[dim]}"}
WHERE: Columns = {"cell": "{config[cell]}", "threads": "{config[threads]}", **SIZE}
OVER_OURS: Columns = {
    **WHERE,
    "mean steps": "{rows[mean_steps]:.2f}",
    "longest": "{rows[longest]}",
    "way": "{way}",
    "ours ms": "{times_ms[ours][median]:ms}",
    **{f"{label} / ours": f"{{ratios[{name}/ours]:.2f}}" for name, label in LABELS.items()},
}
RATE: Columns = {
    "mode": lambda row: Config(**row["config"]).mode,
    **WHERE,
    "ours GFLOP/s": "{gflops[ours]:.1f}",
    "product GFLOP/s": "{gflops[product]:.1f}",
    "ours / product": "{ratios[ours/product]:.0%}",
    "square product GFLOP/s": "{gflops[square]:.1f}",
    "ours / square product": "{ratios[ours/square]:.0%}",
}
SCALING: Columns = {
    "mode": "{mode}",
    "cell": "{cell}",
    "B": "{batch}",
    "D": "{dim}",
    **{name: f"{{{name}:.2f}}" for name in ("ours", "loop", "hoisted", "layer")},
}
MEMORY: Columns = {
    **SIZE,
    "way": "{way}",
    **{name: f"{{bytes[{name}]:MB3}}" for name in ("ours", "loop", "hoisted", "layer", "masked")},
    "ours / loop": lambda r: f"{r['bytes']['ours'] / r['bytes']['loop']:.2f}",
    "ours / hoisted": lambda r: f"{r['bytes']['ours'] / r['bytes']['hoisted']:.2f}",
}
PRICES: Columns = {
    "mode": "{mode}",
    "threads": "{threads}",
    "rows": "{rows}",
    "layer": "{width} × {width}",
    "ours ms": "{ms[ours]:ms}",
    "torch ms": "{ms[torch]:ms}",
    "price": "{price:.2f}",
}


def best_of_others(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return for each mode and form the configuration at which the form is best against ours."""
    found = []
    for (mode, title), (name, label) in product(TITLES.items(), LABELS.items()):
        rated = [
            row
            for row in rows
            if Config(**row["config"]).mode == mode and row["ratios"].get(f"{name}/ours") is not None
        ]
        if rated:
            least = min(rated, key=lambda row: row["ratios"][f"{name}/ours"])
            value, where = least["ratios"][f"{name}/ours"], least["label"]
            found.append({"mode": title.partition(":")[0], "form": label, "least": value, "where": where})
    return found


def scaling(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return how many times faster two threads are, for what was measured with one and with two."""
    medians = {
        replace(Config(**row["config"]), compiled=False): {n: t["median"] for n, t in row["times_ms"].items()}
        for row in rows
    }
    found = []
    for config, one in medians.items():
        two = medians.get(replace(config, threads=2))
        if config.threads == 1 and two is not None:
            size = {"mode": config.mode, "cell": config.cell, "batch": config.batch, "dim": config.dim}
            found.append({**size, **{name: one[name] / two[name] for name in one if name in two}})
    return found


class RecurrenceBenchmark(harness.Benchmark):
    """A recurrence in one kernel call against loops, torch's layer and the steps alone."""

    name = "recurrence"
    title = "Recurrence benchmark"
    block = 10.0
    extra: ClassVar[dict[str, Any]] = {"compiler": None, "memory": [], "linear": []}

    @dataclass(frozen=True)
    class Options(harness.Options):
        """Its options."""

        out: str = harness.option("results/bench_recurrence", "Folder of the results.")
        quick: bool = harness.option(False, "The same as --grid quick: less than a minute.")
        grid: str = harness.option(
            "default", "Configurations to time: default, quick, or required, which takes four minutes."
        )
        threads: int | None = harness.option(
            None,
            "Threads of torch. Default: 1 and 2, one after the other; on CUDA as many as it is set to.",
            1,
        )
        compiled: bool = harness.option(
            True, "Whether the compiled baseline takes part, if there is a compiler."
        )
        memory: bool = harness.option(True, "Whether training memory is measured; on the CPU only.")
        linear: bool = harness.option(True, "Whether ac.ops.linear is timed.")
        full_seconds: ClassVar[float] = 2.0

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.grid not in GRIDS:
                raise ValueError(f"grid: expected one of {', '.join(GRIDS)}, got {self.grid!r}")

    @property
    def threads(self) -> tuple[int, ...]:
        """The numbers of threads that are measured."""
        if self.options.threads is not None:
            return (self.options.threads,)
        return THREADS if self.device.type == "cpu" else (torch.get_num_threads(),)

    def configs(self) -> list[Config]:
        return configs_of("quick" if self.options.quick else self.options.grid, self.threads)

    def weight(self, config: Config) -> float:
        # A round at 50 billion operations a second: masking to the last step weighs as much as all else.
        rounds = 10 * config.operations(2 * config.batch * config.max_steps) / 5e10
        return max(float(self.options.seconds), rounds)

    def measure(self, config: Config) -> dict[str, Any]:
        with machine.threads(config.threads):
            return self._measure(config)

    def _measure(self, config: Config) -> dict[str, Any]:
        problem = make_problem(config, self.device, self.options.seed)
        cache = self.cache if self.compiler is None and config.compiled else None
        row_steps = int(problem.steps.sum())
        operations = config.operations(row_steps)
        # The steps alone make leaves that require gradients, and inference tensors could not.
        beside: dict[str, Call] = {"alone": steps_alone(problem), "product": matmul(problem)}
        if config.batch >= LARGE:
            beside["square"] = matrix_product(self.device)
        of_product = 2.0 * problem.x.shape[0] * problem.cell.weight_hh.numel()
        with nullcontext() if config.training else torch.inference_mode():
            forward, ways = forms(problem, cache)
            both = {
                name: partial(harness.both_passes, partial(loss, call), problem.leaves)
                for name, call in forward.items()
            }
            calls: Mapping[str, Call] = both if config.training else forward
            if cache is not None:
                cache.first_call(config.label, calls["masked_compile"])

            def agreement() -> dict[str, float]:
                check_ways(ways)
                gradients = harness.results_of(both) if config.training else {}
                script = problem.with_step(problem.cell, problem.x)
                return verify(script, harness.results_of(forward), gradients)

            row = self.timed(
                config,
                {**calls, **beside},
                agreement,
                partial(ratios, operations=operations, of_product=of_product),
                rows={"mean_steps": row_steps / config.batch, "longest": int(problem.steps.max())},
                way=ways["ours"].way,
                gflops=None,
            )
        if row["error"] is None:
            work = {"ours": operations, "product": of_product, "square": PRODUCT_FLOPS}
            took = {name: times["median"] for name, times in row["times_ms"].items()}
            row["gflops"] = {name: work[name] / took[name] / 1e6 for name in work if name in took}
        return row

    @cached_property
    def compiler(self) -> str | None:
        """Why there is no compiled baseline; None if there is one."""
        return harness.no_compiler(self.device) if self.options.compiled else "not wanted"

    def extras(self) -> None:
        o = self.options
        self.report["compiler"] = self.compiler
        if o.memory and self.device.type == "cpu":
            with machine.threads(1):
                self.report["memory"] = list(memory_rows(self.device, o.seed))
        if o.linear:
            rows = linear_rows(self.device, o.seed, self.threads, o.seconds / 10)
            self.report["linear"] = list(rows)

    @staticmethod
    def notes(report: Report) -> str:
        missing = report["compiler"]
        return f"The compiled baseline was left out: {missing}." if missing else ""

    @staticmethod
    def tables(report: Report, rows: Sequence[Row]) -> Iterable[Table]:
        for mode, title in TITLES.items():
            yield Table(title, "", [r for r in rows if Config(**r["config"]).mode == mode], OVER_OURS)
        columns: Columns = {"mode": "{mode}", "form": "{form}", "form / ours": "{least:.2f}", "at": "{where}"}
        yield Table("Where ours is least ahead", LOSES, best_of_others(rows), columns)
        yield Table("Rate of the arithmetic", RATES, [r for r in rows if r["config"]["cell"] == "gru"], RATE)
        yield Table("Two threads", TWO, scaling(rows), SCALING)
        yield Table("Training memory", KEPT, report["memory"], MEMORY)
        yield Table("The price of the same bits", PRICE, report["linear"], PRICES)
        text = "Of the compiled baseline, where the compiler's cache did not have it; not in the times above."
        yield harness.compile_times(report, text, "configuration")

    @staticmethod
    def draw(report: Report, rows: Sequence[Row]) -> Any:
        """Draw the times over ours at the required sizes, with the most threads."""
        most = max((row["config"]["threads"] for row in rows), default=0)
        shown: dict[str, list[Row]] = {}
        for mode in TITLES:
            found = [
                (size, row)
                for size, row in product(SIZES, rows)
                if Config(*size, mode == "train", most) == replace(Config(**row["config"]), compiled=True)
            ]
            if found:
                shown[mode] = [row for _, row in found]
        if not shown:
            return None
        figure, axes = harness.panels(len(shown), 3.8)
        for axis, (mode, series) in zip(axes, shown.items(), strict=True):
            harness.curves(axis, list(enumerate(series)), "ours", STYLES, LABELS, [1, 2, 5, 10, 20, 50])
            names = [f"B {row['config']['batch']}\nD {row['config']['dim']}" for row in series]
            axis.set_xticks(range(len(names)), names, fontsize="small")
            axis.set(title=TITLES[mode].partition(":")[0], xlim=(-0.5, len(names) - 0.5))
            axis.grid(alpha=0.3, axis="y")
        axes[0].set_ylabel("time over ours")
        threads = f"{most} thread{'s' * (most > 1)}"
        harness.legend(figure, f"GRU with ACT, 4 of 16 steps on average, {threads}: time over ours")
        return figure
