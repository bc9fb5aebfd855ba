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

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

import adaptcomp_ext as ac

from . import harness
from .halting import scripted_steps
from .harness import Columns, Report, Row, Table
from .timing import Times, ratio

__all__ = ["EnergyBenchmark"]

STEP_SIZE = 0.1
FRACTION = 0.25
TOLERANCE = 1e-4
MARGIN = 0.01
"""How far the norms before and after must be from the tolerance, so that rounding does not decide."""
PRODUCT = 1024
PRODUCT_FLOPS = 2.0 * PRODUCT**3
BLOCK = 10.0
"""Milliseconds of calls in a row; see `interleave`."""
aten = torch.ops.aten


# --- configurations -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    """A point of the grid: B rows, widths of the context and of y, at most M steps.

    ``mode`` is "all": all rows take all steps; "stop": rows converge, after a quarter of the steps on
    average; or "train": forward and backward pass through all steps. ``hidden`` are the widths of a network's
    layers, the number of a Hopfield network's patterns, or nothing for a quadratic energy, whose context is
    b.
    """

    mode: str
    batch: int
    context: int
    dim: int
    hidden: tuple[int, ...]
    steps: int = 20
    activation: str = "silu"
    kind: str = "mlp"
    compiled: bool = True

    @property
    def label(self) -> str:
        """Short name for progress and messages."""
        widths = "×".join(map(str, self.hidden)) or "–"
        what = f"{self.kind} {self.activation}" if self.kind == "mlp" else self.kind
        return (
            f"{self.mode} {what} B={self.batch} x={self.context} y={self.dim} hidden={widths} M={self.steps}"
        )

    @property
    def flops(self) -> float:
        """Operations of the products of all steps with y, forth and back, without the context's part."""
        if self.kind == "quadratic":
            return 2.0 * self.batch * self.dim * self.dim * self.steps
        return 4.0 * self.batch * self.steps * sum(a * b for a, b in pairwise((self.dim, *self.hidden)))


SIZES = ((16, 32, 32, 128), (128, 32, 32, 128), (256, 64, 64, 256), (1024, 128, 128, 512))
"""B, elements of the context, elements of y, hidden."""
MEMORY_STEPS = (5, 10, 20, 40)
HOPFIELD: dict[str, Any] = {"kind": "hopfield", "context": 0}
QUADRATIC: dict[str, Any] = {"kind": "quadratic", "hidden": ()}


def at(mode: str, size: int, **changes: Any) -> Config:
    """Return the configuration of a mode at one of `SIZES`."""
    batch, context, dim, hidden = SIZES[size]
    return Config(
        **{"mode": mode, "batch": batch, "context": context, "dim": dim, "hidden": (hidden,), **changes}
    )


MEMORY_CONFIGS = (at("train", 1), at("train", 2))


def default() -> Iterator[Config]:
    """The four sizes in every mode, but three in training; other activations, layers and energies."""
    yield from (at("all", size) for size in range(4))
    yield from (at("all", 2, activation=activation) for activation in ("softplus", "tanh", "gelu"))
    yield at("all", 2, hidden=(256, 256))
    yield at("all", 2, **HOPFIELD)
    yield at("all", 2, **QUADRATIC)
    yield from (at("stop", size) for size in range(4))
    yield from (at("train", size) for size in range(3))


def quick() -> Iterator[Config]:
    """A look at everything in less than a minute; one step is compiled."""
    yield at("all", 0, compiled=False)
    yield at("all", 1)
    yield at("all", 1, **HOPFIELD, compiled=False)
    yield at("all", 1, **QUADRATIC, compiled=False)
    yield at("stop", 1, compiled=False)
    yield at("train", 0)


GRIDS = {"default": default, "quick": quick}


# --- energies as one writes them in plain PyTorch -----------------------------------------------------------
Energy = Callable[..., Tensor]
AnyEnergy = ac.MLPEnergy | ac.HopfieldEnergy | ac.QuadraticEnergy
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": F.softplus,
    "silu": F.silu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
}


