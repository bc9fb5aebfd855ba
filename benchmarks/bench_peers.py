"""Time adaptcomp_ext against the peers in the documentation: torchdeq, torchode, TorchEBM and earlyon.

Both sides do the same arithmetic on the same 1,024 rows, and were checked before timing to give the same
results (torchode: the same numbers of steps). Exception: the batch of earlyon leaves together, at the first
exit at which every row is sure, here the last; with `AdaptiveHalt` each row leaves at its own.

These are single points, chosen to show the mechanism: rows that need different numbers of steps (torchdeq,
torchode, earlyon), and a descent in one kernel call (TorchEBM). Where all rows need the same number of steps,
nothing is gained over the first two. Inference; ratios of times in the same round, median over interleaved
rounds.

`python benchmarks/bench_peers.py`, after `pip install torchdeq torchode torchebm earlyon`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import adaptcomp_ext as ac
from adaptcomp_ext.experiments.bench import harness
from adaptcomp_ext.experiments.bench.harness import Columns, Report, Row, Table
from adaptcomp_ext.experiments.bench.timing import Call, ratios_over

ROWS, WIDTH = 1024, 256
TOLERANCE = 1e-3
Sides = tuple[Call, Call, str]
"""The call of the peer, our own, and what both do."""


class Contraction(nn.Module):
    """One iteration z ← tanh(ρ·Wz + x): the larger a row's ρ, the more iterations it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.orthogonal_(self.linear.weight)

    def forward(self, z: Tensor, x: Tensor, rho: Tensor) -> Tensor:
        return torch.tanh(rho * self.linear(z) + x)


def torchdeq() -> Sides:
    """A fixed point for each row, until two iterations differ by at most 1e-3."""
    from torchdeq import get_deq

    step, x = Contraction(), 0.1 * torch.randn(ROWS, WIDTH)
    rho, z0 = torch.rand(ROWS, 1).pow(3) * 0.9, torch.zeros(ROWS, WIDTH)
    solver = get_deq(f_solver="fixed_point_iter", f_max_iter=100, f_tol=TOLERANCE, f_stop_mode="abs").eval()
    halt = ac.AdaptiveHalt(step, ac.Convergence(TOLERANCE, norm="absolute"), max_steps=100)
    steps = halt(z0, x, rho).steps.float()
    what = f"fixed points; {steps.mean():.1f} iterations per row on average, of {steps.max():.0f}"
    return lambda: solver(lambda z: step(z, x, rho), z0)[0][-1], lambda: halt(z0, x, rho).output, what


class Euler(nn.Module):
    """One step of Euler's method through a small network."""

    def __init__(self, dt: float) -> None:
        super().__init__()
        self.flow = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.dt = dt

    def forward(self, y: Tensor) -> Tensor:
        return y + self.dt * self.flow(y)


def torchode() -> Sides:
    """Euler's method, each row to its own end: 1 to 40 steps."""
    import torchode

    step, y0 = Euler(0.05), torch.randn(ROWS, WIDTH)
    steps = (torch.rand(ROWS).pow(3) * 39 + 1.5).long().clamp(max=40)
    term = torchode.ODETerm(lambda t, y: step.flow(y))
    solver = torchode.AutoDiffAdjoint(torchode.Euler(term=term), torchode.FixedStepController())
    zero, dt = torch.zeros(ROWS), torch.full((ROWS,), step.dt)
    # The step with which a row reaches its end is its last; the middle of it leaves no doubt which one it is.
    ends = (steps - 0.5) * step.dt
    problem = torchode.InitialValueProblem(y0=y0, t_start=zero, t_end=ends, t_eval=zero[:, None])
    halt = ac.AdaptiveHalt(step, ac.FixedSteps(steps), max_steps=40)
    what = f"Euler steps; {steps.float().mean():.1f} per row on average, of {steps.max()}"
    return lambda: solver.solve(problem, dt0=dt).stats["n_steps"], lambda: halt(y0).steps, what


