"""Strategies of compaction out of place, with gradients, for the halting loop."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from adaptcomp_ext.nn._active import ActiveCount, bucket
from adaptcomp_ext.nn.halting.block import Problem
from adaptcomp_ext.nn.halting.cost_model import at_once
from adaptcomp_ext.ops import halting
from adaptcomp_ext.ops._backend import on_cuda, on_reference


class Packing(ABC):
    """The interface of a strategy."""

    has_padding = False
    """Whether rows have stayed in the block after their end."""

    @abstractmethod
    def advance(
        self,
        results: halting.Results,
        row: Tensor,
        decision: halting.Fused,
        leaves: list[Tensor],
        carried: list[Tensor],
        step: halting.Step,
    ) -> halting.EndedAndPacked:
        """End the rows that halt, and compact the others, with the `carried` tensors."""


class Exact(Packing):
    """Ends and compacts rows in one call and one autograd node: for the kernels on the CPU."""

    def __init__(self, problem: Problem) -> None:
        # With gradients halted rows leave at once: see `Padded`.
        self._schedule = at_once() if problem.as_in_training else problem.schedule()

    def advance(
        self,
        results: halting.Results,
        row: Tensor,
        decision: halting.Fused,
        leaves: list[Tensor],
        carried: list[Tensor],
        step: halting.Step,
    ) -> halting.EndedAndPacked:
        """End and compact in one call: see `Packing`."""
        rows = row.shape[0]
        done = halting.end_and_pack(results, row, decision, leaves, carried, step, self._schedule.least(rows))
        if done.row.shape[0] < rows:
            self._schedule.packed()
        elif 0 < done.running < rows:
            self._schedule.kept(rows - done.running)
            self.has_padding = True
        return done


class Padded(Packing):
    """Ends rows, and compacts into a block that may be larger than the number of active rows.

    It is for CUDA, the reference, and training with compact=False. Halted rows in the block are stepped
    again. Their gradient is zero, but zero times the infinity of a step that diverges after their halt would
    be NaN. With gradients they are therefore replaced by copies of active rows, which costs a compaction, so
    that keeping halted rows never pays.
    """

    def __init__(self, problem: Problem) -> None:
        run = problem.run
        self._stay = problem.compact is False
        self._differentiable = problem.as_in_training
        self._active = ActiveCount(run.batch, run.device, problem.lag) if on_cuda(run.device) else None
        self._running = run.batch
        self.has_padding = self._active is not None

    def advance(
        self,
        results: halting.Results,
        row: Tensor,
        decision: halting.Fused,
        leaves: list[Tensor],
        carried: list[Tensor],
        step: halting.Step,
    ) -> halting.EndedAndPacked:
        """End the rows, then compact where the block can be smaller: see `Packing`."""
        node, weight, readout, increments = step.node, step.weight, step.readout, step.increments
        flag, running = halting.halt_rows(
            *(results, row, decision, leaves),
            step=step.step,
            min_steps=step.min_steps,
            max_steps=step.max_steps,
            weight=weight,
            readout=readout,
            increments=increments,
            running=None if self._active is None else self._active.running,
            sample_ids=step.sample_ids,
            tested=step.tested,
            carry=None if node is None else node.after,
            weight_out=None if node is None else node.weight,
            read_leaf=step.read_leaf,
            spent=None if node is None else node.before,
        )
        rows = row.shape[0]
        if self._active is not None:
            running = self._active.bound()
            if rows > 0 and self._active.none_ran():
                # The host learns late that no row is active, and has stepped once more on zeros: this step
                # takes no part in the gradient.
                return halting.EndedAndPacked(row, 0, leaves, carried)
            if step.step == step.max_steps:
                running = 0
            size = rows if self._stay else min(rows, bucket(running))
            # The host may not know yet that a row has ended; before min_steps only rows that are not finite
            # end.
            fewer = running < self._running
            ended = fewer or not self._active.exact or rows == 0
            halted = fewer or (ended and step.step >= step.min_steps)
            packs = running > 0 and (size < rows or (self._differentiable and halted))
        else:
            ended = running < self._running or rows == 0  # an empty batch has a gradient, too
            size = rows if self._stay else running
            packs = 0 < running < rows and (size < rows or (ended and self._differentiable))
        self._running = running
        plan = halting.plan_packing(flag, row, size) if packs else None
        if (
            plan is not None
            or node is not None
            or (self._differentiable and (ended or weight is not None or increments))
        ):
            leaves, carried = halting.pack_rows(
                *(results, row, flag, plan, leaves, carried),
                weight=weight,
                readout=readout,
                increments=increments,
                act=node,
            )
        if plan is not None:
            row = plan.row
            self.has_padding = self.has_padding or size > running
        elif ended and running > 0:
            row = torch.where(flag == halting.RUNNING, row, -1)
            self.has_padding = True
        return halting.EndedAndPacked(row, running, leaves, carried)


def choose(problem: Problem) -> Packing:
    """Choose the strategy of a run."""
    if on_cuda(problem.run.device) or on_reference() or (problem.as_in_training and problem.compact is False):
        return Padded(problem)
    return Exact(problem)
