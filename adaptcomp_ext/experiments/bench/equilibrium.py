"""Time deep equilibria, forward and backward, against solvers that iterate the whole batch.

The fixed points of z = tanh(ρ·Wz + x) and the gradients of x and W: a tenth of the rows is slow, with
ρ = 0.99 and small x, so that the slope of tanh stays near 1; the others have ρ = 0.5. W has norm 1, and is
orthogonal ("rotating", every direction of a slow row is slow) or symmetric with eigenvalues from −1 to 1.
Solvers are compared at equal error. The *error* of a solution is that of its worst row, in z and in the
gradient of x, relative to the row's solution in float64 (Newton's method and a direct solution). Ours is
found with tolerance 1e-5, and sets the error that the others have to reach. Each of them gets the largest
tolerances with which it does, on a scale of half powers of ten, forward and backward.

- *own*: `AdaptiveHalt` with ``Convergence(1e-5, gradient="implicit")``. Each row leaves when it has
  converged.
- *batch*: the same iteration in plain PyTorch, for all rows until the worst one has converged.
- *torchdeq*: its solvers in forward and backward pass, with ``ift=True``, where torchdeq is installed
  (``pip install torchdeq``). "anderson, 1e-8" has a smaller ridge than its default of 1e-4. The plain
  iterations may take 3,000 iterations, Anderson's 800, and Broyden's method, which stores all of them, 80. A
  solver that does not reach the error with them is not timed, and the report says where it ended.

Ratios of times in the same round, median over interleaved rounds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import adaptcomp_ext as ac

from . import harness
from .harness import Columns, Report, Row, Table
from .timing import Call, ratios_over

TOLERANCE = 1e-5
MOST = 3000
"""Steps, and terms of the backward pass, of the plain iterations."""
LADDER = tuple(10 ** (-k / 2) for k in range(6, 15))
"""The tolerances that are tried, the largest first."""
SOLVERS = {"fixed_point_iter": MOST, "anderson": 800, "anderson, 1e-8": 800, "broyden": 80}
"""torchdeq's solvers, and the most iterations of each."""


@dataclass(frozen=True)
class Config:
    """A batch of rows of ``dim`` elements, of which the share ``slow`` has the larger ``gain``."""

    matrix: str
    batch: int = 1024
    dim: int = 128
    slow: float = 0.1
    gain: float = 0.99

    @property
    def label(self) -> str:
        """Short name for progress and messages."""
        return f"{self.matrix} B={self.batch} D={self.dim}"


class Step(nn.Module):
    """z ← tanh(ρ·Wz + x)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, z: Tensor, x: Tensor, rho: Tensor) -> Tensor:
        """Apply it once."""
        return torch.tanh(rho * (z @ self.weight.T) + x)


@dataclass
class Problem:
    """What every solver solves."""

    step: Step
    x: Tensor
    rho: Tensor
    upstream: Tensor
    """Gradient of the result."""
    exact: tuple[Tensor, Tensor]
    """z and the gradient of x, in float64."""


Solved = tuple[Tensor, Tensor, Tensor]
"""z, and the gradients of x and W."""
Solve = Callable[[float, float], Solved]
"""A solver, as a function of the tolerances forward and backward."""


def make_problem(config: Config, device: torch.device, seed: int) -> Problem:
    """Draw a matrix and the rows."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    weight = torch.linalg.qr(draw(config.dim, config.dim))[0]
    if config.matrix == "symmetric":
        weight = (weight * torch.linspace(-1, 1, config.dim, dtype=torch.float64)) @ weight.T
    rho, size = torch.full((config.batch, 1), 0.5), torch.full((config.batch, 1), 0.5)
    slow = torch.randperm(config.batch, generator=generator)[: round(config.slow * config.batch)]
    rho[slow], size[slow] = config.gain, 0.005
    x, upstream = (draw(config.batch, config.dim).float() for _ in range(2))
    x, weight = size * x, weight.float()
    exact = solve_exactly(weight.double(), x.double(), rho.double(), upstream.double())
    x, rho, upstream = (t.to(device) for t in (x, rho, upstream))
    return Problem(Step(weight.to(device)), x.requires_grad_(), rho, upstream, exact)


