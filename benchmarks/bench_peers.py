"""Time adaptcomp_ext against the peers that the documentation names: torchdeq, torchode, TorchEBM and earlyon.

    pip install torchdeq torchode torchebm earlyon
    python benchmarks/bench_peers.py

Each comparison does the same arithmetic on the same rows, and checks that the results agree before it is timed.
The two sides take turns; the ratio is the median over the rounds. Writes benchmarks/results/bench_peers.json
and .md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

import adaptcomp_ext as ac

ROWS, WIDTH = 1024, 256
TOLERANCE = 1e-3


class Contraction(nn.Module):
    """One iteration z ← tanh(ρ·Wz + x): the larger a row's ρ, the more iterations it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.orthogonal_(self.linear.weight)

    def forward(self, z: Tensor, x: Tensor, rho: Tensor) -> Tensor:
        return torch.tanh(rho * self.linear(z) + x)


def fixed_point() -> tuple[str, Callable[[], Tensor], Callable[[], Tensor], str]:
    """A fixed point for each row, as far as a residual of 1e-3; 100 iterations at most."""
    from torchdeq import get_deq

    step, x = Contraction(), 0.1 * torch.randn(ROWS, WIDTH)
    rho = torch.rand(ROWS, 1).pow(3) * 0.9
    solver = get_deq(f_solver="fixed_point_iter", f_max_iter=100, f_tol=TOLERANCE, f_stop_mode="abs")
    solver.eval()
    halt = ac.AdaptiveHalt(step, ac.Convergence(TOLERANCE, norm="absolute"), max_steps=100)
    z0 = torch.zeros(ROWS, WIDTH)
    mean = halt(z0, x, rho).steps.float().mean().item()

    def peer() -> Tensor:
        return solver(lambda z: step(z, x, rho), z0)[0][-1]

    what = f"fixed points; {mean:.1f} iterations per row on average, of {int(halt(z0, x, rho).steps.max())}"
    return "torchdeq", peer, lambda: halt(z0, x, rho).output, what


class Flow(nn.Module):
    """dy/dt, a small network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def forward(self, y: Tensor) -> Tensor:
        return self.net(y)


class Euler(nn.Module):
    def __init__(self, flow: Flow, dt: float) -> None:
        super().__init__()
        self.flow, self.dt = flow, dt

    def forward(self, y: Tensor) -> Tensor:
        return y + self.dt * self.flow(y)


def ode() -> tuple[str, Callable[[], Tensor], Callable[[], Tensor], str]:
    """Euler's method, each row to its own end: 1 to 40 steps, 10 on average."""
    import torchode

    flow, dt = Flow(), 0.05
    steps = (torch.rand(ROWS).pow(3) * 39 + 1.5).long().clamp(max=40)
    y0 = torch.randn(ROWS, WIDTH)
    term = torchode.ODETerm(lambda t, y: flow(y))
    solver = torchode.AutoDiffAdjoint(torchode.Euler(term=term), torchode.FixedStepController())
    ends = (
        steps - 0.5
    ) * dt  # the last step crosses the end; both sides are compared on the states before it
    problem = torchode.InitialValueProblem(
        y0=y0, t_start=torch.zeros(ROWS), t_end=ends, t_eval=torch.zeros(ROWS, 1)
    )
    halt = ac.AdaptiveHalt(Euler(flow, dt), ac.FixedSteps(steps), max_steps=40)

    def peer() -> Tensor:
        return solver.solve(problem, dt0=torch.full((ROWS,), dt)).stats["n_steps"]

    what = f"Euler steps; {steps.float().mean():.1f} per row on average, of {int(steps.max())}"
    return "torchode", peer, lambda: halt(y0).steps, what


