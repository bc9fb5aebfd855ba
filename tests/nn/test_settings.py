"""Assignments after construction are checked like the constructor's arguments."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import adaptcomp_ext as ac
from tests.helpers.halting import MODES, Head, mode

HALF = torch.tensor(0.5)
POLICIES = {
    "act": lambda: ac.ACT(Head()),
    "confidence": lambda: ac.Confidence(0.5),
    "convergence": lambda: ac.Convergence(0.1),
    "ponder": lambda: ac.PonderNet(Head()),
}


@pytest.mark.promise("bad input")
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


@pytest.mark.promise("bad input")
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


@pytest.mark.promise("bad input")
@pytest.mark.parametrize("how", MODES)
def test_bounds_assigned_later_are_checked_at_the_call(how):
    halt = ac.AdaptiveHalt(torch.tanh, ac.FixedSteps(2), max_steps=4)
    with mode(how):
        for name, value in (
            ("max_steps", "4"),
            ("max_steps", 0),
            ("max_steps", None),
            ("min_steps", 1.0),
            ("min_steps", 5),
        ):
            other = copy.deepcopy(halt)
            setattr(other, name, value)
            with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
                other(torch.ones(3, 2))


def half_square(y):
    return y.square().sum(1) / 2


class Annealed(ac.EnergyDescent):
    """A subclass may make step size and number of steps properties."""

    stage = 0

    @property
    def step_size(self):
        return 0.5**self.stage

    @step_size.setter
    def step_size(self, value):
        pass

    @property
    def max_steps(self):
        return 1 + self.stage

    @max_steps.setter
    def max_steps(self, value):
        pass


def exchanged(descend, name, value):
    delattr(descend, name)
    descend.register_parameter(name, value)


@pytest.mark.parametrize(
    ("options", "change", "expected"),
    [
        ({}, lambda d: setattr(d, "max_steps", 2), 0.25),
        ({}, lambda d: setattr(d, "step_size", 0.25), 0.75),
        ({}, lambda d: setattr(d, "clip", 0.5), 0.75),
        ({}, lambda d: setattr(d, "clamp", (0.625, 1.0)), 0.625),
        ({"clamp": [-1.0, 1.0]}, lambda d: d.clamp.__setitem__(0, 0.75), 0.75),
        ({"step_size": torch.tensor(0.5)}, lambda d: d.step_size.fill_(0.75), 0.25),
        ({}, lambda d: exchanged(d, "step_size", nn.Parameter(torch.tensor(0.125))), 0.875),
        ({}, lambda d: setattr(d, "energy", lambda y: half_square(y) / 2), 0.75),
    ],
    ids=[
        "steps",
        "size",
        "clip",
        "clamp",
        "clamp in place",
        "size in place",
        "size as a parameter",
        "energy",
    ],
)
def test_a_descent_heeds_what_has_changed_since_the_last_call(options, change, expected):
    descend = ac.EnergyDescent(half_square, **{"step_size": 0.5, "max_steps": 1, "tol": 0.0, **options})
    other = copy.copy(descend)
    y = torch.ones(3, 1)
    assert torch.equal(descend(y).y, torch.full((3, 1), 0.5))
    before = copy.deepcopy(descend)
    change(descend)
    assert torch.equal(descend(y).y, torch.full((3, 1), expected))
    assert torch.equal(before(y).y, torch.full((3, 1), 0.5))
    if not options:
        assert torch.equal(other(y).y, torch.full((3, 1), 0.5))


def test_a_descent_heeds_noise_that_was_changed_in_place():
    descend = ac.EnergyDescent(half_square, max_steps=1, noise=torch.tensor(0.0))
    y = torch.ones(3, 1)
    quiet = descend(y).y
    descend.noise.fill_(1.0)
    loud = descend(y).y
    descend.noise = 1.0
    assert not torch.equal(quiet, loud)
    assert torch.equal(loud, descend(y).y)
    descend.noise = torch.tensor(-1.0)
    with pytest.raises(ValueError, match=r"noise: expected a finite number >= 0, got -1.0"):
        descend(y)


@pytest.mark.promise("bad input")
def test_settings_of_a_descent_that_are_properties_are_read_at_every_call():
    descend = Annealed(half_square, tol=0.0)
    y = torch.ones(3, 1)
    assert torch.equal(descend(y).y, torch.zeros(3, 1))
    descend.__dict__["stage"] = 1
    assert torch.equal(descend(y).y, torch.full((3, 1), 0.25))


def test_a_seed_of_the_call_is_of_that_call_only():
    descend = ac.EnergyDescent(half_square, max_steps=1, noise=1.0, seed=3)
    y = torch.ones(3, 1)
    own = descend(y).y
    assert torch.equal(
        descend(y, seed=4).y, ac.EnergyDescent(half_square, max_steps=1, noise=1.0, seed=4)(y).y
    )
    assert torch.equal(descend(y).y, own)
    with pytest.raises(ValueError, match="seed: expected an int >= 0, got -1"):
        descend(y, seed=-1)
