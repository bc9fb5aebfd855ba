"""The kernels that run all steps of a descent: allocation and calls, whatever the energy. Private.

An energy is a `ClosedForm`: its tensors, in the order of its kernels, and its constants. The functions know
nothing of autograd, and are not operators of ``torch.library``: the module that calls them, with its node,
splits a compiled graph anyway.
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


class ClosedForm(NamedTuple):
    """An energy as its kernels take it."""

    kind: str
    """"mlp", "hopfield" or "quadratic"."""
    tensors: tuple[Tensor | None, ...]
    """In the compute dtype. A tensor that may have rows of its own, [B, ...] or without B, stands where
    `rows_at` says."""
    integers: tuple[int, ...]
    numbers: tuple[float, ...]
    function: Callable[..., Tensor]
    """``function(y, *tensors) -> [n]``: the same in plain PyTorch."""
    rows_at: int | None
    """Which of the tensors may have a row for each row of the batch."""


class Descended(NamedTuple):
    """What a whole descent returns. The last three are None unless they were asked for."""

    y: Tensor
    energy: Tensor
    steps: Tensor
    status: Tensor
    path: Tensor | None
    """[B, max_steps, dim]: y after each step that the row took; beyond them uninitialised."""
    scale: Tensor | None
    """[B, max_steps]: what backtracking had left of the step size; 0 where the step was rejected."""
    velocity: Tensor | None
    """[B, max_steps, dim]: the velocity of each step, with momentum."""


class DescentGradients(NamedTuple):
    """Gradients of a whole descent, each row's its own."""

    y0: Tensor
    step_size: Tensor
    """[B]"""
    noise: Tensor | None
    """[B]; None without noise."""
    tensors: list[Tensor | None]
    """Of the energy's tensors; one with rows of its own has [B, ...] in any case."""


_FORWARD = {"mlp": _C.mlp_descent, "hopfield": _C.hopfield_descent, "quadratic": _C.quadratic_descent}
_BACKWARD = {
    "mlp": _C.mlp_descent_backward,
    "hopfield": _C.hopfield_descent_backward,
    "quadratic": _C.quadratic_descent_backward,
}


_SCRATCH = {
    "mlp": _C.mlp_descent_scratch,
    "hopfield": _C.hopfield_descent_scratch,
    "quadratic": _C.quadratic_descent_scratch,
}


def _scratch_bytes(form: ClosedForm, y0: Tensor, backward: bool) -> int:
    """Of a call on CUDA. Negative where a row does not fit in a block of the device."""
    first = form.tensors[0]
    assert first is not None
    sizes = {"mlp": form.integers[:2], "hopfield": first.shape[:1], "quadratic": ()}[form.kind]
    return _SCRATCH[form.kind]([*y0.shape, y0.dtype == torch.float64, backward, place(y0.device)[0], *sizes])


def fits(form: ClosedForm, y0: Tensor, through: bool) -> bool:
    """Whether the device has room for rows like y0 in the kernel, and in that of the gradient where it is wanted."""
    return not on_cuda(y0.device) or (
        _scratch_bytes(form, y0, backward=False) >= 0
        and (not through or _scratch_bytes(form, y0, backward=True) >= 0)
    )


def _place(form: ClosedForm, y0: Tensor, backward: bool) -> list[Any]:
    """The end of an argument list, with the scratch in it."""
    if not on_cuda(y0.device):
        return [*place(y0.device)]
    scratch = torch.empty(_scratch_bytes(form, y0, backward), dtype=torch.uint8, device=y0.device)
    return [*place(y0.device), scratch, scratch.numel()]


def _setting(value: Tensor | None) -> tuple[Tensor | None, int]:
    """A setting, and its stride over the rows."""
    return value, 1 if value is not None and value.dim() else 0


def _head(
    y0: Tensor, step_size: Tensor, noise: Tensor | None, sample_ids: Tensor | None, rule: list[int]
) -> list[Any]:
    wide = y0.dtype == torch.float64
    return [*y0.shape, wide, *rule, y0, *_setting(step_size), *_setting(noise), sample_ids]


def _energy(form: ClosedForm) -> list[Any]:
    if form.kind == "hopfield":
        patterns, beta = form.tensors
        assert patterns is not None
        return [patterns.shape[0], patterns, beta]
    first, rows, *rest = form.tensors
    assert rows is not None
    stride = rows.shape[1] if rows.dim() == 2 else 0
    return [*form.integers, first, rows, stride, *rest]


def whole_descent(
    form: ClosedForm,
    rule: DescentRule,
    y0: Tensor,
    step_size: Tensor,
    noise: Tensor | None,
    sample_ids: Tensor | None,
    keep: bool,
) -> Descended:
    """All steps of every row.

    All tensors contiguous, without graph, and of one dtype, float32 or float64; y0 is [B, dim], `step_size`
    without dimensions or [B], `noise` likewise or None, `sample_ids` int64 [B] or None. `keep`: the path, the
    scale and the velocity.
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
    _FORWARD[form.kind](
        [
            *_head(y0, step_size, noise, sample_ids, integers),
            *out,
            *_energy(form),
            *_place(form, y0, backward=False),
        ],
        [*numbers, *form.numbers],
    )
    return out


def whole_descent_backward(
    form: ClosedForm,
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
    """Gradients through the last `last_steps` steps of each row, to y0 where it took fewer; 0: through each step by itself."""
    integers, numbers = rule_arguments(rule)
    rows = y0.shape[0]
    out = DescentGradients(
        torch.empty_like(y0),
        y0.new_empty(rows),
        None if noise is None else y0.new_empty(rows),
        [
            None
            if t is None
            else t.new_empty((rows, t.shape[-1]))
            if i == form.rows_at
            else torch.empty_like(t)
            for i, t in enumerate(form.tensors)
        ],
    )
    parts = list(out.tensors)
    if form.kind == "mlp":
        out_bias = parts.pop()  # takes no part in a descent
        assert out_bias is not None
        out_bias.zero_()
    _BACKWARD[form.kind](
        [
            *_head(y0, step_size, noise, sample_ids, integers),
            *(
                run.steps,
                run.path,
                run.scale,
                run.velocity,
                last_steps,
                g_y,
                g_path,
                out.y0,
                out.step_size,
                out.noise,
            ),
            *(*_energy(form), *parts, *_place(form, y0, backward=True)),
        ],
        [*numbers, *form.numbers],
    )
    return out