def energy() -> tuple[str, Callable[[], Tensor], Callable[[], Tensor], str]:
    """20 steps of gradient descent on the energy of a network, all rows to the end."""
    from torchebm.core import BaseModel
    from torchebm.samplers.gradient_descent import GradientDescentSampler

    own = ac.MLPEnergy(dim_y=64, dim_context=0, hidden=256, ridge=1.0)

    class Model(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.own = own

        def forward(self, x: Tensor) -> Tensor:
            return self.own(x)

    y0 = torch.randn(ROWS, 64)
    sampler = GradientDescentSampler(model=Model(), step_size=0.1)
    descend = ac.EnergyDescent(own, step_size=0.1, max_steps=20, tol=0.0)
    return (
        "torchebm",
        lambda: sampler.sample(x=y0, n_steps=20).detach(),
        lambda: descend(y0).y,
        "20 steps of gradient descent on an MLPEnergy, 64 → 256, no row stops",
    )


class Exit(nn.Module):
    def __init__(self, layer: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, head

    def forward(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        features = self.layer(state[0])
        return features, self.head(features)


def early_exit() -> tuple[str, Callable[[], Tensor], Callable[[], Tensor], str]:
    """Six layers with a head each; a row is sure where its features are large."""
    from earlyon import EarlyExitConfig, EarlyExitWrapper, ExitPoint

    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)) for _ in range(6)]
    heads = [nn.Linear(WIDTH, 10) for _ in range(6)]
    for layer in layers:  # each layer enlarges the features, so that every row is sure in the end
        nn.init.orthogonal_(layer[2].weight, gain=5.0)
    backbone = nn.Sequential(*layers)
    config = EarlyExitConfig(
        backbone="custom",
        num_classes=10,
        exit_points=[ExitPoint(f"exit{i}", str(i), WIDTH) for i in range(5)],
        confidence_thresholds=[0.5] * 5,
        temperatures={**{f"exit{i}": 1.0 for i in range(5)}, "final": 1.0},
    )
    wrapper = EarlyExitWrapper(
        backbone, nn.ModuleDict({f"exit{i}": heads[i] for i in range(5)}), heads[5], config, (WIDTH,)
    ).eval()
    exits = nn.ModuleList([Exit(layer, head) for layer, head in zip(layers, heads, strict=True)])
    halt = ac.AdaptiveHalt(exits, ac.Confidence(0.5), max_steps=6, readout=lambda state: state[1])
    x = torch.randn(ROWS, WIDTH) * torch.rand(ROWS, 1) * 4
    state = (x, torch.zeros(ROWS, 10))
    result, left = halt(state), wrapper.forward_inference_batched(x).exit_taken
    mean = result.steps.float().mean()
    assert left == -1  # the last exit: some row was unsure everywhere before
    what = f"early exit; {mean:.1f} of 6 layers per row on average, earlyon's batch takes all 6"
    return (
        "earlyon",
        lambda: wrapper.forward_inference_batched(x).predictions,
        lambda: halt(state).output,
        what,
    )


def compare(case: Callable, rounds: int) -> dict[str, object]:
    torch.manual_seed(0)
    name, peer, own, what = case()
    theirs, ours = peer(), own()
    if name != "earlyon":  # whose batch passes through all layers, where our rows leave early
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    times: dict[str, list[float]] = {"peer": [], "own": []}
    for _ in range(rounds):
        for side, call in (("peer", peer), ("own", own)):
            start = perf_counter()
            call()
            times[side].append(1000 * (perf_counter() - start))
    ratios = sorted(p / o for p, o in zip(times["peer"], times["own"], strict=True))
    return {
        "peer": name,
        "version": version(name),
        "what": what,
        "peer_ms": statistics.median(times["peer"]),
        "own_ms": statistics.median(times["own"]),
        "ratio": statistics.median(ratios),
        "quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
    }


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def page(report: dict) -> str:
    rows = [
        f"| {r['peer']} {r['version']} | {r['what']} | {r['peer_ms']:.1f} | {r['own_ms']:.1f} | "
        f"{r['ratio']:.1f} ({r['quartiles'][0]:.1f} to {r['quartiles'][1]:.1f}) |"
        for r in report["results"]
    ]
    return "\n".join(
        [
            "# Peers",
            "",
            f"{report['processor']}, one thread, device cpu; Python {report['python']}, torch {report['torch']}; "
            f"{ROWS:,} rows of float32, inference; {report['rounds']} rounds in which the two sides took turns.",
            "",
            "Both sides do the same arithmetic on the same rows, and their results agree within 1e-3 (of torchode the "
            "numbers of steps were compared). Exception: earlyon's batch leaves together, at the first exit at which "
            "every row is sure, here the last; with `AdaptiveHalt` each row leaves at its own.",
            "",
            "| peer | work | peer, ms | adaptcomp_ext, ms | peer / adaptcomp_ext, median (quartiles) |",
            "|---|---|---:|---:|---:|",
            *rows,
            "",
            "Other work ran on the machine meanwhile, which is why the sides took turns and quartiles are given.",
            "",
            "These are single points, chosen to show the mechanism: rows that need different numbers of steps (torchdeq, "
            "torchode, earlyon), and a descent in one kernel call (TorchEBM). Where all rows need the same number of "
            "steps, nothing is gained over the first two.",
            "",
            "Made by `python benchmarks/bench_peers.py`.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="Number of rounds.")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="Folder of the report."
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        results = [compare(case, options.rounds) for case in (fixed_point, ode, energy, early_exit)]
    report = {
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rounds": options.rounds,
        "results": results,
    }
    (options.out / "bench_peers.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "bench_peers.md").write_text(page(report))
    print(page(report))


if __name__ == "__main__":
    main()
