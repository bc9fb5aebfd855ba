"""Time EnergyDescent against autograd, torch.compile and hand-written loops.

Forms that are timed, after a check that they give the same points, steps and gradients within 1e-04 of the
largest element:

- *eager autograd*: `y = y − α·grad(energy(y, x).sum(), y)` with `torch.autograd.grad`, the energy written
  with `linear` on y and on x at every step, weights without `requires_grad`; in training `create_graph=True`,
  and the graph of all steps is kept.
- *compiled*: that step with `torch.func.grad` under `torch.compile`, static shapes; on CUDA with
  `mode="reduce-overhead"`.
- *analytic*: the gradient as a formula in torch's public operations. The context's part once, `addmm` into
  buffers allocated beforehand, everything in place, no autograd; for a quadratic energy the step as one
  product. In training the formula recorded by autograd, which needs no second-order graph.
- *analytic, aten*: the same with the activation's derivative from the private operations of torch's own
  backward passes, such as `aten.silu_backward`: one pass over memory instead of five.
- *generic*: `EnergyDescent` on the eager energy as a function.
- *kernel*: `EnergyDescent` on `MLPEnergy`, `HopfieldEnergy` or `QuadraticEnergy`.

All of them return the last points and their energies. Where rows converge, the first four run all of them
until the last one has, and the converged ones stand still behind a mask.

Ratios of times in the same round, median over interleaved rounds: over 1 the kernel, or the generic form, is
the faster. In each round a call shorter than 10 ms is made as often as fits into that time, and its mean
counts; a call that comes once, after something else has used the caches and the threads, takes longer, most
of all the shortest ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import harness
from .energy_forms import (
    FRACTION,
    Config,
    Outcome,
    Problem,
    eager,
    forms,
    make_problem,
    training_calls,
    training_losses,
)
from .harness import Columns, Report, Row, Table
from .timing import Call, Times, ratio, ratios_over

TOLERANCE = 1e-4
PRODUCT = 1024
PRODUCT_FLOPS = 2.0 * PRODUCT**3


# --- configurations -----------------------------------------------------------------------------------------
SIZES = ((16, 32, 32, 128), (128, 32, 32, 128), (256, 64, 64, 256), (1024, 128, 128, 512))
"""B, elements of the context, elements of y, hidden."""
HOPFIELD: dict[str, Any] = {"kind": "hopfield", "context": 0}
QUADRATIC: dict[str, Any] = {"kind": "quadratic", "hidden": ()}


def at(mode: str, size: int, **changes: Any) -> Config:
    """Return the configuration of a mode at one of `SIZES`."""
    batch, context, dim, hidden = SIZES[size]
    sizes = {"batch": batch, "context": context, "dim": dim, "hidden": (hidden,)}
    return Config(**{"mode": mode, **sizes, **changes})


DEFAULT = [
    *(at("all", size) for size in range(4)),
    *(at("all", 2, activation=activation) for activation in ("softplus", "tanh", "gelu")),
    at("all", 2, hidden=(256, 256)),
    at("all", 2, **HOPFIELD),
    at("all", 2, **QUADRATIC),
    *(at("stop", size) for size in range(4)),
    *(at("train", size) for size in range(3)),
]
"""The four sizes in every mode, but three in training; other activations, layers and energies."""
QUICK = [
    at("all", 0, compiled=False),
    at("all", 1),
    at("all", 1, **HOPFIELD, compiled=False),
    at("all", 1, **QUADRATIC, compiled=False),
    at("stop", 1, compiled=False),
    at("train", 0),
]
"""A look at everything in less than a minute; one step is compiled."""
MEMORY = [at("train", size, steps=steps) for size in (1, 2) for steps in (5, 10, 20, 40)]
"""Where training memory is measured."""


# --- checks and ratios --------------------------------------------------------------------------------------
def verify(problem: Problem, outcomes: Mapping[str, Outcome]) -> float:
    """Compare all forms with the eager loop, and their steps with the schedule."""
    alike = {name: outcome for name, outcome in outcomes.items() if name != "kernel_all"}
    for name, outcome in alike.items():
        if problem.steps is not None and not torch.equal(outcome.steps, problem.steps):  # type: ignore[arg-type]
            raise harness.DisagreementError(
                f"{name}: rows converged after other numbers of steps than they should"
            )
    results: harness.Results = {name: (outcome.y, outcome.energy) for name, outcome in alike.items()}
    worst = harness.compare(results, ("y", "the energy"), "eager", TOLERANCE)
    if "kernel_all" in outcomes:
        to_the_end = eager(replace(problem, config=replace(problem.config, mode="all")))
        results = {"kernel_all": (outcomes["kernel_all"].y,), "eager": (to_the_end().y,)}
        worst = max(worst, harness.compare(results, ("y",), "eager", TOLERANCE))
    return worst


def verify_gradients(calls: Mapping[str, Call]) -> float:
    """Compare the gradients of all forms with those of the eager loop."""
    return harness.compare_gradients(harness.results_of(calls), "eager", TOLERANCE)


def ratios(times: Times, flops: float) -> dict[str, float]:
    """Return the ratios of a configuration of this number of operations.

    They are ``"NAME/kernel"``, ``"eager/generic"`` and, where the matrix product was timed,
    ``"kernel/matmul"``: the rate of the kernel as a share of the product's rate.
    """
    found = {**ratios_over(times, "kernel", "matmul"), "eager/generic": ratio(times, "eager", "generic")}
    if "matmul" in times:
        found["kernel/matmul"] = ratio(times, "matmul", "kernel") * flops / PRODUCT_FLOPS
    return found


def matrix_product(device: torch.device) -> Callable[[], Tensor]:
    """Return a matrix product of `PRODUCT_FLOPS` operations."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(PRODUCT, PRODUCT, generator=generator).to(device) for _ in range(2))
    return partial(torch.mm, a, b, out=torch.empty_like(a))


