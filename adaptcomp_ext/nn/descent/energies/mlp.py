"""The energy of a small network."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptcomp_ext import _C
from adaptcomp_ext.nn.descent.energies.closed_form import (
    ClosedFormEnergy,
    check_given,
    check_number_of_contexts,
    check_own,
    check_points,
    own_tensor,
)
from adaptcomp_ext.ops._checks import check_choice, check_int, describe
from adaptcomp_ext.ops._fused_descent import ClosedForm
from adaptcomp_ext.ops.descent import check_number
from adaptcomp_ext.ops.linear import linear_unchecked
from adaptcomp_ext.ops.mlp_energy import mlp_closed_form
from adaptcomp_ext.reference.mlp_energy import ACTIVATIONS


class MLPEnergy(ClosedFormEnergy):
    """The energy E(y, x) that a network with one or two hidden layers computes, to be descended in y.

    ::

        a = W_y y + W_x x + b₁          E = w·act(a) + b_o + ρ/2·‖y‖²
        with a second layer             E = w·act(W₂ act(a) + b₂) + b_o + ρ/2·‖y‖²

    `EnergyDescent` runs all steps of a row in one kernel call and their gradient in another, and computes the
    context's part of the first layer once for each row.

    Parameters
    ----------
    dim_y : int
        Number of elements of y.
    dim_context : int
        Number of elements of x. With 0 the energy has no context and is called with y alone.
    hidden : int or pair of int
        Widths of the hidden layers.
    activation : {"silu", "softplus", "tanh", "gelu"}
        The activation of the hidden layers. "gelu" is the exact one, with the error function.
    ridge : float
        ρ ≥ 0. With ρ = 0 the slope of a "tanh" network vanishes far from the origin, and the energy of the
        other networks may have no lower bound. ρ > 0 gives every row a minimum, because all four activations
        grow at most linearly.
    device, dtype
        Device and dtype of the parameters.

    Notes
    -----
    ``energy(y, x) -> [n]`` for y [n, dim_y], x [n, dim_context] is differentiable to any order in both and in
    the parameters: ``weight_y`` [hidden₁, dim_y], ``weight_x`` [hidden₁, dim_context], ``bias1`` [hidden₁],
    ``weight2`` [hidden₂, hidden₁], ``bias2`` [hidden₂], ``out`` w, ``out_bias`` [1]. Parameters of a layer
    that the network does not have are None. The initial values are distributed like those of
    `torch.nn.Linear`.

    In a descent a row has the same bits alone and in any batch, the context's part included, and so has its
    gradient of ``result.y``. As a plain function, and for the gradient of ``result.energy``, the network is
    computed by torch, whose rounding depends on the number of rows.

    A descent computes with half-precision parameters and points in float32 and rounds once, at the end.

    Examples
    --------
    >>> energy = ac.MLPEnergy(dim_y=32, dim_context=128, hidden=128, activation="softplus", ridge=1.0)
    >>> result = ac.EnergyDescent(energy, step_size=0.1)(torch.zeros(256, 32), features)
    """

    def __init__(
        self,
        dim_y: int,
        dim_context: int,
        hidden: int | tuple[int, int],
        activation: str = "silu",
        ridge: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim_y = check_int("dim_y", dim_y, 1)
        self.dim_context = check_int("dim_context", dim_context, 0)
        widths = [hidden] if isinstance(hidden, int) else hidden
        if not isinstance(widths, (tuple, list)) or len(widths) not in (1, 2):
            raise TypeError(f"hidden: expected an int or a pair of ints, got {describe(hidden)}")
        self.hidden = tuple(check_int("hidden", width, 1) for width in widths)
        check_choice("activation", activation, tuple(ACTIVATIONS))
        self.activation = activation
        self.ridge = check_number("ridge", ridge, 0, math.inf)
        first, last = self.hidden[0], self.hidden[-1]

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight_y = parameter(first, dim_y)
        self.weight_x = parameter(first, dim_context) if dim_context else None
        self.bias1 = parameter(first)
        self.weight2 = parameter(last, first) if len(self.hidden) == 2 else None
        self.bias2 = parameter(last) if len(self.hidden) == 2 else None
        self.out = parameter(last)
        self.out_bias = parameter(1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every layer's weights and bias uniformly from ±1/√(its inputs), as `torch.nn.Linear` does."""
        layers = [
            (self.dim_y + self.dim_context, (self.weight_y, self.weight_x, self.bias1)),
            (self.hidden[0], (self.weight2, self.bias2)),
            (self.hidden[-1], (self.out, self.out_bias)),
        ]
        for inputs, parameters in layers:
            for parameter in parameters:
                if parameter is not None:
                    nn.init.uniform_(parameter, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))

    def closed_form(
        self, y: Tensor, *context: Tensor, dtype: torch.dtype, kernels: bool = False
    ) -> ClosedForm:
        """Return the energy as its kernels take it, with W_x x + b₁ computed."""
        if self.activation not in ACTIVATIONS:
            check_choice("activation", self.activation, tuple(ACTIVATIONS))
        ridge = check_number("ridge", self.ridge, 0, math.inf) if kernels else self.ridge
        own = self._ordinary(y, context) if kernels and y.dtype == dtype else None
        weight_y, first_part, out, out_bias, x, weight_x, weight2, bias2 = own or self._checked(
            y, context, dtype, kernels
        )
        if x is not None:
            first_part = (linear_unchecked if kernels else F.linear)(x, weight_x, first_part)
        return mlp_closed_form(weight_y, first_part, weight2, bias2, out, out_bias, self.activation, ridge)

    def _ordinary(self, y: Tensor, context: tuple[Tensor, ...]) -> list[Any] | None:
        """Return the tensors of `closed_form` if one look shows that they need no check, else None."""
        of, first, last = self._parameters.get, self.hidden[0], self.hidden[-1]
        tensors: list[Any] = [of("weight_y"), of("bias1"), of("out"), of("out_bias")]
        shapes: list[tuple[int, ...]] = [(first, self.dim_y), (first,), (last,), (1,)]
        rest: list[Any] = [None, None, None, None]
        rows = y.shape[0]
        if self.dim_context and len(context) == 1:
            rest[:2] = context[0], of("weight_x")
            shapes += [(rows, self.dim_context), (first, self.dim_context)]
        elif self.dim_context or context:
            return None
        if len(self.hidden) == 2:
            rest[2:] = of("weight2"), of("bias2")
            shapes += [(last, first), (last,)]
        tensors += rest
        given = [t for t in tensors if t is not None]
        given.append(y)
        shapes.append((rows, self.dim_y))
        return tensors if len(given) == len(shapes) and _C.are_ordinary(given, shapes) else None

    def _checked(
        self, y: Tensor, context: tuple[Tensor, ...], dtype: torch.dtype, kernels: bool
    ) -> tuple[Any, ...]:
        """Return the tensors of `closed_form` in `dtype`: weight_y, bias1, out, out_bias, x, weight_x, ..."""
        weight_y = own_tensor(self, "weight_y")
        check_points(y, self.dim_y, "weight_y", weight_y)
        check_number_of_contexts(context, 1 if self.dim_context else 0)
        first, last = self.hidden[0], self.hidden[-1]

        def own(name: str, *shape: int) -> Tensor:
            return check_own(name, own_tensor(self, name), shape, y, dtype, kernels)

        weight_y = check_own("weight_y", weight_y, (first, self.dim_y), y, dtype, kernels)
        bias1 = own("bias1", first)
        x = weight_x = weight2 = bias2 = None
        if self.dim_context:
            x = check_given("context", context[0], (y.shape[0], self.dim_context), y, dtype, kernels)
            weight_x = own("weight_x", first, self.dim_context)
        if len(self.hidden) == 2:
            weight2, bias2 = own("weight2", last, first), own("bias2", last)
        return weight_y, bias1, own("out", last), own("out_bias", 1), x, weight_x, weight2, bias2

    def extra_repr(self) -> str:
        """Show the sizes."""
        hidden = self.hidden[0] if len(self.hidden) == 1 else self.hidden
        return (
            f"dim_y={self.dim_y}, dim_context={self.dim_context}, hidden={hidden}, "
            f"activation={self.activation!r}, ridge={self.ridge:g}"
        )
