"""What a run needs to know of its functions and finds out once for each of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from adaptcomp_ext.nn._ownership import is_function
from adaptcomp_ext.nn._reads import walked
from adaptcomp_ext.nn.halting import batch_statistics
from adaptcomp_ext.nn.halting.calling import form_of, is_plain
from adaptcomp_ext.nn.halting.compiled_step import CompiledSteps
from adaptcomp_ext.nn.halting.cost_model import count_weights
from adaptcomp_ext.nn.halting.policy import Policy, heads_of

SETTINGS = (
    "max_steps",
    "min_steps",
    "compact",
    "check_rows",
    "training",
    "readout",
    "keep_trace",
    "compile_step",
    "_together",
)
"""The settings of an `AdaptiveHalt` that a later call may find changed."""


def computes_settings(halt: nn.Module) -> bool:
    """Whether a subclass computes a setting, which may then have another value in the next call."""
    return any(hasattr(getattr(type(halt), name, None), "__get__") for name in SETTINGS)


@dataclass(slots=True)
class Known:
    """Facts about the functions of an `AdaptiveHalt`, valid while it has these functions."""

    step: Any
    policy: Policy
    readout: Any
    head: Any
    """The policy's; None where it has none."""
    plain: bool
    """Whether step, readout and head are called as they are: see `adaptcomp_ext.nn.halting.calling`."""
    weights: int | None
    """Number of weights of a step, for the cost model."""
    norms: list[Any]
    """Batch normalisations in the modules."""
    moded: nn.Module | None
    """The module whose mode is the step's: of a plain function the first that it reads."""
    unwalked: bool
    """Whether the graph of a plain function has yet to be searched for parameters."""
    dtype: torch.dtype | None = None
    """With `training` and `mode`, the combination whose rows were found apart last."""
    training: bool = False
    mode: bool = False
    apart: set[tuple[torch.dtype, bool, bool]] = field(default_factory=set)
    """All combinations of dtype and modes that were checked."""
    compiled: CompiledSteps = field(default_factory=CompiledSteps)
    """The steps of ``compile_step``."""
    loops: dict[bool, Any] = field(default_factory=dict)
    """The `KnownLoop` of the last run without gradients, and of the last with, where it can be repeated."""


def learn(step: Any, policy: Policy, readout: Any) -> Known:
    """Find out what there is to know: a walk through a large module takes longer than a small step."""
    head = getattr(policy, "head", None)
    moded = (
        step if isinstance(step, nn.Module) else next(iter(walked([("step", step)]).modules.values()), None)
    )
    return Known(
        step,
        policy,
        readout,
        head,
        (isinstance(step, nn.ModuleList) or form_of(step).place is None)
        and is_plain(readout)
        and is_plain(head),
        count_weights(step),
        batch_statistics.find(step, policy, readout),
        moded,
        any(is_function(function) for function in (step, readout, *heads_of(policy))),
    )