def solve_exactly(weight: Tensor, x: Tensor, rho: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Return z by Newton's method, and the gradient of x by a direct solution, some rows after the other."""
    points, gradients = [], []
    eye = torch.eye(len(weight), dtype=x.dtype)
    for b, r, v in zip(x.split(128), rho.split(128), upstream.split(128), strict=True):
        z = torch.zeros_like(b)
        for _ in range(50):
            now = torch.tanh(r * (z @ weight.T) + b)
            slope = 1 - now.square()
            jacobian = (slope * r)[:, :, None] * weight
            change = torch.linalg.solve(eye - jacobian, now - z)
            z = z + change
            if change.abs().max() < 1e-14:
                break
        points.append(z)
        gradients.append(slope * torch.linalg.solve((eye - jacobian).mT, v))
    return torch.cat(points), torch.cat(gradients)


def error(value: Tensor, exact: Tensor) -> float:
    """Return the error of the worst row."""
    value = value.detach().cpu().double()
    return float(((value - exact).norm(dim=1) / exact.norm(dim=1)).max())


def differentiated(problem: Problem, z: Tensor) -> Solved:
    """Run the backward pass."""
    of_x, of_weight = torch.autograd.grad(z, [problem.x, problem.step.weight], problem.upstream)
    return z, of_x, of_weight


def own(problem: Problem) -> Solve:
    """`AdaptiveHalt`, whose tolerance is that of both passes."""
    halt = ac.AdaptiveHalt(problem.step, ac.Convergence(TOLERANCE, gradient="implicit"), max_steps=MOST)
    start = torch.zeros_like(problem.x)
    return lambda *_: differentiated(problem, halt(start, problem.x, problem.rho).output)


def batch(problem: Problem) -> Solve:
    """The plain iteration of the whole batch."""
    step, x, rho = problem.step, problem.x, problem.rho

    def iterate(function: Callable[[Tensor], Tensor], z: Tensor, tolerance: float) -> Tensor:
        for _ in range(MOST):
            before, z = z, function(z)
            if bool(((z - before).norm(dim=1) <= tolerance * z.norm(dim=1)).all()):
                break
        return z

    def solve(forward: float, backward: float) -> Solved:
        with torch.no_grad():
            z = iterate(lambda z: step(z, x, rho), torch.zeros_like(x), forward)
        z.requires_grad_()
        after = step(z, x, rho)

        def product(g: Tensor) -> Tensor:
            return problem.upstream + torch.autograd.grad(after, z, g, retain_graph=True)[0]

        g = iterate(product, problem.upstream, backward)
        of_x, of_weight = torch.autograd.grad(after, [x, step.weight], g)
        return after, of_x, of_weight

    return solve


def torchdeq(name: str, problem: Problem) -> Solve:
    """A solver of torchdeq."""
    from torchdeq import get_deq  # type: ignore[import-not-found]
    from torchdeq.solver import register_solver  # type: ignore[import-not-found]
    from torchdeq.solver.anderson import anderson_solver  # type: ignore[import-not-found]

    register_solver("anderson, 1e-8", partial(anderson_solver, lam=1e-8))
    step, x, rho, start = problem.step, problem.x, problem.rho, torch.zeros_like(problem.x)

    def solve(forward: float, backward: float) -> Solved:
        deq = get_deq(
            **{"f_solver": name, "f_max_iter": SOLVERS[name], "f_tol": forward, "f_stop_mode": "rel"},
            **{"b_solver": name, "b_max_iter": SOLVERS[name], "b_tol": backward, "b_stop_mode": "rel"},
            ift=True,
        )
        return differentiated(problem, deq(lambda z: step(z, x, rho), start)[0][-1])

    return solve


def solvers(problem: Problem) -> dict[str, Solve]:
    """Return the solvers that our own is compared with."""
    found = {"batch": batch(problem)}
    if find_spec("torchdeq") is not None:
        found.update({f"torchdeq {name}": torchdeq(name, problem) for name in SOLVERS})
    return found


def tolerances(
    solve: Solve, problem: Problem, allowed: tuple[float, float]
) -> tuple[tuple[float, float] | None, tuple[float, float]]:
    """Return the largest tolerances with which a solver stays within the `allowed` errors, and its errors.

    None for the tolerances: not even the smallest ones are enough.
    """

    def errors(forward: float, backward: float) -> tuple[float, float]:
        z, gradient, _ = solve(forward, backward)
        return error(z, problem.exact[0]), error(gradient, problem.exact[1])

    best = errors(LADDER[-1], LADDER[-1])
    if not (best[0] <= allowed[0] and best[1] <= allowed[1]):
        return None, best
    for forward in LADDER:
        if errors(forward, LADDER[0])[0] > allowed[0]:
            continue
        for backward in LADDER:
            found = errors(forward, backward)
            if found[1] <= allowed[1]:
                return (forward, backward), found
    return (LADDER[-1], LADDER[-1]), best


COLUMNS: Columns = {
    "matrix": "{config[matrix]}",
    "B": "{config[batch]}",
    "D": "{config[dim]}",
    "steps per row, mean": "{steps[mean]:.0f}",
    "most": "{steps[most]}",
    "own ms": "{times_ms[own][median]:ms}",
    "batch / own": "{ratios[batch/own]:.2f}",
    "torchdeq's best": "{best}",
    "torchdeq's best / own": "{ratios[best/own]:.2f}",
    "of the fastest rounds": "{ratios_of_minima[best/own]:.2f}",
}
REACHED: Columns = {
    "matrix": "{matrix}",
    "solver": "{solver}",
    "error of z": "{errors[0]:.1e}",
    "of the gradient": "{errors[1]:.1e}",
    "tolerance": "{forward:.0e}",
    "backward": "{backward:.0e}",
    "ms": "{ms:ms}",
}


class EquilibriumBenchmark(harness.Benchmark):
    """Fixed points, each row to its own end, against solvers of the whole batch."""

    name = "equilibrium"
    title = "Deep equilibria"

    @dataclass(frozen=True)
    class Options(harness.Options):
        """Its options."""

        out: str = harness.option("results/bench_equilibrium", "Folder of the results.")
        quick: bool = harness.option(False, "Few rows with little time for them: less than a minute.")
        full_seconds: ClassVar[float] = 10.0

    def configs(self) -> Iterable[Config]:
        sizes = {"batch": 256, "dim": 32} if self.options.quick else {}
        return [Config(matrix, **sizes) for matrix in ("rotating", "symmetric")]

    def measure(self, config: Config) -> dict[str, Any]:
        problem = make_problem(config, self.device, self.options.seed)
        ours = own(problem)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # every row converges, forward and backward
            z, gradient, _ = ours(0.0, 0.0)
        allowed = error(z, problem.exact[0]), error(gradient, problem.exact[1])
        reached: list[dict[str, Any]] = [
            {"solver": "own", "errors": allowed, "forward": TOLERANCE, "backward": TOLERANCE}
        ]
        calls: dict[str, Call] = {"own": partial(ours, 0.0, 0.0)}
        for name, solve in solvers(problem).items():
            found, errors = tolerances(solve, problem, allowed)
            forward, backward = found or (None, None)
            reached.append({"solver": name, "errors": errors, "forward": forward, "backward": backward})
            if found is not None:
                calls[name] = partial(solve, *found)
        with torch.no_grad():
            halt = ac.AdaptiveHalt(problem.step, ac.Convergence(TOLERANCE), max_steps=MOST)
            counts = halt(torch.zeros_like(problem.x), problem.x, problem.rho).steps
        steps = {"mean": float(counts.double().mean()), "most": int(counts.max())}
        known: dict[str, Any] = {"reached": reached, "steps": steps, "best": None}
        agreement = dict(zip(("z", "gradient"), allowed, strict=True))
        row = self.timed(
            config,
            calls,
            lambda: agreement,
            partial(ratios_over, under="own"),
            **known,
        )
        peers = [name for name in calls if name.startswith("torchdeq ")]
        if peers:
            best = min(peers, key=lambda name: row["ratios"][f"{name}/own"])
            row["best"] = best.removeprefix("torchdeq ")
            for ratios in (row["ratios"], row["ratios_of_minima"]):
                ratios["best/own"] = ratios[f"{best}/own"]
        return row

    @staticmethod
    def notes(report: Report) -> str:
        peers = any(one["solver"].startswith("torchdeq") for row in report["rows"] for one in row["reached"])
        return "" if peers else "torchdeq is not installed: its solvers were left out."

    @staticmethod
    def tables(report: Report, rows: Sequence[Row]) -> Iterable[Table]:
        yield Table("Forward and backward", "", rows, COLUMNS)
        lines = [
            {
                **one,
                "matrix": row["config"]["matrix"],
                "ms": row["times_ms"].get(one["solver"], {}).get("median"),
            }
            for row in rows
            for one in row["reached"]
        ]
        text = "Without tolerances: the solver did not reach the error of *own*."
        yield Table("Errors of the worst row", text, lines, REACHED)
