"""A linear layer whose rows do not depend on each other, down to the last bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaptcomp_ext import _C, reference
from adaptcomp_ext.ops import _checks
from adaptcomp_ext.ops._backend import compute_dtype, contiguous, on_reference, place
from adaptcomp_ext.ops._library import Function, register
from adaptcomp_ext.ops._transforms import EVERYTHING, OP_OF_TENSORS, check_gradients, enter, without_address


def _kernel(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Compute x W' + b, or x W + b if `transposed`, for contiguous tensors of one dtype."""
    rows, columns = weight.shape
    inner, columns, strides = (rows, columns, (columns, 1)) if transposed else (columns, rows, (1, columns))
    out = x.new_empty((x.shape[0], columns))
    wide = x.dtype == torch.float64
    _C.linear([x.shape[0], inner, columns, wide, x, weight, *strides, bias, out, *place(x.device)])
    return out


_linear = register(
    "linear(Tensor x, Tensor weight, Tensor? bias, bool transposed) -> Tensor",
    _kernel,
    lambda x, weight, bias, transposed: x.new_empty((x.shape[0], weight.shape[1 if transposed else 0])),
    tensor_at=0,
)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        ctx.transposed = transposed
        ctx.save_for_backward(x, weight)
        return (_linear if without_address() else _kernel)(x, weight, bias, transposed)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        check_gradients("ops.linear", (g,))
        (x, weight), (of_x, of_weight, of_bias, _) = ctx.saved_tensors, ctx.needs_input_grad
        g_x = g_weight = None
        if of_x:
            dense = g.contiguous() if torch.compiler.is_compiling() else contiguous("gradient", g)
            g_x = linear_unchecked(dense, weight, None, not ctx.transposed)
        if of_weight:  # a sum over rows need not be batch-invariant
            g_weight = x.mT @ g if ctx.transposed else g.mT @ x
        return g_x, g_weight, g.sum(dim=0) if of_bias else None, None


def linear_unchecked(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool = False) -> Tensor:
    """Compute x W' + b, or x W + b if `transposed`, for plain contiguous matrices, float32 or float64."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        out: Tensor = _Linear.apply(x, weight, bias, transposed)
        return out
    result: Tensor = _linear(x, weight, bias, transposed)
    return result


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer, x W' + b, in which a row has the same bits alone and in any batch.

    `torch.nn.functional.linear` rounds a row by the number of rows beside it, so that a halting step built on
    it may decide otherwise for a row in another batch. Here the terms of an element are added in one order,
    whatever the batch and the number of threads. Another instruction set, or CUDA, may round otherwise.

    Parameters
    ----------
    x : Tensor
        [..., in], with in ≥ 1; float32, float64, bfloat16 or float16. All dimensions but the last make up the
        rows.
    weight : Tensor
        [out, in], with out ≥ 1, of the dtype and device of `x`.
    bias : Tensor, optional
        [out], of the dtype and device of `x`.

    Returns
    -------
    Tensor
        [..., out], contiguous, of the dtype of `x`. Half precision is computed in float32 and rounded once.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Notes
    -----
    The result is differentiable in all three, to any order. A row's gradient in `x` has the same bits in any
    batch, too. Those of `weight` and `bias` are sums over rows, which are torch's and carry no such promise.
    Autocast does not act on it.

    It costs more than `torch.nn.functional.linear` where that is bound by arithmetic; on CUDA one thread
    computes each element, which is several times slower than cuBLAS. A NaN or an infinity in a row stays in
    that row.

    Examples
    --------
    >>> class Step(nn.Linear):
    ...     def forward(self, state):
    ...         return torch.tanh(ac.ops.linear(state, self.weight, self.bias))
    """
    x = _checks.check_floating("x", x)
    weight = _checks.check_floating("weight", weight)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(
            f"weight: expected shape [out, in] with out, in >= 1, got {_checks.describe(weight)}"
        )
    columns, inner = weight.shape
    if x.dim() == 0 or x.shape[-1] != inner:
        raise ValueError(f"x: expected shape [..., {inner}], as weight has it, got {_checks.describe(x)}")
    others = {"weight": weight}
    if bias is not None:
        bias = others["bias"] = _checks.check_floating("bias", bias)
        if bias.shape != (columns,):
            raise ValueError(
                f"bias: expected shape [{columns}], as weight has it, got {_checks.describe(bias)}"
            )
    for name, tensor in others.items():
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected {x.dtype}, as x has it, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected a tensor on {x.device}, as x is, got one on {tensor.device}")
    enter("ops.linear", (x, weight, bias), OP_OF_TENSORS, EVERYTHING)
    if on_reference():
        return reference.linear(x, weight, bias)
    wide = compute_dtype(x.dtype)
    rows, weight = x.reshape(-1, inner).to(wide).contiguous(), weight.to(wide).contiguous()
    if bias is not None:
        bias = bias.to(wide).contiguous()
    return linear_unchecked(rows, weight, bias).to(x.dtype).view(*x.shape[:-1], columns)
