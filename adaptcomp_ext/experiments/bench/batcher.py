"""Time ContinuousBatcher on streams and on single requests.

The step is `torch.nn.GRUCell`; the numbers of steps are geometric, drawn by `ac.PonderNet` from a constant
hazard, and bounded by M. In the stream with slow samples a twentieth of them has ten times the mean. Single
samples are taken from memory. The forms give the same numbers of steps, and states within 1e-04 of the
largest element:

- *batcher*: `for result in ac.ContinuousBatcher(halt, slots).run(samples)`.
- *batches*: `halt(state, x)` on one batch of `slots` rows after the other, in inference, which compacts.
- *steps*: the step and the head alone on full blocks of `slots` rows, as often as all steps of all rows fill
  blocks. It is the lower bound of a loop that runs the step on so many rows at a time.

Ratios of times in the same round, median over interleaved rounds.

*Requests* come one by one, at random times (exponential gaps), so often that the batcher is at half of the
load at which full blocks would keep up, and at most 2,000 times a second. The own time of a row is the time
of the calls of the step that it was in. *Soak* sends a million samples through a small step, with failures in
stream and step, and looks at the memory of the process on the way.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import adaptcomp_ext as ac

from . import harness, machine
from .harness import Columns, Report, Row, Table
from .timing import Call, Times, ratio

TOLERANCE = 1e-4
"""Relative to the largest element: products over other numbers of rows are summed in other orders."""
BATCHER, BATCHES, STEPS = "batcher", "batches", "steps"


@dataclass(frozen=True)
class Config:
    """A stream: the width of the step, the mean number of steps before the bound M cuts it, M, samples.

    ``slow`` is the share of the samples whose mean is ten times as large.
    """

    dim: int
    mean: float
    most: int
    samples: int
    slots: int = 256
    slow: float = 0.0

    @property
    def label(self) -> str:
        """Short name for progress and messages."""
        slow = f" slow={self.slow:g}" if self.slow else ""
        return f"D={self.dim} mean={self.mean:g} M={self.most}{slow}"


DEFAULT = (
    Config(512, 16, 64, 32768),  # long, so that the end, where slots stay empty, weighs little
    Config(512, 8, 256, 16384, slow=0.05),
    Config(256, 16, 64, 16384),
    Config(128, 16, 64, 8192),
)
QUICK = (Config(512, 4, 16, 1024, 64),)
MOST_REQUESTS = 2000.0
"""Requests a second: more would keep the thread of Python busy that sends them."""
SOAKED, QUICK_SOAKED = 1_000_000, 20_000
"""Samples of the soak."""


class Step(nn.Module):
    """A recurrent cell that takes the state first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(dim, dim)

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        """Take a step."""
        out: Tensor = self.cell(x, state)
        return out


class ConstantHazard:
    """A head that gives every row the same probability of halting."""

    def __init__(self, mean: float) -> None:
        self.logit = -math.log(mean - 1)

    def __call__(self, state: Tensor) -> Tensor:
        """Return the logits."""
        return state.new_full((state.shape[0],), self.logit)


class MixedHazard:
    """A head with two probabilities of halting: the first number of the input says which one a row has."""

    def __init__(self, mean: float, slow: float) -> None:
        self.fast, self.slow = -math.log(mean - 1), -math.log(10 * mean - 1)
        self.above = statistics.NormalDist().inv_cdf(1 - slow)

    def __call__(self, state: Tensor, x: Tensor) -> Tensor:
        """Return the logits."""
        return torch.where(x[:, 0] > self.above, self.slow, self.fast)


@dataclass
class Problem:
    """What every form runs: built once for a configuration."""

    config: Config
    halt: ac.AdaptiveHalt
    head: ConstantHazard | MixedHazard
    state: Tensor
    x: Tensor
    samples: list[tuple[Tensor, Tensor]]


def make_problem(config: Config, seed: int) -> Problem:
    """Build the module and draw the samples."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        step, x = Step(config.dim), torch.randn(config.samples, config.dim)
    head = MixedHazard(config.mean, config.slow) if config.slow else ConstantHazard(config.mean)
    halt = ac.AdaptiveHalt(step, ac.PonderNet(head, seed=seed), max_steps=config.most).eval()
    state = torch.zeros_like(x)
    samples = list(zip(state.unbind(), x.unbind(), strict=True))
    return Problem(config, halt, head, state, x, samples)


def run_batches(problem: Problem) -> list[ac.HaltResult]:
    """Run batch after batch, with the random numbers of the stream."""
    results = []
    for begin in range(0, problem.config.samples, problem.config.slots):
        rows = slice(begin, begin + problem.config.slots)
        ids = torch.arange(begin, min(begin + problem.config.slots, problem.config.samples))
        results.append(problem.halt(problem.state[rows], problem.x[rows], sample_ids=ids))
    return results


def run_steps(problem: Problem, row_steps: int) -> Call:
    """Return the step and the head alone, on full blocks."""
    slots = problem.config.slots
    state, x, step, head = problem.state[:slots], problem.x[:slots], problem.halt.step, problem.head

    def run() -> None:
        for _ in range(round(row_steps / slots)):
            out = step(state, x)
            head(out, x) if isinstance(head, MixedHazard) else head(out)

    return run


def ratios(times: Times) -> dict[str, float]:
    """Return the batcher's share of what the steps alone reach, and how much faster it is than batches."""
    pairs = ((STEPS, BATCHER), (BATCHES, BATCHER), (STEPS, BATCHES))
    return {f"{over}/{under}": ratio(times, over, under) for over, under in pairs}


