"""One call of `EnergyDescent` with its arguments checked, and the evaluation of its energy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from adaptcomp_ext.nn._mixing import mixed_row
from adaptcomp_ext.nn._modes import Autocast, autocast_of, recording
from adaptcomp_ext.nn._snapshot import Snapshot
from adaptcomp_ext.ops._backend import DTYPE_CODES
from adaptcomp_ext.ops._checks import describe
from adaptcomp_ext.ops._plain import check_initialized
from adaptcomp_ext.ops._transforms import Watch
from adaptcomp_ext.reference import DescentRule


class Ended(Protocol):
    """The rows of a descent that has ended; each tensor is [B, ...]."""

    @property
    def y(self) -> Tensor:
        """The last point of each row."""

    @property
    def energy(self) -> Tensor:
        """The energy there."""

    @property
    def steps(self) -> Tensor:
        """int64: the number of steps."""

    @property
    def status(self) -> Tensor:
        """int8: the status."""


@dataclass(slots=True)
class Problem:
    """One call of `EnergyDescent`, checked."""

    energy: Callable[..., Any]
    y0: Tensor
    context: list[Tensor]
    step_size: float | Tensor
    """A tensor is without dimensions or [B]."""
    sigma: float | Tensor
    rule: DescentRule
    gradient: str
    last: int | None
    """k of ("truncated", k), whose `gradient` is "unrolled"."""
    keep_trace: bool
    sample_ids: Tensor | None
    check_first: Callable[[Tensor, Tensor, Sequence[Tensor]], None]
    """Called with the first energies, points and context; raises if the energy mixes rows."""
    watch: Watch | None = None
    """Watches what the energy returns under transforms of torch."""
    autocast: Autocast | None = None
    """Device type, dtype and switch at the first evaluation."""
    starts: int = 1
    """The number of rows of one race, which stand together: the first to halt ends the others."""
    snapshot: Snapshot | None = None
    """The energy's state, if a backward pass may evaluate the energy again."""

    def evaluating(self) -> contextlib.AbstractContextManager[object]:
        """Return the context for evaluating and differentiating the energy, whatever the caller's modes.

        The backward pass evaluates the energy again, under the autocast of the forward pass.
        """
        if self.autocast is None:
            self.autocast = autocast_of(self.y0.device)
        switched = [a for a in self.autocast if a[2] or torch.is_autocast_enabled(a[0])]
        if switched or torch.is_inference_mode_enabled():
            return recording(switched)
        return torch.enable_grad()

    def autocast_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes to which autocast rounds within the energy."""
        return [dtype for _, dtype, enabled in self.autocast or [] if enabled]

    def evaluate_once(self) -> None:
        """Evaluate the energy at the start, so that its lazy modules get their shapes."""
        with self.evaluating():
            self.evaluate(self.y0.detach().clone().requires_grad_(), self.context)

    def evaluate(self, point: Tensor, context: Sequence[Tensor]) -> Tensor:
        """Return the energies [n] of points [n, ...], with a graph that reaches the points."""
        value = self.energy(point, *context)
        if self.watch is not None:
            self.watch("energy", value)
        if (
            type(value) is Tensor
            and value.shape == point.shape[:1]
            and value.requires_grad
            and value.dtype in DTYPE_CODES
            and value.device == point.device
            and value.layout is torch.strided
        ):
            return value
        return _checked_energies(value, point)

    def slope(self, value: Tensor, point: Tensor, ones: Tensor, create_graph: bool = False) -> Tensor:
        """Return the gradient of each row's energy at its point."""
        (g,) = torch.autograd.grad(
            value, point, ones, retain_graph=create_graph, create_graph=create_graph, allow_unused=True
        )
        if g is None:
            raise ValueError("energy: expected it to depend on y, got one whose graph does not reach y")
        return g

    def evaluate_again(self, point: Tensor, context: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return energies and their gradients, both with a graph, in the modes of the first evaluation."""
        with self.evaluating():
            value = self.evaluate(point, context)
            return value, self.slope(value, point, torch.ones_like(value), create_graph=True)


def _checked_energies(value: Any, point: Tensor) -> Tensor:
    """Require one differentiable energy for each row."""
    rows = point.shape[0]
    if not isinstance(value, Tensor):
        raise TypeError(f"energy: expected it to return a Tensor, got {describe(value)}")
    check_initialized("energy", value)
    if value.layout != torch.strided:
        raise TypeError(f"energy: expected it to return a dense tensor, got layout {value.layout}")
    if value.dtype not in DTYPE_CODES:
        raise TypeError(
            f"energy: expected it to return float32, float64, bfloat16 or float16, got {value.dtype}"
        )
    if value.shape != (rows,):
        hint = "; one energy for each row, not their sum or mean" if value.dim() == 0 else ""
        raise ValueError(f"energy: expected it to return shape [{rows}]{hint}, got {list(value.shape)}")
    if value.device != point.device:
        raise ValueError(
            f"energy: expected it to return a tensor on {point.device}, got one on {value.device}"
        )
    if not value.requires_grad:
        raise ValueError(f"energy: expected it to depend on y, got {describe(value)} without a graph")
    return value


def check_mixing(value: Tensor, point: Tensor) -> None:
    """Raise where a row's energy visibly depends on another row. The graph is kept."""
    row = mixed_row([value], [point])
    if row is not None:
        raise ValueError(
            "energy: expected each row's energy to depend on that row alone, got one in which that of row "
            f"{row} depends on others"
        )