def memory_rows(device: torch.device, seed: int, configs: Iterable[Config]) -> Iterator[dict[str, Any]]:
    """Measure all forms of training: ``bytes``, by form, and ``points``, the bytes of y after every step."""
    for config in configs:
        problem = make_problem(config, device, seed)
        losses = training_losses(problem)
        yield {
            "size": [config.batch, config.context, config.dim, *config.hidden],
            "steps": config.steps,
            "points": config.steps * problem.y0.numel() * problem.y0.element_size(),
            "bytes": {name: harness.kept_and_peak(loss, problem.leaves) for name, loss in losses.items()},
        }


# --- what is asked of the ratios, on two CPU cores in float32 -----------------------------------------------
LEAST: dict[tuple[str, str, str], tuple[float | None, ...]] = {
    ("eager over kernel", "all", "eager/kernel"): (20.0, 5.0, 3.0, 2.0),
    ("compiled over kernel", "all", "compiled/kernel"): (3.0, 2.0, None, None),
    ("analytic over kernel", "all", "analytic/kernel"): (None, None, 1.5, 1.2),
    ("share of the matrix product's rate", "all", "kernel/matmul"): (None, 0.6, 0.6, 0.6),
    ("all steps over stopping, kernel", "stop", "kernel_all/kernel"): (3.0, 3.0, 3.0, None),
    ("eager over kernel", "train", "eager/kernel"): (5.0, 5.0, None, None),
}
"""What is compared, mode, ratio; and what the ratio should be at least at each of `SIZES`."""
GENERIC_BAR = 1.0
"""Least eager/generic, in inference."""
MEMORY_BAR = 1.05
"""Most bytes that the kernel keeps for more steps, over the bytes of these steps' points."""


