"""What the energy benchmark times: energies, starting points, and the loops that descend on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import adaptcomp_ext as ac
from adaptcomp_ext.reference.mlp_energy import ACTIVATIONS

from .halting_forms import scripted_steps
from .harness import CompileCache, both_passes

STEP_SIZE = 0.1
FRACTION = 0.25
"""Mean number of steps of the rows that converge, as a share of all steps."""
MARGIN = 0.01
"""How far the norms before and after must be from the tolerance, so that rounding does not decide."""
aten = torch.ops.aten


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


# --- energies as one writes them in plain PyTorch -----------------------------------------------------------
Energy = Callable[..., Tensor]
AnyEnergy = ac.MLPEnergy | ac.HopfieldEnergy | ac.QuadraticEnergy


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


def gradient(energy: Energy, y: Tensor, *context: Tensor) -> Tensor:
    """Return the gradient at y by autograd."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        (g,) = torch.autograd.grad(energy(y, *context).sum(), y)
    return g


# --- problems -----------------------------------------------------------------------------------------------
class Outcome(NamedTuple):
    """What every form returns: y [B, D]; steps [B], None where every row takes all; energies [B]."""

    y: Tensor
    steps: Tensor | None
    energy: Tensor | None = None


Form = Callable[[], Outcome]


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


def network_part(energy: ac.MLPEnergy, x: Tensor) -> Tensor:
    """Return the context's part of the first layer."""
    assert energy.weight_x is not None
    return F.linear(x, energy.weight_x, energy.bias1)


def network_slope(energy: ac.MLPEnergy, batch: int, derivative: Derivative) -> Energy:
    """Return a function of y and the context's part: s [B, hidden], of which Wᵧᵀ s is the gradient.

    The ridge is left to the caller.
    """
    name, weight2, bias2 = energy.activation, energy.weight2, energy.bias2
    out, device = energy.out.expand(batch, -1), energy.out.device
    first, last = (torch.empty(batch, energy.hidden[layer], device=device) for layer in (0, -1))
    values = torch.empty_like(first)

    def slope(y: Tensor, c: Tensor) -> Tensor:
        torch.addmm(c, y, energy.weight_y.T, out=first)
        if weight2 is None or bias2 is None:
            derivative(name, out, first)
            return first
        torch.tanh(first, out=values) if name == "tanh" else getattr(aten, name).out(first, out=values)
        torch.addmm(bias2, values, weight2.T, out=last)
        derivative(name, out, last)
        torch.mm(last, weight2, out=values)
        derivative(name, values, first)
        return first

    return slope


def analytic_hopfield(problem: Problem, energy: ac.HopfieldEnergy) -> Form:
    """Return a call that takes all steps on a Hopfield network's energy."""
    y, patterns, beta = torch.empty_like(problem.y0), energy.patterns, float(energy.beta)
    scores = torch.empty(len(y), len(patterns), device=y.device)
    attention = torch.empty_like(scores)

    def call() -> Outcome:
        y.copy_(problem.y0)
        for _ in range(problem.config.steps):
            torch.addmm(scores, y, patterns.T, beta=0, alpha=beta, out=scores)
            torch.softmax(scores, dim=1, out=attention)
            y.addmm_(attention, patterns, beta=1 - STEP_SIZE, alpha=STEP_SIZE)
        return Outcome(y, None)

    return call


def analytic_quadratic(problem: Problem, energy: ac.QuadraticEnergy) -> Form:
    """Return a call that takes all steps on a quadratic energy: y − α(Ay − b) = (I − αA)y + αb."""
    y, other = torch.empty_like(problem.y0), torch.empty_like(problem.y0)
    identity = torch.eye(y.shape[1], device=y.device)

    def call() -> Outcome:
        here, there = y.copy_(problem.y0), other
        update, linear = identity - STEP_SIZE * energy.A, STEP_SIZE * problem.context[0]
        for _ in range(problem.config.steps):
            torch.addmm(linear, here, update, out=there)
            here, there = there, here
        return Outcome(here, None)

    return call


