"""The kernels that run all steps of a descent: allocation and calls, whatever the energy. Private.

An energy is a `ClosedForm`: its tensors, in the order of its kernels, and its constants. `whole_descent` and its gradient know
nothing of autograd; `adaptcomp_ext.nn` makes the node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adaptcomp_ext import _C
from adaptcomp_ext.ops._backend import place, pointer
from adaptcomp_ext.ops._library import register
from adaptcomp_ext.ops.descent import rule_arguments
from adaptcomp_ext.reference import DescentRule


class ClosedForm(NamedTuple):
    """An energy as its kernels take it."""

    kind: str
    """"mlp", "hopfield" or "quadratic"."""
    tensors: tuple[Tensor | None, ...]
    """In the compute dtype. A tensor that may have rows of its own, [B, ...] or without B, stands where `rows_at` says."""
    integers: tuple[int, ...]
    numbers: tuple[float, ...]
    function: Callable[..., Tensor]
    """``function(y, *tensors) -> [n]``: the same in plain PyTorch."""
    rows_at: int | None
    """Which of the tensors may have a row for each row of the batch."""


class Descended(NamedTuple):
    """What a whole descent returns. The last three are empty unless they were asked for."""

    y: Tensor
    energy: Tensor
    steps: Tensor
    status: Tensor
    path: Tensor
    """[B, max_steps, dim]: y after each step that the row took; beyond them uninitialised."""
    scale: Tensor
    """[B, max_steps]: what backtracking had left of the step size; 0 where the step was rejected."""
    velocity: Tensor
    """[B, max_steps, dim]: the velocity of each step, with momentum."""


class DescentGradients(NamedTuple):
    """Gradients of a whole descent, each row's its own."""

    y0: Tensor
    step_size: Tensor
    """[B]"""
    noise: Tensor
    """[B]; empty without noise."""
    tensors: list[Tensor | None]
    """Of the energy's tensors; one with rows of its own has [B, ...] in any case."""


_FORWARD = {"mlp": _C.mlp_descent, "hopfield": _C.hopfield_descent, "quadratic": _C.quadratic_descent}
_BACKWARD = {
    "mlp": _C.mlp_descent_backward,
    "hopfield": _C.hopfield_descent_backward,
    "quadratic": _C.quadratic_descent_backward,
}


