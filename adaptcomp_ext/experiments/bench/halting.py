"""Time AdaptiveHalt against masking, boolean indexing, torch.compile and a lower bound.

Forms that are timed, after a check that they give the same outputs, steps and, in training, gradients:

- *masked*: all rows run until the last one has halted; `torch.where` freezes those that have.
- *masked compile*: the same with its step (core, head, masking) under `torch.compile(dynamic=True)`.
- *boolean indexing*: after every step `state = state[active]`, written the fast way, with index tensors.
- *auto*, *compact=True*, *compact=False*: `AdaptiveHalt` with this `compact`.
- *auto, compiled step*: `AdaptiveHalt(compact="auto")` around a compiled step.
- *lower bound*: core and head alone on tensors of each step's true number of active rows, without any
  bookkeeping.

When each row halts is drawn beforehand. A head runs for real, and a script in the state, on which all forms
spend the same time, sees to it that each row halts when it should. Ratios of times in the same round, median
over interleaved rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import product
from statistics import median
from typing import Any, ClassVar

import torch

import adaptcomp_ext as ac

from . import harness
from .gpu import BANDWIDTH, bandwidth
from .halting_forms import (
    CORES,
    Config,
    Outcome,
    Problem,
    active_counts,
    forms,
    loss,
    lower_bound,
    make_problem,
    training,
)
from .harness import Columns, Report, Row, Table
from .timing import Call, Times, clock, ratio, ratios_over

TOLERANCE = 1e-3
"""Relative to the largest element: block shapes change how products are summed, step after step."""


# --- configurations -----------------------------------------------------------------------------------------
def grid(
    core: str,
    sizes: Iterable[tuple[int, int]],
    fractions: Sequence[float] = (0.25,),
    policies: Sequence[str] = ("fixed",),
    max_steps: int = 16,
    **others: bool,
) -> list[Config]:
    """Return the product of policies, sizes (B, D) and fractions."""
    axes = product(policies, sizes, fractions)
    return [Config(core, *size, max_steps, fraction, policy, **others) for policy, size, fraction in axes]


POLICIES = ("fixed", "confidence", "act")
FRACTIONS = (0.1, 0.25, 0.5, 1.0)
SIZES = SMALL, MEDIUM, LARGE, HUGE = (32, 64), (256, 128), (1024, 256), (4096, 256)
REQUIRED = [
    *grid("gru", SIZES, policies=POLICIES),
    *grid("gru", [LARGE, HUGE], policies=["fixed", "act"], training=True),
]
"""What every full run reports."""
DEFAULT = [
    *REQUIRED,
    # All fractions, up to 1.0, where no row ever leaves and compaction can only lose.
    *grid("gru", SIZES, FRACTIONS),
    *grid("gru", [SMALL, MEDIUM, LARGE], [0.1, 0.5, 1.0], ["act"]),
    *grid("gru", [MEDIUM, SMALL], [0.5, 1.0], ["confidence"]),
    # Other limits, widths and batches, small ones included, where bookkeeping weighs most.
    *grid("gru", [MEDIUM, LARGE], max_steps=8),
    *grid("gru", [MEDIUM], policies=["act"], max_steps=8),
    *grid("gru", [MEDIUM, LARGE], max_steps=32),
    *grid("gru", [MEDIUM], policies=["act"], max_steps=32),
    *grid("gru", [(32, 1024)]),
    *grid("gru", [(256, 1024)], [0.5]),
    *grid("gru", [(256, 1024)], [1.0], max_steps=8),
    *grid("gru", [(4096, 64)], [0.25, 1.0]),
    *grid("gru", [(4096, 128)], max_steps=8),
    *grid("gru", [(32, 256)], max_steps=32),
    # Other cores.
    *grid("mlp", [SMALL, MEDIUM, LARGE, (4096, 128)], [0.25, 1.0]),
    *grid("mlp", [MEDIUM], [0.25, 1.0], ["act"]),
    *grid("mlp", [LARGE, (256, 1024)], [0.5], max_steps=8),
    *grid("mlp", [SMALL, (1024, 64)], [0.1], max_steps=32),
    *grid("mlp", [MEDIUM], [0.5], ["confidence"]),
    *grid("mlp", [(1024, 128)], policies=["confidence"], max_steps=32),
    *grid("transformer", [SMALL, MEDIUM], [0.25, 1.0]),
    *grid("transformer", [(256, 64)], [0.1], max_steps=32),
    *grid("transformer", [(1024, 64)], [0.5], max_steps=8),
    *grid("transformer", [(32, 256), (256, 256)], max_steps=8),
    *grid("transformer", [(32, 128)], [0.5], ["act"]),
    *grid("transformer", [MEDIUM], policies=["confidence"]),
    # Training.
    *grid("gru", [MEDIUM], [0.25, 1.0], ["fixed", "act"], training=True),
    *grid("gru", [SMALL], policies=["fixed", "act"], training=True),
    *grid("gru", [LARGE], [0.5], ["fixed", "act"], training=True),
    *grid("gru", [LARGE], [0.1, 1.0], training=True),
    *grid("mlp", [MEDIUM], training=True),
    *grid("mlp", [(1024, 128)], [0.5], max_steps=8, training=True),
    *grid("transformer", [SMALL], training=True),
    *grid("transformer", [(256, 64)], max_steps=8, training=True),
]
"""Every value of every axis several times, the most important first: some twenty minutes on two cores. The
full product of the axes would take days."""
QUICK = [
    *grid("gru", [SMALL], policies=POLICIES, compiled=False),
    *grid("gru", [MEDIUM], [0.25, 0.1, 0.5, 1.0]),
    *grid("gru", [MEDIUM], policies=["confidence", "act"], compiled=False),
    *grid("gru", [LARGE], policies=POLICIES, compiled=False),
    *grid("gru", [SMALL], [0.1, 0.5, 1.0], compiled=False),
    *grid("gru", [MEDIUM], policies=["fixed", "act"], training=True, compiled=False),
    *grid("mlp", [MEDIUM], compiled=False),
    *grid("mlp", [SMALL], [1.0], compiled=False),
    *grid("transformer", [SMALL], compiled=False),
]
"""A look at everything in a minute or two; only one model is compiled."""
GRIDS = {"default": DEFAULT, "quick": QUICK, "required": REQUIRED}


def is_required(config: Config) -> bool:
    """Whether every full run reports this configuration."""
    return replace(config, compiled=True) in REQUIRED


def select(
    configs: Iterable[Config], cores: Sequence[str], flops: float, limit_seconds: float
) -> tuple[list[Config], list[Config]]:
    """Return the configurations that fit, those of one model side by side, and those that do not.

    Training may take three times the limit. A required configuration always fits.
    """
    chosen: list[Config] = []
    skipped: list[Config] = []
    for config in dict.fromkeys(configs):
        if config.core in cores:
            fits = config.seconds(flops) <= limit_seconds * (3 if config.training else 1)
            (chosen if fits or is_required(config) else skipped).append(config)
    models = list(dict.fromkeys(config.model_key for config in chosen))
    return sorted(chosen, key=lambda config: models.index(config.model_key)), skipped


# --- checks and ratios --------------------------------------------------------------------------------------
def verify(problem: Problem, outcomes: Mapping[str, Outcome], gradients: harness.Results) -> dict[str, float]:
    """Compare all forms with the masked one, and their steps with the schedule."""
    for name, outcome in outcomes.items():
        if not torch.equal(outcome.steps, problem.steps):
            raise harness.DisagreementError(f"{name}: the steps are not the scripted ones")
    count = 2 if problem.config.policy == "act" else 1  # the others' cost is the number of steps
    results = {name: (outcome.output, outcome.cost)[:count] for name, outcome in outcomes.items()}
    what = ("output", "ponder cost")[:count]
    return harness.compare_both(results, what, gradients, "masked", TOLERANCE)


def ratios(times: Times) -> dict[str, float]:
    """Return every form over the lower bound, auto over the better baseline, and each baseline over auto."""
    best = max(ratio(times, "auto", "masked"), ratio(times, "auto", "boolean"))
    others = [name for name in times if name not in ("masked", "boolean", "masked_compile")]
    return {**ratios_over(times, "limit"), "auto/best": best, **ratios_over(times, "auto", *others)}


def memory_rows(core: str, device: torch.device, seed: int) -> Iterator[dict[str, Any]]:
    """Measure the bytes alive between forward and backward pass, for M = 16, ``fixed`` and ``act``.

    AdaptiveHalt should follow ``row_steps``, the sum of steps over all rows; the masked form B times the
    longest row.
    """
    options = {"training": True, "compiled": False}
    for config in grid(core, [MEDIUM, LARGE], FRACTIONS, ["fixed", "act"], **options):
        problem = make_problem(config, device, seed)
        kept = {
            name: harness.kept_and_peak(partial(loss, call), problem.leaves)["kept"]
            for name, call in forms(problem, None).items()
        }
        ran, longest = int(problem.steps.sum()), int(problem.steps.max())
        counts = {"row_steps": ran, "masked_row_steps": config.batch * longest}
        yield {"config": asdict(config), **counts, "bytes": kept}


def sync_rows(device: torch.device, seed: int) -> Iterator[dict[str, Any]]:
    """Run AdaptiveHalt where any wait of the host raises; ``error`` is None where it never waited."""
    for config in grid("gru", [LARGE], policies=POLICIES):
        problem = make_problem(config, device, seed)
        with torch.inference_mode():
            calls = forms(problem, None)
        for name in ("auto", "compact", "mask"):
            error = None
            with torch.inference_mode():
                for _ in range(3):
                    calls[name]()
                torch.cuda.synchronize(device)
                torch.cuda.set_sync_debug_mode("error")
                try:
                    calls[name]()
                except RuntimeError as raised:
                    error = str(raised).splitlines()[0]
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            yield {"policy": config.policy, "form": name, "error": error}


def first_calls(device: torch.device, seed: int) -> Iterator[dict[str, Any]]:
    """Time the first call of an AdaptiveHalt in inference, with and without its check of the rows."""
    measure = clock(device)
    for config in grid("gru", [SMALL, MEDIUM]):
        problem = make_problem(config, device, seed)
        times: dict[bool, list[float]] = {True: [], False: []}
        for check_rows in 11 * (True, False):
            policy = ac.FixedSteps(problem.steps)
            halt = ac.AdaptiveHalt(problem.step, policy, config.max_steps, check_rows=check_rows)
            with torch.inference_mode():
                times[check_rows].append(measure(partial(halt, problem.state, *problem.inputs)))
        checked, unchecked = (median(times[check_rows]) for check_rows in (True, False))
        yield {"config": asdict(config), "checked_ms": checked, "unchecked_ms": unchecked}


# --- report -------------------------------------------------------------------------------------------------
LABELS = {
    "auto": "auto",
    "compact": "compact=True",
    "mask": "compact=False",
    "auto_compile": "auto, compiled step",
    "boolean": "boolean indexing",
    "masked": "masked eager",
    "masked_compile": "masked compile",
}
STYLES = {
    "masked": ("tab:gray", "o-"),
    "masked_compile": ("black", "s--"),
    "boolean": ("tab:orange", "^-"),
    "compact": ("tab:cyan", "v:"),
    "auto": ("tab:blue", "D-"),
}
WORST = 12


def _inverse(row: Row, key: str) -> str:
    return f"{1 / row['ratios'][key]:.2f}" if key in row["ratios"] else "–"


SIZE = {
    "core": "{config[core]}",
    "policy": "{config[policy]}",
    "B": "{config[batch]}",
    "D": "{config[dim]}",
    "M": "{config[max_steps]}",
    "mean/M": "{config[fraction]:g}",
}
WHERE: Columns = {**SIZE, "mode": lambda row: Config(**row["config"]).mode}
OVER_BOUND: Columns = {
    **WHERE,
    "lower bound ms": "{times_ms[limit][median]:ms}",
    **{label: f"{{ratios[{name}/limit]:.2f}}" for name, label in LABELS.items()},
}
LOSES: Columns = {
    **WHERE,
    "auto / best of both": "{ratios[auto/best]:.2f}",
    "auto / masked eager": partial(_inverse, key="masked/auto"),
    "auto / boolean": partial(_inverse, key="boolean/auto"),
    "auto / masked compile": partial(_inverse, key="masked_compile/auto"),
}
TRAINING: Columns = {
    **SIZE,
    "auto ms": "{times_ms[auto][median]:ms}",
    "over masked eager": "{ratios[masked/auto]:.2f}",
    "over boolean": "{ratios[boolean/auto]:.2f}",
    "over masked compile": "{ratios[masked_compile/auto]:.2f}",
    "auto / lower bound": "{ratios[auto/limit]:.2f}",
}
KEPT = (
    "Bytes of the tensors alive between forward and backward pass, beyond weights and inputs. *Of masked*: "
    "the sum of steps as a share of B times the longest row."
)
MEMORY: Columns = {
    **SIZE,
    "sum of steps": "{row_steps}",
    "of masked": lambda r: f"{100 * r['row_steps'] / r['masked_row_steps']:.0f} %",
    **{f"{LABELS[n]} MB": f"{{bytes[{n}]:MB2}}" for n in ("masked", "boolean", "mask", "compact", "auto")},
    "auto B / row-step": lambda r: f"{r['bytes']['auto'] / r['row_steps']:.0f}",
    "masked / auto": lambda r: f"{r['bytes']['masked'] / r['bytes']['auto']:.2f}",
}
FIRST: Columns = {
    **SIZE,
    "with its check, ms": "{checked_ms:.2f}",
    "without, ms": "{unchecked_ms:.2f}",
}
WAITS: Columns = {
    "policy": "{policy}",
    "compact": "{form}",
    "host synchronisation": lambda r: r["error"] or "none",
}


def _worst(rows: Sequence[Row]) -> str:
    """Return the sentences on the configurations at which auto is slowest."""

    def sentence(about: str, slowness: Callable[[Row], float], candidates: Sequence[Row]) -> str:
        row = max(candidates, key=slowness)
        return f"{about}: **{slowness(row):.2f}** times its time ({Config(**row['config']).label})."

    about = "Worst case of auto against the better of masked eager and boolean indexing"
    lines = [sentence(about, lambda row: row["ratios"]["auto/best"], rows)] if rows else []
    compiled = [row for row in rows if "masked_compile/auto" in row["ratios"]]
    if compiled:
        about = "Against masked torch.compile, whose compile time is not counted"
        lines.append(sentence(about, lambda row: 1 / row["ratios"]["masked_compile/auto"], compiled))
    return "\n".join([*lines, "", "Over 1 means that auto is slower."])


@dataclass(frozen=True)
class HaltingOptions(harness.Options):
    """The options of the halting benchmark."""

    out: str = harness.option("results/bench_halting", "Folder of the results.")
    quick: bool = harness.option(False, "The same as --grid quick: one or two minutes.")
    cores: str = harness.option(
        "gru,mlp,transformer", "Step networks to time, out of gru, mlp and transformer."
    )
    grid: str = harness.option("default", "Configurations to time: default, quick or required.")
    limit_seconds: float = harness.option(
        1.5, "Leave out configurations whose masked form takes longer; three times longer in training.", 0.0
    )
    compiled: bool = harness.option(True, "Whether compiled baselines take part.")
    memory: bool = harness.option(True, "Whether training memory is measured.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.wanted or not set(self.wanted) <= set(CORES):
            raise ValueError(f"cores: expected names out of {', '.join(CORES)}, got {self.cores!r}")
        if self.grid not in GRIDS:
            raise ValueError(f"grid: expected one of {', '.join(GRIDS)}, got {self.grid!r}")

    @property
    def wanted(self) -> tuple[str, ...]:
        """The names in ``cores``."""
        return tuple(name.strip() for name in self.cores.split(",") if name.strip())


class HaltingBenchmark(harness.Benchmark):
    """AdaptiveHalt against masking, boolean indexing and a lower bound."""

    name = "halting"
    title = "Halting benchmark"
    Options = HaltingOptions
    extra: ClassVar[dict[str, Any]] = {"memory": [], "first_call": [], "cuda": None, "skipped": []}

    @cached_property
    def flops(self) -> float:
        """Rate of a middling matrix product, for estimates only."""
        a, b = torch.randn(512, 256, device=self.device), torch.randn(256, 1024, device=self.device)
        measure = clock(self.device)
        return 2 * 512 * 256 * 1024 / (1e-3 * min(measure(partial(torch.mm, a, b)) for _ in range(10)))

    def configs(self) -> list[Config]:
        o = self.options
        configs = GRIDS["quick" if o.quick else o.grid]
        chosen, skipped = select(configs, o.wanted, self.flops, o.limit_seconds)
        self.report["skipped"] = [asdict(config) for config in skipped]
        return chosen

    def weight(self, config: Config) -> float:
        return max(self.options.seconds, 8 * 5 * config.seconds(self.flops))

    def measure(self, config: Config) -> dict[str, Any]:
        o = self.options
        problem = make_problem(config, self.device, o.seed)
        cache = self.cache if o.compiled and config.compiled else None
        steps = problem.steps
        rows = {
            "mean_steps": float(steps.double().mean()),
            "longest": int(steps.max()),
            "row_steps": int(steps.sum()),
            "active": active_counts(steps),
        }
        # The lower bound makes leaves that require gradients, and inference tensors could not.
        bound = lower_bound(problem)
        with nullcontext() if config.training else torch.inference_mode():
            forward = forms(problem, cache)
            both = {name: training(problem, call) for name, call in forward.items()}
            calls: Mapping[str, Call] = both if config.training else forward
            if cache is not None:
                label = f"{config.core}/{config.dim}/{config.policy}/{config.mode}"
                for name in ("masked_compile", "auto_compile"):
                    cache.first_call(f"{label}/{name}", calls[name])

            def agreement() -> dict[str, float]:
                gradients = harness.results_of(both) if config.training else {}
                return verify(problem, harness.results_of(forward), gradients)

            return self.timed(config, {**calls, "limit": bound}, agreement, ratios, rows=rows)

    def extras(self) -> None:
        o = self.options
        if o.memory:
            self.report["memory"] = list(memory_rows(o.wanted[0], self.device, o.seed))
        self.report["first_call"] = list(first_calls(self.device, o.seed))
        if self.device.type == "cuda":
            rows, waits = list(bandwidth(self.device)), list(sync_rows(self.device, o.seed))
            self.report["cuda"] = {"bandwidth": rows, "synchronisation": waits}

    @staticmethod
    def tables(report: Report, rows: Sequence[Row]) -> Iterable[Table]:
        needed = [row for row in rows if is_required(Config(**row["config"]))]
        title = "Over the lower bound: the required points"
        yield Table(
            title,
            "Time over the lower bound's; no loop that calls the step gets below 1.",
            needed,
            OVER_BOUND,
        )
        ordered = sorted(rows, key=lambda row: -row["ratios"]["auto/best"])
        yield Table("Where auto loses", _worst(rows), ordered[:WORST], LOSES)
        trained = [row for row in rows if row["config"]["training"]]
        text = "Forward and backward: how many times faster auto is; its time over the lower bound's."
        yield Table("Training", text, trained, TRAINING)
        yield Table("Training memory", KEPT, report["memory"], MEMORY)
        text = "The first call checks once that no row of the step depends on another (`check_rows`)."
        yield Table("First call", text, report.get("first_call", []), FIRST)
        cuda = report["cuda"] or {"bandwidth": [], "synchronisation": []}
        text = "Bandwidth of the row kernels against a device copy of the same block."
        yield Table("On the GPU", text, cuda["bandwidth"], BANDWIDTH)
        text = 'Under `torch.cuda.set_sync_debug_mode("error")`:'
        yield Table("Waits of the host", text, cuda["synchronisation"], WAITS)
        text = "Lower bound in milliseconds, all others over the lower bound."
        yield Table("All configurations", text, rows, OVER_BOUND, printed=False)
        text = "Once for each model, shared by all batch sizes; not in the times above."
        yield harness.compile_times(report, text, "model")
        text, left_out = "The masked form would have taken too long.", report["skipped"]
        yield Table("Left out", text, left_out, {"configuration": lambda config: Config(**config).label})

    @staticmethod
    def draw(report: Report, rows: Sequence[Row]) -> Any:
        """Draw time over the lower bound against mean/M for GRU, M = 16, fixed steps, inference."""
        shown = {}
        for size in SIZES:
            wanted = grid("gru", [size], FRACTIONS)
            found = [row for row in rows if replace(Config(**row["config"]), compiled=True) in wanted]
            shown[size] = sorted(((row["config"]["fraction"], row) for row in found), key=lambda p: p[0])
        shown = {size: points for size, points in shown.items() if len(points) > 1}
        if not shown:
            return None
        figure, axes = harness.panels(len(shown), 3.6)
        for axis, ((batch, dim), points) in zip(axes, shown.items(), strict=True):
            harness.curves(axis, points, "limit", STYLES, LABELS, [1, 2, 4, 8])
            axis.set(title=f"B = {batch}, D = {dim}", xlabel="mean steps / M")
            axis.grid(alpha=0.3)
            axis.sharey(axes[0])
        axes[0].set_ylabel("time over the lower bound")
        harness.legend(figure, "GRU cell, M = 16, inference: what halting costs beyond the rows that run")
        return figure
