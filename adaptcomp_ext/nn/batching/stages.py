"""An engine for steps that differ by their number: rows of one stage are run together.

The rows that have taken the same number of steps wait for each other in a pool. A full block is run at the
latest stage that has one; where none has, samples are accepted first, and then the fullest pool is run. So
blocks stay full, although rows leave at different stages.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from adaptcomp_ext.nn.batching.buffer import RowBuffer
from adaptcomp_ext.nn.batching.engine import Engine
from adaptcomp_ext.nn.batching.form import Form
from adaptcomp_ext.nn.halting.adaptive_halt import AdaptiveHalt
from adaptcomp_ext.nn.halting.block import Problem
from adaptcomp_ext.nn.halting.calling import call_at, form_of
from adaptcomp_ext.nn.halting.fusing import begin
from adaptcomp_ext.nn.halting.policy import (
    View,
    check_decision,
    decision_of,
    head_logits_of,
    plain_decision,
)
from adaptcomp_ext.nn.result import HaltResult
from adaptcomp_ext.ops import halting
from adaptcomp_ext.ops._backend import compute_dtype
from adaptcomp_ext.ops._plain import dressed

STAGES = 16
"""Rows that are in flight at most, for each slot, however many stages there are."""

_PATIENCE = 16
"""Blocks that a row waits for others at most, for each stage where rows wait."""


@dataclass(slots=True)
class _Rows:
    """Rows that wait for a stage."""

    keys: list[int]
    tensors: list[Tensor]
    """Sample ids; state, inputs, output and totals so far, and the policy's carry."""
    since: int
    """The number of blocks that had been run when the first of them came."""


