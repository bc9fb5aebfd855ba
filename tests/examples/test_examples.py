"""The examples do what their first lines promise: they halt, they save, and what they train learns."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).parents[2] / "examples"
CONSTANT = ("energy.out_bias",)
"""What is added to an energy everywhere moves no minimum: its gradient is zero."""
UNTRAINED = ("output_init_embed", "latent_init_embed")
"""Of tiny-recursive-model, which begins every deep step without gradients: these never get one."""
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def run(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[nn.Module, dict[str, float], dict[int, torch.Tensor]]:
    """Run an example; return its result, and its optimiser's parameters before the training, by id."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    begun: dict[int, torch.Tensor] = {}
    make = torch.optim.Adam.__init__

    def remember(self, params, *args, **kwargs):
        params = list(params)
        begun.update({id(p): p.detach().clone() for p in params})
        make(self, params, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "__init__", remember)
    model, figures = module.main()
    return model, figures, begun


def check_learning(model: nn.Module, begun: dict[int, torch.Tensor]) -> None:
    """The optimiser holds every parameter that asks for a gradient; each got one, and moved."""
    parameters = {
        n: p for n, p in model.named_parameters() if p.requires_grad and p.numel() and n not in UNTRAINED
    }
    assert parameters
    for n, p in parameters.items():
        assert id(p) in begun, f"{n} is not the optimiser's"
        assert p.grad is not None and bool(p.grad.isfinite().all()), n
        if n in CONSTANT:
            assert not p.grad.any()
        else:
            assert bool(p.grad.any()) and not torch.equal(begun[id(p)], p.detach()), n


def act_recurrent(model: nn.Module, figures: dict[str, float]) -> None:
    """Rows halt after the mark."""
    assert figures["accuracy"] > 0.98
    assert 8 < figures["steps"] < 11
    assert figures["correlation"] > 0.7


def early_exit(halt: nn.Module, figures: dict[str, float]) -> None:
    """Most images leave early, and those that have left do not pass through the later layers."""
    assert figures["right at 1.0"] > 0.9
    assert figures["right at 0.9"] > figures["right at 1.0"] - 0.01
    assert figures["layers at 0.5"] < figures["layers at 0.9"] < 2.5 < 5.9 < figures["layers at 1.0"]

    from sklearn.datasets import load_digits

    halt.policy.threshold = 0.9
    passed = []
    for layer in halt.step:
        layer.register_forward_hook(lambda _module, _inputs, state: passed.append(len(state)))
    x = torch.tensor(load_digits().data[:500], dtype=torch.float32) / 8 - 1
    with torch.no_grad():
        result = halt(x)
    assert int(result.steps.sum()) <= sum(passed) < 0.5 * 6 * 500


def energy_descent(model: nn.Module, figures: dict[str, float]) -> None:
    """A descent improves from step to step, and stops by itself."""
    errors = [figures[f"error {n}"] for n in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.13 < 0.2 < errors[0]
    assert figures["error 50"] < 1.05 * errors[-1]
    assert figures["halted 50"] > 0.99 and 8 < figures["steps 50"] < 20


def habit_and_control(model: nn.Module, figures: dict[str, float]) -> None:
    """The gate calls where the habit fails."""
    assert figures["control, incongruent"] > figures["habit, incongruent"] + 0.03
    assert figures["gated, incongruent"] > figures["control, incongruent"] - 0.03
    assert figures["gated, congruent"] > figures["control, congruent"] - 0.03
    assert figures["called, incongruent"] > figures["called, congruent"] + 0.2
    assert (figures["called, incongruent"] + figures["called, congruent"]) / 2 < 0.55


def planning_agent(model: nn.Module, figures: dict[str, float]) -> None:
    """The agent plans where it pays."""
    assert figures["everywhere, sweeps"] == 32 and figures["habit, sweeps"] == 0
    assert figures["everywhere"] > 0.95 > figures["chosen"] > figures["shuffled"] > figures["habit"] + 0.05
    assert figures["chosen, sweeps"] < 9
    assert figures["chosen, sweeps"] < figures["shuffled, sweeps"] + 0.5


def recursive_reasoner(model: nn.Module, figures: dict[str, float]) -> None:
    """Puzzles leave early, with the answers of full depth."""
    assert figures["right"] > 0.85 and figures["right"] > figures["right, full depth"] - 0.02
    assert figures["same"] > 0.96 and figures["blocks"] < 8


CHECKS = {
    check.__name__: check
    for check in (
        act_recurrent,
        early_exit,
        energy_descent,
        habit_and_control,
        planning_agent,
        recursive_reasoner,
    )
}


@pytest.mark.promise("examples")
@pytest.mark.parametrize("name", NAMES)
def test_an_example_does_what_it_says(name, monkeypatch):
    if name in ("early_exit", "habit_and_control"):
        pytest.importorskip("sklearn")
    if name == "recursive_reasoner":
        pytest.importorskip("tiny_recursive_model")
    model, figures, begun = run(name, monkeypatch)
    check_learning(model, begun)
    CHECKS[name](model, figures)


def test_there_are_six():
    assert len(NAMES) == 6


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short(name):
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    assert len(lines) < 80
    assert max(map(len, lines)) <= 110
    assert "Expect" in "\n".join(lines[:20])