def analytic(problem: Problem, derivative: Derivative) -> Form:
    """Return the hand-written descent of a configuration."""
    energy = problem.energy
    if isinstance(energy, ac.HopfieldEnergy):
        return analytic_hopfield(problem, energy)
    if isinstance(energy, ac.QuadraticEnergy):
        return analytic_quadratic(problem, energy)
    y, slope = torch.empty_like(problem.y0), network_slope(energy, len(problem.y0), derivative)
    weight, keep = energy.weight_y, 1 - STEP_SIZE * energy.ridge

    def all_steps() -> Outcome:
        y.copy_(problem.y0)
        c = network_part(energy, *problem.context)
        for _ in range(problem.config.steps):
            y.addmm_(slope(y, c), weight, beta=keep, alpha=-STEP_SIZE)
        return Outcome(y, None)

    g, moves = torch.empty_like(y), torch.empty(len(y), 1, device=y.device)
    steps = torch.empty(len(y), dtype=torch.int64, device=y.device)

    def until_converged() -> Outcome:
        y.copy_(problem.y0)
        steps.zero_()
        active = torch.ones(len(y), dtype=torch.bool, device=y.device)
        c = network_part(energy, *problem.context)
        for step in range(problem.config.steps + 1):
            torch.addmm(y, slope(y, c), weight, beta=energy.ridge, out=g)
            if step > 0:
                active.logical_and_(torch.linalg.vector_norm(g, dim=1) > problem.tol)
                if step == problem.config.steps or not active.any():
                    break
            moves.copy_(active[:, None])
            y.addcmul_(g, moves, value=-STEP_SIZE)
            steps.add_(active)
        return Outcome(y, steps)

    return until_converged if problem.config.mode == "stop" else all_steps


def analytic_unrolled(problem: Problem) -> Tensor:
    """Take all steps on a silu network with one layer, recorded by autograd to first order."""
    energy, y = problem.energy, problem.y0
    assert isinstance(energy, ac.MLPEnergy)
    c = network_part(energy, *problem.context)
    for _ in range(problem.config.steps):
        a = torch.addmm(c, y, energy.weight_y.T)
        gate = torch.sigmoid(a)
        s = energy.out * gate * (1 + a * (1 - gate))
        y = torch.addmm(y, s, energy.weight_y, beta=1 - STEP_SIZE * energy.ridge, alpha=-STEP_SIZE)
    return y


# --- the forms that are timed -------------------------------------------------------------------------------
def plain(
    problem: Problem,
    slope: Callable[..., Tensor],
    compiled: Callable[[str, Callable[..., Any]], Callable[..., Any]] = lambda name, function: function,
) -> Form:
    """Return the loop that one writes around the gradient of an energy, its steps compiled or as they are."""
    y0, context, tol = problem.y0, problem.context, problem.tol

    def move(y: Tensor, *context: Tensor) -> Tensor:
        return y - STEP_SIZE * slope(y, *context)

    def move_active(y: Tensor, g: Tensor, active: Tensor, steps: Tensor, *context: Tensor) -> Any:
        y = torch.where(active[:, None], y - STEP_SIZE * g, y)
        steps = steps + active
        g = slope(y, *context)
        return y, g, active & (torch.linalg.vector_norm(g, dim=1) > tol), steps

    def all_steps() -> Outcome:
        y = y0
        for _ in range(problem.config.steps):
            y = step(y, *context)
        return Outcome(y, None)

    def until_converged() -> Outcome:
        y, g = y0, first(y0, *context)
        active = torch.ones(len(y), dtype=torch.bool, device=y.device)
        steps = torch.zeros(len(y), dtype=torch.int64, device=y.device)
        for _ in range(problem.config.steps):
            y, g, active, steps = step(y, g, active, steps, *context)
            if not active.any():
                break
        return Outcome(y, steps)

    if problem.config.mode == "stop":
        first, step = compiled("slope", slope), compiled("masked", move_active)
        return until_converged
    step = compiled("step", move)
    return all_steps