class StageEngine(Engine):
    """Runs the step of one number on the rows that have come to it.

    Parameters
    ----------
    halt : AdaptiveHalt
        Its step, readout or head is a ModuleList or asks for the number of the step.
    form : Form
    problem : Problem
        That of a batch of one row of this form.
    fused : Fused or None
        The policy's decision in the kernel's terms; None: it decides in Python.
    slots : int
        Number of rows of a block.
    """

    def __init__(
        self, halt: AdaptiveHalt, form: Form, problem: Problem, fused: halting.Fused | None, slots: int
    ) -> None:
        self._halt, self._form, self._problem, self._fused = halt, form, problem, fused
        self._slots, self._run = slots, problem.run
        self._readout = problem.readout
        self._most = slots * min(self._run.max_steps, STAGES)
        self._new = RowBuffer(form, slots)
        self._pools: dict[int, _Rows] = {}  # by the number of steps that the rows have taken
        self._apart = False
        self._n_state, self._n_inputs = form.counts[0], sum(form.counts[1:])
        self._readout_dtype: torch.dtype | None = None
        self._fields: tuple[bool, bool, bool] | None = None

    @property
    def room(self) -> int:
        """Number of samples that are taken now."""
        return min(self._slots - len(self._new), self._most - self.held)

    def put(self, sample: Any, key: int, sample_id: int) -> None:
        """Accept a copy of a sample."""
        self._new.put(sample, key, sample_id)
        self.held += 1

    def drop(self) -> None:
        """Forget all rows, after an error."""
        self._new.clear()
        self._pools.clear()
        self.held = 0

    def advance(self) -> list[tuple[int, Any]]:
        """Run the step of one number on a block of the rows that wait for it."""
        taken = self._choose()
        rows = self._take_new() if taken == 0 else self._take(taken)
        self.calls += 1
        self.row_steps += len(rows.keys)
        self.capacity += self._slots
        return self._step(rows, taken + 1)

    def _choose(self) -> int:
        """Return the number of steps that the rows to be run have taken."""
        waiting = {taken: len(rows.keys) for taken, rows in self._pools.items()}
        patience = _PATIENCE * (len(waiting) + 1)
        for taken, rows in self._pools.items():
            if self.calls - rows.since > patience:
                return taken
        full = [taken for taken, count in waiting.items() if count >= self._slots]
        if full:
            return max(full)
        if len(self._new):
            waiting[0] = len(self._new)
        return max(waiting, key=lambda taken: (waiting[taken], taken))

    def _take_new(self) -> _Rows:
        leaves, keys, ids = self._new.take()
        return _Rows(keys, [ids, *leaves], self.calls)

    def _take(self, taken: int) -> _Rows:
        rows = self._pools.pop(taken)
        count = self._slots
        if len(rows.keys) > count:
            rest = [t[count:] for t in rows.tensors]
            self._pools[taken] = _Rows(rows.keys[count:], rest, self.calls)
            return _Rows(rows.keys[:count], [t[:count] for t in rows.tensors], rows.since)
        return rows

    def _step(self, rows: _Rows, n: int) -> list[tuple[int, HaltResult]]:
        """Run step n, give the rows that halt their results, and let the others wait for the next step."""
        problem, policy, halt = self._problem, self._problem.policy, self._halt
        count = len(rows.keys)
        ids, *tensors = rows.tensors
        state, tensors = tensors[: self._n_state], tensors[self._n_state :]
        inputs, tensors = tensors[: self._n_inputs], tensors[self._n_inputs :]
        previous, arguments = problem.tree(state), problem.arguments(inputs)
        if not self._apart and n == 1 and count > 1:
            halt._problem(previous, arguments, None)  # its probe raises if rows depend on each other
            self._apart = True
        problem._expect(state)
        known = halt._known(halt.step, self._problem.policy, halt.readout)
        step = halt._called_step(known)
        if isinstance(halt.step, nn.ModuleList):
            step = step[n - 1]
        asks = form_of(step).has_n(len(arguments))
        current = step(previous, *arguments, n=n) if asks else step(previous, *arguments)
        leaves = problem.leaves(current, count)
        shapes = problem.shapes
        changed = [leaf.shape[1:] for leaf in leaves] != shapes
        problem.change_shapes(leaves, n)
        if problem.kinds is not None or changed:
            current = problem.tree(leaves)
        if self._readout is not None:
            problem.readout = lambda tree: call_at("readout", self._readout, tree, arguments, n)
        readout = problem.read(current, leaves, count)

        run = self._run._replace(batch=count, sample_ids=ids)
        weighted, apart = policy.weighted, self._readout is not None
        row = torch.arange(count, device=run.device)
        output: Tensor | None = None
        totals: list[Tensor] = []
        if n == 1:
            carry = begin(policy, run, self._fused is not None and self._fused.carried)
        else:
            if weighted:
                output, *tensors = tensors
            assert self._fields is not None
            sums = sum(self._fields[1:])
            totals, carry = [t.clone() for t in tensors[:sums]], tuple(tensors[sums:])
        increments: list[Tensor] = []
        weight = tested = None
        decided: halting.Fused
        if self._fused is not None:
            decided = self._fused
            if decided.head is not None:
                head = decided.head
                signal = head_logits_of(
                    lambda tree: call_at("head", head, tree, arguments, n), current, count, run.device, head
                )
                decided = decided._replace(signal=signal)
            fields = (weighted, decided.has_cost, False)
            kept: list[Tensor] = [carry[0].clone()] if decided.carried else []
        else:
            read = dressed(readout, problem.readout_kind)
            view = View(run, n, current, previous, read, row, carry, arguments)
            decision = plain_decision(decision_of(policy, view))
            fields = check_decision(decision, view)
            if weighted and decision.weight is None:
                raise ValueError("decide: expected a weight in the Decision of a weighted policy, got None")
            decided = halting.Fused(halting.GIVEN, decision.halt)
            increments = [t.to(run.scalar) for t in (decision.cost, decision.log_prob) if t is not None]
            weight = decision.weight.to(run.scalar) if weighted else None
            tested, kept = decision.logits, list(decision.carry)
        if fields != (self._fields or fields):
            raise ValueError(
                "decide: expected the same fields of the Decision (weight, cost, log_prob) at every step"
            )
        self._fields, self._readout_dtype = fields, readout.dtype
        if n == 1:
            totals = [torch.zeros(count, dtype=run.scalar, device=run.device) for each in fields[1:] if each]
        if weighted:
            wide = compute_dtype(readout.dtype)
            output = readout.new_zeros(readout.shape, dtype=wide) if output is None else output.clone()
        elif apart:
            output = torch.empty_like(readout)
        results = halting.Results(
            steps=torch.zeros(count, dtype=torch.int64, device=run.device),
            status=torch.zeros(count, dtype=torch.int8, device=run.device),
            leaves=[torch.empty_like(leaf) for leaf in leaves],
            totals=totals,
            output=output,
        )
        flag, _ = halting.halt_rows(
            *(results, row, decided, leaves),
            step=n,
            min_steps=run.min_steps,
            max_steps=run.max_steps,
            weight=weight,
            readout=readout if output is not None else None,
            increments=increments,
            sample_ids=ids,
            tested=tested,
            carry=kept[0] if self._fused is not None and kept else None,
            read_leaf=problem.read_leaf(readout, leaves),
        )
        goes_on = (flag == halting.RUNNING).nonzero()[:, 0]
        if len(goes_on):
            outputs = [results.output] if weighted and results.output is not None else []
            waiting = [ids, *leaves, *inputs, *outputs, *results.totals, *kept]
            self._wait(n, rows.keys, goes_on, waiting)
        if len(goes_on) == count:
            return []
        return self._results(results, rows.keys, (flag != halting.RUNNING).nonzero()[:, 0], fields)

    def _wait(self, taken: int, keys: list[int], at: Tensor, tensors: list[Tensor]) -> None:
        """Let rows of a block wait for their next step."""
        moved = [t.index_select(0, at) for t in tensors]
        names = [keys[i] for i in at.tolist()]
        pool = self._pools.get(taken)
        if pool is not None:
            pool.keys += names
            pool.tensors = [torch.cat(pair) for pair in zip(pool.tensors, moved, strict=True)]
        else:
            self._pools[taken] = _Rows(names, moved, self.calls)

    def _results(
        self, results: halting.Results, keys: list[int], at: Tensor, fields: tuple[bool, bool, bool]
    ) -> list[tuple[int, HaltResult]]:
        problem = self._problem
        columns = [leaf.index_select(0, at) for leaf in results.leaves]
        names = [keys[i] for i in at.tolist()]
        self.held -= len(names)
        problem.kinds = problem.result_kinds
        states = [problem.tree(list(row)) for row in zip(*[c.unbind() for c in columns], strict=True)]
        output = columns[0]
        if results.output is not None:
            assert self._readout_dtype is not None
            output = results.output.index_select(0, at).to(self._readout_dtype)
        steps = results.steps.index_select(0, at)
        totals = [t.index_select(0, at) for t in results.totals]
        cost = totals.pop(0) if fields[1] else steps.to(self._run.scalar)
        log_probs: Iterable[Tensor | None] = totals.pop(0).unbind() if fields[2] else repeat(None)
        outputs = dressed(output, problem.readout_kind).unbind()
        status = results.status.index_select(0, at).unbind()
        columns_of_all = (outputs, states, steps.unbind(), cost.unbind(), status, repeat(None), log_probs)
        return list(zip(names, map(HaltResult._make, zip(*columns_of_all, strict=False)), strict=True))
