"""The network energy in the form that its descent kernels take."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaptcomp_ext import _C, reference
from adaptcomp_ext.ops._backend import contiguous, place
from adaptcomp_ext.ops._fused_descent import ClosedForm, EnergyKernels
from adaptcomp_ext.ops._library import Function

KERNELS = EnergyKernels("mlp", rows_at=1, shift_at=5)
# The codes of csrc/mlp_energy/rows.h.
ACTIVATION_CODES = {"softplus": 0, "silu": 1, "tanh": 2, "gelu": 3}


def mlp_closed_form(
    weight1: Tensor,
    context: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    out: Tensor,
    out_bias: Tensor,
    activation: str,
    ridge: float,
) -> ClosedForm:
    """Return the closed form with the tensors of `reference.mlp_energy`."""
    return ClosedForm(
        KERNELS,
        partial(reference.mlp_energy, activation=activation, ridge=ridge),
        (weight1, context, weight2, bias2, out, out_bias),
        sizes=(weight1.shape[0], 0 if weight2 is None else weight2.shape[0]),
        codes=(ACTIVATION_CODES[activation],),
        numbers=(ridge,),
    )


def context_part(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute x W' + b for plain contiguous tensors of one dtype, float32 or float64.

    A row and its gradient have the same bits alone and in any batch. torch's matrix product does not promise
    that: its rounding depends on the number of rows.
    """
    tensors = (x, weight, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        out: Tensor = _Product.apply(False, *tensors)
        return out
    return _product(False, x, weight, bias)


def _product(transposed: bool, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x W' + b, or x W if `transposed`."""
    rows, columns = weight.shape
    inner, columns, strides = (rows, columns, (columns, 1)) if transposed else (columns, rows, (1, columns))
    out = x.new_empty((x.shape[0], columns))
    wide = x.dtype == torch.float64
    _C.mlp_context([x.shape[0], inner, columns, wide, x, weight, *strides, bias, out, *place(x.device)])
    return out


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, transposed: bool, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.transposed = transposed
        ctx.save_for_backward(x, weight)
        return _product(transposed, x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (x, weight), (_, of_x, of_weight, of_bias) = ctx.saved_tensors, ctx.needs_input_grad
        g_x = g_weight = None
        if of_x:
            product = _Product.apply if torch.is_grad_enabled() else _product
            g_x = product(not ctx.transposed, contiguous("gradient", g), weight, None)
        if of_weight:  # a sum over rows need not be batch-invariant
            g_weight = x.mT @ g if ctx.transposed else g.mT @ x
        return None, g_x, g_weight, g.sum(dim=0) if of_bias else None
