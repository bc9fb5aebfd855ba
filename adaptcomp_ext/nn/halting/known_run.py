"""Runs that went the kernel's way before: a call that differs in nothing but its tensors goes it again.

The checks of a call take longer than a small run. After a run the compiled module (csrc/bindings/known_run.h)
remembers, by identity, the settings, the modules' classes and attributes, the methods of these classes, and
what the tensors were like. The modes of torch are asked at each call.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from adaptcomp_ext import _C
from adaptcomp_ext.nn.halting.known import SETTINGS, computes_settings
from adaptcomp_ext.nn.halting.recurrence import (
    FORMULAS,
    GATES,
    LAYER,
    MLP,
    WholeRun,
    active_mode,
    halt_result,
)
from adaptcomp_ext.nn.result import HaltResult
from adaptcomp_ext.ops._backend import DTYPE_CODES, on_cuda, on_reference
from adaptcomp_ext.ops._transforms import enter
from adaptcomp_ext.ops.recurrence import Tensors, recurrence

_OF_A_POLICY = ("decide", "begin", "fuse", "check_readout", "weighted", "traced", "reads_logits", "log_prior")
_FIRST = {name: Tensors._fields.index(name) for name in ("weight_ih", "weight2", "head", "readout")}


class KnownRun:
    """A run of an `AdaptiveHalt`, which `run` repeats on other tensors."""

    def __init__(self, halt: nn.Module, whole: WholeRun) -> None:
        self.settings, tensors = whole.settings, whole.tensors
        self.is_pair = self.settings.kind == "lstm"
        step, policy = halt._modules["step"], whole.problem.policy
        tables: list[tuple[Any, tuple[str, ...], int]] = [
            (step, names, first) for names, first in _tables(self.settings.kind)
        ]
        if tensors.head is not None:
            tables.append((policy._modules["head"], LAYER, _FIRST["head"]))
        if tensors.readout is not None:
            tables.append((halt._modules["readout"], LAYER, _FIRST["readout"]))
        formulas = list({id(module): module for module, *_ in tables}.values())
        own = halt.__dict__
        self.known = _C.KnownRun(
            type(halt),
            [(name, own[name]) for name in SETTINGS if name in own],
            halt._modules,
            [*formulas, policy],
            len(formulas),
            [
                *((type(policy), name) for name in _OF_A_POLICY),
                *((type(halt), name) for name in SETTINGS),
                *((cls, name) for cls, name, _ in FORMULAS),
            ],
            [
                (module, names, tuple([_shape(tensors[first + i]) for i in range(len(names))]), first)
                for module, names, first in tables
            ],
            (
                2 if self.is_pair else 1,
                tensors.state.shape[1],
                0 if tensors.x is None else tensors.x.shape[1],
                DTYPE_CODES[tensors.state.dtype],
                len(tensors),
            ),
        )

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Become None in a copy, which has other modules, and in a pickle."""
        return type(None), ()

    def run(self, halt: nn.Module, state: Any, inputs: tuple[Any, ...]) -> HaltResult | None:
        """Run every row until it has ended, or return None if something has changed."""
        if on_reference() or enter("AdaptiveHalt", (state, inputs)) is not None or active_mode() is not None:
            return None
        found = _C.known_tensors(self.known, halt, state, inputs)
        if found is None:
            return None
        tensors = Tensors._make(found)
        return halt_result(recurrence(self.settings, tensors), tensors, tuple if self.is_pair else _only)


def remember(halt: nn.Module, whole: WholeRun) -> KnownRun | None:
    """Return the run as one that can be repeated, if it can."""
    settings = whole.settings
    if settings.signal is not None or settings.sample_ids is not None:
        return None
    if on_cuda(whole.problem.run.device):  # the compiled module knows the tensors of the CPU alone
        return None
    if computes_settings(halt):
        return None
    policy = whole.problem.policy
    if "fuse" in policy.__dict__ or not type(policy).fuse.__module__.startswith("adaptcomp_ext."):
        return None
    if settings.kind == "lstm" and type(whole.problem.tree(whole.problem.state)) is not tuple:
        return None
    return KnownRun(halt, whole)


def _tables(kind: str) -> list[tuple[tuple[str, ...], int]]:
    """Return names of the cell's parameters, and the place of their first in `Tensors`."""
    if kind == "mlp":
        return [(MLP[:3], _FIRST["weight_ih"]), (MLP[3:], _FIRST["weight2"])]
    return [(GATES, _FIRST["weight_ih"])]


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _only(leaves: list[Tensor]) -> Tensor:
    return leaves[0]
