"""Time route against masking, boolean indexing and index_select.

The branch is a network of two linear layers with SiLU between, from 128 to 128 elements. The forms were
checked before timing to give the same results and gradients within 1e-04 of the largest element:

- *route*: `ac.route(mask, branch, x, otherwise=y)`.
- *masking*: `torch.where(mask[:, None], branch(x), y)`.
- *boolean indexing*: `out = y.clone(); out[mask] = branch(x[mask])`.
- *index_select*: `y.index_copy(0, i, branch(x.index_select(0, i)))` with `i` from one `nonzero`.
- *lower bound*: the branch alone on the routed rows, taken out beforehand. It has no result of B rows: 1
  cannot be reached.

In training the gradients of the weights, of x and of y are wanted. Ratios of times in the same round, median
over interleaved rounds: a baseline over 1 is slower than route. A call shorter than 10 ms is made as often as
fits into that time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import adaptcomp_ext as ac

from . import harness
from .harness import Columns, Report, Row, Table
from .timing import Call, Times, ratios_over

DIM = 128
TOLERANCE = 1e-4
"""Relative to the largest element: products over other numbers of rows are summed in other orders."""


@dataclass(frozen=True)
class Config:
    """A point of the grid: B rows of ``dim`` elements, the routed share, the branch's hidden width."""

    mode: str
    batch: int
    hidden: int
    share: float
    dim: int = DIM

    @property
    def routed(self) -> int:
        """Number of rows that are routed."""
        return round(self.share * self.batch)

    @property
    def label(self) -> str:
        """Short name for progress and messages."""
        return f"{self.mode} B={self.batch} hidden={self.hidden} share={self.share:g}"


DEFAULT = (64, 1024, 16384), (64, 256, 1024), (0.1, 0.25, 0.5, 1.0)
QUICK = (64, 1024), (256,), (0.1, 0.5)
"""Batch sizes, branches and shares of the grid, which are measured in both modes."""


@dataclass
class Problem:
    """What every form runs: built once for a configuration, shared by all of them."""

    config: Config
    branch: nn.Module
    mask: Tensor
    x: Tensor
    otherwise: Tensor
    upstream: Tensor
    """Gradient of the result."""

    @property
    def leaves(self) -> list[Tensor]:
        """What training differentiates: the weights, and both tensors as if a network had made them."""
        return [*self.branch.parameters(), self.x, self.otherwise]


def make_problem(config: Config, device: torch.device, seed: int) -> Problem:
    """Build the branch and draw the tensors of one configuration."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Linear(config.dim, config.hidden), nn.SiLU(), nn.Linear(config.hidden, config.dim)
        branch = nn.Sequential(*layers).to(device).requires_grad_(config.mode == "train")
    mask = torch.zeros(config.batch, dtype=torch.bool)
    mask[torch.randperm(config.batch, generator=generator)[: config.routed]] = True
    x, otherwise, upstream = (
        torch.randn(config.batch, config.dim, generator=generator).to(device) for _ in range(3)
    )
    for tensor in (x, otherwise):
        tensor.requires_grad_(config.mode == "train")
    return Problem(config, branch, mask.to(device), x, otherwise, upstream)


def forms(problem: Problem) -> dict[str, Callable[[], Tensor]]:
    """Return the forward pass of every form but the lower bound."""
    branch, mask, x, otherwise = problem.branch, problem.mask, problem.x, problem.otherwise

    def route() -> Tensor:
        return ac.route(mask, branch, x, otherwise=otherwise)

    def masking() -> Tensor:
        return torch.where(mask[:, None], branch(x), otherwise)

    def boolean() -> Tensor:
        out = otherwise.clone()
        out[mask] = branch(x[mask])
        return out

    def indexed() -> Tensor:
        index = mask.nonzero()[:, 0]
        return otherwise.index_copy(0, index, branch(x.index_select(0, index)))

    return {"route": route, "masking": masking, "boolean": boolean, "indexed": indexed}


def backward(
    forward: Callable[[], Tensor], leaves: Sequence[Tensor], upstream: Tensor
) -> tuple[Tensor | None, ...]:
    """Run the forward and backward pass; None is the gradient of what the result does not depend on."""
    return torch.autograd.grad(forward(), leaves, upstream, allow_unused=True)


def lower_bound(problem: Problem) -> Call:
    """Return the branch alone on the routed rows."""
    rows = problem.x.detach()[problem.mask].requires_grad_(problem.x.requires_grad)
    forward = partial(problem.branch, rows)
    if problem.config.mode == "infer":
        return forward
    return partial(backward, forward, [*problem.branch.parameters(), rows], problem.upstream[problem.mask])


def verify(outputs: harness.Results, gradients: harness.Results) -> dict[str, float]:
    """Compare the outputs of all forms and, in training, the gradients with masking's."""
    return harness.compare_both(outputs, ("the result",), gradients, "masking", TOLERANCE)


def ratios(times: Times) -> dict[str, float]:
    """Return each form's time over the lower bound's, and each baseline's over route's."""
    return {**ratios_over(times, "limit"), **ratios_over(times, "route", "limit")}


LABELS = {"route": "route", "masking": "masking", "boolean": "boolean indexing", "indexed": "index_select"}
COLUMNS: Columns = {
    "B": "{config[batch]}",
    "hidden": "{config[hidden]}",
    "routed": lambda row: f"{100 * row['config']['share']:g} %",
    "lower bound ms": "{times_ms[limit][median]:ms}",
    "route ms": "{times_ms[route][median]:ms}",
    "route / lower bound": "{ratios[route/limit]:.2f}",
    **{f"{LABELS[n]} / route": f"{{ratios[{n}/route]:.2f}}" for n in list(LABELS)[1:]},
}


class RouteBenchmark(harness.Benchmark):
    """Route against masking and indexing."""

    name = "route"
    title = "Routing benchmark"
    block = 10.0

    @dataclass(frozen=True)
    class Options(harness.Options):
        """Its options."""

        out: str = harness.option("results/bench_route", "Folder of the results.")
        quick: bool = harness.option(
            False, "A small grid with little time for each point: less than half a minute."
        )
        full_seconds: ClassVar[float] = 3.0

    def configs(self) -> Iterable[Config]:
        axes = QUICK if self.options.quick else DEFAULT
        return (Config(*point) for point in product(("infer", "train"), *axes))

    def measure(self, config: Config) -> dict[str, Any]:
        problem, train = make_problem(config, self.device, self.options.seed), config.mode == "train"
        forward = forms(problem)
        both = {n: partial(backward, f, problem.leaves, problem.upstream) for n, f in forward.items()}
        calls: dict[str, Call] = {**(both if train else forward), "limit": lower_bound(problem)}

        def agreement() -> dict[str, float]:
            outputs = {name: (call(),) for name, call in forward.items()}
            return verify(outputs, harness.results_of(both) if train else {})

        with torch.set_grad_enabled(train):
            return self.timed(config, calls, agreement, ratios, routed=config.routed)

    @staticmethod
    def tables(report: Report, rows: Sequence[Row]) -> Iterable[Table]:
        for mode, title in {"infer": "Inference", "train": "Training: forward and backward"}.items():
            yield Table(title, "", [row for row in rows if row["config"]["mode"] == mode], COLUMNS)