# --- requests -----------------------------------------------------------------------------------------------
class TimedStep(nn.Module):
    """A step that notes when its calls begin and how long they take."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step
        self.until = [0.0]
        """The time of all calls so far, after each call, in seconds."""

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        """Take a step."""
        start = time.perf_counter()
        out: Tensor = self.step(state, x)
        self.until.append(self.until[-1] + time.perf_counter() - start)
        return out


def measure_requests(problem: Problem, seconds: float, load: float, seed: int) -> dict[str, Any]:
    """Send single requests at a share of the load that full blocks would serve."""
    config = problem.config
    inner: Any = problem.halt.step
    step = TimedStep(inner)
    halt = ac.AdaptiveHalt(step, problem.halt.policy, max_steps=config.most).eval()
    with torch.no_grad():
        whole = [problem.state[: config.slots], problem.x[: config.slots]]
        for _ in range(5):
            step(*whole)
    mean_steps = sum(
        int(r.steps) for r in ac.ContinuousBatcher(halt, config.slots).run(problem.samples[:512])
    )
    of_a_block = statistics.median(b - a for a, b in zip(step.until[1:5], step.until[2:6], strict=True))
    full = config.slots / (of_a_block * mean_steps / 512)  # requests a second
    rate = min(load * full, MOST_REQUESTS)
    count = max(50, int(rate * seconds))
    found: list[tuple[float, float]] = []

    def done(since: float) -> Callable[[Future[Any]], None]:
        def note(future: Future[Any]) -> None:
            latency, taken = time.perf_counter() - since, int(future.result().steps)
            found.append((latency, step.until[-1] - step.until[-1 - taken]))

        return note

    gaps = random.Random(seed)
    with ac.ContinuousBatcher(halt, config.slots) as batcher:
        following = time.perf_counter()
        for i in range(count):
            following += gaps.expovariate(rate)
            time.sleep(max(0.0, following - time.perf_counter()))
            future = batcher.submit(problem.samples[i % config.samples], sample_id=i)
            future.add_done_callback(done(time.perf_counter()))
    measured = batcher.statistics
    over = sorted(latency / own for latency, own in found)
    return {
        "label": config.label,
        "requests": count,
        "per_second": rate,
        "load": rate / full,
        "mean_block": measured.row_steps / measured.calls,
        "latency_ms": 1e3 * statistics.median(latency for latency, _ in found),
        "own_ms": 1e3 * statistics.median(own for _, own in found),
        "ratio": statistics.median(over),
        "ratio_p95": over[int(0.95 * (len(over) - 1))],
        "queue_ms": 1e3 * measured.mean_queue_seconds,
    }


# --- soak ---------------------------------------------------------------------------------------------------
class BreakingStep(nn.Module):
    """A step that raises at every hundredth call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        """Take a step."""
        self.calls += 1
        if self.calls % 100 == 0:
            raise OSError(f"call {self.calls}")
        return state * 0.5 + x