def as_function(energy: AnyEnergy) -> Energy:
    """Return the energy as a function of y and context, on the module's parameters."""
    if isinstance(energy, ac.HopfieldEnergy):
        patterns, beta = energy.patterns, float(energy.beta)

        def hopfield(y: Tensor) -> Tensor:  # −1/β·log Σ exp(β Xy) + ‖y‖²/2
            return 0.5 * y.square().sum(dim=1) - torch.logsumexp(beta * F.linear(y, patterns), dim=1) / beta

        return hopfield
    if isinstance(energy, ac.QuadraticEnergy):
        matrix = energy.A

        def quadratic(y: Tensor, b: Tensor) -> Tensor:  # y'Ay/2 − b'y
            return (y * (0.5 * (y @ matrix) - b)).sum(dim=1)

        return quadratic
    act, ridge = ACTIVATIONS[energy.activation], energy.ridge
    weight_y, weight_x, bias1 = energy.weight_y, energy.weight_x, energy.bias1
    weight2, bias2, out, out_bias = energy.weight2, energy.bias2, energy.out, energy.out_bias
    assert weight_x is not None

    def network(y: Tensor, x: Tensor) -> Tensor:
        # Two products are faster than one product of [y, x], whose gradient would contain that of x.
        hidden = act(F.linear(y, weight_y) + F.linear(x, weight_x, bias1))
        if weight2 is not None:
            hidden = act(F.linear(hidden, weight2, bias2))
        value = hidden @ out + out_bias
        return value if ridge == 0 else value + 0.5 * ridge * y.square().sum(dim=1)

    return network


# --- loops that one writes around an energy -----------------------------------------------------------------
class Outcome(NamedTuple):
    """What every form returns: y [B, D]; steps [B], None where every row takes all; energies [B]."""

    y: Tensor
    steps: Tensor | None
    energy: Tensor | None = None


def gradient(energy: Energy, y: Tensor, *context: Tensor) -> Tensor:
    """Return the gradient at y by autograd."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        (g,) = torch.autograd.grad(energy(y, *context).sum(), y)
    return g


def descend(energy: Energy, y: Tensor, context: tuple[Tensor, ...], step_size: float, steps: int) -> Tensor:
    """Take all steps with autograd's gradients."""
    for _ in range(steps):
        y = y - step_size * gradient(energy, y, *context)
    return y


def unrolled(energy: Energy, y: Tensor, context: tuple[Tensor, ...], step_size: float, steps: int) -> Tensor:
    """Take all steps and keep the graph of all of them."""
    y = y if y.requires_grad else y.detach().requires_grad_()
    for _ in range(steps):
        (g,) = torch.autograd.grad(energy(y, *context).sum(), y, create_graph=True)
        y = y - step_size * g
    return y


