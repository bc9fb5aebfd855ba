"""An energy in closed form, and the kernels that run all steps of a descent on it in one call. Private.

The functions know nothing of autograd and are not operators of ``torch.library``: the module that calls them,
with its autograd node, splits a compiled graph anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptcomp_ext import _C
from adaptcomp_ext.ops._backend import on_cuda, place
from adaptcomp_ext.ops.descent import rule_arguments
from adaptcomp_ext.reference import DescentRule


class Descended(NamedTuple):
    """The result of a fused descent. The last three fields are None unless the caller keeps the path."""

    y: Tensor
    energy: Tensor
    steps: Tensor
    status: Tensor
    path: Tensor | None
    """[B, max_steps, dim]: y after each step that the row took; the rest is uninitialised."""
    scale: Tensor | None
    """[B, max_steps]: the factor that backtracking had left on the step size; 0 for a rejected step."""
    velocity: Tensor | None
    """[B, max_steps, dim]: the velocity of each step, with momentum."""


class DescentGradients(NamedTuple):
    """Gradients of a fused descent, one for each row."""

    y0: Tensor
    step_size: Tensor
    """[B]"""
    noise: Tensor | None
    """[B]; None without noise."""
    tensors: list[Tensor | None]
    """Gradients of the energy's tensors; that of the tensor with rows of its own is [B, ...] in any case."""


class EnergyKernels:
    """The compiled functions of one family of energies, found by the family's name in csrc.

    Parameters
    ----------
    family : str
        The family whose ``<family>_descent``, ``<family>_descent_backward`` and ``<family>_descent_scratch``
        the compiled module exports.
    rows_at : int, optional
        Position of the tensor that may have one row for each row of the batch.
    shift_at : int, optional
        Position of the tensor that shifts the energy by a constant: no descent depends on it, and the kernel
        of the gradient leaves it out.
    """

    def __init__(self, family: str, rows_at: int | None = None, shift_at: int | None = None) -> None:
        self.descend: Callable[..., None] = getattr(_C, f"{family}_descent")
        self.differentiate: Callable[..., None] = getattr(_C, f"{family}_descent_backward")
        self.scratch_bytes: Callable[[list[int]], int] = getattr(_C, f"{family}_descent_scratch")
        self.rows_at = rows_at
        self.shift_at = shift_at