def judge(rows: Iterable[Row], memory: Sequence[Row] = ()) -> list[dict[str, Any]]:
    """Compare the report's rows with the bars: one verdict for each bar that has a measured ratio."""
    timed = {row["label"]: row for row in rows if row["error"] is None}
    found = []

    def verdict(what: str, where: str, bar: str, value: float, passed: bool) -> None:
        found.append({"what": what, "where": where, "bar": bar, "found": value, "passed": passed})

    for (what, mode, key), bars in LEAST.items():
        for size, least in enumerate(bars):
            where = at(mode, size).label
            if least is not None and where in timed and key in timed[where]["ratios"]:
                value = timed[where]["ratios"][key]
                bar = f"≥ {100 * least:.0f} %" if key == "kernel/matmul" else f"≥ {least:g}"
                verdict(what, where, bar, value, value >= least)
    generic = {
        label: row["ratios"]["eager/generic"]
        for label, row in timed.items()
        if row["config"]["mode"] != "train"
    }
    if generic:
        where, value = min(generic.items(), key=lambda item: item[1])
        what = "eager over generic, worst in inference"
        verdict(what, where, f"≥ {GENERIC_BAR:g}", value, value >= GENERIC_BAR)
    for shape in SIZES:
        kept = [row for row in memory if tuple(row["size"]) == shape]
        if len(kept) > 1:
            value = growth(kept[0], kept[-1])
            where = f"B={shape[0]} y={shape[2]}, {kept[0]['steps']} → {kept[-1]['steps']} steps"
            what = "kernel: bytes kept per byte of points"
            verdict(what, where, f"≤ {MEMORY_BAR:g}", value, value <= MEMORY_BAR)
    return found


def growth(few: Row, many: Row) -> float:
    """Return how much more the kernel keeps for more steps, over what the points of those steps take."""
    more = many["bytes"]["kernel"]["kept"] - few["bytes"]["kernel"]["kept"]
    return float(more / (many["points"] - few["points"]))


# --- report -------------------------------------------------------------------------------------------------
LABELS = {
    "eager": "eager autograd",
    "compiled": "compiled",
    "analytic": "analytic",
    "private": "analytic, aten",
    "generic": "generic",
    "kernel": "kernel",
    "kernel_all": "kernel, all steps",
}
BASELINES = ("eager", "compiled", "analytic", "private", "generic")
TRAINED = ("eager", "analytic", "generic", "kernel")
STYLES = {
    "eager": ("tab:gray", "o-"),
    "compiled": ("black", "s--"),
    "analytic": ("tab:orange", "^-"),
    "private": ("tab:red", "d-"),
    "generic": ("tab:cyan", "v:"),
    "kernel_all": ("tab:purple", "x-."),
}
TITLES = {"all": "all rows, all steps", "stop": "rows stop, mean/M = 0.25", "train": "training"}
CONVERGING = """\
Each row starts at the point of its trajectory from which its gradient's norm reaches the tolerance after as
many steps as a clipped geometric schedule asks for. All but generic and kernel run all rows until the last
one has converged, behind a mask; generic and kernel drop each row where it converges. The network has a ridge
of 1. *Kernel, all steps*: the kernel without a tolerance, from the same points."""
RATES = f"""\
Operations of the products with y, forth and back (4·B·y·hidden for each step of a network with one layer, and
where rows converge of the steps that they took), over the kernel's time, which includes the context's part,
the activations and the energies. Next to it the rate of a {PRODUCT} × {PRODUCT} × {PRODUCT} matrix product in
the same rounds."""
MEMORY_TEXT = """\
MB of the tensors that live between forward and backward pass, beyond weights and inputs, and at most at any
time. *Points*: y after every step, which the kernel stores. *Per point*: how much more the kernel keeps than
with fewer steps, over how much more the points take. What a kernel allocates and frees within one call is not
seen."""
WHERE: Columns = {
    "energy": lambda r: ", ".join(
        [r["config"]["kind"], *[r["config"]["activation"]] * (r["config"]["kind"] == "mlp")]
    ),
    "B": "{config[batch]}",
    "context": lambda r: str(r["config"]["context"] or "–"),
    "y": "{config[dim]}",
    "hidden": lambda r: "×".join(map(str, r["config"]["hidden"])) or "–",
    "M": "{config[steps]}",
}


