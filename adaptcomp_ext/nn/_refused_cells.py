"""The refusal of torch's recurrent cells where something else is called."""

from __future__ import annotations

from typing import Any

from torch import nn

from adaptcomp_ext.ops._checks import describe

_INPUT_FIRST = {cell.forward: cell.__name__ for cell in (nn.RNNCell, nn.GRUCell, nn.LSTMCell)}


def cell_name(function: Any) -> str | None:
    """Return the name of torch's cell whose ``forward`` a module has; None for all other callables."""
    return _INPUT_FIRST.get(type(function).forward) if isinstance(function, nn.RNNCellBase) else None


def refuse_cell_as_step(function: Any) -> None:
    """Raise TypeError for a cell as a step."""
    name = cell_name(function)
    if name is not None:
        own = {"GRUCell": "GRU", "LSTMCell": "LSTM"}.get(name)
        way_out = (
            f"Pass adaptcomp_ext.cells.{own}.from_torch(cell), which has its parameters"
            if own
            else "Subclass it: class Cell(nn.RNNCell): def forward(self, state, x): return "
            "super().forward(x, state)"
        )
        raise TypeError(
            f"step: expected a module that is called as step(state, *inputs), got {describe(function)}, "
            f"which takes the input first: with equal sizes the two would be swapped silently. {way_out}"
        )


def refuse_cell(role: str, call: str, result: str, function: Any) -> None:
    """Raise TypeError for a cell in another role, which is called as `call` and returns `result`."""
    if cell_name(function) is not None:
        raise TypeError(
            f"{role}: expected a callable that is called as {call} and returns {result}, got "
            f"{describe(function)}, which is a step: it computes a recurrent state"
        )
