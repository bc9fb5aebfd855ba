"""The update of a descent to the next point, with its gradient, and the noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptcomp_ext import _C, reference
from adaptcomp_ext.ops import _checks
from adaptcomp_ext.ops._backend import compute_dtype, contiguous, needs_grad, on_reference, place, row_size
from adaptcomp_ext.ops._fields import documented
from adaptcomp_ext.ops._library import Function, register
from adaptcomp_ext.ops._transforms import EVERYTHING, OP_OF_TENSORS, check_gradients, enter, without_address
from adaptcomp_ext.reference import DescentRule


@documented
class DescentUpdate(NamedTuple):
    """The result of `descent_update`.

    Attributes
    ----------
    point : Tensor
        [rows, ...]: the next point y', in the dtype of y.
    velocity : Tensor
        [rows, ...]: the velocity v' of the step; float32, float64 for float64 points.
    """

    point: Tensor
    velocity: Tensor


def rule_arguments(rule: DescentRule) -> tuple[list[int], list[float]]:
    """Return the integers and numbers of a rule in the order of the kernels' arguments."""
    integers = [rule.max_steps, rule.on_gradient, rule.if_lower, rule.noisy, rule.seed]
    return integers, [rule.tol, rule.momentum, rule.clip, rule.low, rule.high, rule.backtracking]


