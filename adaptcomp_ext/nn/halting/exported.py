"""`AdaptiveHalt` in an exported program: a loop of torch's own operators over the whole batch.

An exported program has no kernels of this package and no sizes that data decide. So rows that have halted
stay in the block, masked, and the loop ends with the last active row. The arithmetic is that of the
reference. Steps until the first at which a row may halt are not part of the loop.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adaptcomp_ext.nn._tree import flatten, unflatten
from adaptcomp_ext.nn.halting.calling import call_at, form_of
from adaptcomp_ext.nn.halting.fusing import begin
from adaptcomp_ext.nn.halting.policy import Run, View, check_decision, decision_of
from adaptcomp_ext.nn.result import HaltResult
from adaptcomp_ext.ops._backend import compute_dtype
from adaptcomp_ext.reference._broadcast import over
from adaptcomp_ext.reference.halting import (
    HALTED,
    MAX_STEPS,
    NONFINITE,
    finite_rows,
    logit_rows,
    weighted_term,
)


class _Rows(NamedTuple):
    """What the loop carries of all rows."""

    leaves: list[Tensor]
    carry: tuple[Tensor, ...]
    active: Tensor
    output: Tensor
    steps: Tensor
    status: Tensor
    totals: list[Tensor]


def run(halt: Any, state: Any, inputs: tuple[Any, ...], sample_ids: Tensor | None) -> HaltResult:
    """Run every row until it ends, in operations that `torch.export` records."""
    policy = halt.policy
    if policy.traced or halt.keep_trace:
        raise RuntimeError(
            "AdaptiveHalt does not support torch.export with a trace, whose length the data decide: export "
            "in evaluation mode, and with keep_trace=False"
        )
    with torch.no_grad():
        return _Loop(halt, state, inputs, sample_ids).run()


class _Loop:
    def __init__(self, halt: Any, state: Any, inputs: tuple[Any, ...], sample_ids: Tensor | None) -> None:
        self.halt, self.policy, self.inputs = halt, halt.policy, inputs
        self.leaves, self.structure = flatten(state)
        first = self.leaves[0]
        scalar = torch.float64 if torch.float64 in [t.dtype for t in self.leaves] else torch.float32
        self.least, self.most = halt._bounds(halt.step)
        self.constants = Run(first.shape[0], first.device, self.least, self.most, sample_ids, scalar)
        self.row = torch.arange(first.shape[0], device=first.device)
        self.readout_dtype = first.dtype
        self.has_cost = self.has_log_prob = False

    def run(self) -> HaltResult:
        rows = self._begin()
        listed = isinstance(self.halt.step, nn.ModuleList)
        start = self.most if listed else self.least
        for n in range(1, start + 1):
            rows = self._where_active(rows, n) if n > 1 and listed else self._step(rows, n)
        if start < self.most:
            rows = self._while_active(rows, start)
        totals = list(rows.totals)
        cost = totals.pop(0) if self.has_cost else rows.steps.to(self.constants.scalar)
        return HaltResult(
            output=rows.output.to(self.readout_dtype),
            state=unflatten(rows.leaves, self.structure),
            steps=rows.steps,
            cost=cost,
            status=rows.status,
            trace=None,
            log_prob=totals.pop(0) if self.has_log_prob else None,
        )

    def _begin(self) -> _Rows:
        run = self.constants
        return _Rows(
            list(self.leaves),
            begin(self.policy, run, False),
            torch.ones(run.batch, dtype=torch.bool, device=run.device),
            torch.empty(0),  # the first readout makes it
            torch.zeros(run.batch, dtype=torch.int64, device=run.device),
            torch.zeros(run.batch, dtype=torch.int8, device=run.device),
            [],
        )

    def _step(self, rows: _Rows, n: int | Tensor) -> _Rows:
        """Take a step of all rows, and keep what belongs to active ones; `n` is a tensor within the loop."""
        policy, run, halt = self.policy, self.constants, self.halt
        step = halt.step[int(n) - 1] if isinstance(halt.step, nn.ModuleList) else halt.step
        options = {"n": n} if form_of(step).has_n(len(self.inputs)) else {}
        previous = unflatten(rows.leaves, self.structure)
        current = step(previous, *self.inputs, **options)
        leaves, structure = flatten(current)
        if structure != self.structure or any(
            t.shape != u.shape or t.dtype != u.dtype for t, u in zip(leaves, rows.leaves, strict=True)
        ):
            raise ValueError("step: expected it to keep the state's structure, shapes and dtypes")
        readout = leaves[0]
        if halt.readout is not None:
            readout = call_at("readout", halt.readout, current, self.inputs, n)
        at = n if isinstance(n, int) else n.expand(self.row.shape)
        view = View(run, at, current, previous, readout, self.row, rows.carry, self.inputs)
        decision = decision_of(policy, view)
        if isinstance(n, int) and n == 1:
            _, self.has_cost, self.has_log_prob = check_decision(decision, view)
            rows = rows._replace(**self._allocate(readout))
        weight = decision.weight if policy.weighted else None
        finite = torch.ones_like(rows.active)
        for i, leaf in enumerate(leaves):
            if leaf.is_floating_point():
                # −inf is valid in the leaf that is the readout of logits.
                reads = policy.reads_logits and i == 0 if halt.readout is None else leaf is readout
                finite = finite & (logit_rows(leaf, weight) if reads else finite_rows(leaf))
        if readout.is_floating_point() and (halt.readout is not None or policy.weighted):
            finite = finite & logit_rows(readout, weight)
        if weight is not None:
            finite = finite & weight.isfinite()
        if decision.logits is not None:
            finite = finite & (decision.logits.isfinite() | decision.logits.isneginf())
        active = rows.active
        halts = decision.halt & (n >= run.min_steps)
        is_last = n >= run.max_steps
        flag = torch.where(halts, HALTED, torch.where(torch.as_tensor(is_last), MAX_STEPS, 0))
        flag = torch.where(finite, flag, NONFINITE).to(torch.int8)
        ended = active & (flag > 0)

        def choose(where: Tensor, new: Tensor, old: Tensor) -> Tensor:
            chosen: Tensor = torch.where(over(where, new), new, old)
            return chosen

        if weight is not None:
            dtype = rows.output.dtype
            term = weighted_term(over(weight, readout).to(dtype), readout.to(dtype))
            output = choose(active, rows.output + term, rows.output)
        else:
            output = choose(ended, readout, rows.output)
        increments = [t for t in (decision.cost, decision.log_prob) if t is not None]
        counted = active & finite
        return _Rows(
            [choose(active, new, old) for new, old in zip(leaves, rows.leaves, strict=True)],
            self._carried(active, decision.carry, rows.carry),
            active & ~ended,
            output,
            torch.where(ended, torch.as_tensor(n), rows.steps),
            torch.where(ended, flag, rows.status),
            [
                torch.where(counted, total + t.to(total.dtype), total)
                for t, total in zip(increments, rows.totals, strict=True)
            ],
        )

    @staticmethod
    def _carried(active: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if len(new) != len(old):  # it begins with others than it carries on
            return new
        return tuple([torch.where(over(active, n), n, o) for n, o in zip(new, old, strict=True)])

    def _allocate(self, readout: Tensor) -> dict[str, Any]:
        self.readout_dtype = readout.dtype
        dtype = compute_dtype(readout.dtype) if self.policy.weighted else readout.dtype
        totals = [
            torch.zeros(self.constants.batch, dtype=self.constants.scalar, device=readout.device)
            for wanted in (self.has_cost, self.has_log_prob)
            if wanted
        ]
        return {"output": torch.zeros_like(readout, dtype=dtype), "totals": totals}

    def _flat(self, rows: _Rows) -> list[Tensor]:
        return [*rows.leaves, *rows.carry, rows.active, rows.output, rows.steps, rows.status, *rows.totals]

    def _rows(self, flat: Any, like: _Rows) -> _Rows:
        it = iter(flat)
        leaves = [next(it) for _ in like.leaves]
        carry = tuple([next(it) for _ in like.carry])
        active, output, steps, status = (next(it) for _ in range(4))
        return _Rows(leaves, carry, active, output, steps, status, list(it))

    def _while_active(self, rows: _Rows, done: int) -> _Rows:
        """Run the loop from step `done` + 1 on."""
        from torch._higher_order_ops.while_loop import while_loop

        def goes_on(n: Tensor, *flat: Tensor) -> Tensor:
            result: Tensor = (n < self.most) & self._rows(flat, rows).active.any()
            return result

        def body(n: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
            after = self._step(self._rows(flat, rows), n + 1)
            return (n + 1, *(t.clone() for t in self._flat(after)))

        start = torch.full((), done, dtype=torch.int64, device=rows.active.device)
        _, *flat = while_loop(goes_on, body, (start, *self._flat(rows)))
        return self._rows(flat, rows)

    def _where_active(self, rows: _Rows, n: int) -> _Rows:
        """Run stage n of a ModuleList if a row is active."""

        def stage(*flat: Tensor) -> tuple[Tensor, ...]:
            return tuple([t.clone() for t in self._flat(self._step(self._rows(flat, rows), n))])

        def skip(*flat: Tensor) -> tuple[Tensor, ...]:
            return tuple([t.clone() for t in flat])

        flat = torch.cond(rows.active.any(), stage, skip, tuple(self._flat(rows)))
        return self._rows(flat, rows)