def _over_kernel(names: Sequence[str]) -> Columns:
    return {
        **WHERE,
        "kernel ms": "{times_ms[kernel][median]:ms}",
        **{f"{LABELS[n]} / kernel": f"{{ratios[{n}/kernel]:.2f}}" for n in names},
        "eager / generic": "{ratios[eager/generic]:.2f}",
    }


STEPS: Columns = {
    "mean/M": lambda r: f"{r['steps']['mean'] / r['config']['steps']:.3f}",
    "longest": "{steps[longest]}",
    "tol": "{steps[tol]:.3f}",
}
RATE: Columns = {
    "mode": "{config[mode]}",
    **WHERE,
    "kernel GFLOP/s": "{gflops[kernel]:.1f}",
    "product GFLOP/s": "{gflops[matmul]:.1f}",
    "share": "{ratios[kernel/matmul]:.0%}",
}
KEPT: Columns = {
    "B": "{size[0]}",
    "y": "{size[2]}",
    "hidden": "{size[3]}",
    "steps": "{steps}",
    "points": "{points:MB3}",
    **{f"{LABELS[n]}, kept": f"{{bytes[{n}][kept]:MB3}}" for n in TRAINED},
    "per point": "{growth:.3f}",
    **{f"{LABELS[n]}, peak": f"{{bytes[{n}][peak]:MB3}}" for n in TRAINED},
}
BAR_COLUMNS: Columns = {
    "ratio": "{what}",
    "where": "{where}",
    "bar": "{bar}",
    "found": lambda v: f"{100 * v['found']:.0f} %" if v["bar"].endswith("%") else f"{v['found']:.2f}",
    "": lambda v: "PASS" if v["passed"] else "short",
}


