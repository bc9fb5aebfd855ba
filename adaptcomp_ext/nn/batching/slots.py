"""An engine that refills slots at every step: rows that began at different times share a block.

The rows of a block have taken different numbers of steps. So the kernel decides about each row with a step
number of its own, and a policy in Python gets `View.step` as a tensor. What a policy carries is moved with
the rows (csrc/bindings/slot_block.h).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from adaptcomp_ext import _C
from adaptcomp_ext.nn._tree import form as form_code
from adaptcomp_ext.nn.batching.buffer import put
from adaptcomp_ext.nn.batching.engine import Engine
from adaptcomp_ext.nn.batching.form import Form
from adaptcomp_ext.nn.halting.adaptive_halt import AdaptiveHalt
from adaptcomp_ext.nn.halting.block import Problem
from adaptcomp_ext.nn.halting.calling import PLAIN, Calls
from adaptcomp_ext.nn.halting.fusing import begin
from adaptcomp_ext.nn.halting.policy import (
    Decision,
    View,
    check_decision,
    check_logits,
    decision_of,
    explain_call,
    plain_decision,
)
from adaptcomp_ext.nn.result import HaltResult
from adaptcomp_ext.ops import halting
from adaptcomp_ext.ops._backend import compute_dtype, contiguous
from adaptcomp_ext.ops._plain import dressed, with_memory

_make: Any = partial(tuple.__new__, HaltResult)  # as HaltResult._make, in a fifth of the time
_UNUSUAL = -1  # what `advance` returns where readout or logits do not have the expected form


class SlotEngine(Engine):
    """Runs one step on all rows, and gives the slots of those that have halted to the next samples.

    Parameters
    ----------
    halt : AdaptiveHalt
        Its step is no ModuleList.
    form : Form
        Plain tensors on the CPU.
    problem : Problem
        That of a batch of one row of this form.
    fused : Fused or None
        The policy's decision in the kernel's terms; None: it decides in Python.
    slots : int
        Number of slots.
    """

    def __init__(
        self, halt: AdaptiveHalt, form: Form, problem: Problem, fused: halting.Fused | None, slots: int
    ) -> None:
        self._halt, self._form, self._problem, self._fused = halt, form, problem, fused
        self._slots = slots
        self._leaves = form.counts[0]
        self._row, self._row_step, self._ids, steps = (
            torch.zeros(slots, dtype=torch.int64) for _ in range(4)
        )
        self._run = problem.run = problem.run._replace(batch=slots, sample_ids=self._ids)
        self._output_dtype: torch.dtype | None = None
        self._is_first = True
        self._apart = False  # whether the rows are known not to depend on each other
        self._fresh = 0  # number of rows that take their first step next
        self._fields: tuple[bool, bool, bool] | None = None
        # A head and a readout may take the inputs, but not the number of the step.
        self._calls = Calls()
        known = halt._known(halt.step, problem.policy, halt.readout)
        self._step = partial(self._calls._step, halt._called_step(known), PLAIN, 0)
        problem.readout = self._calls.after("readout", problem.readout)
        if fused is not None and fused.head is not None:
            self._fused = fused = fused._replace(head=self._calls.after("head", fused.head))
        blocks = form.new_blocks(slots)
        self._block = _C.slot_block(blocks=blocks, trees=form.codes, leaves=self._leaves, slots=slots)
        policy = halting.GIVEN if fused is None else fused.policy
        self._block.configure(
            [
                *(self._row, self._row_step, self._ids, steps, torch.zeros(slots, dtype=torch.int8)),
                form.new_blocks(slots)[: self._leaves],
                self._run.scalar == torch.float64,
                *(self._run.min_steps, self._run.max_steps, policy),
                fused is not None and fused.head is not None,
                fused is not None and halting.KERNELS[policy].reads_logits,
                *((0.0, 0, False) if fused is None else (fused.threshold, fused.parameter, fused.carried)),
            ]
        )
        if fused is not None and fused.has_cost:
            self._block.use_totals(torch.zeros(slots, dtype=self._run.scalar), None)

    @property
    def room(self) -> int:
        """Number of free slots."""
        return self._slots - self.held

    def put(self, sample: Any, key: int, sample_id: int) -> None:
        """Copy a sample to a free slot."""
        put(self._block, self._form, sample, key, sample_id)
        self._fresh += 1
        self.held += 1

    def drop(self) -> None:
        """Forget all rows, after an error."""
        self._block.clear()
        self.held = self._fresh = 0

    def advance(self) -> list[tuple[int, Any]]:
        """Run one step on all rows."""
        block, problem = self._block, self._problem
        rows = block.settle()
        state, inputs = self._tensors(rows)
        if not self._apart and rows > 1:
            # The probe of a call, which raises if rows depend on each other.
            self._halt._problem(problem.tree(state), problem.arguments(inputs), None)
            self._apart = True
        previous = problem.tree(state)
        arguments = problem.arguments(inputs)
        current = self._step(previous, *arguments)
        del inputs, state
        leaves = problem.leaves(current, rows)
        if problem.kinds is not None:
            current = problem.tree(leaves)
        fused, apart = self._fused, problem.readout is not None
        readout: Any = None
        logits, decision = None, None
        carry: list[Tensor] = []
        if fused is None:
            readout = problem.read(current, leaves, rows)
            decision, carry = self._decide(rows, current, previous, readout, arguments)
        else:
            if apart:
                readout = self._call("readout", problem.readout, current)
            if fused.head is not None:
                logits = self._call("head", fused.head, current)
        if self._is_first:
            self._first(readout, leaves, decision)
        if not apart:
            readout = None
        del current, previous, arguments  # so that the block may be written to
        self._calls.forget()
        in_inference = torch.is_inference_mode_enabled()
        done = block.advance(leaves, readout, logits, decision, carry, in_inference)
        if done == _UNUSUAL:
            readout, logits = self._mend(readout, logits, rows)
            done = block.advance(leaves, readout, logits, decision, carry, in_inference)
            assert done != _UNUSUAL, "readout and logits were mended"
        self._is_first = False
        self._fresh = 0
        self.calls += 1
        self.row_steps += rows
        self.capacity += self._slots
        return [] if done is None else self._results(*done)

    def _tensors(self, rows: int) -> tuple[list[Tensor], list[Tensor]]:
        tensors = _first_rows(self._block.blocks(), rows)
        return tensors[: self._leaves], tensors[self._leaves :]

    def _call(self, role: str, function: Any, state: Any) -> Any:
        try:
            return function(state)
        except (TypeError, AttributeError) as error:
            explain_call(role, function, state, error)
            raise

    def _decide(
        self, rows: int, current: Any, previous: Any, readout: Tensor, inputs: tuple[Any, ...]
    ) -> tuple[tuple[Tensor | None, ...], list[Tensor]]:
        """Let the policy decide in Python. Return the decision for the kernel, and what is carried."""
        problem, policy = self._problem, self._problem.policy
        # Copies: the policy may carry them, and the block moves its own.
        row, step = self._row[:rows].clone(), self._row_step[:rows].clone()
        carry = tuple(_first_rows(self._block.carried(), rows))
        dressed_readout = dressed(readout, problem.readout_kind)
        whole = View(self._run, step, current, previous, dressed_readout, row, carry, inputs)
        if self._fresh == 0:
            decision = self._ask(whole)
        else:
            fresh = (step == 1).nonzero()[:, 0]
            ids = self._ids[row[fresh]]
            start = begin(policy, self._run._replace(batch=len(fresh), sample_ids=ids), False)
            if len(fresh) == rows:
                decision = self._ask(_with(whole, start))
            elif [t.shape[1:] for t in start] == [t.shape[1:] for t in carry]:
                merged = tuple(
                    [c.index_copy(0, fresh, s.to(c.dtype)) for c, s in zip(carry, start, strict=True)]
                )
                decision = self._ask(_with(whole, merged))
            else:
                # The policy begins with other tensors than it carries on: it decides about its rows' first
                # step apart from the others.
                old = (step > 1).nonzero()[:, 0]
                decision = _joined(
                    torch.cat([fresh, old]),
                    self._ask(_part(whole, fresh, start)),
                    self._ask(_part(whole, old, tuple([c[old] for c in carry]))),
                )
        fields = check_decision(decision, whole)
        if fields != (self._fields or fields):
            raise ValueError(
                "decide: expected the same fields of the Decision (weight, cost, log_prob) at every step"
            )
        self._fields = fields
        scalar, weighted = self._run.scalar, policy.weighted
        if weighted and decision.weight is None:
            raise ValueError("decide: expected a weight in the Decision of a weighted policy, got None")
        numbers = (decision.weight if weighted else None, decision.cost, decision.log_prob)
        weight, cost, log_prob = (None if t is None else t.to(scalar) for t in numbers)
        return (decision.halt, weight, decision.logits, cost, log_prob), list(decision.carry)

    def _ask(self, view: View) -> Decision:
        if not self._problem.policy._decides_by_step:
            return self._ask_once(view)
        steps = view.step.unique().tolist()
        rows = [(view.step == step).nonzero()[:, 0] for step in steps]
        parts = [_part(view, at, tuple([c[at] for c in view.carry])) for at in rows]
        for part, step in zip(parts, steps, strict=True):
            part.step = step
        return _joined(torch.cat(rows), *map(self._ask_once, parts))

    def _ask_once(self, view: View) -> Decision:
        decision: Decision = plain_decision(decision_of(self._problem.policy, view))
        check_decision(decision, view)
        return decision

    def _first(self, readout: Any, leaves: list[Tensor], decision: tuple[Tensor | None, ...] | None) -> None:
        """Allocate what the first readout and the first decision decide."""
        problem, run = self._problem, self._run
        weighted, apart = problem.policy.weighted, problem.readout is not None
        if self._fused is not None:
            problem.first_read = None
            readout = problem.check_readout(readout if apart else leaves[0], leaves[0].shape[0])
        first = contiguous("readout", readout)
        self._output_dtype = first.dtype
        output = None
        if weighted or apart:
            dtype = compute_dtype(first.dtype) if weighted else first.dtype
            output = torch.zeros((self._slots, *first.shape[1:]), dtype=dtype)
        self._block.use_first(leaves, first if apart else None, output, weighted)
        if decision is not None:
            numbers = (
                None if t is None else torch.zeros(self._slots, dtype=run.scalar) for t in decision[3:]
            )
            self._block.use_totals(*numbers)

    def _mend(self, readout: Any, logits: Any, rows: int) -> tuple[Tensor | None, Tensor | None]:
        """Raise if readout or logits are wrong; make them contiguous if that is all."""
        if self._problem.readout is not None:
            readout = _readable("readout", self._problem.check_readout(readout, rows))
        if logits is not None:
            logits = _readable("head", check_logits(logits, rows, self._run.device))
        return readout, logits

    def _results(self, keys: list[int], tensors: list[Tensor | None]) -> list[tuple[int, HaltResult]]:
        """Return keys and results of the rows that have ended."""
        self.held -= len(keys)
        problem = self._problem
        output, *leaves, steps, status, cost, log_prob = tensors
        assert steps is not None and status is not None
        columns = [leaf.unbind() for leaf in leaves if leaf is not None]
        problem.kinds = problem.result_kinds
        states: Iterable[Any]
        if form_code(problem.structure) == 0 and problem.kinds is None:
            states = columns[0]
        else:
            states = [problem.tree(list(row)) for row in zip(*columns, strict=True)]
        outputs: Iterable[Any] = columns[0]
        if output is not None:
            if output.dtype != self._output_dtype:
                output = output.to(self._output_dtype)
            outputs = dressed(output, problem.readout_kind).unbind()
        if cost is None:
            cost = steps.to(self._run.scalar)
        fields = (
            *(outputs, states, steps.unbind(), cost.unbind(), status.unbind()),
            repeat(None),
            repeat(None) if log_prob is None else log_prob.unbind(),
        )
        return list(zip(keys, map(_make, zip(*fields, strict=False)), strict=True))


def _first_rows(blocks: list[Tensor], rows: int) -> list[Tensor]:
    return [block if block.shape[0] == rows else block.narrow(0, 0, rows) for block in blocks]


def _readable(name: str, tensor: Tensor) -> Tensor:
    return with_memory(name, contiguous(name, tensor))


def _with(view: View, carry: tuple[Tensor, ...]) -> View:
    return replace(view, carry=carry)


def _part(view: View, rows: Tensor, carry: tuple[Tensor, ...]) -> View:
    """Return the view of some rows of a block."""
    state, previous, inputs = (
        pytree.tree_map(lambda t: t if t is None else t[rows], tree)
        for tree in (view.state, view.previous, view.inputs)
    )
    return View(view.run, view.step[rows], state, previous, view.readout[rows], view.row[rows], carry, inputs)


def _joined(rows: Tensor, *parts: Decision) -> Decision:
    """Return the decision for all rows of a block from those for its parts, whose rows are `rows`."""
    if len({len(part.carry) for part in parts}) > 1:
        raise ValueError("Decision.carry: expected the same number of tensors at every step")

    def join(tensors: tuple[Any, ...]) -> Any:
        if all(t is None for t in tensors):
            return None
        if any(t is None for t in tensors):
            raise ValueError(
                "decide: expected the same fields of the Decision (weight, cost, log_prob) at every step"
            )
        whole = torch.cat(tensors)
        return torch.empty_like(whole).index_copy_(0, rows, whole)

    names = ("halt", "weight", "cost", "log_prob", "logits")
    fields = {name: join(tuple([getattr(part, name) for part in parts])) for name in names}
    carry = tuple([join(tensors) for tensors in zip(*[part.carry for part in parts], strict=True)])
    return Decision(**fields, carry=carry)
