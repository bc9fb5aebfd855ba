"""One halting step of PonderNet on a block of rows (Banino et al. 2021)."""

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
class PonderNetStep(NamedTuple):
    """The result of one step of PonderNet, in float32 or float64 like `log_survival`.

    Attributes
    ----------
    weight : Tensor
        [rows]: pₙ, the probability of halting at this step.
    log_survival : Tensor
        [rows], in nats: log Qₙ, the log probability of going on after this step.
    cost : Tensor
        [rows], in nats: this step's term of KL(p ‖ prior).
    halt : Tensor
        bool [rows]: whether it is the row's last step.
    """

    weight: Tensor
    log_survival: Tensor
    cost: Tensor
    halt: Tensor


def _kernel(
    logits: Tensor,
    log_survival: Tensor,
    step: int,
    min_steps: int,
    max_steps: int,
    log_prior: float,
    log_epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # empty_like of a tensor with one dimension is contiguous.
    out = torch.empty_like(log_survival), torch.empty_like(log_survival), torch.empty_like(log_survival)
    halt = torch.empty_like(log_survival, dtype=torch.bool)
    _C.pondernet_step(
        [
            *(logits.shape[0], step, min_steps, max_steps, log_survival.dtype == torch.float64),
            *(logits, dtype_code(logits.dtype), log_survival, *out, halt, *place(logits.device)),
        ],
        log_prior,
        log_epsilon,
    )
    return *out, halt


def _backward_kernel(
    logits: Tensor,
    log_survival: Tensor,
    g_weight: Tensor | None,
    g_log_survival: Tensor | None,
    g_cost: Tensor | None,
    step: int,
    min_steps: int,
    max_steps: int,
    log_prior: float,
    log_epsilon: float,
) -> tuple[Tensor, Tensor]:
    g_logits, g_before = torch.empty_like(log_survival), torch.empty_like(log_survival)
    _C.pondernet_step_backward(
        [
            *(logits.shape[0], step, min_steps, max_steps, log_survival.dtype == torch.float64),
            *(
                logits,
                dtype_code(logits.dtype),
                log_survival,
                g_weight,
                g_log_survival,
                g_cost,
                g_logits,
                g_before,
            ),
            *place(logits.device),
        ],
        log_prior,
        log_epsilon,
    )
    return g_logits, g_before


_STATIC = "int step, int min_steps, int max_steps, float log_prior, float log_epsilon"
_pondernet_step = register(
    f"pondernet_step(Tensor logits, Tensor log_survival, {_STATIC}) -> (Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    lambda logits, log_survival, *static: (
        *(torch.empty_like(log_survival) for _ in range(3)),
        torch.empty_like(log_survival, dtype=torch.bool),
    ),
    tensor_at=0,
)
_pondernet_step_backward = register(
    "pondernet_step_backward(Tensor logits, Tensor log_survival, Tensor? g_weight, Tensor? g_log_survival, "
    f"Tensor? g_cost, {_STATIC}) -> (Tensor, Tensor)",
    _backward_kernel,
    lambda logits, log_survival, *rest: (torch.empty_like(log_survival), torch.empty_like(log_survival)),
)


class _PonderNetStep(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_survival: Tensor, *static: Any) -> tuple[Tensor, ...]:
        ctx.save_for_backward(logits, log_survival)
        ctx.static = static
        ctx.set_materialize_grads(False)
        out = (_pondernet_step if without_address() else _kernel)(logits, log_survival, *static)
        ctx.mark_non_differentiable(out[3])
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, g_weight: Any, g_log_survival: Any, g_cost: Any, _: Any) -> tuple[Any, ...]:
        logits, log_survival = ctx.saved_tensors
        check_gradients("ops.pondernet_step", (g_weight, g_log_survival, g_cost))
        # With create_graph=True the gradient has to be differentiable, as the reference's is.
        if torch.is_grad_enabled():
            backward = reference.pondernet_step_backward
        else:
            backward = _pondernet_step_backward if without_address() else _backward_kernel
        g_logits, g_before = backward(logits, log_survival, g_weight, g_log_survival, g_cost, *ctx.static)
        return g_logits.to(logits.dtype), g_before, *[None] * len(ctx.static)


def pondernet_step(
    logits: Tensor,
    log_survival: Tensor,
    *,
    step: int,
    min_steps: int = 1,
    max_steps: int,
    log_prior: float,
    log_epsilon: float = float("-inf"),
) -> PonderNetStep:
    """Add one step to every row's halting distribution, in log space.

    With the hazard λ = sigmoid(logit) and the survival Q, the weight is pₙ = λₙ Q_{n−1}. At the last step λ
    is taken as 1, so that the weights of a row sum to 1. The cost is this step's term of KL(p ‖ prior),
    pₙ (log pₙ − log priorₙ).

    Parameters
    ----------
    logits : Tensor
        Hazard logits, [rows]; float32, float64, bfloat16 or float16. −∞ is a hazard of 0, without a gradient.
    log_survival : Tensor
        log Q_{n−1}, [rows], zero before the first step, on the device of `logits`; float32 or float64, the
        dtype of the results.
    step, min_steps, max_steps : int
        n, counted from 1, and its bounds. Before `min_steps` the hazard is taken as 0; at `max_steps` as 1.
    log_prior : float
        Logarithm of the prior probability of this step, at most 0.
    log_epsilon : float
        Truncation: this step is a row's last one if log Qₙ falls below it. Default −∞: no truncation.

    Returns
    -------
    PonderNetStep
        ``weight``, ``log_survival`` (log Qₙ), ``cost``, and ``halt``: bool, true at a row's last step.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Notes
    -----
    The results are differentiable in `logits` and `log_survival`, to any order. See Banino, Balaguer,
    Blundell 2021, "PonderNet", equations 3 to 6.
    """
    logits = _checks.check_row_scalars("logits", logits)
    log_survival = _checks.check_row_scalars("log_survival", log_survival, logits.shape[0])
    if log_survival.dtype is not torch.float32 and log_survival.dtype is not torch.float64:
        raise TypeError(f"log_survival: expected float32 or float64, got {log_survival.dtype}")
    if log_survival.device != logits.device:
        raise ValueError(
            f"log_survival: expected a tensor on {logits.device}, got one on {log_survival.device}"
        )
    _checks.check_steps(step, min_steps, max_steps)
    logs = (
        _checks.check_log_probability("log_prior", log_prior),
        _checks.check_log_probability("log_epsilon", log_epsilon),
    )
    return PonderNetStep(*pondernet_step_unchecked(logits, log_survival, step, min_steps, max_steps, *logs))


def pondernet_step_unchecked(logits: Tensor, log_survival: Tensor, *static: Any) -> tuple[Tensor, ...]:
    """Run `pondernet_step` without its checks, for the halting loop."""
    differentiable = torch.is_grad_enabled() and (logits.requires_grad or log_survival.requires_grad)
    enter("ops.pondernet_step", (logits, log_survival), OP_OF_TENSORS, EVERYTHING)
    if on_reference():
        return reference.pondernet_step(logits, log_survival, *static)
    if differentiable:
        result: tuple[Tensor, ...] = _PonderNetStep.apply(logits, log_survival, *static)
        return result
    stepped: tuple[Tensor, ...] = _pondernet_step(logits, log_survival, *static)
    return stepped