class ClosedForm(NamedTuple):
    """An energy with the values of its tensors, as its kernels take it."""

    kernels: EnergyKernels
    function: Callable[..., Tensor]
    """``function(y, *tensors) -> [n]``: the energy in plain PyTorch."""
    tensors: tuple[Tensor | None, ...]
    """The energy's tensors in the kernels' order, in the compute dtype."""
    sizes: tuple[int, ...] = ()
    """The sizes that the kernels need besides B and dim."""
    codes: tuple[int, ...] = ()
    """Further integers: the code of an activation, for instance."""
    numbers: tuple[float, ...] = ()

    def fits(self, y0: Tensor, differentiated: bool) -> bool:
        """Whether rows like y0 fit in the kernel on their device, and in that of the gradient if needed."""
        return not on_cuda(y0.device) or (
            self._scratch_bytes(y0, backward=False) >= 0
            and (not differentiated or self._scratch_bytes(y0, backward=True) >= 0)
        )

    def descend(
        self,
        rule: DescentRule,
        y0: Tensor,
        step_size: Tensor,
        noise: Tensor | None,
        sample_ids: Tensor | None,
        keep: bool,
    ) -> Descended:
        """Run all steps of every row.

        All tensors are contiguous, without graph, and of one dtype, float32 or float64; y0 is [B, dim],
        `step_size` without dimensions or [B], `noise` likewise or None, `sample_ids` int64 [B] or None. With
        `keep` the result has the path, the scale and the velocity.
        """
        integers, numbers = rule_arguments(rule)
        rows, dim = y0.shape
        out = Descended(
            torch.empty_like(y0),
            y0.new_empty(rows),
            y0.new_empty(rows, dtype=torch.int64),
            y0.new_empty(rows, dtype=torch.int8),
            y0.new_empty((rows, rule.max_steps, dim)) if keep else None,
            y0.new_empty((rows, rule.max_steps)) if keep else None,
            y0.new_empty((rows, rule.max_steps, dim)) if keep and rule.momentum > 0 else None,
        )
        self.kernels.descend(
            [
                *_start(y0, step_size, noise, sample_ids, integers),
                *out,
                *self._arguments(),
                *self._place(y0, backward=False),
            ],
            [*numbers, *self.numbers],
        )
        return out

    def differentiate(
        self,
        rule: DescentRule,
        y0: Tensor,
        step_size: Tensor,
        noise: Tensor | None,
        sample_ids: Tensor | None,
        run: Descended,
        last_steps: int,
        g_y: Tensor | None,
        g_path: Tensor | None,
    ) -> DescentGradients:
        """Compute the gradients of a descent that `descend` has run with ``keep=True``.

        They go through the last `last_steps` steps of each row, and to y0 where the row took fewer. 0
        differentiates each step by itself.
        """
        integers, numbers = rule_arguments(rule)
        rows = y0.shape[0]
        tensors: list[Tensor | None] = []
        for i, t in enumerate(self.tensors):
            own = i == self.kernels.rows_at and t is not None
            tensors.append(
                None if t is None else t.new_empty((rows, t.shape[-1])) if own else torch.empty_like(t)
            )
        out = DescentGradients(
            torch.empty_like(y0), y0.new_empty(rows), None if noise is None else y0.new_empty(rows), tensors
        )
        written = list(tensors)
        if self.kernels.shift_at is not None:
            shift = written.pop(self.kernels.shift_at)
            assert shift is not None
            shift.zero_()
        self.kernels.differentiate(
            [
                *_start(y0, step_size, noise, sample_ids, integers),
                *(run.steps, run.path, run.scale, run.velocity),
                *(last_steps, g_y, g_path, out.y0, out.step_size, out.noise),
                *self._arguments(),
                *written,
                *self._place(y0, backward=True),
            ],
            [*numbers, *self.numbers],
        )
        return out

    def _arguments(self) -> list[Any]:
        """Return sizes, codes and tensors, with the row stride after the tensor with rows of its own."""
        at = self.kernels.rows_at
        if at is None:
            return [*self.sizes, *self.codes, *self.tensors]
        rows = self.tensors[at]
        assert rows is not None
        stride = rows.shape[1] if rows.dim() == 2 else 0
        return [*self.sizes, *self.codes, *self.tensors[: at + 1], stride, *self.tensors[at + 1 :]]

    def _scratch_bytes(self, y0: Tensor, backward: bool) -> int:
        """Return the scratch memory of a call on CUDA; negative where a row does not fit in a block."""
        wide = y0.dtype == torch.float64
        return self.kernels.scratch_bytes([*y0.shape, wide, backward, place(y0.device)[0], *self.sizes])

    def _place(self, y0: Tensor, backward: bool) -> list[Any]:
        """Return the end of an argument list: device, stream, and on CUDA the scratch memory."""
        if not on_cuda(y0.device):
            return [*place(y0.device)]
        scratch = torch.empty(self._scratch_bytes(y0, backward), dtype=torch.uint8, device=y0.device)
        return [*place(y0.device), scratch, scratch.numel()]


def _start(
    y0: Tensor, step_size: Tensor, noise: Tensor | None, sample_ids: Tensor | None, rule: list[int]
) -> list[Any]:
    """Return the arguments that both kernels begin with."""
    wide = y0.dtype == torch.float64
    return [*y0.shape, wide, *rule, y0, *_setting(step_size), *_setting(noise), sample_ids]


def _setting(value: Tensor | None) -> tuple[Tensor | None, int]:
    """Return a setting and its stride over the rows."""
    return value, 1 if value is not None and value.dim() else 0
