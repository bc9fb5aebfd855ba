"""One step of sampled halting on a block of rows, as an action with a log-probability (REINFORCE)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptcomp_ext import _C, reference
from adaptcomp_ext.ops import _checks
from adaptcomp_ext.ops._backend import compute_dtype, dtype_code, on_reference, place
from adaptcomp_ext.ops._fields import documented
from adaptcomp_ext.ops._library import Function, register
from adaptcomp_ext.ops._transforms import EVERYTHING, OP_OF_TENSORS, check_gradients, enter, without_address


@documented
class BernoulliStep(NamedTuple):
    """The result of one step of sampled halting.

    Attributes
    ----------
    log_prob : Tensor
        [rows], in nats: the log-probability of the row's action; float32, or float64 for float64 logits.
        Differentiable.
    halt : Tensor
        bool [rows]: whether the action is to halt.
    """

    log_prob: Tensor
    halt: Tensor


def _split(number: int | Tensor | None) -> tuple[Tensor | None, int]:
    """Return a key as the kernel takes it: one number for each row, or one for all."""
    return (None, number or 0) if isinstance(number, int) or number is None else (number, 0)


def _kernel(
    logits: Tensor, sample: Tensor | None, seeds: Tensor | None, steps: Tensor | None, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    log_prob = logits.new_empty((rows,), dtype=compute_dtype(logits.dtype))
    halt = logits.new_empty((rows,), dtype=torch.bool)
    _C.bernoulli_step(
        [
            *(rows, sample, seeds, steps, seed, step, log_prob.dtype == torch.float64),
            *(logits, dtype_code(logits.dtype), log_prob, halt, *place(logits.device)),
        ]
    )
    return log_prob, halt


def _backward_kernel(logits: Tensor, halt: Tensor, g_log_prob: Tensor) -> Tensor:
    g_logits = torch.empty_like(g_log_prob, memory_format=torch.contiguous_format)
    _C.bernoulli_step_backward(
        [
            *(logits.shape[0], g_log_prob.dtype == torch.float64, logits, dtype_code(logits.dtype)),
            *(halt, g_log_prob, g_logits, *place(logits.device)),
        ]
    )
    return g_logits


def _draws_kernel(sample: Tensor, seeds: Tensor | None, steps: Tensor | None, seed: int, step: int) -> Tensor:
    out = sample.new_empty((sample.shape[0],), dtype=torch.float32)
    _C.uniform_draws([sample.shape[0], sample, seeds, steps, seed, step, out, *place(sample.device)])
    return out


_bernoulli_step = register(
    "bernoulli_step(Tensor logits, Tensor? sample, Tensor? seeds, Tensor? steps, int seed, int step) "
    "-> (Tensor, Tensor)",
    _kernel,
    lambda logits, *rest: (
        logits.new_empty((logits.shape[0],), dtype=compute_dtype(logits.dtype)),
        logits.new_empty((logits.shape[0],), dtype=torch.bool),
    ),
    tensor_at=0,
)
_bernoulli_step_backward = register(
    "bernoulli_step_backward(Tensor logits, Tensor halt, Tensor g_log_prob) -> Tensor",
    _backward_kernel,
    lambda logits, halt, g_log_prob: torch.empty_like(g_log_prob, memory_format=torch.contiguous_format),
)
_uniform_draws = register(
    "uniform_draws(Tensor sample, Tensor? seeds, Tensor? steps, int seed, int step) -> Tensor",
    _draws_kernel,
    lambda sample, *rest: sample.new_empty((sample.shape[0],), dtype=torch.float32),
    tensor_at=0,
)


class _BernoulliStep(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, *keys: Any) -> tuple[Tensor, ...]:
        log_prob, halt = (_bernoulli_step if without_address() else _kernel)(logits, *keys)
        ctx.save_for_backward(logits, halt)
        ctx.mark_non_differentiable(halt)
        return log_prob, halt

    @staticmethod
    def backward(ctx: Any, g_log_prob: Any, _: Any) -> tuple[Any, ...]:
        logits, halt = ctx.saved_tensors
        check_gradients("ops.bernoulli_step", (g_log_prob,))
        # With create_graph=True the gradient has to be differentiable, as the reference's is.
        if torch.is_grad_enabled():
            backward = reference.bernoulli_step_backward
        else:
            backward = _bernoulli_step_backward if without_address() else _backward_kernel
        return backward(logits, halt, g_log_prob).to(logits.dtype), None, None, None, None, None


def _check_key(name: str, value: Any, rows: int, device: torch.device, least: int) -> Any:
    if not isinstance(value, Tensor):
        return _checks.check_int(name, value, least)
    tensor = _checks.check_tensor(name, value)
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {tensor.dtype}")
    if tensor.shape != (rows,):
        raise ValueError(f"{name}: expected shape [{rows}], got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")
    return tensor


def bernoulli_step(
    logits: Tensor, *, seed: int | Tensor, step: int | Tensor, sample: Tensor | None = None
) -> BernoulliStep:
    """Draw for each row whether it halts, with the log-probability of this action.

    The probability of halting is λ = sigmoid(logit): a row halts if its draw, uniform in [0, 1), is less. The
    draw is a function of seed, sample and step alone (Philox 4x32-10): it does not depend on other rows.

    Parameters
    ----------
    logits : Tensor
        [rows]; float32, float64, bfloat16 or float16. −∞ is a probability of 0.
    seed, step : int or Tensor
        The seed, at least 0, and the number of the step, at least 1: one for all rows, or int64 [rows] on the
        device of `logits`. The values of a tensor are not checked.
    sample : Tensor, optional
        int64 [rows]: the number of each row's sample. Default: its place, counted from 0.

    Returns
    -------
    BernoulliStep
        ``log_prob``: log λ where the row halts, log(1 − λ) where it goes on; and ``halt``, bool.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Notes
    -----
    ``log_prob`` is differentiable in `logits`, to any order. A logit that is NaN or +∞ gets no gradient.
    """
    logits = _checks.check_row_scalars("logits", logits)
    rows, device = logits.shape[0], logits.device
    seed = _check_key("seed", seed, rows, device, 0)
    step = _check_key("step", step, rows, device, 1)
    if sample is not None:
        if not isinstance(sample, Tensor):
            raise TypeError(f"sample: expected an int64 Tensor or None, got {_checks.describe(sample)}")
        sample = _check_key("sample", sample, rows, device, 0)
    return BernoulliStep(*bernoulli_step_unchecked(logits, sample, seed, step))


def bernoulli_step_unchecked(
    logits: Tensor, sample: Tensor | None, seed: int | Tensor, step: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Run `bernoulli_step` without its checks, for the halting loop."""
    enter("ops.bernoulli_step", (logits,), OP_OF_TENSORS, EVERYTHING)
    if on_reference():
        return reference.bernoulli_step(logits, sample, seed, step)
    (seeds, seed), (steps, step) = _split(seed), _split(step)
    run = _BernoulliStep.apply if torch.is_grad_enabled() and logits.requires_grad else _bernoulli_step
    stepped: tuple[Tensor, Tensor] = run(logits, sample, seeds, steps, seed, step)
    return stepped


def uniform_draws(seed: int | Tensor, sample: Tensor, step: int | Tensor) -> Tensor:
    """Return `reference.uniform` of samples [rows], for the policies that sample; nothing is checked."""
    if on_reference():
        return reference.uniform(seed, sample, step)
    (seeds, seed), (steps, step) = _split(seed), _split(step)
    draws: Tensor = _uniform_draws(sample, seeds, steps, seed, step)
    return draws
