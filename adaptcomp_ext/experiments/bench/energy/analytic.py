"""Hand-written descents: the gradient as a formula in torch's operations, no autograd, no allocation within the loop.

This is what somebody writes who has seen the profile: the context's part once, one fused product for each
layer and direction, and everything in place. The buffers are allocated beforehand. The activations'
derivatives are written out in torch's public operations, or taken from the private ones of its own backward
passes: one pass over memory instead of five.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import adaptcomp_ext as ac

from .loops import Outcome
from .problem import Problem

__all__ = ["all_steps", "private", "stopping", "unrolled", "written_out"]

aten = torch.ops.aten


Derivative = Callable[[str, Tensor, Tensor], None]
"""Puts upstream · act'(a) in the place of a."""


def written_out(activation: str, upstream: Tensor, a: Tensor) -> None:
    """In public operations."""
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
    """In the operations of torch's own backward passes."""
    if activation == "silu":
        aten.silu_backward.grad_input(upstream, a, grad_input=a)
    elif activation == "tanh":
        aten.tanh_backward.grad_input(upstream, a.tanh_(), grad_input=a)
    elif activation == "gelu":
        aten.gelu_backward.grad_input(upstream, a, grad_input=a)
    else:
        aten.softplus_backward.grad_input(upstream, a, 1.0, 20.0, grad_input=a)


class _Network:
    """The gradient of a network's energy: Wᵧᵀ s, with s [B, hidden] computed in place."""

    def __init__(self, energy: ac.MLPEnergy, batch: int, derivative: Derivative) -> None:
        self.times_derivative_ = derivative
        self.activation = energy.activation
        self.weight, self.weight_x, self.bias1 = energy.weight_y, energy.weight_x, energy.bias1
        self.out = energy.out.expand(batch, -1)
        self.first = torch.empty(batch, energy.hidden[0], device=energy.out.device)
        self.second: tuple[Tensor, Tensor] | None = None
        if energy.weight2 is not None and energy.bias2 is not None:
            self.second = energy.weight2, energy.bias2
            self.values = torch.empty_like(self.first)
            self.last = torch.empty(batch, energy.hidden[-1], device=energy.out.device)

    def context(self, x: Tensor) -> Tensor:
        assert self.weight_x is not None
        return F.linear(x, self.weight_x, self.bias1)

    def upstream(self, y: Tensor, c: Tensor) -> Tensor:
        """Return s."""
        a = torch.addmm(c, y, self.weight.T, out=self.first)
        if self.second is None:
            self.times_derivative_(self.activation, self.out, a)
            return a
        weight2, bias2 = self.second
        values, last = self.values, self.last
        _activate(self.activation, a, values)
        torch.addmm(bias2, values, weight2.T, out=last)
        self.times_derivative_(self.activation, self.out, last)
        torch.mm(last, weight2, out=values)
        self.times_derivative_(self.activation, values, a)
        return a


def _activate(activation: str, a: Tensor, out: Tensor) -> None:
    if activation == "tanh":
        torch.tanh(a, out=out)
    else:
        getattr(aten, activation).out(a, out=out)


def all_steps(problem: Problem, derivative: Derivative = written_out) -> Callable[[], Outcome]:
    """Return a call that takes all steps."""
    y0, energy, steps, size = problem.y0, problem.energy, problem.config.steps, problem.step_size
    y = torch.empty_like(y0)

    if isinstance(energy, ac.MLPEnergy):
        network = _Network(energy, y0.shape[0], derivative)

        def on_network() -> Outcome:
            y.copy_(y0)
            c = network.context(*problem.context)
            for _ in range(steps):
                y.addmm_(network.upstream(y, c), network.weight, beta=1 - size * energy.ridge, alpha=-size)
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

    matrix = energy.A
    other = torch.empty_like(y0)
    identity = torch.eye(matrix.shape[0], device=y0.device)

    def on_quadratic() -> Outcome:
        # y − α(Ay − b) = (I − αA)y + αb
        here, there = y.copy_(y0), other
        update, linear = identity - size * matrix, size * problem.context[0]
        for _ in range(steps):
            torch.addmm(linear, here, update, out=there)
            here, there = there, here
        return Outcome(here, None)

    return on_quadratic


def stopping(problem: Problem, derivative: Derivative = written_out) -> Callable[[], Outcome]:
    """Return a call that runs all rows of a network's energy until the last one has stopped; those that have stand still."""
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


def unrolled(energy: ac.MLPEnergy, y: Tensor, x: Tensor, step_size: float, steps: int) -> Tensor:
    """Take all steps on a silu network with one layer, in operations that autograd records: no second-order graph is needed."""
    assert energy.weight_x is not None
    c = F.linear(x, energy.weight_x, energy.bias1)
    for _ in range(steps):
        a = torch.addmm(c, y, energy.weight_y.T)
        gate = torch.sigmoid(a)
        s = energy.out * gate * (1 + a * (1 - gate))
        y = torch.addmm(y, s, energy.weight_y, beta=1 - step_size * energy.ridge, alpha=-step_size)
    return y