def _scalars(name: str, tensor: Tensor | None) -> tuple[int, int]:
    """Address of a setting, and its stride over the rows."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), 1 if tensor.dim() else 0)


def _energy_arguments(kind: str, tensors: Sequence[Tensor | None], integers: Sequence[int]) -> list[int]:
    if kind == "mlp":
        weight1, context, weight2, bias2, out, out_bias = tensors
        assert weight1 is not None and context is not None
        stride = context.shape[-1] if context.dim() == 2 else 0
        return [*integers, pointer(weight1), pointer(context), stride, *map(pointer, (weight2, bias2, out, out_bias))]
    if kind == "hopfield":
        patterns, beta = tensors
        assert patterns is not None
        return [patterns.shape[0], pointer(patterns), pointer(beta)]
    matrix, linear = tensors
    assert linear is not None
    return [pointer(matrix), pointer(linear), linear.shape[-1] if linear.dim() == 2 else 0]


def _head(y0: Tensor, step_size: Tensor, noise: Tensor | None, ids: Tensor | None, rule: Sequence[int]) -> list[int]:
    settings = (*_scalars("step_size", step_size), *_scalars("noise", noise))
    return [*y0.shape, y0.dtype == torch.float64, *rule, y0.data_ptr(), *settings, pointer(ids)]


def _kernel(
    kind: str,
    y0: Tensor,
    step_size: Tensor,
    noise: Tensor | None,
    sample_ids: Tensor | None,
    tensors: Sequence[Tensor | None],
    integers: Sequence[int],
    rule: Sequence[int],
    numbers: Sequence[float],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    out = _empty(y0, rule, numbers, keep)
    kept = [pointer(t) if t.numel() else 0 for t in out[4:]]
    arguments = _head(y0, step_size, noise, sample_ids, rule)
    arguments += [t.data_ptr() for t in out[:4]] + kept
    arguments += _energy_arguments(kind, tensors, integers)
    _FORWARD[kind]([*arguments, *place(y0.device)], list(numbers))
    return out


def _empty(
    y0: Tensor, rule: Sequence[int], numbers: Sequence[float], keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, dim = y0.shape
    steps = rule[0]
    momentum = numbers[1] > 0
    return (
        torch.empty_like(y0),
        y0.new_empty(rows),
        y0.new_empty(rows, dtype=torch.int64),
        y0.new_empty(rows, dtype=torch.int8),
        y0.new_empty((rows, steps, dim) if keep else 0),
        y0.new_empty((rows, steps) if keep else 0),
        y0.new_empty((rows, steps, dim) if keep and momentum else 0),
    )


_whole_descent = register(
    "whole_descent(str kind, Tensor y0, Tensor step_size, Tensor? noise, Tensor? sample_ids, Tensor?[] tensors, int[] integers, "
    "int[] rule, float[] numbers, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    lambda kind, y0, step_size, noise, ids, tensors, integers, rule, numbers, keep: _empty(y0, rule, numbers, keep),
)


def whole_descent(
    energy: ClosedForm,
    rule: DescentRule,
    y0: Tensor,
    step_size: Tensor,
    noise: Tensor | None,
    sample_ids: Tensor | None,
    keep: bool,
) -> Descended:
    """All steps of every row. All tensors contiguous and of one dtype, float32 or float64; `keep`: path, scale and velocity."""
    integers, numbers = rule_arguments(rule)
    arguments = (y0, step_size, noise, sample_ids, list(energy.tensors), list(energy.integers), integers)
    return Descended(*_whole_descent(energy.kind, *arguments, [*numbers, *energy.numbers], keep))


def _backward_kernel(
    kind: str,
    y0: Tensor,
    step_size: Tensor,
    noise: Tensor | None,
    sample_ids: Tensor | None,
    tensors: Sequence[Tensor | None],
    integers: Sequence[int],
    rule: Sequence[int],
    numbers: Sequence[float],
    steps: Tensor,
    path: Tensor,
    scale: Tensor,
    velocity: Tensor,
    last_steps: int,
    rows_at: int,
    g_y: Tensor | None,
    g_path: Tensor | None,
) -> list[Tensor]:
    out = _empty_gradients(y0, noise, tensors, rows_at)
    g_y0, g_step_size, g_noise, *grads = out
    arguments = _head(y0, step_size, noise, sample_ids, rule)
    arguments += [
        steps.data_ptr(),
        path.data_ptr(),
        scale.data_ptr(),
        velocity.data_ptr(),
        last_steps,
        pointer(g_y),
        pointer(g_path),
    ]
    arguments += [g_y0.data_ptr(), g_step_size.data_ptr(), g_noise.data_ptr() if noise is not None else 0]
    arguments += _energy_arguments(kind, tensors, integers)
    given = iter(grads)
    addresses = [0 if t is None else next(given).data_ptr() for t in tensors]
    if kind == "mlp":
        addresses.pop()  # the last bias takes no part in a descent
        grads[-1].zero_()
    _BACKWARD[kind]([*arguments, *addresses, *place(y0.device)], list(numbers))
    return out


def _empty_gradients(y0: Tensor, noise: Tensor | None, tensors: Sequence[Tensor | None], rows_at: int) -> list[Tensor]:
    rows = y0.shape[0]
    grads = [
        t.new_empty((rows, *t.shape[-1:])) if i == rows_at else torch.empty_like(t)
        for i, t in enumerate(tensors)
        if t is not None
    ]
    return [torch.empty_like(y0), y0.new_empty(rows), y0.new_empty(rows if noise is not None else 0), *grads]


_whole_descent_backward = register(
    "whole_descent_backward(str kind, Tensor y0, Tensor step_size, Tensor? noise, Tensor? sample_ids, Tensor?[] tensors, "
    "int[] integers, int[] rule, float[] numbers, Tensor steps, Tensor path, Tensor scale, Tensor velocity, int last_steps, "
    "int rows_at, Tensor? g_y, Tensor? g_path) -> Tensor[]",
    _backward_kernel,
    lambda kind, y0, step_size, noise, ids, tensors, *rest: _empty_gradients(y0, noise, tensors, rest[8]),
)


def whole_descent_backward(
    energy: ClosedForm,
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
    """Gradients through the last `last_steps` steps of each row; 0: through each step by itself."""
    integers, numbers = rule_arguments(rule)
    g_y0, g_step_size, g_noise, *grads = _whole_descent_backward(
        *(energy.kind, y0, step_size, noise, sample_ids, list(energy.tensors), list(energy.integers), integers),
        *([*numbers, *energy.numbers], run.steps, run.path, run.scale, run.velocity, last_steps),
        *(-1 if energy.rows_at is None else energy.rows_at, g_y, g_path),
    )
    given = iter(grads)
    return DescentGradients(g_y0, g_step_size, g_noise, [None if t is None else next(given) for t in energy.tensors])
