"""One configuration of the benchmark, and the energy and tensors it stands for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import adaptcomp_ext as ac

from ..schedule import scripted_steps
from . import functions
from .functions import Energy
from .loops import autograd_slope
from .starts import starts

__all__ = ["FRACTION", "MODES", "Config", "Problem", "make_problem"]

MODES = ("all", "stop", "train")
FRACTION = 0.25
STEP_SIZE = 0.1
HOPFIELD_BETA = 1.0


@dataclass(frozen=True)
class Config:
    """One point of the grid.

    Attributes
    ----------
    mode : str
        "all": all rows take all steps. "stop": rows stop on their own, after a quarter of the steps on
        average. "train": forward and backward through all steps.
    batch, context, dim : int
        B rows with so many elements of context and of y.
    hidden : tuple of int
        Widths of a network's layers; the number of a Hopfield network's patterns; none for a quadratic
        energy.
    steps : int
        M.
    activation : str
        Of a network.
    kind : str
        "mlp", "hopfield" (no context) or "quadratic" (its context is b).
    compiled : bool
        Whether the compiled contender takes part: compiling takes seconds.
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
        """Operations of the products of all steps with y, forth and back; the context's part is not counted."""
        if self.kind == "quadratic":
            return 2.0 * self.batch * self.dim * self.dim * self.steps
        widths = (self.dim, *self.hidden)
        return 4.0 * self.batch * self.steps * sum(a * b for a, b in pairwise(widths))

    def as_dict(self) -> dict[str, Any]:
        """Plain form for the JSON report."""
        return {**asdict(self), "hidden": list(self.hidden)}


@dataclass
class Problem:
    """Everything a contender needs; built once, shared by all of them."""

    config: Config
    energy: ac.MLPEnergy | ac.HopfieldEnergy | ac.QuadraticEnergy
    function: Energy
    """The same energy as one writes it."""
    y0: Tensor
    context: tuple[Tensor, ...]
    step_size: float
    tol: float
    """On the gradient's norm; 0 where rows do not stop."""
    steps: Tensor | None
    """How many each row takes; None: all."""
    target: Tensor
    """Of the loss."""

    @property
    def leaves(self) -> list[Tensor]:
        """What a training call differentiates: the weights, and y0 and the context as if an encoder had made them."""
        return [*self.energy.parameters(), self.y0, *self.context]


def _make_energy(config: Config, device: torch.device, generator: torch.Generator) -> tuple[Any, Energy]:
    if config.kind == "hopfield":
        (patterns,) = config.hidden
        hopfield = ac.HopfieldEnergy(
            torch.randn(patterns, config.dim, generator=generator), HOPFIELD_BETA
        ).to(device)
        return hopfield, functions.hopfield(hopfield)
    if config.kind == "quadratic":
        root = torch.randn(config.dim, config.dim, generator=generator) / config.dim**0.5
        quadratic = ac.QuadraticEnergy(0.5 * torch.eye(config.dim) + 0.5 * root @ root.T).to(device)
        return quadratic, functions.quadratic(quadratic)
    # As in the plain formula, without a ridge, rows need not converge; where they are to stop, they need one.
    ridge = 1.0 if config.mode == "stop" else 0.0
    hidden = config.hidden[0] if len(config.hidden) == 1 else (config.hidden[0], config.hidden[1])
    network = ac.MLPEnergy(config.dim, config.context, hidden, config.activation, ridge).to(device)
    return network, functions.mlp(network)


def make_problem(config: Config, device: torch.device, seed: int) -> Problem:
    """Build the energy and draw the tensors of one configuration."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        energy, function = _make_energy(config, device, generator)
    stops, training = config.mode == "stop", config.mode == "train"
    energy.requires_grad_(training)

    def draw(rows: int, width: int) -> Tensor:
        return torch.randn(rows, width, generator=generator).to(device)

    candidates = 2 * config.batch + 16 if stops else config.batch
    y0 = draw(candidates, config.dim)
    context: tuple[Tensor, ...] = (draw(candidates, config.context),) if config.context else ()
    steps, tol = None, 0.0
    if stops:
        steps = scripted_steps(config.batch, config.steps, FRACTION, seed).to(device)
        (x,) = context
        y0, x, tol = starts(partial(autograd_slope, function), y0, x, steps, STEP_SIZE, config.steps)
        context = (x,)
    for tensor in (y0, *context):
        tensor.requires_grad_(training)
    return Problem(
        config, energy, function, y0, context, STEP_SIZE, tol, steps, draw(config.batch, config.dim)
    )
