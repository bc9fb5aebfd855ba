"""Recurrent cells as steps: the state comes first, and what comes back is the next state."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptcomp_ext.ops._checks import check_choice, check_int, describe
from adaptcomp_ext.reference.mlp_energy import ACTIVATIONS

__all__ = ["GRU", "LSTM", "MLP"]

_Cell = TypeVar("_Cell", bound=nn.RNNCellBase)


def _check_rows(name: str, value: Any, width: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {describe(value)}")
    if value.dim() != 2 or value.shape[1] != width:
        raise ValueError(f"{name}: expected a tensor of shape [n, {width}], got {describe(value)}")


def _check_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {describe(value)}")
    return value


def _taken_over(own: type[_Cell], cell: Any, theirs: type[nn.RNNCellBase]) -> _Cell:
    """Return a cell of the class `own` that holds the parameters of `cell`."""
    if not isinstance(cell, theirs) or type(cell).forward not in (theirs.forward, own.forward):
        raise TypeError(f"cell: expected a torch.nn.{theirs.__name__}, got {describe(cell)}")
    names = {"weight_ih", "weight_hh"} | ({"bias_ih", "bias_hh"} if cell.bias else set())
    found = {name for name, parameter in cell._parameters.items() if parameter is not None}
    if found != names:
        raise ValueError(
            f"cell: expected one whose parameters are {', '.join(sorted(names))}, got "
            f"{', '.join(sorted(found)) or 'none of them'}; remove parametrizations and pruning first"
        )
    made = own(cell.input_size, cell.hidden_size, bias=cell.bias, device="meta")  # type: ignore[call-arg]
    for name in names:
        setattr(made, name, getattr(cell, name))
    made.train(cell.training)
    return made


class GRU(nn.GRUCell):
    """A gated recurrent unit (Cho et al. 2014) as a step: ``gru(state, x) -> state``.

    ::

        r = σ(W_ir x + b_ir + W_hr h + b_hr)        z = σ(W_iz x + b_iz + W_hz h + b_hz)
        n = tanh(W_in x + b_in + r (W_hn h + b_hn))        h' = (1 − z) n + z h

    It is `torch.nn.GRUCell` with its arguments the other way round: parameters have the same names, shapes
    and initial values, and a ``state_dict`` of the one loads into the other.

    Parameters
    ----------
    input_size : int
        Width of x.
    hidden_size : int
        Width of the state.
    bias : bool
        Whether the biases b_i and b_h exist.
    device, dtype
        Device and dtype of the parameters.

    Notes
    -----
    ``gru(state, x)`` with state [n, hidden_size] and x [n, input_size] of the parameters' dtype returns
    [n, hidden_size]; differentiable in everything, to any order that torch's cell is. A wrong shape raises
    ValueError, what is no tensor TypeError. Not promised: the same bits in any batch, since the products are
    torch's.

    Examples
    --------
    >>> halt = ac.AdaptiveHalt(ac.cells.GRU(64, 256), ac.ACT(nn.Linear(256, 1)), max_steps=16)
    >>> result = halt(torch.zeros(32, 256), torch.randn(32, 64))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_int("input_size", input_size, 1)
        check_int("hidden_size", hidden_size, 1)
        super().__init__(input_size, hidden_size, _check_flag("bias", bias), device=device, dtype=dtype)

    @classmethod
    def from_torch(cls, cell: nn.GRUCell) -> GRU:
        """Return a step with the parameters of a `torch.nn.GRUCell`: the same objects, not copies.

        Training either trains both. Hooks of `cell` stay with it.

        Raises
        ------
        TypeError
            If `cell` is no GRUCell, or has a ``forward`` of its own.
        ValueError
            If the cell's weights are not plain parameters, such as under a parametrization.
        """
        return _taken_over(cls, cell, nn.GRUCell)

    def forward(self, state: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the next state."""
        _check_rows("state", state, self.hidden_size)
        _check_rows("x", x, self.input_size)
        return super().forward(x, state)


class LSTM(nn.LSTMCell):
    """A long short-term memory (Hochreiter and Schmidhuber 1997) as a step: ``lstm((h, c), x) -> (h, c)``.

    ::

        i, f, o = σ(W_i x + b_i + W_h h + b_h) for each gate        g = tanh(W_ig x + b_ig + W_hg h + b_hg)
        c' = f c + i g        h' = o tanh(c')

    It is `torch.nn.LSTMCell` with its arguments the other way round: parameters have the same names, shapes
    and initial values, and a ``state_dict`` of the one loads into the other. As a step of `AdaptiveHalt` its
    output is h, the first tensor of the state.

    Parameters
    ----------
    input_size : int
        Width of x.
    hidden_size : int
        Width of h and of c.
    bias : bool
        Whether the biases b_i and b_h exist.
    device, dtype
        Device and dtype of the parameters.

    Notes
    -----
    ``lstm((h, c), x)`` with h and c [n, hidden_size] and x [n, input_size] of the parameters' dtype returns a
    pair like (h, c); differentiable in everything, to any order that torch's cell is. A wrong shape raises
    ValueError, another structure TypeError. Not promised: the same bits in any batch, since the products are
    torch's. A policy's head is called with the pair.

    Examples
    --------
    >>> class Head(nn.Linear):
    ...     def forward(self, state):
    ...         return super().forward(state[0])
    >>> halt = ac.AdaptiveHalt(ac.cells.LSTM(64, 256), ac.ACT(Head(256, 1)), max_steps=16)
    >>> result = halt((torch.zeros(32, 256), torch.zeros(32, 256)), torch.randn(32, 64))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_int("input_size", input_size, 1)
        check_int("hidden_size", hidden_size, 1)
        super().__init__(input_size, hidden_size, _check_flag("bias", bias), device=device, dtype=dtype)

    @classmethod
    def from_torch(cls, cell: nn.LSTMCell) -> LSTM:
        """Return a step with the parameters of a `torch.nn.LSTMCell`: the same objects, not copies.

        Training either trains both. Hooks of `cell` stay with it.

        Raises
        ------
        TypeError
            If `cell` is no LSTMCell, or has a ``forward`` of its own.
        ValueError
            If the cell's weights are not plain parameters, such as under a parametrization.
        """
        return _taken_over(cls, cell, nn.LSTMCell)

    def forward(self, state: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the next pair (h, c)."""
        if not isinstance(state, (tuple, list)) or len(state) != 2:
            raise TypeError(f"state: expected a pair of tensors (h, c), got {describe(state)}")
        _check_rows("state[0]", state[0], self.hidden_size)
        _check_rows("state[1]", state[1], self.hidden_size)
        _check_rows("x", x, self.input_size)
        return super().forward(x, (state[0], state[1]))


class MLP(nn.Module):
    """A network with one hidden layer as a step: ``mlp(state, x) -> state``.

    ::

        s' = W₂ act(W_s s + W_x x + b₁) + b₂        with residual=True        s' = s + W₂ act(…) + b₂

    Parameters
    ----------
    state : int
        Width of the state s.
    input : int
        Width of x. With 0 there is no input, and the step is called with the state alone.
    hidden : int
        Width of the hidden layer.
    activation : {"silu", "softplus", "tanh", "gelu"}
        The activation of the hidden layer. "gelu" is the exact one, with the error function.
    residual : bool
        Whether the state is added to what the network computes.
    device, dtype
        Device and dtype of the parameters.

    Notes
    -----
    ``mlp(state, x)`` with state [n, state] and x [n, input] of the parameters' dtype returns [n, state];
    differentiable to any order in both and in the parameters: ``weight_state`` [hidden, state],
    ``weight_input`` [hidden, input] (None without input), ``bias1`` [hidden], ``weight2`` [state, hidden],
    ``bias2`` [state]. The initial values are distributed like those of `torch.nn.Linear`. A wrong shape
    raises ValueError, what is no tensor TypeError. Not promised: the same bits in any batch, since the
    products are torch's.

    Examples
    --------
    >>> halt = ac.AdaptiveHalt(ac.cells.MLP(128, 64, 256), ac.Convergence(1e-3), max_steps=50)
    >>> result = halt(torch.zeros(32, 128), torch.randn(32, 64))
    """

    def __init__(
        self,
        state: int,
        input: int,
        hidden: int,
        activation: str = "silu",
        residual: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.state_size = check_int("state", state, 1)
        self.input_size = check_int("input", input, 0)
        self.hidden_size = check_int("hidden", hidden, 1)
        check_choice("activation", activation, tuple(ACTIVATIONS))
        self.activation = activation
        self.residual = _check_flag("residual", residual)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight_state = parameter(hidden, state)
        self.weight_input = parameter(hidden, input) if input else None
        self.bias1 = parameter(hidden)
        self.weight2 = parameter(state, hidden)
        self.bias2 = parameter(state)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each layer's weights and bias uniformly from ±1/√(its inputs), as `torch.nn.Linear` does."""
        first = (self.weight_state, self.weight_input, self.bias1)
        for inputs, parameters in (
            (self.state_size + self.input_size, first),
            (self.hidden_size, (self.weight2, self.bias2)),
        ):
            for parameter in parameters:
                if parameter is not None:
                    nn.init.uniform_(parameter, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))

    def forward(self, state: Tensor, x: Tensor | None = None) -> Tensor:
        """Return the next state."""
        _check_rows("state", state, self.state_size)
        a = F.linear(state, self.weight_state, self.bias1)
        if self.weight_input is not None:
            _check_rows("x", x, self.input_size)
            assert x is not None
            a = a + F.linear(x, self.weight_input)
        elif x is not None:
            raise ValueError(f"x: expected no input, since the cell was made with input=0, got {describe(x)}")
        after = F.linear(ACTIVATIONS[self.activation](a), self.weight2, self.bias2)
        return state + after if self.residual else after

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"{self.state_size}, {self.input_size}, {self.hidden_size}, activation={self.activation!r}, "
            f"residual={self.residual}"
        )
