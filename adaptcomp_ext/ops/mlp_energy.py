"""The network energy in the form that its descent kernels take."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from adaptcomp_ext import reference
from adaptcomp_ext.ops._fused_descent import ClosedForm, EnergyKernels

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