def eager(problem: Problem) -> Form:
    """Return the loop with autograd's gradients."""
    return plain(problem, partial(gradient, problem.function))


def compiled(problem: Problem, cache: CompileCache) -> Form:
    """Return the loop with compiled steps."""

    def compiled(name: str, body: Callable[..., Any]) -> Callable[..., Any]:
        if problem.y0.device.type != "cuda":
            return cache.get(problem.config, name, body, dynamic=False)
        graph = cache.get(problem.config, name, body, dynamic=False, mode="reduce-overhead")

        def replayed(*arguments: Tensor) -> Any:
            # The next replay of the CUDA graph overwrites what this one returns, and reads it.
            torch.compiler.cudagraph_mark_step_begin()
            result = graph(*arguments)
            return result.clone() if isinstance(result, Tensor) else tuple(t.clone() for t in result)

        return replayed

    function = problem.function
    return plain(problem, torch.func.grad(lambda y, *context: function(y, *context).sum()), compiled)


def unrolled(problem: Problem) -> Tensor:
    """Take all steps and keep the graph of all of them."""
    y = problem.y0
    for _ in range(problem.config.steps):
        (g,) = torch.autograd.grad(problem.function(y, *problem.context).sum(), y, create_graph=True)
        y = y - STEP_SIZE * g
    return y


def without_graph(problem: Problem, call: Form) -> Outcome:
    """Make the call, and compute the energy, which EnergyDescent returns as well."""
    with torch.no_grad():
        outcome = call()
        if outcome.energy is None:
            outcome = outcome._replace(energy=problem.function(outcome.y, *problem.context))
        return outcome


def ours(problem: Problem, energy: Any, tol: float) -> Form:
    """Return a call of EnergyDescent."""
    stop = "gradient" if tol > 0 else "energy"
    descent = ac.EnergyDescent(energy, STEP_SIZE, problem.config.steps, tol, stop)

    def call() -> Outcome:
        result = descent(problem.y0, *problem.context)
        return Outcome(result.y, result.steps if tol > 0 else None, result.energy)

    return call


def forms(problem: Problem, cache: CompileCache | None) -> dict[str, Form]:
    """Return every form of a configuration without training; the compiled one only with a cache."""
    calls = {"eager": eager(problem)}
    if cache is not None:
        calls["compiled"] = compiled(problem, cache)
    calls["analytic"] = analytic(problem, written_out)
    if problem.config.kind == "mlp":
        calls["private"] = analytic(problem, private)
    calls["generic"] = ours(problem, problem.function, problem.tol)
    calls["kernel"] = ours(problem, problem.energy, problem.tol)
    if problem.config.mode == "stop":
        calls["kernel_all"] = ours(problem, problem.energy, 0.0)
    return {name: partial(without_graph, problem, call) for name, call in calls.items()}


def training_losses(problem: Problem) -> dict[str, Callable[[], Tensor]]:
    """Return the forms of training: each gives the loss, the mean square of y − target after all steps."""
    generic, kernel = ours(problem, problem.function, 0.0), ours(problem, problem.energy, 0.0)
    ends: dict[str, Callable[[], Tensor]] = {
        "eager": partial(unrolled, problem),
        "analytic": partial(analytic_unrolled, problem),
        "generic": lambda: generic().y,
        "kernel": lambda: kernel().y,
    }

    def loss(end: Callable[[], Tensor]) -> Tensor:
        return (end() - problem.target).square().mean()

    return {name: partial(loss, end) for name, end in ends.items()}


def training_calls(problem: Problem) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Return the forward and backward pass of the forms of training: the gradients of all leaves."""
    losses, leaves = training_losses(problem), problem.leaves
    return {name: partial(both_passes, loss, leaves) for name, loss in losses.items()}
