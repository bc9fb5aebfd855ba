"""The examples do what their first lines promise: they halt, they save, and what they train learns."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).parents[2] / "examples"
CONSTANT = ("energy.out_bias",)
"""What is added to an energy everywhere moves no minimum: its gradient is zero."""
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@cache
def run(name: str) -> tuple[nn.Module, dict[str, float], list[nn.Module]]:
    """Run an example once; what it returns, and the states of the model's parameters before the training."""
    if name in ("early_exit", "habit_and_control"):
        pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    begun: dict[int, torch.Tensor] = {}
    make = torch.optim.Adam.__init__

    def remember(self, params, *args, **kwargs):
        params = list(params)
        begun.update({id(p): p.detach().clone() for p in params})
        make(self, params, *args, **kwargs)

    torch.optim.Adam.__init__ = remember
    try:
        model, figures = module.main()
    finally:
        torch.optim.Adam.__init__ = make
    return model, figures, begun


def test_there_are_five():
    assert len(NAMES) == 5


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short(name):
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    assert len(lines) < 80
    assert max(map(len, lines)) <= 110
    assert "Expect" in "\n".join(lines[:20])


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_the_model_learns(name):
    """The optimiser holds every parameter that asks for a gradient; each got one, and moved."""
    model, _, begun = run(name)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert parameters
    for n, p in parameters.items():
        assert id(p) in begun, f"{n} is not the optimiser's"
        assert p.grad is not None and bool(p.grad.isfinite().all()), n
        if n in CONSTANT:
            assert not p.grad.any()
        else:
            assert bool(p.grad.any()) and not torch.equal(begun[id(p)], p.detach()), n


def test_act_halts_after_the_mark():
    _, figures, _ = run("act_recurrent")
    assert figures["accuracy"] > 0.98
    assert 8 < figures["steps"] < 11
    assert figures["correlation"] > 0.7


def test_most_images_leave_early():
    _, figures, _ = run("early_exit")
    assert figures["right at 1.0"] > 0.9
    assert figures["right at 0.9"] > figures["right at 1.0"] - 0.01
    assert figures["layers at 0.5"] < figures["layers at 0.9"] < 2.5 < 5.9 < figures["layers at 1.0"]


def test_rows_that_have_left_do_not_pass_through_the_later_layers():
    halt, _, _ = run("early_exit")
    halt.policy.threshold = 0.9
    passed = []
    hooks = [
        layer.register_forward_hook(lambda _module, _inputs, state: passed.append(len(state[0])))
        for layer in halt.step
    ]
    from sklearn.datasets import load_digits

    x = torch.tensor(load_digits().data[:500], dtype=torch.float32) / 8 - 1
    with torch.no_grad():
        result = halt((x, torch.zeros(500, 10)))
    for hook in hooks:
        hook.remove()
    assert int(result.steps.sum()) <= sum(passed) < 0.5 * 6 * 500


def test_a_descent_improves_and_stops():
    _, figures, _ = run("energy_descent")
    errors = [figures[f"error {n}"] for n in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.13 < 0.25 < errors[0]
    assert figures["error 50"] < 1.05 * errors[-1]
    assert figures["halted 50"] > 0.99 and 8 < figures["steps 50"] < 20


def test_the_gate_calls_where_habit_fails():
    _, figures, _ = run("habit_and_control")
    assert figures["control, incongruent"] > figures["habit, incongruent"] + 0.03
    assert figures["gated, incongruent"] > figures["control, incongruent"] - 0.03
    assert figures["gated, congruent"] > figures["control, congruent"] - 0.03
    assert figures["called, incongruent"] > figures["called, congruent"] + 0.2
    assert (figures["called, incongruent"] + figures["called, congruent"]) / 2 < 0.55


def test_the_agent_plans_where_it_pays():
    _, figures, _ = run("planning_agent")
    assert figures["everywhere, sweeps"] == 32 and figures["habit, sweeps"] == 0
    assert figures["everywhere"] > 0.95 > figures["chosen"] > figures["shuffled"] > figures["habit"] + 0.05
    assert figures["chosen, sweeps"] < 9
    assert figures["chosen, sweeps"] < figures["shuffled, sweeps"] + 0.5
