"""Loops that were run before: a call that differs in nothing but its tensors is set up at once.

What `AdaptiveHalt` and `FusedRun` find out before the first step takes longer than a small step. After a run
in the compiled loop, a `KnownLoop` remembers it, and asks whether what it followed from is still so:
functions, settings, modes, and the form of the tensors (csrc/bindings/known_loop.h). What turns out to be
unusual in the course of a run goes to a `FusedRun` that is made then.
"""

from __future__ import annotations

from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from adaptcomp_ext import _C
from adaptcomp_ext.nn._tree import form
from adaptcomp_ext.nn.halting import batch_statistics
from adaptcomp_ext.nn.halting.cost_model import never
from adaptcomp_ext.nn.halting.fused import SMALL, FusedRun
from adaptcomp_ext.nn.halting.fusing import begin, fused_decision
from adaptcomp_ext.nn.halting.known import Known, computes_settings
from adaptcomp_ext.nn.halting.loop import explain_write
from adaptcomp_ext.nn.halting.policy import Run
from adaptcomp_ext.nn.result import HaltResult
from adaptcomp_ext.ops import halting
from adaptcomp_ext.ops._backend import on_reference
from adaptcomp_ext.ops._transforms import enter, is_in_a_function

_CPU = torch.device("cpu")
_ANY = 1 << 62  # bytes


def _settings(halt: Any) -> tuple[Any, ...]:
    return (
        *(halt.max_steps, halt.min_steps, halt.compact, halt.check_rows, halt.training),
        *(halt.keep_trace, halt.compile_step, halt._together),
    )


class KnownLoop:
    """A run of an `AdaptiveHalt` in the compiled loop, which `run` repeats on other tensors."""

    def __init__(self, halt: Any, known: Known, run: FusedRun, first: Tensor, single: bool) -> None:
        problem, fused = run.problem, run.fused
        self.training = run.training
        self.settings = _settings(halt)
        self.mode = known.moded is not None and known.moded.training
        self.is_tuple = form(problem.structure) == 1
        self.scalar = problem.run.scalar
        self.max_steps, self.min_steps = problem.run.max_steps, problem.run.min_steps
        self.policy, self.has_head, self.carried = fused.policy, fused.head is not None, fused.carried
        self.single = single  # only runs of one row, which need no check that rows do not depend on rows
        self.first_read = problem.first_read
        self.loop = _C.known_loop(
            state=problem.like,
            inputs=run.inputs,
            schedule=never() if run.training else problem.schedule(),
            readout=first,
            apart=problem.readout is not None,
            weighted=problem.policy.weighted,
            wide=self.scalar == torch.float64,
            policy=fused.policy,
            has_head=self.has_head,
            reads_logits=halting.KERNELS[fused.policy].reads_logits,
            min_steps=self.min_steps,
            max_steps=self.max_steps,
        )

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Become None in a copy, which has other modules, and in a pickle."""
        return type(None), ()

    def run(self, halt: Any, known: Known, state: Any, inputs: tuple[Any, ...]) -> HaltResult | None:
        """Run every row until it has ended, or return None if something has changed."""
        step: Any = halt._modules.get("step")  # faster than the look-up as an attribute
        if step is None:
            step = halt.step
        policy = halt._modules["policy"]
        first = state[0] if self.is_tuple and type(state) is tuple and state else state
        training = self.training
        if (
            known.step is not step
            or known.policy is not policy
            or known.readout is not halt.readout
            or (known.moded is not None and known.moded.training) is not self.mode
            or _settings(halt) != self.settings
            or not isinstance(first, Tensor)
            or not first.dim()
            or (training and known.unwalked)
            or on_reference()
            or (not training and is_in_a_function())
            or enter("AdaptiveHalt", (state, inputs)) is not None
        ):
            return None
        rows = first.shape[0]
        if self.single and rows != 1:
            return None
        constants = Run(rows, _CPU, self.min_steps, self.max_steps, None, self.scalar)
        fused = fused_decision(policy, constants)
        if (
            fused is None
            or fused.policy != self.policy
            or fused.head is not known.head  # which may take more than the state
            or fused.carried is not self.carried
        ):
            return None
        carry = begin(policy, constants, self.carried)
        checks = _Checks(halt, fused, state, inputs, self.first_read)
        try:
            found = self.loop.run(
                repeat(known.compiled.one(step) if halt.compile_step else step, self.max_steps),
                state,
                inputs,
                halt.readout,
                fused.head,
                fused.threshold,
                fused.signal,
                fused.parameter,
                carry[0] if self.carried else None,
                torch.is_inference_mode_enabled(),
                halting.apply_node if training else None,
                SMALL if training else _ANY,
                checks,
            )
        except RuntimeError as error:
            if training:
                explain_write(error, policy)
            raise
        except ValueError as error:
            batch_statistics.explain(error, halt.compact)
            raise
        if found is None:
            return None
        results, output, steps, cost, status, broken = found
        if broken or checks.run is not None:
            run = checks.made()
            run.results, run.steps, run.cost, run.status = results, steps, cost, status
            run.output = output
            return run.result(broken)
        return HaltResult(
            results[0] if output is None else output,
            tuple(results) if self.is_tuple else results[0],
            steps,
            steps.to(self.scalar) if cost is None else cost,
            status,
            None,
            None,
        )


class _Checks:
    """The `FusedRun` of a known loop, which is made when something unusual asks for it."""

    __slots__ = ("arguments", "run")

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.run: FusedRun | None = None

    def made(self) -> FusedRun:
        if self.run is None:
            halt, fused, state, inputs, first_read = self.arguments
            problem = halt._problem(state, inputs, None, probe=False)
            problem.first_read = first_read
            self.run = FusedRun(problem, fused)
            self.run.output_dtype = first_read[1]
        return self.run

    def __getattr__(self, name: str) -> Any:
        return getattr(self.made(), name)


def remember(halt: Any, known: Known, run: FusedRun) -> KnownLoop | None:
    """Return the run as one that can be repeated, if it can."""
    problem, fused, first = run.problem, run.fused, run.first
    if (
        first is None  # the loop is in Python
        or not problem.ordinary
        or problem.watch is not None
        or problem.run.sample_ids is not None
        or problem.readout_kind not in (None, Tensor)
        or (problem.policy.weighted and first.dtype not in (torch.float32, torch.float64))
        or known.norms  # which may change `compact`
        or isinstance(known.step, nn.ModuleList)
        or not known.plain
        or fused.head is not known.head
        or (run.training and known.unwalked)
        or computes_settings(halt)
    ):
        return None
    mode = known.moded is not None and known.moded.training
    combination = (problem.state[0].dtype, halt.training, mode)
    checked = not halt.check_rows or halt.compact is False or combination in known.apart
    if not checked and problem.run.batch != 1:
        return None
    return KnownLoop(halt, known, run, first, single=not checked)