def torchebm() -> Sides:
    """20 steps of gradient descent on the energy of a network, all rows to the end."""
    from torchebm.core import BaseModel
    from torchebm.samplers.gradient_descent import GradientDescentSampler

    energy, y0 = ac.MLPEnergy(dim_y=64, dim_context=0, hidden=256, ridge=1.0), torch.randn(ROWS, 64)

    class Model(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.energy = energy

        def forward(self, x: Tensor) -> Tensor:
            return self.energy(x)

    sampler = GradientDescentSampler(model=Model(), step_size=0.1)
    descend = ac.EnergyDescent(energy, step_size=0.1, max_steps=20, tol=0.0)
    what = "20 steps of gradient descent on an MLPEnergy, 64 → 256, no row stops"
    return lambda: sampler.sample(x=y0, n_steps=20).detach(), lambda: descend(y0).y, what


class Exit(nn.Module):
    """A layer with its own classifier."""

    def __init__(self) -> None:
        super().__init__()
        last = nn.Linear(WIDTH, WIDTH)
        # Features grow from layer to layer, and with them confidence.
        nn.init.orthogonal_(last.weight, gain=5.0)
        self.layer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), last)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        features = self.layer(state[0])
        return features, self.head(features)


def earlyon() -> Sides:
    """Six layers with a classifier each; a row is sure where its features are large."""
    from earlyon import EarlyExitConfig, EarlyExitWrapper, ExitPoint

    exits = nn.ModuleList([Exit() for _ in range(6)])
    *early, last = exits
    config = EarlyExitConfig(
        backbone="custom",
        num_classes=10,
        exit_points=[ExitPoint(f"exit{i}", str(i), WIDTH) for i in range(5)],
        confidence_thresholds=[0.5] * 5,
        temperatures={**{f"exit{i}": 1.0 for i in range(5)}, "final": 1.0},
    )
    heads = nn.ModuleDict({f"exit{i}": one.head for i, one in enumerate(early)})
    backbone = nn.Sequential(*(one.layer for one in exits))
    wrapper = EarlyExitWrapper(backbone, heads, last.head, config, (WIDTH,)).eval()
    x = torch.randn(ROWS, WIDTH) * torch.rand(ROWS, 1) * 4
    state = x, torch.zeros(ROWS, 10)
    halt = ac.AdaptiveHalt(exits, ac.Confidence(0.5), max_steps=6, readout=lambda state: state[1])
    full = ac.AdaptiveHalt(exits, ac.FixedSteps(6), max_steps=6, readout=lambda state: state[1])
    theirs = wrapper.forward_inference_batched(x).predictions
    torch.testing.assert_close(full(state).output, theirs, rtol=TOLERANCE, atol=TOLERANCE)  # all six layers
    mean = halt(state).steps.float().mean()
    what = f"early exit; {mean:.1f} of 6 layers per row on average, earlyon's batch takes all 6"
    return lambda: wrapper.forward_inference_batched(x).predictions, lambda: halt(state).output, what


PEERS: dict[str, Callable[[], Sides]] = {
    "torchdeq": torchdeq,
    "torchode": torchode,
    "torchebm": torchebm,
    "earlyon": earlyon,
}
COLUMNS: Columns = {
    "peer": "{label} {version}",
    "work": "{what}",
    "peer, ms": "{times_ms[peer][median]:ms}",
    "adaptcomp_ext, ms": "{times_ms[own][median]:ms}",
    "peer / adaptcomp_ext": "{ratios[peer/own]:.1f}",
    "of the fastest rounds": "{ratios_of_minima[peer/own]:.1f}",
}


@dataclass(frozen=True)
class Config:
    """One peer."""

    label: str


class PeerBenchmark(harness.Benchmark):
    """One measured point against each peer."""

    name = "peers"
    title = "Peers"

    @dataclass(frozen=True)
    class Options(harness.Options):
        """Its options."""

        out: str = harness.option("results/bench_peers", "Folder of the results.")
        full_seconds: ClassVar[float] = 10.0

    def configs(self) -> Iterable[Config]:
        return map(Config, PEERS)

    def measure(self, config: Config) -> dict[str, Any]:
        torch.manual_seed(self.options.seed)
        with torch.no_grad():
            peer, own, what = PEERS[config.label]()

            def agreement() -> dict[str, float]:
                if config.label == "earlyon":  # compared where it was made: our rows leave earlier
                    return {}
                both = {"peer": (peer().float(),), "own": (own().float(),)}
                return {"output": harness.compare(both, ("the result",), "peer", TOLERANCE)}

            calls, known = {"peer": peer, "own": own}, {"what": what, "version": version(config.label)}
            return self.timed(config, calls, agreement, partial(ratios_over, under="own"), **known)

    @staticmethod
    def tables(report: Report, rows: Sequence[Row]) -> Iterable[Table]:
        yield Table("One point each", "", rows, COLUMNS)


if __name__ == "__main__":
    PeerBenchmark.main()