# --- raw ops ------------------------------------------------------------------------------------------------
def _kernel(
    y: Tensor,
    gradient: Tensor,
    step_size: Tensor,
    velocity: Tensor | None,
    noise: Tensor | None,
    momentum: float,
    clip: float,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    y, gradient, step_size = (
        contiguous("y", y),
        contiguous("gradient", gradient),
        contiguous("step_size", step_size),
    )
    velocity = None if velocity is None else contiguous("velocity", velocity)
    noise = None if noise is None else contiguous("noise", noise)
    point = torch.empty_like(y)
    after = torch.empty_like(y, dtype=compute_dtype(y.dtype))
    integers, numbers = rule_arguments(DescentRule(1, momentum=momentum, clip=clip, low=low, high=high))
    _C.descent_update(
        (y, gradient, velocity, noise, point, after), step_size, [*integers, *place(y.device)], numbers
    )
    return point, after


_descent_update: Callable[..., tuple[Tensor, Tensor]] = register(
    "descent_update(Tensor y, Tensor gradient, Tensor step_size, Tensor? velocity, Tensor? noise, "
    "float momentum, float clip, float low, float high) -> (Tensor, Tensor)",
    _kernel,
    lambda y, *rest: (
        torch.empty_like(y, memory_format=torch.contiguous_format),
        torch.empty_like(y, dtype=compute_dtype(y.dtype), memory_format=torch.contiguous_format),
    ),
    tensor_at=0,
)


def _normals_kernel(sample: Tensor, elements: int, seed: int, step: int, wide: bool) -> Tensor:
    out = sample.new_empty((sample.shape[0], elements), dtype=torch.float64 if wide else torch.float32)
    _C.descent_normals([*out.shape, step, wide, sample, out, seed, *place(sample.device)])
    return out


_normals = register(
    "descent_normals(Tensor sample, int elements, int seed, int step, bool wide) -> Tensor",
    _normals_kernel,
    lambda sample, elements, seed, step, wide: sample.new_empty(
        (sample.shape[0], elements), dtype=torch.float64 if wide else torch.float32
    ),
    tensor_at=0,
)


def normals(rule: DescentRule, sample: Tensor, step: int, like: Tensor) -> Tensor:
    """Draw the standard normal noise of a step for samples [n], in the shape and compute dtype of `like`."""
    elements, wide = row_size(like), like.dtype == torch.float64
    if on_reference():
        out = reference.normals(rule.seed, sample, step, elements).to(compute_dtype(like.dtype))
    else:
        out = _normals(sample, elements, rule.seed, step, wide)
    return out.view(like.shape)


# --- autograd -----------------------------------------------------------------------------------------------
class _Update(Function):
    """The update as a node. If `point` and `after` are given, the update has run and they are its result."""

    @staticmethod
    def forward(
        ctx: Any,
        rule: DescentRule,
        point: Tensor | None,
        after: Tensor | None,
        y: Tensor,
        gradient: Tensor,
        step_size: Tensor,
        velocity: Tensor | None,
        noise: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if point is None or after is None:
            run = _descent_update if without_address() else _kernel
            point, after = run(
                y, gradient, step_size, velocity, noise, rule.momentum, rule.clip, rule.low, rule.high
            )
        else:
            point, after = point.view_as(point), after.view_as(after)
        ctx.save_for_backward(y, gradient, step_size, after, noise)
        ctx.rule, ctx.moves = rule, velocity is not None
        ctx.set_materialize_grads(False)
        return point, after

    @staticmethod
    def backward(ctx: Any, g_point: Tensor | None, g_after: Tensor | None) -> tuple[Any, ...]:
        check_gradients("ops.descent_update", (g_point, g_after))
        y, gradient, step_size, after, noise = ctx.saved_tensors
        if g_point is None:
            g_point = torch.zeros_like(y)
        g_y, g_gradient, g_step, g_velocity = reference.descent_update_backward(
            y, gradient, step_size, after, noise, ctx.rule, g_point, g_after
        )
        return (
            *(None, None, None, g_y.to(y.dtype), g_gradient.to(gradient.dtype)),
            (g_step if step_size.dim() else g_step.sum()).to(step_size.dtype),
            g_velocity if ctx.moves else None,
            None if noise is None else g_y,
        )


def attach(
    point: Tensor,
    after: Tensor,
    rule: DescentRule,
    y: Tensor,
    gradient: Tensor,
    step_size: Tensor,
    velocity: Tensor | None,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Give a point and a velocity that a kernel has computed the gradient of `descent_update`."""
    moved: tuple[Tensor, Tensor] = _Update.apply(rule, point, after, y, gradient, step_size, velocity, noise)
    return moved


def descent_update(
    y: Tensor,
    gradient: Tensor,
    step_size: Tensor,
    *,
    velocity: Tensor | None = None,
    noise: Tensor | None = None,
    momentum: float = 0.0,
    clip: float | None = None,
    clamp: tuple[float, float] | None = None,
) -> DescentUpdate:
    """Compute the next point of each row in a descent: v' = μ v + clip(g), y' = clamp(y + noise − α v').

    Parameters
    ----------
    y : Tensor
        The points, [rows, ...]; float32, float64, bfloat16 or float16.
    gradient : Tensor
        g, the energy's gradient at y, in y's shape and dtype.
    step_size : Tensor
        α, without dimensions or [rows]; float32, float64 for float64 points.
    velocity : Tensor, optional
        v, in y's shape and the dtype of `step_size`. None: zero.
    noise : Tensor, optional
        The noise, in y's shape and the dtype of `step_size`. None: zero.
    momentum : float
        μ, in [0, 1).
    clip : float, optional
        Upper bound, > 0, on the norm of a row's gradient; a longer one is scaled down to it. None: no bound.
    clamp : pair of float, optional
        Lower and upper bound of every element of y'. None: no bounds.

    Returns
    -------
    DescentUpdate
        ``point``, in y's dtype, and ``velocity``, in float32 or float64. A row has the same bits in any
        batch.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Notes
    -----
    The results are differentiable in all tensors, to any order. An element that the clamp changes has
    gradient zero.
    """
    y = _checks.check_floating("y", y)
    if y.dim() == 0:
        raise ValueError("y: expected a batch dimension first, got a tensor without dimensions")
    wide = compute_dtype(y.dtype)
    gradient = _check_like(y, "gradient", gradient, y.dtype)
    velocity = None if velocity is None else _check_like(y, "velocity", velocity, wide)
    noise = None if noise is None else _check_like(y, "noise", noise, wide)
    step_size = _checks.check_tensor("step_size", step_size)
    if step_size.dtype is not wide:
        raise TypeError(f"step_size: expected {wide}, got {step_size.dtype}")
    if step_size.dim() and step_size.shape != y.shape[:1]:
        raise ValueError(f"step_size: expected shape [] or [{y.shape[0]}], got {list(step_size.shape)}")
    if step_size.device != y.device:
        raise ValueError(f"step_size: expected a tensor on {y.device}, got one on {step_size.device}")
    rule = DescentRule(
        1, 0.0, False, False, False, check_momentum(momentum), check_clip(clip), *check_clamp(clamp)
    )
    return DescentUpdate(*update(y, gradient, step_size, velocity, noise, rule))


def _check_like(y: Tensor, name: str, value: object, dtype: torch.dtype) -> Tensor:
    tensor = _checks.check_rows(name, value, y.shape[0], y.device)
    if tensor.shape != y.shape:
        raise ValueError(f"{name}: expected the shape of y, {list(y.shape)}, got {list(tensor.shape)}")
    if tensor.dtype is not dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    return tensor


def update(
    y: Tensor,
    gradient: Tensor,
    step_size: Tensor,
    velocity: Tensor | None,
    noise: Tensor | None,
    rule: DescentRule,
) -> tuple[Tensor, Tensor]:
    """Run `descent_update` without its checks."""
    tensors = [t for t in (y, gradient, step_size, velocity, noise) if t is not None]
    enter("ops.descent_update", tensors, OP_OF_TENSORS, EVERYTHING)
    if on_reference():
        return reference.descent_update(y, gradient, step_size, velocity, noise, rule)
    if needs_grad(tensors):
        moved: tuple[Tensor, Tensor] = _Update.apply(
            rule, None, None, y, gradient, step_size, velocity, noise
        )
        return moved
    return _descent_update(
        y, gradient, step_size, velocity, noise, rule.momentum, rule.clip, rule.low, rule.high
    )


def clipped(gradient: Tensor, rule: DescentRule) -> Tensor:
    """Return the clipped gradients, [n, ...], in the compute dtype: the velocity without momentum."""
    if rule.clip == 0:
        return gradient.to(compute_dtype(gradient.dtype))
    return reference.clipped(gradient, rule.clip)


# --- checks -------------------------------------------------------------------------------------------------
def check_number(name: str, value: object, low: float, high: float, *, ends: str = "[)") -> float:
    """Require a finite number from `low` to `high`; `ends`, such as "[)", says which end is excluded."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {_checks.describe(value)}")
    number = float(value)
    above = number >= low if ends[0] == "[" else number > low
    below = number <= high if ends[1] == "]" else number < high
    if not (above and below and math.isfinite(number)):
        raise ValueError(f"{name}: expected a number in {ends[0]}{low:g}, {high:g}{ends[1]}, got {value}")
    return number


def check_momentum(value: object) -> float:
    """Require a number in [0, 1)."""
    return check_number("momentum", value, 0, 1)


def check_clip(value: object) -> float:
    """Require None, which becomes 0, or a positive number."""
    return 0.0 if value is None else check_number("clip", value, 0, math.inf, ends="()")


def check_clamp(value: object) -> tuple[float, float]:
    """Require None or two numbers in ascending order; an infinite number is no bound."""
    if value is None:
        return -math.inf, math.inf
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"clamp: expected None or a pair (low, high), got {_checks.describe(value)}")
    for end in value:
        if isinstance(end, bool) or not isinstance(end, (int, float)):
            raise TypeError(f"clamp: expected a pair of numbers, got {_checks.describe(value)}")
    low, high = float(value[0]), float(value[1])
    if not low < high:
        raise ValueError(f"clamp: expected low < high, got {value!r}")
    return low, high
