"""The texts of ``help()`` and ``repr()``."""

import dataclasses
import functools
import inspect
import pydoc

import pytest
import torch
from torch import nn

import adaptcomp_ext as ac
from adaptcomp_ext.nn.halting import policy

RECORDS = {
    name: cls
    for module in (ac, ac.ops, policy)
    for name, cls in vars(module).items()
    if inspect.isclass(cls)
    and cls.__module__.startswith("adaptcomp_ext.")
    and (issubclass(cls, tuple) or dataclasses.is_dataclass(cls))
    and name != "Fused"  # private: it is only passed through
}


def test_the_records_are_all_there():
    expected = {
        "HaltResult",
        "EnergyResult",
        "Trace",
        "View",
        "Decision",
        "Run",
        "ActStep",
        "PonderNetStep",
        "DescentUpdate",
    }
    assert expected <= set(RECORDS)


@pytest.mark.parametrize("name", RECORDS)
def test_every_field_is_described(name):
    cls = RECORDS[name]
    text = pydoc.render_doc(cls, renderer=pydoc.plaintext)
    assert "Alias for field number" not in text
    fields = cls._fields if issubclass(cls, tuple) else [field.name for field in dataclasses.fields(cls)]
    for field in fields:
        assert f"{field} : " in inspect.getdoc(cls)
        if issubclass(cls, tuple):
            doc = getattr(cls, field).__doc__
            assert doc[0] != " " and doc.count(". ") + doc.endswith(".") >= 1 and "\n" not in doc
            assert not doc.startswith("Tensor.") or "[" in doc  # a shape


def test_status_says_why():
    assert all(f"{status.name} : {status.value}" in inspect.getdoc(ac.Status) for status in ac.Status)


class Callable:
    def __call__(self, state):
        return state


def test_a_repr_names_plain_functions():
    def grow(state):
        return state + 1

    def logits(state):
        return state[:, 0]

    text = repr(ac.AdaptiveHalt(grow, ac.ACT(logits), 3, readout=torch.tanh))
    assert "step=grow, readout=tanh, max_steps=3" in text
    assert "ACT(head=logits, threshold=0.99)" in text
    assert "head=logits, prior=0.2" in repr(ac.PonderNet(logits))
    assert "step=partial(grow), max_steps" in repr(ac.AdaptiveHalt(functools.partial(grow), ac.FixedSteps(1)))
    assert "step=Callable, max_steps" in repr(ac.AdaptiveHalt(Callable(), ac.FixedSteps(1)))
    assert "step=<lambda>, max_steps" in repr(ac.AdaptiveHalt(lambda s: s, ac.FixedSteps(1)))
    module = repr(ac.AdaptiveHalt(nn.Linear(2, 2), ac.ACT(nn.Linear(2, 1)), readout=nn.Identity()))
    assert (
        "(step): Linear" in module
        and "(head): Linear" in module
        and "step=" not in module
        and "head=" not in module
    )
    assert "energy=grow, step_size" in repr(ac.EnergyDescent(grow))
