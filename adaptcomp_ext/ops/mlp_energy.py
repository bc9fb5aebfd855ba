"""The network energy as its whole-descent kernels take it."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from adaptcomp_ext import reference
from adaptcomp_ext.ops._whole_descent import ClosedForm

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
    """The tensors of `reference.mlp_energy`."""
    function = partial(reference.mlp_energy, activation=activation, ridge=ridge)

    sizes = (weight1.shape[0], 0 if weight2 is None else weight2.shape[0], ACTIVATION_CODES[activation])
    return ClosedForm("mlp", (weight1, context, weight2, bias2, out, out_bias), sizes, (ridge,), function, rows_at=1)
