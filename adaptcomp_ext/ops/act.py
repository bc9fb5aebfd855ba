"""One halting step of ACT on a block of rows (Graves 2016)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptcomp_ext import _C, reference
from adaptcomp_ext.ops import _checks
from adaptcomp_ext.ops._backend import dtype_code, on_reference, place
from adaptcomp_ext.ops._fields import documented
from adaptcomp_ext.ops._library import Function, register
from adaptcomp_ext.ops._transforms import EVERYTHING, OP_OF_TENSORS, check_gradients, enter, without_address


@documented
class ActStep(NamedTuple):
    """The result of one step of ACT, in float32 or float64 like `accumulated`.

    Attributes
    ----------
    weight : Tensor
        [rows]: hₙ, or the remainder R at the last step.
    accumulated : Tensor
        [rows]: h₁ + … + hₙ.
    cost : Tensor
        [rows], in steps: N + R at the last step, zero before.
    halt : Tensor
        bool [rows]: whether the threshold is reached.
    """

    weight: Tensor
    accumulated: Tensor
    cost: Tensor
    halt: Tensor


def _kernel(
    logits: Tensor, accumulated: Tensor, step: int, min_steps: int, max_steps: int, threshold: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # empty_like of a tensor with one dimension is contiguous.
    out = torch.empty_like(accumulated), torch.empty_like(accumulated), torch.empty_like(accumulated)
    halt = torch.empty_like(accumulated, dtype=torch.bool)
    _C.act_step(
        [
            *(logits.shape[0], step, min_steps, max_steps, accumulated.dtype == torch.float64),
            *(logits, dtype_code(logits.dtype), accumulated, *out, halt, *place(logits.device)),
        ],
        threshold,
    )
    return *out, halt


def _backward_kernel(
    logits: Tensor,
    accumulated: Tensor,
    g_weight: Tensor | None,
    g_accumulated: Tensor | None,
    g_cost: Tensor | None,
    step: int,
    min_steps: int,
    max_steps: int,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    g_logits, g_before = torch.empty_like(accumulated), torch.empty_like(accumulated)
    _C.act_step_backward(
        [
            *(logits.shape[0], step, min_steps, max_steps, accumulated.dtype == torch.float64),
            *(
                logits,
                dtype_code(logits.dtype),
                accumulated,
                g_weight,
                g_accumulated,
                g_cost,
                g_logits,
                g_before,
            ),
            *place(logits.device),
        ],
        threshold,
    )
    return g_logits, g_before


_STATIC = "int step, int min_steps, int max_steps, float threshold"
_act_step = register(
    f"act_step(Tensor logits, Tensor accumulated, {_STATIC}) -> (Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    lambda logits, accumulated, *static: (
        *(torch.empty_like(accumulated) for _ in range(3)),
        torch.empty_like(accumulated, dtype=torch.bool),
    ),
    tensor_at=0,
)
_act_step_backward = register(
    "act_step_backward(Tensor logits, Tensor accumulated, Tensor? g_weight, Tensor? g_accumulated, "
    f"Tensor? g_cost, {_STATIC}) -> (Tensor, Tensor)",
    _backward_kernel,
    lambda logits, accumulated, *rest: (torch.empty_like(accumulated), torch.empty_like(accumulated)),
)


class _ActStep(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, accumulated: Tensor, *static: Any) -> tuple[Tensor, ...]:
        ctx.save_for_backward(logits, accumulated)
        ctx.static = static
        ctx.set_materialize_grads(False)
        out = (_act_step if without_address() else _kernel)(logits, accumulated, *static)
        ctx.mark_non_differentiable(out[3])
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, g_weight: Any, g_accumulated: Any, g_cost: Any, _: Any) -> tuple[Any, ...]:
        logits, accumulated = ctx.saved_tensors
        check_gradients("ops.act_step", (g_weight, g_accumulated, g_cost))
        # With create_graph=True the gradient has to be differentiable, as the reference's is.
        if torch.is_grad_enabled():
            backward = reference.act_step_backward
        else:
            backward = _act_step_backward if without_address() else _backward_kernel
        g_logits, g_before = backward(logits, accumulated, g_weight, g_accumulated, g_cost, *ctx.static)
        return g_logits.to(logits.dtype), g_before, *[None] * len(ctx.static)


def act_step(
    logits: Tensor,
    accumulated: Tensor,
    *,
    step: int,
    min_steps: int = 1,
    max_steps: int,
    threshold: float = 0.99,
) -> ActStep:
    """Decide, for every row of a block, whether ACT halts it at this step, and with which weight.

    Let h = sigmoid(logit), N be the first step at which h₁ + … + hₙ ≥ `threshold` (or `max_steps`), and the
    remainder be R = 1 − (h₁ + … + h_{N−1}). The weight is hₙ before N and R at N. The ponder cost is N + R at
    N and zero before. Before `min_steps` the probability of halting is zero.

    Parameters
    ----------
    logits : Tensor
        Halting logits, [rows]; float32, float64, bfloat16 or float16. −∞ is a halting probability of 0,
        without a gradient.
    accumulated : Tensor
        h₁ + … + h_{n−1}, [rows], on the device of `logits`; float32 or float64, the dtype of the results.
    step : int
        n, counted from 1.
    min_steps, max_steps : int
        Lower and upper bound of N.
    threshold : float
        1 − ε, in (0, 1].

    Returns
    -------
    ActStep
        ``weight``, ``accumulated`` (this step included), ``cost`` (zero before N), and ``halt``: bool,
        whether the threshold is reached. A row that only `max_steps` ends has its remainder as weight and
        ``halt`` false.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Notes
    -----
    The results are differentiable in `logits` and `accumulated`, to any order. N counts as a constant, so the
    gradient in h_N is zero. See Graves 2016, "Adaptive Computation Time for Recurrent Neural Networks",
    equations 5 to 14.
    """
    logits = _checks.check_row_scalars("logits", logits)
    accumulated = _checks.check_row_scalars("accumulated", accumulated, logits.shape[0])
    if accumulated.dtype is not torch.float32 and accumulated.dtype is not torch.float64:
        raise TypeError(f"accumulated: expected float32 or float64, got {accumulated.dtype}")
    if accumulated.device != logits.device:
        raise ValueError(
            f"accumulated: expected a tensor on {logits.device}, got one on {accumulated.device}"
        )
    _checks.check_steps(step, min_steps, max_steps)
    static = (step, min_steps, max_steps, _checks.check_fraction("threshold", threshold))
    return ActStep(*act_step_unchecked(logits, accumulated, *static))


def act_step_unchecked(logits: Tensor, accumulated: Tensor, *static: Any) -> tuple[Tensor, ...]:
    """Run `act_step` without its checks, for the halting loop."""
    differentiable = torch.is_grad_enabled() and (logits.requires_grad or accumulated.requires_grad)
    enter("ops.act_step", (logits, accumulated), OP_OF_TENSORS, EVERYTHING)
    if on_reference():
        return reference.act_step(logits, accumulated, *static)
    if differentiable:
        result: tuple[Tensor, ...] = _ActStep.apply(logits, accumulated, *static)
        return result
    stepped: tuple[Tensor, ...] = _act_step(logits, accumulated, *static)
    return stepped
