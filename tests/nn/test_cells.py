"""Cells: torch's own arithmetic and parameters, the state first; steps of every policy."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrizations

import adaptcomp_ext as ac

PAIRS = {"GRU": (ac.cells.GRU, nn.GRUCell), "LSTM": (ac.cells.LSTM, nn.LSTMCell)}


def cells() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "gru": ac.cells.GRU(3, 4),
        "gru without biases": ac.cells.GRU(3, 4, bias=False),
        "lstm": ac.cells.LSTM(3, 4),
        "mlp": ac.cells.MLP(4, 3, 8),
        "mlp without input": ac.cells.MLP(4, 0, 8, activation="tanh", residual=False),
    }


def arguments(cell: nn.Module, rows: int, dtype: torch.dtype = torch.float32) -> list:
    """A state and, where the cell takes one, an input."""
    draw = torch.Generator().manual_seed(rows)
    state = torch.randn(rows, 4, generator=draw, dtype=dtype)
    pair = (state, torch.randn(rows, 4, generator=draw, dtype=dtype))
    x = torch.randn(rows, 3, generator=draw, dtype=dtype)
    return [pair if isinstance(cell, ac.cells.LSTM) else state, *([x] if cell.input_size else [])]


@pytest.mark.promise("formula")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", PAIRS)
def test_a_cell_is_torchs_with_the_state_first(kind, bias):
    own, theirs = PAIRS[kind]
    torch.manual_seed(3)
    cell = own(3, 4, bias=bias)
    torch.manual_seed(3)
    other = theirs(3, 4, bias=bias)
    state, x = arguments(cell, 5)
    for got, want in zip(torch.atleast_2d(cell(state, x)), torch.atleast_2d(other(x, state)), strict=True):
        assert torch.equal(got, want)
    assert list(cell.state_dict()) == list(other.state_dict())
    own(3, 4, bias=bias).load_state_dict(other.state_dict())
    other.load_state_dict(own(3, 4, bias=bias).state_dict())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", PAIRS)
def test_a_cell_of_torch_is_taken_over_with_its_parameters(kind, bias):
    own, theirs = PAIRS[kind]
    cell = theirs(3, 4, bias=bias, dtype=torch.float64).eval()
    cell.weight_hh.requires_grad_(False)
    made = own.from_torch(cell)
    assert type(made) is own and not made.training
    assert {n: id(p) for n, p in made.named_parameters()} == {n: id(p) for n, p in cell.named_parameters()}
    state, x = arguments(made, 5, torch.float64)
    for got, want in zip(torch.atleast_2d(made(state, x)), torch.atleast_2d(cell(x, state)), strict=True):
        assert torch.equal(got, want)
    assert own.from_torch(made).weight_ih is cell.weight_ih


def test_the_networks_formula():
    cell = ac.cells.MLP(4, 3, 8, activation="gelu", dtype=torch.float64)
    state, x = arguments(cell, 5, torch.float64)
    hidden = nn.functional.gelu(state @ cell.weight_state.T + x @ cell.weight_input.T + cell.bias1)
    torch.testing.assert_close(cell(state, x), state + hidden @ cell.weight2.T + cell.bias2)
    cell.residual = False
    torch.testing.assert_close(cell(state, x), hidden @ cell.weight2.T + cell.bias2)
    assert (
        max(float(p.detach().abs().max()) for p in (cell.weight_state, cell.weight_input, cell.bias1))
        <= 7**-0.5
    )


@pytest.mark.promise("gradient", "second derivative")
@pytest.mark.parametrize("name", cells())
def test_gradients_by_finite_differences(name):
    cell = cells()[name].double()
    state, *inputs = arguments(cell, 2, torch.float64)
    state = state if isinstance(state, tuple) else (state,)
    flat = [t.requires_grad_() for t in (*state, *inputs)]

    def run(*flat):
        states = flat[: len(state)]
        return cell(states if len(state) > 1 else states[0], *flat[len(state) :])

    assert gradcheck(run, flat) and gradgradcheck(run, flat)


@pytest.mark.parametrize("compact", [True, False, "auto"])
@pytest.mark.parametrize("name", cells())
def test_a_cell_is_a_step_that_learns(name, compact):
    class Head(nn.Linear):
        def forward(self, state):
            return super().forward(state[0] if isinstance(state, tuple) else state)

    cell = cells()[name]
    halt = ac.AdaptiveHalt(cell, ac.ACT(Head(4, 1)), max_steps=6, compact=compact)
    result = halt(*arguments(cell, 9))
    (result.output.square().sum() + result.cost.sum()).backward()
    assert result.output.shape == (9, 4)
    assert all(p.grad is not None and bool(p.grad.any()) for p in halt.parameters())


@pytest.mark.promise("modules")
@pytest.mark.parametrize("name", cells())
def test_copies_behave_like_the_original(name):
    cell = cells()[name]
    for copied in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        assert type(copied) is type(cell) and repr(copied) == repr(cell)
        for a, b in zip(
            torch.atleast_2d(cell(*arguments(cell, 3))),
            torch.atleast_2d(copied(*arguments(cell, 3))),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_a_cell_compiles_in_one_graph():
    for cell in cells().values():
        run = torch.compile(cell, fullgraph=True, backend="aot_eager")
        for a, b in zip(
            torch.atleast_2d(run(*arguments(cell, 3))),
            torch.atleast_2d(cell(*arguments(cell, 3))),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


class _Own(nn.GRUCell):
    def forward(self, x, h=None):
        return super().forward(x, h) * 2


STATE, X = torch.zeros(2, 4), torch.zeros(2, 3)
BAD = {
    "no int": (lambda: ac.cells.GRU(3.0, 4), TypeError, "input_size: expected an int"),
    "no width": (lambda: ac.cells.LSTM(3, 0), ValueError, "hidden_size: expected"),
    "no flag": (lambda: ac.cells.GRU(3, 4, bias=1), TypeError, "bias: expected True or False, got int 1"),
    "residual": (lambda: ac.cells.MLP(4, 3, 8, residual=0), TypeError, "residual: expected True or False"),
    "activation": (lambda: ac.cells.MLP(4, 3, 8, "relu"), ValueError, "activation: expected"),
    "negative": (lambda: ac.cells.MLP(4, -1, 8), ValueError, "input: expected"),
    "swapped": (
        lambda: ac.cells.GRU(3, 4)(X, STATE),
        ValueError,
        "state: expected .* \\[n, 4\\], got .* \\[2, 3\\]",
    ),
    "wide": (
        lambda: ac.cells.GRU(3, 4)(STATE, STATE),
        ValueError,
        "x: expected .* \\[n, 3\\], got .* \\[2, 4\\]",
    ),
    "one row": (lambda: ac.cells.GRU(3, 4)(STATE[0], X), ValueError, "state: expected .* \\[n, 4\\]"),
    "no tensor": (lambda: ac.cells.GRU(3, 4)(STATE, [1.0]), TypeError, "x: expected a Tensor, got list"),
    "no pair": (lambda: ac.cells.LSTM(3, 4)(STATE, X), TypeError, "state: expected a pair"),
    "half": (lambda: ac.cells.LSTM(3, 4)((STATE, X), X), ValueError, "state\\[1\\]: expected"),
    "no input": (lambda: ac.cells.MLP(4, 3, 8)(STATE), TypeError, "x: expected a Tensor, got NoneType"),
    "an input": (lambda: ac.cells.MLP(4, 0, 8)(STATE, X), ValueError, "x: expected no input"),
    "LSTM": (
        lambda: ac.cells.GRU.from_torch(nn.LSTMCell(3, 4)),
        TypeError,
        "cell: expected a torch.nn.GRUCell",
    ),
    "a class": (lambda: ac.cells.GRU.from_torch(_Own(3, 4)), TypeError, "cell: expected a torch.nn.GRUCell"),
    "parametrized": (
        lambda: ac.cells.GRU.from_torch(parametrizations.weight_norm(nn.GRUCell(3, 4), "weight_hh")),
        ValueError,
        "cell: expected one whose parameters are .*weight_hh.*remove parametrizations",
    ),
}


@pytest.mark.promise("bad input")
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()


def test_another_shape_in_a_state_dict_names_the_parameter():
    with pytest.raises(RuntimeError, match=re.escape("weight_ih")):
        ac.cells.GRU(3, 4).load_state_dict(nn.GRUCell(5, 4).state_dict())
