"""What the rooms of the library know of each other."""

from __future__ import annotations

import ast
import importlib
import pickle
from pathlib import Path

import pytest

import adaptcomp_ext as ac

ROOM = Path(ac.__file__).parent / "nn" / "halting"
POLICIES = set(importlib.import_module("adaptcomp_ext.nn.policies").__all__)
CODES = {"ACT", "ARGMAX", "CONFIDENCE", "CONVERGES", "FIXED_STEPS", "PONDER_SAMPLE", "Q_HALT", "ActNode"}


@pytest.mark.parametrize("name", ["loop", "fused", "packing", "block", "fusing", "policy", "adaptive_halt"])
def test_the_loops_know_no_policy(name):
    tree = ast.parse((ROOM / f"{name}.py").read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not names & (POLICIES | CODES)
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [module for module in imported if module and ".policies" in module]


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("policy", ("Decision", "Policy", "Run", "View")),
        ("policies", ("ACT", "Confidence", "Convergence", "FixedSteps", "PonderNet")),
        ("cost_model", ("CostModel", "schedule")),
        ("result", ("HaltResult", "Status", "Trace")),
    ],
)
def test_public_names_stay_where_they_were(module, names):
    room = importlib.import_module(f"adaptcomp_ext.nn.{module}")
    for name in names:
        assert getattr(room, name) is getattr(ac.nn, name, getattr(room, name))
        assert pickle.loads(pickle.dumps(getattr(room, name))) is getattr(room, name)
