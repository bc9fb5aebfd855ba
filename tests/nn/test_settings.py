"""What is assigned after construction is checked as the constructor checks it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import adaptcomp_ext as ac

from .helpers import MODES, Head, mode

HALF = torch.tensor(0.5)
POLICIES = {
    "act": lambda: ac.ACT(Head()),
    "confidence": lambda: ac.Confidence(0.5),
    "convergence": lambda: ac.Convergence(0.1),
    "ponder": lambda: ac.PonderNet(Head()),
}


@pytest.mark.parametrize(
    ("policy", "name", "good", "bad"),
    [
        (
            "act",
            "threshold",
            [0.5, 1],
            ["0.5", None, math.nan, 0.0, 1.5, True, HALF, nn.Parameter(HALF)],
        ),
        ("act", "head", [nn.Linear(2, 1)], [None, 3, "head", torch.zeros(2)]),
        ("confidence", "threshold", [0.5], ["0.5", None, math.nan, -0.1]),
        ("confidence", "measure", ["margin"], ["max", None, 1, math.nan]),
        ("convergence", "tol", [0, 0.5], ["0", None, math.nan, -1.0, math.inf]),
        ("convergence", "norm", ["absolute"], ["l2", None, 2]),
        ("convergence", "patience", [3], ["3", None, 0, 1.0, math.nan]),
        ("ponder", "prior", [0.5, "uniform"], ["geometric", None, math.nan, 0.0, 1.0]),
        ("ponder", "epsilon", [0, 0.5], ["0", None, math.nan, 1.0, -0.5]),
        ("ponder", "seed", [3, 2**63 - 1], ["3", None, 1.5, -1, 2**63]),
        ("ponder", "head", [nn.Linear(2, 1)], [None, 3]),
    ],
)
def test_settings_of_a_policy_are_checked_whenever_they_are_assigned(policy, name, good, bad):
    made = POLICIES[policy]()
    for value in good:
        setattr(made, name, value)
        assert getattr(made, name) == value
    before = getattr(made, name)
    for value in bad:
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            setattr(made, name, value)
        assert getattr(made, name) == before
    assert getattr(copy.deepcopy(made), name) == before or isinstance(before, nn.Module)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("step", [torch.tanh, nn.Tanh(), nn.ModuleList([nn.Tanh()])], [None, 3, nn.ModuleList()]),
        ("policy", [], [None, torch.tanh, 3, nn.Tanh()]),
        ("readout", [None, torch.tanh, nn.Tanh()], [3, "state"]),
        ("compact", [True, False, "auto"], [None, 1, "never"]),
        ("lag", [None, 1], [0, "2", 1.0]),
    ],
)
def test_settings_of_a_module_are_checked_whenever_they_are_assigned(name, good, bad):
    for value in good:
        halt = ac.AdaptiveHalt(torch.tanh, ac.FixedSteps(2))
        setattr(halt, name, value)
        assert getattr(halt, name) is value
        assert halt(torch.ones(3, 2)).steps.tolist() == [1 if isinstance(value, nn.ModuleList) else 2] * 3
    for value in bad:
        halt = ac.AdaptiveHalt(torch.tanh, ac.FixedSteps(2))
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            setattr(halt, name, value)
        assert halt(torch.ones(3, 2)).steps.tolist() == [2] * 3


@pytest.mark.parametrize("how", MODES)
def test_bounds_assigned_later_are_checked_at_the_call(how):
    halt = ac.AdaptiveHalt(torch.tanh, ac.FixedSteps(2), max_steps=4)
    with mode(how):
        for name, value in (("max_steps", "4"), ("max_steps", 0), ("max_steps", None), ("min_steps", 1.0), ("min_steps", 5)):
            other = copy.deepcopy(halt)
            setattr(other, name, value)
            with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
                other(torch.ones(3, 2))
