"""The choice of an engine, and the refusal of modules that a batcher cannot run."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from adaptcomp_ext.nn.batching.chunks import ChunkEngine
from adaptcomp_ext.nn.batching.engine import Engine
from adaptcomp_ext.nn.batching.form import Form
from adaptcomp_ext.nn.batching.slots import SlotEngine
from adaptcomp_ext.nn.batching.stages import StageEngine
from adaptcomp_ext.nn.descent.energy_descent import EnergyDescent
from adaptcomp_ext.nn.halting.adaptive_halt import AdaptiveHalt
from adaptcomp_ext.nn.halting.calling import form_of
from adaptcomp_ext.nn.halting.fusing import fused_decision
from adaptcomp_ext.nn.halting.recurrence import NotServed, find
from adaptcomp_ext.ops._backend import on_cuda, on_reference
from adaptcomp_ext.ops._checks import describe
from adaptcomp_ext.ops.halting import KERNELS

Module = AdaptiveHalt | EnergyDescent

NAMES = {AdaptiveHalt: ("state", "inputs"), EnergyDescent: ("y0", "context")}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")

STREAM_CHUNK = 8
"""Slots of a chunk of a stream, for each slot: the kernel's own slots run empty at the end of a chunk."""


def check_module(halt: object) -> Module:
    """Require a module that a batcher can run."""
    if not isinstance(halt, (AdaptiveHalt, EnergyDescent)):
        raise TypeError(f"halt: expected an AdaptiveHalt or an EnergyDescent, got {describe(halt)}")
    return halt


def check_served(halt: Module) -> None:
    """Refuse settings, which may change between runs, that have no meaning for single samples."""
    if getattr(halt, "keep_trace", False):
        raise ValueError("halt: expected keep_trace=False, because a sample's result has no trace, got True")
    if isinstance(halt, EnergyDescent):
        if isinstance(halt.step_size, Tensor) and halt.step_size.dim() > 0:
            raise ValueError(
                "halt: expected one step_size for all samples, because a batcher has no fixed batch, got "
                f"{describe(halt.step_size)}"
            )
        return
    policy = halt.policy
    if policy.traced:
        mode = "in training mode keeps all steps; call halt.eval()" if policy.training else "keeps all steps"
        raise ValueError(
            f"halt: expected a policy without a trace, got {type(policy).__name__}, which {mode}"
        )
    if isinstance(getattr(policy, "n", None), Tensor):
        raise ValueError(
            f"halt: expected one number of steps for all samples, because a batcher has no fixed batch, got "
            f"{type(policy).__name__} with {describe(policy.n)}"
        )


def make_engine(halt: Module, form: Form, slots: int, chunk: int) -> Engine:
    """Return the engine for samples of this form, for the modes of torch of this moment.

    `slots`: the number of rows of a block. `chunk`: the number of rows that one call runs to its end, where
    that is the way.
    """
    if type(halt) is AdaptiveHalt and _is_stepped(halt, form):
        state, *inputs = form.trees(form.rows)
        problem = halt._problem(state, tuple(inputs), None, probe=False)
        if problem.compact is False and halt.compact is not False:
            raise ValueError(
                "halt: expected rows that do not depend on each other, got a batch normalisation that takes "
                "its statistics over the rows of a block; call halt.eval()"
            )
        if problem.watch is None and problem.kinds is None and problem.input_kinds is None:
            fused = fused_decision(problem.policy, problem.run)
            stepped = fused if fused is None or not KERNELS[fused.policy].compiled_only else None
            if _asks_for_number(halt):
                return StageEngine(halt, form, problem, stepped, slots)
            try:
                find(problem, fused, halt.step)
            except NotServed:
                return SlotEngine(halt, form, problem, stepped, slots)
    return ChunkEngine(halt, form, chunk)


def _is_stepped(halt: nn.Module, form: Form) -> bool:
    """Whether an engine may call the step itself."""
    own: Any = halt.__dict__
    return (
        form.is_ordinary
        and not on_cuda(form.device)
        and not on_reference()
        and "forward" not in own
        and not any(own[name] for name in _HOOKS)
    )


def _asks_for_number(halt: Any) -> bool:
    """Whether a function depends on the number of the step, which rows of one block do not share."""
    functions = (halt.step, halt.readout, getattr(halt.policy, "head", None))
    return any(
        isinstance(f, nn.ModuleList) or form_of(f).place is not None for f in functions if f is not None
    )