Advance = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def masked_advance(slope: Callable[[Tensor], Tensor], step_size: float, tol: float) -> Advance:
    """Return a step of all rows that moves the active ones, and says which of them stay active."""

    def advance(y: Tensor, g: Tensor, active: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y = torch.where(active[:, None], y - step_size * g, y)
        steps = steps + active
        g = slope(y)
        return y, g, active & (torch.linalg.vector_norm(g, dim=1) > tol), steps

    return advance


def masked_descend(advance: Advance, y: Tensor, g: Tensor, most: int) -> Outcome:
    """Run all rows until the last one has converged, from y and the gradient there."""
    active = torch.ones(y.shape[0], dtype=torch.bool, device=y.device)
    steps = torch.zeros(y.shape[0], dtype=torch.int64, device=y.device)
    for _ in range(most):
        y, g, active, steps = advance(y, g, active, steps)
        if not active.any():
            break
    return Outcome(y, steps)


# --- problems -----------------------------------------------------------------------------------------------
@dataclass
class Problem:
    """What every form runs: built once for a configuration, shared by all of them."""

    config: Config
    energy: AnyEnergy
    function: Energy
    y0: Tensor
    context: tuple[Tensor, ...]
    tol: float
    """On the gradient's norm; 0 where rows do not converge."""
    steps: Tensor | None
    """How many steps each row takes; None: all."""
    target: Tensor
    """Of the training loss."""
    step_size: float = STEP_SIZE

    @property
    def leaves(self) -> list[Tensor]:
        """What training differentiates: the weights, y0 and the context, as if an encoder had made these."""
        return [*self.energy.parameters(), self.y0, *self.context]


def _make_energy(config: Config, generator: torch.Generator) -> AnyEnergy:
    if config.kind == "hopfield":
        return ac.HopfieldEnergy(torch.randn(config.hidden[0], config.dim, generator=generator), 1.0)
    if config.kind == "quadratic":
        root = torch.randn(config.dim, config.dim, generator=generator) / config.dim**0.5
        return ac.QuadraticEnergy(0.5 * torch.eye(config.dim) + 0.5 * root @ root.T)
    # As in the plain formula, without a ridge, rows need not converge; where they are to, they need one.
    ridge = 1.0 if config.mode == "stop" else 0.0
    hidden = config.hidden[0] if len(config.hidden) == 1 else (config.hidden[0], config.hidden[1])
    return ac.MLPEnergy(config.dim, config.context, hidden, config.activation, ridge)


def make_problem(config: Config, device: torch.device, seed: int) -> Problem:
    """Build the energy and draw the tensors of one configuration."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        energy = _make_energy(config, generator).to(device)
    function, converges, train = as_function(energy), config.mode == "stop", config.mode == "train"
    energy.requires_grad_(train)

    def draw(rows: int, width: int) -> Tensor:
        return torch.randn(rows, width, generator=generator).to(device)

    candidates = 2 * config.batch + 16 if converges else config.batch
    y0 = draw(candidates, config.dim)
    context: tuple[Tensor, ...] = (draw(candidates, config.context),) if config.context else ()
    steps, tol = None, 0.0
    if converges:
        steps = scripted_steps(config.batch, config.steps, FRACTION, seed).to(device)
        y0, x, tol = starts(partial(gradient, function), y0, context[0], steps, config.steps)
        context = (x,)
    for tensor in (y0, *context):
        tensor.requires_grad_(train)
    return Problem(config, energy, function, y0, context, tol, steps, draw(config.batch, config.dim))


def starts(
    slope: Callable[[Tensor, Tensor], Tensor], y: Tensor, x: Tensor, wanted: Tensor, most: int
) -> tuple[Tensor, Tensor, float]:
    """Choose starting points from which each row converges after the wanted number of steps.

    A row's trajectory of plain descent crosses any level of its gradient's norm once, at some step K. Started
    N steps before, at a point of that very trajectory, it converges after N steps: the schedule is exact, and
    the energy is one like any other. Candidates y and x are more than are wanted, since some cross the
    tolerance too close to it. Returns y0, x and the tolerance.
    """
    points, norms = [y], [torch.linalg.vector_norm(slope(y, x), dim=1)]
    for _ in range(3 * most):
        points.append(points[-1] - STEP_SIZE * slope(points[-1], x))
        norms.append(torch.linalg.vector_norm(slope(points[-1], x), dim=1))
    path, norm = torch.stack(points, dim=1), torch.stack(norms, dim=1)
    tol = float(norm[:, most].quantile(0.1))
    below = norm <= tol
    crossing = below.to(torch.int8).argmax(dim=1)
    before, after = (norm.gather(1, k[:, None])[:, 0] / tol for k in ((crossing - 1).clamp(min=0), crossing))
    fits = below.any(dim=1) & (crossing >= most) & (before > 1 + MARGIN) & (after < 1 - MARGIN)
    rows = fits.nonzero()[: wanted.shape[0], 0]
    if rows.shape[0] < wanted.shape[0]:
        raise ValueError(
            f"wanted: expected at most {rows.shape[0]} rows of these candidates, got {wanted.shape[0]}"
        )
    return path[rows, crossing[rows] - wanted], x[rows].contiguous(), tol


# --- hand-written descents ----------------------------------------------------------------------------------
# What somebody writes who has seen the profile: the gradient as a formula in torch's operations, the
# context's part once, one fused product for each layer and direction, in place in buffers made beforehand.
Derivative = Callable[[str, Tensor, Tensor], None]
"""Puts upstream · act'(a) in the place of a."""


def written_out(activation: str, upstream: Tensor, a: Tensor) -> None:
    """The derivative in public operations."""
    if activation == "silu":
        gate = torch.sigmoid(a)
        a.addcmul_(a, gate, value=-1).add_(1).mul_(gate)  # σ(1 + a(1 − σ))
    elif activation == "tanh":
        a.tanh_().square_().neg_().add_(1)
    elif activation == "gelu":
        density = torch.exp(a.square().mul_(-0.5)).mul_(1 / math.sqrt(2 * math.pi))
        density.mul_(a)
        a.mul_(1 / math.sqrt(2)).erf_().add_(1).mul_(0.5).add_(density)
    else:
        a.sigmoid_()
    a.mul_(upstream)


def private(activation: str, upstream: Tensor, a: Tensor) -> None:
    """The derivative in the operations of torch's backward passes: one pass over memory, not five."""
    if activation == "silu":
        aten.silu_backward.grad_input(upstream, a, grad_input=a)
    elif activation == "tanh":
        aten.tanh_backward.grad_input(upstream, a.tanh_(), grad_input=a)
    elif activation == "gelu":
        aten.gelu_backward.grad_input(upstream, a, grad_input=a)
    else:
        aten.softplus_backward.grad_input(upstream, a, 1.0, 20.0, grad_input=a)


class _Network:
    """The gradient of a network's energy without its ridge: Wᵧᵀ s, with s [B, hidden] in place."""

    def __init__(self, energy: ac.MLPEnergy, batch: int, derivative: Derivative) -> None:
        self.energy, self.times_derivative_ = energy, partial(derivative, energy.activation)
        self.weight, self.out = energy.weight_y, energy.out.expand(batch, -1)
        self.first = torch.empty(batch, energy.hidden[0], device=energy.out.device)
        self.values = torch.empty_like(self.first)
        self.last = torch.empty(batch, energy.hidden[-1], device=energy.out.device)

    def context(self, x: Tensor) -> Tensor:
        assert self.energy.weight_x is not None
        return F.linear(x, self.energy.weight_x, self.energy.bias1)

    def upstream(self, y: Tensor, c: Tensor) -> Tensor:
        """Return s."""
        a = torch.addmm(c, y, self.weight.T, out=self.first)
        weight2, bias2 = self.energy.weight2, self.energy.bias2
        if weight2 is None or bias2 is None:
            self.times_derivative_(self.out, a)
            return a
        values, last, name = self.values, self.last, self.energy.activation
        torch.tanh(a, out=values) if name == "tanh" else getattr(aten, name).out(a, out=values)
        torch.addmm(bias2, values, weight2.T, out=last)
        self.times_derivative_(self.out, last)
        torch.mm(last, weight2, out=values)
        self.times_derivative_(values, a)
        return a


def analytic_all(problem: Problem, derivative: Derivative = written_out) -> Callable[[], Outcome]:
    """Return a call that takes all steps."""
    y0, energy, steps, size = problem.y0, problem.energy, problem.config.steps, problem.step_size
    y = torch.empty_like(y0)

    if isinstance(energy, ac.MLPEnergy):
        network, weight, keep = (
            _Network(energy, y0.shape[0], derivative),
            energy.weight_y,
            1 - size * energy.ridge,
        )

        def on_network() -> Outcome:
            y.copy_(y0)
            c = network.context(*problem.context)
            for _ in range(steps):
                y.addmm_(network.upstream(y, c), weight, beta=keep, alpha=-size)
            return Outcome(y, None)

        return on_network

    if isinstance(energy, ac.HopfieldEnergy):
        patterns, beta = energy.patterns, float(energy.beta)
        scores = torch.empty(y0.shape[0], patterns.shape[0], device=y0.device)
        attention = torch.empty_like(scores)

        def on_patterns() -> Outcome:
            y.copy_(y0)
            for _ in range(steps):
                torch.addmm(scores, y, patterns.T, beta=0, alpha=beta, out=scores)
                torch.softmax(scores, dim=1, out=attention)
                y.addmm_(attention, patterns, beta=1 - size, alpha=size)
            return Outcome(y, None)

        return on_patterns

    matrix, other = energy.A, torch.empty_like(y0)
    identity = torch.eye(matrix.shape[0], device=y0.device)

    def on_quadratic() -> Outcome:  # y − α(Ay − b) = (I − αA)y + αb
        here, there = y.copy_(y0), other
        update, linear = identity - size * matrix, size * problem.context[0]
        for _ in range(steps):
            torch.addmm(linear, here, update, out=there)
            here, there = there, here
        return Outcome(here, None)

    return on_quadratic


def analytic_stop(problem: Problem, derivative: Derivative = written_out) -> Callable[[], Outcome]:
    """Return a call that runs all rows of a network's energy until the last one has converged."""
    y0, energy, size, tol = problem.y0, problem.energy, problem.step_size, problem.tol
    assert isinstance(energy, ac.MLPEnergy)
    network = _Network(energy, y0.shape[0], derivative)
    y, g = torch.empty_like(y0), torch.empty_like(y0)
    moves = torch.empty(y0.shape[0], 1, device=y0.device)
    steps = torch.empty(y0.shape[0], dtype=torch.int64, device=y0.device)

    def call() -> Outcome:
        y.copy_(y0)
        steps.zero_()
        active = torch.ones(y0.shape[0], dtype=torch.bool, device=y0.device)
        c = network.context(*problem.context)
        for step in range(problem.config.steps + 1):
            torch.addmm(y, network.upstream(y, c), network.weight, beta=energy.ridge, out=g)
            if step > 0:
                active.logical_and_(torch.linalg.vector_norm(g, dim=1) > tol)
                if step == problem.config.steps or not active.any():
                    break
            moves.copy_(active[:, None])
            y.addcmul_(g, moves, value=-size)
            steps.add_(active)
        return Outcome(y, steps)

    return call


def analytic_unrolled(energy: ac.MLPEnergy, y: Tensor, x: Tensor, step_size: float, steps: int) -> Tensor:
    """Take all steps on a silu network with one layer, recorded by autograd to first order."""
    assert energy.weight_x is not None
    c = F.linear(x, energy.weight_x, energy.bias1)
    for _ in range(steps):
        a = torch.addmm(c, y, energy.weight_y.T)
        gate = torch.sigmoid(a)
        s = energy.out * gate * (1 + a * (1 - gate))
        y = torch.addmm(y, s, energy.weight_y, beta=1 - step_size * energy.ridge, alpha=-step_size)
    return y


# --- the forms that are timed -------------------------------------------------------------------------------
def _no_grad(problem: Problem, call: Callable[[], Outcome]) -> Callable[[], Outcome]:
    """Return the call without a graph and with the energy, which EnergyDescent returns as well."""

    def without() -> Outcome:
        with torch.no_grad():
            outcome = call()
            if outcome.energy is None:
                outcome = outcome._replace(energy=problem.function(outcome.y, *problem.context))
            return outcome

    return without


def ours(problem: Problem, energy: Any, tol: float) -> Callable[[], Outcome]:
    """Return a call of EnergyDescent."""
    stop = "gradient" if tol > 0 else "energy"
    descent = ac.EnergyDescent(energy, problem.step_size, problem.config.steps, tol, stop)

    def call() -> Outcome:
        result = descent(problem.y0, *problem.context)
        return Outcome(result.y, result.steps if tol > 0 else None, result.energy)

    return call


def _eager(problem: Problem) -> Outcome:
    function, y0, context, config = problem.function, problem.y0, problem.context, problem.config
    if config.mode == "all":
        return Outcome(descend(function, y0, context, problem.step_size, config.steps), None)

    def slope(y: Tensor) -> Tensor:
        return gradient(function, y, *context)

    advance = masked_advance(slope, problem.step_size, problem.tol)
    return masked_descend(advance, y0, slope(y0), config.steps)


def _compiled(problem: Problem, cache: harness.CompileCache) -> Callable[[], Outcome]:
    function, config, size, tol = problem.function, problem.config, problem.step_size, problem.tol
    y0, context = problem.y0, problem.context
    slope = torch.func.grad(lambda y, *context: function(y, *context).sum())

    def compiled(name: str, body: Callable[..., Any]) -> Callable[..., Any]:
        if y0.device.type != "cuda":
            return cache.get(config, name, body, dynamic=False)
        graph = cache.get(config, name, body, dynamic=False, mode="reduce-overhead")

        def replayed(*arguments: Tensor) -> Any:
            # The next replay of the CUDA graph overwrites what this one returns, and reads it.
            torch.compiler.cudagraph_mark_step_begin()
            result = graph(*arguments)
            return result.clone() if isinstance(result, Tensor) else tuple(t.clone() for t in result)

        return replayed

    if config.mode == "all":
        step = compiled("step", lambda y, *context: y - size * slope(y, *context))

        def all_steps() -> Outcome:
            y = y0
            for _ in range(config.steps):
                y = step(y, *context)
            return Outcome(y, None)

        return all_steps

    def masked(y: Tensor, g: Tensor, active: Tensor, steps: Tensor, *context: Tensor) -> Any:
        return masked_advance(lambda y: slope(y, *context), size, tol)(y, g, active, steps)

    first, move = compiled("slope", slope), compiled("masked", masked)

    def until_converged() -> Outcome:
        return masked_descend(lambda *state: move(*state, *context), y0, first(y0, *context), config.steps)

    return until_converged


def forms(problem: Problem, cache: harness.CompileCache | None) -> dict[str, Callable[[], Outcome]]:
    """Return every form of a configuration without training; the compiled one only with a cache."""
    converges = problem.config.mode == "stop"
    by_hand = analytic_stop if converges else analytic_all
    calls: dict[str, Callable[[], Outcome]] = {"eager": partial(_eager, problem)}
    if cache is not None:
        calls["compiled"] = _compiled(problem, cache)
    calls["analytic"] = by_hand(problem)
    if isinstance(problem.energy, ac.MLPEnergy):
        calls["private"] = by_hand(problem, private)
    calls["generic"] = ours(problem, problem.function, problem.tol)
    calls["kernel"] = ours(problem, problem.energy, problem.tol)
    if converges:
        calls["kernel_all"] = ours(problem, problem.energy, 0.0)
    return {name: _no_grad(problem, call) for name, call in calls.items()}


def training_losses(problem: Problem) -> dict[str, Callable[[], Tensor]]:
    """Return the forms of training: each gives the loss, the mean square of y − target after all steps."""
    energy, size, steps = problem.energy, problem.step_size, problem.config.steps
    y0, context = problem.y0, problem.context
    assert isinstance(energy, ac.MLPEnergy)
    generic, kernel = ours(problem, problem.function, 0.0), ours(problem, energy, 0.0)
    ends: dict[str, Callable[[], Tensor]] = {
        "eager": lambda: unrolled(problem.function, y0, context, size, steps),
        "analytic": lambda: analytic_unrolled(energy, y0, context[0], size, steps),
        "generic": lambda: generic().y,
        "kernel": lambda: kernel().y,
    }

    def loss(end: Callable[[], Tensor]) -> Tensor:
        return (end() - problem.target).square().mean()

    return {name: partial(loss, end) for name, end in ends.items()}


def training_calls(problem: Problem) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Return the forward and backward pass of the forms of training: the gradients of all leaves."""
    leaves = problem.leaves

    def both(loss: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(), leaves, allow_unused=True, materialize_grads=True)

    return {name: partial(both, loss) for name, loss in training_losses(problem).items()}


def verify(problem: Problem, outcomes: Mapping[str, Outcome]) -> float:
    """Compare all forms with the eager loop, and their steps with the schedule."""
    eager, config, wanted = outcomes["eager"], problem.config, problem.steps
    everything = descend(problem.function, problem.y0, problem.context, problem.step_size, config.steps)
    worst = 0.0
    for name, outcome in outcomes.items():
        stopped = outcome.steps is not None
        if stopped and (wanted is None or not torch.equal(cast(Tensor, outcome.steps), wanted)):
            raise harness.DisagreementError(
                f"{name}: rows converged after other numbers of steps than they should"
            )
        pairs = {
            name: (outcome.y, outcome.energy),
            "eager": (eager.y if stopped else everything, eager.energy),
        }
        # Where rows converge, the energies of all steps have no counterpart.
        what = ("y", "the energy")[: 2 if stopped or wanted is None else 1]
        results = {n: pair[: len(what)] for n, pair in pairs.items()}
        worst = max(worst, harness.compare(results, what, "eager", TOLERANCE))
    return worst


def ratios(times: Times, flops: float) -> dict[str, float]:
    """Return the ratios of a configuration of this number of operations.

    They are ``"NAME/kernel"``, ``"eager/generic"`` and, where the matrix product was timed,
    ``"kernel/matmul"``: the rate of the kernel as a share of the product's rate.
    """
    found = {
        f"{name}/kernel": ratio(times, name, "kernel") for name in times if name not in ("kernel", "matmul")
    }
    found["eager/generic"] = ratio(times, "eager", "generic")
    if "matmul" in times:
        found["kernel/matmul"] = ratio(times, "matmul", "kernel") * flops / PRODUCT_FLOPS
    return found


def matrix_product(device: torch.device) -> Callable[[], Tensor]:
    """Return a matrix product of `PRODUCT_FLOPS` operations."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(PRODUCT, PRODUCT, generator=generator).to(device) for _ in range(2))
    return partial(torch.mm, a, b, out=torch.empty_like(a))


def memory_rows(
    device: torch.device,
    seed: int,
    sizes: Sequence[Config] = MEMORY_CONFIGS,
    steps: Sequence[int] = MEMORY_STEPS,
) -> list[dict[str, Any]]:
    """Measure all forms of training: ``bytes``, by form, and ``points``, the bytes of y after every step."""
    found = []
    for config in sizes:
        for count in steps:
            problem = make_problem(replace(config, steps=count), device, seed)
            losses = training_losses(problem)
            found.append(
                {
                    "size": [config.batch, config.context, config.dim, *config.hidden],
                    "steps": count,
                    "points": count * problem.y0.numel() * problem.y0.element_size(),
                    "bytes": {
                        name: harness.kept_and_peak(loss, problem.leaves) for name, loss in losses.items()
                    },
                }
            )
    return found


# --- what is asked of the ratios, on two CPU cores in float32 -----------------------------------------------
BARS = (
    *(
        ("eager over kernel", "all", k, "eager/kernel", least)
        for k, least in enumerate((20.0, 5.0, 3.0, 2.0))
    ),
    *(("compiled over kernel", "all", k, "compiled/kernel", least) for k, least in enumerate((3.0, 2.0))),
    ("analytic over kernel", "all", 2, "analytic/kernel", 1.5),
    ("analytic over kernel", "all", 3, "analytic/kernel", 1.2),
    *(("share of the matrix product's rate", "all", k, "kernel/matmul", 0.6) for k in (1, 2, 3)),
    *(("all steps over stopping, kernel", "stop", k, "kernel_all/kernel", 3.0) for k in (0, 1, 2)),
    *(("eager over kernel", "train", k, "eager/kernel", 5.0) for k in (0, 1)),
)
"""What is compared, mode, size, ratio, and what the ratio should be at least."""
GENERIC_BAR = 1.0
"""Least eager/generic, in inference."""
MEMORY_BAR = 1.05
"""Most bytes that the kernel keeps for more steps, over the bytes of these steps' points."""


def judge(rows: Iterable[Row], memory: Sequence[Row] = ()) -> list[dict[str, Any]]:
    """Compare the report's rows with the bars: one verdict for each bar that has a measured ratio."""
    timed = [row for row in rows if row["error"] is None]
    ratios = {row["label"]: row["ratios"] for row in timed}
    found: list[tuple[str, str, str, float, bool]] = []
    for what, mode, size, key, least in BARS:
        where = at(mode, size).label
        value = ratios.get(where, {}).get(key)
        if value is not None:
            bar = f"≥ {100 * least:.0f} %" if key == "kernel/matmul" else f"≥ {least:g}"
            found.append((what, where, bar, value, value >= least))
    inferring = [row for row in timed if row["config"]["mode"] != "train"]
    if inferring:
        slowest = min(inferring, key=lambda row: row["ratios"]["eager/generic"])
        what, value = "eager over generic, worst in inference", slowest["ratios"]["eager/generic"]
        found.append((what, slowest["label"], f"≥ {GENERIC_BAR:g}", value, value >= GENERIC_BAR))
    for shape in SIZES:
        kept = [row for row in memory if tuple(row["size"]) == shape]
        if len(kept) > 1:
            what, value = "kernel: bytes kept per byte of points", growth(kept[0], kept[-1])
            where = f"B={shape[0]} y={shape[2]}, {kept[0]['steps']} → {kept[-1]['steps']} steps"
            found.append((what, where, f"≤ {MEMORY_BAR:g}", value, value <= MEMORY_BAR))
    return [dict(zip(("what", "where", "bar", "found", "passed"), verdict, strict=True)) for verdict in found]


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
MEMORY = """\
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


@dataclass(frozen=True)
class EnergyOptions(harness.Options):
    """The options of the energy benchmark."""

    out: str = harness.option("results/bench_energy", "Folder of the results.")
    quick: bool = harness.option(False, "A small grid with little time for each point: less than a minute.")
    compiled: bool = harness.option(True, "Whether the compiled baseline takes part, if there is a compiler.")
    memory: bool = harness.option(True, "Whether training memory is measured.")
    seed: int = harness.option(0, "Seed of weights, tensors and step counts.", 0)


class EnergyBenchmark(harness.Benchmark):
    """EnergyDescent against autograd, torch.compile and hand-written loops."""

    name = "energy"
    title = "Energy descent benchmark"
    help = "Time EnergyDescent against autograd, torch.compile and hand-written loops."
    Options = EnergyOptions
    extra: ClassVar[dict[str, Any]] = {"compiler": None, "memory": [], "bars": []}

    def configs(self) -> Iterable[Config]:
        """Return the configurations of the grid."""
        return GRIDS["quick" if self.options.quick else "default"]()

    def measure(self, config: Config) -> dict[str, Any]:
        """Verify and time one configuration."""
        problem = make_problem(config, self.device, self.options.seed)
        row: dict[str, Any] = {
            "config": {**asdict(config), "hidden": list(config.hidden)},
            "label": config.label,
        }
        row |= {"steps": None, "gflops": None}
        flops, steps = config.flops, problem.steps
        if steps is not None:
            mean = float(steps.double().mean())
            row["steps"] = {"mean": mean, "longest": int(steps.max()), "tol": problem.tol}
            flops *= mean / config.steps
        timed = partial(
            harness.timed_row,
            ratios=partial(ratios, flops=flops),
            device=self.device,
            seconds=self.options.seconds,
            block=BLOCK,
        )
        if config.mode == "train":
            # The rate of a backward pass is not reported: how many products it needs is up to each form.
            both = training_calls(problem)

            def agreement() -> float:
                gradients = {name: call() for name, call in both.items()}
                return harness.compare_gradients(gradients, "eager", TOLERANCE)

            return timed(row, both, agreement)
        cache = self.cache if self.compiler is None and config.compiled else None
        calls = forms(problem, cache)
        if cache is not None:
            cache.first_call(config.label, calls["compiled"])
        all_calls = {**calls, "matmul": matrix_product(self.device)}
        row = timed(row, all_calls, lambda: verify(problem, {name: call() for name, call in calls.items()}))
        if row["error"] is None:
            work = {"kernel": flops, "matmul": PRODUCT_FLOPS}
            row["gflops"] = {n: work[n] / row["times_ms"][n]["median"] / 1e6 for n in work}
        return row

    @cached_property
    def compiler(self) -> str | None:
        """Why there is no compiled baseline; None if there is one."""
        return harness.no_compiler(self.device) if self.options.compiled else "not wanted"

    def extras(self) -> None:
        """Measure training memory, and compare what was found with the bars."""
        self.report["compiler"] = self.compiler
        if self.options.memory:
            self.report["memory"] = memory_rows(self.device, self.options.seed)
        if self.device.type == "cpu":
            self.report["bars"] = judge(self.report["rows"], self.report["memory"])

    @staticmethod
    def notes(report: Report) -> str:
        """Return why the compiled baseline was left out."""
        missing = report["compiler"]
        return f"The compiled baseline was left out: {missing}." if missing else ""

    @staticmethod
    def tables(report: Report, rows: Sequence[Row]) -> Iterable[Table]:
        """Yield the bars, the modes, the rates, memory and compile times."""
        threads = report["machine"]["threads"]
        text = "What the kernel is meant to reach on two CPU cores, with two threads, in float32."
        text += "" if threads == 2 else f" This run used {threads}."
        yield Table.of("The bars", text, report["bars"], BAR_COLUMNS)
        by_mode = {mode: [row for row in rows if row["config"]["mode"] == mode] for mode in TITLES}
        text = "Inference: the point after M steps. Without a tolerance."
        yield Table.of("All rows, all steps", text, by_mode["all"], _over_kernel(BASELINES))
        title = f"Rows that stop on their own, mean/M = {FRACTION:g}"
        yield Table.of(
            title, CONVERGING, by_mode["stop"], {**_over_kernel((*BASELINES, "kernel_all")), **STEPS}
        )
        text = "Forward and backward: the gradients of mean (y − target)² in weights, y₀ and context."
        yield Table.of("Training", text, by_mode["train"], _over_kernel(("eager", "analytic", "generic")))
        rated = [row for row in rows if row["gflops"] is not None]
        yield Table.of("Rate of the arithmetic", RATES, rated, RATE)
        memory = [dict(row) for row in report["memory"]]
        for before, row in pairwise(memory):
            if before["size"] == row["size"]:
                row["growth"] = growth(before, row)
        yield Table.of("Training memory", MEMORY, memory, KEPT)
        text = "Of the compiled baseline, where the compiler's cache did not have it; not in the times above."
        lines = [[name, f"{seconds:.1f}"] for name, seconds in report["compile_seconds"].items()]
        yield Table("Compile times", text, ("configuration", "s"), lines)

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
            for name, (color, style) in STYLES.items():
                over = [(i, r["ratios"].get(f"{name}/kernel")) for i, r in enumerate(by_mode[mode])]
                points = [(i, value) for i, value in over if value is not None]
                if points:
                    axis.plot(
                        *zip(*points, strict=True), style, color=color, label=LABELS[name], markersize=5
                    )
            axis.axhline(1, color="tab:green", linewidth=1)
            axis.set(title=TITLES[mode], yscale="log")
            axis.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
            axis.minorticks_off()
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
