"""Time batched planning in which each state stops by itself.

MPPI with 384 samples, horizon 3 and at most 6 iterations; the forms were checked before timing to give the
same full plans:

- *each its own*: each state leaves the batch after its own number of iterations.
- *all to the end*: every state takes all iterations.
- *lower bound*: the planner's own arithmetic on as many rows as are active in each iteration, prepared
  beforehand; nothing is decided, moved or written back.

Medians of ratios within interleaved rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptcomp_ext import FixedSteps
from adaptcomp_ext.models.agents import Planner, WorldModel
from adaptcomp_ext.models.agents.mppi import FIRST_STD

from . import harness
from .harness import Columns, Report, Row, Table
from .timing import Times, ratio

ITERATIONS = 6
STOPS = (0.0, 0.35, 0.25, 0.15, 0.1, 0.15)
"""Share of the states that stop after 1, 2, … iterations: 3.4 on average, about what trained agents do."""
TOLERANCE = 0.05
"""The planner's own, in units of actions: products over other numbers of rows round differently, so that
samples with nearly equal scores may change places among the elites."""


@dataclass(frozen=True)
class Config:
    """A world model's sizes and the planner's number of samples."""

    observations: int
    actions: int
    latent: int
    hidden: int
    samples: int = 384

    @property
    def label(self) -> str:
        """Short name for progress and messages."""
        return f"z {self.latent}, hidden {self.hidden}, {self.actions} actions"


PENDULUM, WALKER = Config(3, 1, 32, 128), Config(24, 6, 64, 192)


def lower_bound(planner: Planner, latent: Tensor, active: list[int]) -> Callable[[], Tensor]:
    """Return the planner's arithmetic on so many rows in each iteration."""
    with torch.no_grad():
        habit = planner.habit_plans(latent)
    blocks = [(latent[:n].clone(), habit[:n].clone()) for n in active]
    drawn = planner.samples - planner.habits - 1

    @torch.no_grad()
    def run() -> Tensor:
        mean = planner.habit_plans(latent)[:, 0].contiguous()
        std = torch.full_like(mean, FIRST_STD)
        shape = (planner.iterations, drawn, planner.horizon, planner.world.actions)
        noise = torch.randn(shape, device=latent.device)
        for i, (z, rolled) in enumerate(blocks):
            planner.improve(mean[: len(z)], std[: len(z)], z, rolled, noise[i])
        return planner.score(latent, mean[:, None, :1], planner.horizon)

    return run


def ratios(times: Times) -> dict[str, float]:
    """Return the ratios of the report."""
    pairs = (("each its own", "limit"), ("all to the end", "each its own"))
    return {f"{over} / {under}": ratio(times, over, under) for over, under in pairs}


COLUMNS: Columns = {
    "agent": "{label}",
    "mean iterations": "{mean iterations:.2f}",
    "lower bound, ms": "{ms[limit]:.2f}",
    "each its own, ms": "{ms[each its own]:.2f}",
    "all to the end, ms": "{ms[all to the end]:.2f}",
    "own / lower bound": "{each its own / limit:.3f}",
    "all / own": "{all to the end / each its own:.2f}",
}


class PlanningBenchmark(harness.Benchmark):
    """Batched planning in which each state stops by itself."""

    name = "planning"
    title = "Planning, each state for itself"
    extra: ClassVar[dict[str, Any]] = {"stops": STOPS}

    @dataclass(frozen=True)
    class Options(harness.Options):
        """Its options."""

        out: str = harness.option("results/bench_planning", "Folder of the results.")
        rows: int = harness.option(32, "Number of states planned together.", 2)
        threads: int = harness.option(1, "Threads of torch.", 1)
        quick: bool = harness.option(False, "Little time for each agent.")
        full_seconds: ClassVar[float] = 10.0

    def configs(self) -> Iterable[Config]:
        """Return the sizes of a pendulum's agent and of a walker's."""
        return PENDULUM, WALKER

    def measure(self, config: Config) -> dict[str, Any]:
        with torch.random.fork_rng():
            return self._measure(config)

    def _measure(self, config: Config) -> dict[str, Any]:
        rows, device, seed = self.options.rows, self.device, self.options.seed
        torch.manual_seed(seed)
        world = WorldModel(config.observations, config.actions, config.latent, config.hidden)
        planner = Planner(world.to(device).eval(), samples=config.samples, iterations=ITERATIONS)
        with torch.no_grad():
            latent = world.encode(torch.randn(rows, config.observations).to(device))
        counts = [round(share * rows) for share in STOPS]
        counts[1] += rows - sum(counts)
        steps = torch.repeat_interleave(torch.arange(1, ITERATIONS + 1), torch.tensor(counts))
        scattered = steps[torch.randperm(rows)].to(device)
        active = [int((steps > k).sum()) for k in range(ITERATIONS)]
        calls: dict[str, Callable[[], Any]] = {
            "each its own": partial(planner.plan, latent, None, FixedSteps(scattered)),
            "all to the end": partial(planner.plan, latent, None, FixedSteps(ITERATIONS)),
        }

        def plans(name: str) -> Any:
            torch.manual_seed(seed)
            return calls[name]()

        def agreement() -> float:
            own, full = plans("each its own"), plans("all to the end")
            if not torch.equal(own.iterations, scattered):
                raise harness.DisagreementError(
                    "each its own: states stopped after other iterations than they should"
                )
            last = scattered == ITERATIONS
            if not last.any():
                return 0.0
            results = {"each its own": (own.mean[last],), "all to the end": (full.mean[last],)}
            return harness.compare(results, ("a full plan",), "all to the end", TOLERANCE)

        known = {**asdict(config), "rows": rows, "mean iterations": float(steps.double().mean())}
        timed = {**calls, "limit": lower_bound(planner, latent, active)}
        row = self.timed(config, timed, agreement, ratios, **known)
        if row["error"] is None:
            row |= {"ms": {name: times["median"] for name, times in row["times_ms"].items()}, **row["ratios"]}
        return row

    @staticmethod
    def notes(report: Report) -> str:
        return f"{report['settings']['rows']} states were planned together."

    @staticmethod
    def tables(report: Report, rows: Sequence[Row]) -> Iterable[Table]:
        yield Table("Times", "", rows, COLUMNS)