def measure_soak(count: int, slots: int = 256) -> dict[str, Any]:
    """Send samples through a batcher, some of them bad, and count what comes back; bytes on the heap."""
    halt = ac.AdaptiveHalt(BreakingStep(), ac.PonderNet(ConstantHazard(4.0)), max_steps=16).eval()
    good, bad = (torch.zeros(8), torch.ones(8)), (torch.zeros(9), torch.ones(8))

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(count):
            yield bad if i % 997 == 500 else good

    batcher = ac.ContinuousBatcher(halt, slots)
    heap: list[int] = []
    results = refused = failed = 0
    start = time.perf_counter()
    for number, result in enumerate(batcher.run(stream(), errors="return"), 1):
        if isinstance(result, ac.SampleError):
            bad_one = isinstance(result, ValueError)
            refused, failed = refused + bad_one, failed + (not bad_one)
        else:
            results += 1
        if number % max(1, count // 8) == 0:
            gc.collect()
            heap.append(machine.heap_bytes() or 0)
    counted = batcher.statistics
    return {
        "samples": count,
        "seconds": time.perf_counter() - start,
        "results": results,
        "refused": refused,
        "failed": failed,
        "lost": count - results - refused - failed,
        "counts_agree": counted.samples == count and counted.results == results,
        "utilization": counted.utilization,
        "heap_bytes": heap,
        "heap_growth": heap[-1] - heap[len(heap) // 4],
    }


STREAMS: Columns = {
    "D": "{config[dim]}",
    "mean steps": "{mean_steps:.1f}",
    "M": "{config[most]}",
    "slow": "{config[slow]:.0%}",
    "slots": "{config[slots]}",
    "step on a full block, ms": "{block_ms:ms}",
    "slots in use": "{utilization:.1%}",
    "batcher, s": "{seconds[batcher]:.2f}",
    "share of the steps' own speed": "{ratios[steps/batcher]:.1%}",
    "batches / batcher": "{ratios[batches/batcher]:.2f}",
}
REQUESTS: Columns = {
    "stream": "{label}",
    "requests": "{requests}",
    "per second": "{per_second:.0f}",
    "load": "{load:.0%}",
    "rows of a block": "{mean_block:.0f}",
    "own steps, ms": "{own_ms:ms}",
    "latency, ms": "{latency_ms:ms}",
    "latency / own": "{ratio:.2f}",
    "95th percentile": "{ratio_p95:.2f}",
    "in the queue, ms": "{queue_ms:ms}",
}
SOAK: Columns = {
    "samples": "{samples}",
    "s": "{seconds:.0f}",
    "results": "{results}",
    "refused": "{refused}",
    "failed with their step": "{failed}",
    "lost": "{lost}",
    "slots in use": "{utilization:.1%}",
    "heap, MB": lambda row: " ".join(
        f"{b / 1e6:.1f}" for b in row["heap_bytes"][:: len(row["heap_bytes"]) // 4]
    ),
}


class BatcherBenchmark(harness.Benchmark):
    """Streams and requests in slots that are refilled."""

    name = "batcher"
    title = "Batcher benchmark"
    extra: ClassVar[dict[str, Any]] = {"requests": [], "soak": []}

    @dataclass(frozen=True)
    class Options(harness.Options):
        """Its options."""

        out: str = harness.option("results/bench_batcher", "Folder of the results.")
        threads: int = harness.option(1, "Threads of torch.", 1)
        quick: bool = harness.option(False, "One small stream, and a short soak: less than half a minute.")
        soak: int | None = harness.option(
            None, "Samples of the soak. Default: a million, or 20000 with --quick.", 20
        )
        full_seconds: ClassVar[float] = 20.0

    def configs(self) -> Iterable[Config]:
        return QUICK if self.options.quick else DEFAULT

    def weight(self, config: Config) -> float:
        return config.dim**2 * config.samples

    @torch.no_grad()
    def measure(self, config: Config) -> dict[str, Any]:
        problem = make_problem(config, self.options.seed)
        batcher = ac.ContinuousBatcher(problem.halt, config.slots)
        streamed, batches = list(batcher.run(problem.samples)), run_batches(problem)
        counted = batcher.statistics

        def agreement() -> dict[str, float]:
            steps = torch.stack([result.steps for result in streamed])
            if not torch.equal(steps, torch.cat([result.steps for result in batches])):
                raise harness.DisagreementError("batcher: the numbers of steps differ from those of batches")
            outputs = {
                BATCHER: (torch.stack([result.output for result in streamed]),),
                BATCHES: (torch.cat([result.output for result in batches]),),
            }
            return {"output": harness.compare(outputs, ("the output",), BATCHES, TOLERANCE)}

        def stream() -> None:
            for _ in batcher.run(problem.samples):
                pass

        calls: dict[str, Call] = {
            BATCHER: stream,
            BATCHES: lambda: run_batches(problem),
            STEPS: run_steps(problem, counted.row_steps),
        }
        row = self.timed(
            config,
            calls,
            agreement,
            ratios,
            mean_steps=counted.row_steps / config.samples,
            utilization=counted.utilization,
        )
        if row["error"] is None:
            row["seconds"] = {name: t["median"] / 1e3 for name, t in row["times_ms"].items()}
            row["block_ms"] = row["times_ms"][STEPS]["median"] / round(counted.row_steps / config.slots)
        return row

    def extras(self) -> None:
        quick, seed = self.options.quick, self.options.seed
        configs = [Config(**row["config"]) for row in self.report["rows"]]
        seconds = 1.0 if quick else self.options.seconds
        requests = [measure_requests(make_problem(c, seed), seconds, 0.5, seed) for c in configs]
        count = (QUICK_SOAKED if quick else SOAKED) if self.options.soak is None else self.options.soak
        self.report.update(requests=requests, soak=[measure_soak(count)])

    @staticmethod
    def tables(report: Report, rows: Sequence[Row]) -> Iterable[Table]:
        text = "Mean and M of the numbers of steps; a stream is run to its end, where slots stay empty."
        yield Table("Streams", text, rows, STREAMS)
        text = (
            "Single requests at a share of the load that full blocks would serve; medians over all requests."
        )
        yield Table("Requests", text, report["requests"], REQUESTS)
        text = "The heap after each quarter of the stream."
        yield Table("Soak", text, report["soak"], SOAK)