class EnergyBenchmark(harness.Benchmark):
    """EnergyDescent against autograd, torch.compile and hand-written loops."""

    name = "energy"
    title = "Energy descent benchmark"
    block = 10.0
    extra: ClassVar[dict[str, Any]] = {"compiler": None, "memory": [], "bars": []}

    @dataclass(frozen=True)
    class Options(harness.Options):
        """Its options."""

        out: str = harness.option("results/bench_energy", "Folder of the results.")
        quick: bool = harness.option(
            False, "A small grid with little time for each point: less than a minute."
        )
        compiled: bool = harness.option(
            True, "Whether the compiled baseline takes part, if there is a compiler."
        )
        memory: bool = harness.option(True, "Whether training memory is measured.")

    def configs(self) -> Iterable[Config]:
        return QUICK if self.options.quick else DEFAULT

    def measure(self, config: Config) -> dict[str, Any]:
        problem = make_problem(config, self.device, self.options.seed)
        flops, steps = config.flops, None
        if problem.steps is not None:
            mean, longest = float(problem.steps.double().mean()), int(problem.steps.max())
            steps = {"mean": mean, "longest": longest, "tol": problem.tol}
            flops *= mean / config.steps
        timed = partial(self.timed, config, ratios=partial(ratios, flops=flops), steps=steps, gflops=None)
        if config.mode == "train":
            # The rate of a backward pass is not reported: how many products it needs is up to each form.
            both = training_calls(problem)
            return timed(both, partial(verify_gradients, both))
        cache = self.cache if self.compiler is None and config.compiled else None
        calls = forms(problem, cache)
        if cache is not None:
            cache.first_call(config.label, calls["compiled"])
        all_calls = {**calls, "matmul": matrix_product(self.device)}
        row = timed(all_calls, lambda: verify(problem, harness.results_of(calls)))
        if row["error"] is None:
            work = {"kernel": flops, "matmul": PRODUCT_FLOPS}
            row["gflops"] = {n: work[n] / row["times_ms"][n]["median"] / 1e6 for n in work}
        return row

    @cached_property
    def compiler(self) -> str | None:
        """Why there is no compiled baseline; None if there is one."""
        return harness.no_compiler(self.device) if self.options.compiled else "not wanted"

    def extras(self) -> None:
        self.report["compiler"] = self.compiler
        if self.options.memory:
            self.report["memory"] = list(memory_rows(self.device, self.options.seed, MEMORY))
        if self.device.type == "cpu":
            self.report["bars"] = judge(self.report["rows"], self.report["memory"])

    @staticmethod
    def notes(report: Report) -> str:
        missing = report["compiler"]
        return f"The compiled baseline was left out: {missing}." if missing else ""

    @staticmethod
    def tables(report: Report, rows: Sequence[Row]) -> Iterable[Table]:
        threads = report["machine"]["threads"]
        text = "What the kernel is meant to reach on two CPU cores, with two threads, in float32."
        text += "" if threads == 2 else f" This run used {threads}."
        yield Table("The bars", text, report["bars"], BAR_COLUMNS)
        by_mode = {mode: [row for row in rows if row["config"]["mode"] == mode] for mode in TITLES}
        text = "Inference: the point after M steps. Without a tolerance."
        yield Table("All rows, all steps", text, by_mode["all"], _over_kernel(BASELINES))
        title = f"Rows that stop on their own, mean/M = {FRACTION:g}"
        columns = {**_over_kernel((*BASELINES, "kernel_all")), **STEPS}
        yield Table(title, CONVERGING, by_mode["stop"], columns)
        text = "Forward and backward: the gradients of mean (y − target)² in weights, y₀ and context."
        yield Table("Training", text, by_mode["train"], _over_kernel(("eager", "analytic", "generic")))
        rated = [row for row in rows if row["gflops"] is not None]
        yield Table("Rate of the arithmetic", RATES, rated, RATE)
        memory = [dict(row) for row in report["memory"]]
        for before, row in pairwise(memory):
            if before["size"] == row["size"]:
                row["growth"] = growth(before, row)
        yield Table("Training memory", MEMORY_TEXT, memory, KEPT)
        text = "Of the compiled baseline, where the compiler's cache did not have it; not in the times above."
        yield harness.compile_times(report, text, "configuration")

    @staticmethod
    def draw(report: Report, rows: Sequence[Row]) -> Any:
        """Draw the silu networks with one layer: times over the kernel's, and the kernel's rate."""
        plain = {"kind": "mlp", "activation": "silu"}
        series = [r for r in rows if plain.items() <= r["config"].items() and len(r["config"]["hidden"]) == 1]
        by_mode = {mode: [r for r in series if r["config"]["mode"] == mode] for mode in TITLES}
        shown, rates = [mode for mode in TITLES if by_mode[mode]], by_mode["all"]
        if not shown:
            return None
        figure, axes = harness.panels(len(shown) + bool(rates), 3.8)
        for axis, mode in zip(axes, shown, strict=False):
            points = list(enumerate(by_mode[mode]))
            harness.curves(axis, points, "kernel", STYLES, LABELS, [1, 2, 5, 10, 20, 50])
            axis.set_title(TITLES[mode])
        axes[0].set_ylabel("time over the kernel's")
        if rates:
            shares = [100 * r["ratios"]["kernel/matmul"] for r in rates]
            axes[-1].bar(range(len(rates)), shares, width=0.5, color="tab:blue")
            axes[-1].axhline(60, color="tab:green", linewidth=1)
            axes[-1].set(title="rate of the arithmetic", ylabel="% of a matrix product's rate")
        for axis, mode in zip(axes, [*shown, "all"], strict=False):
            sizes = [r["config"] for r in by_mode[mode]]
            names = [f"B {c['batch']}\ny {c['dim']}\nh {c['hidden'][0]}" for c in sizes]
            axis.set_xticks(range(len(names)), names, fontsize="small")
            axis.set_xlim(-0.5, len(names) - 0.5)
            axis.grid(alpha=0.3, axis="y")
        harness.legend(figure, "Energy descent on a silu network, 20 steps: time over the kernel's")
        return figure
