"""The halting loop out of place: training, policies that are not built in, and the reference.

Nothing that the step produced is written to, because autograd may have kept it. After each step the rows that go on are copied
into a fresh, smaller block, in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adaptcomp_ext.nn._active import ActiveCount, bucket
from adaptcomp_ext.nn._block import Problem
from adaptcomp_ext.nn._tree import unflatten
from adaptcomp_ext.nn.policy import View, check_decision, check_logits
from adaptcomp_ext.nn.result import HaltResult, Status, Trace
from adaptcomp_ext.ops import halting
from adaptcomp_ext.ops._backend import compute_dtype, on_reference


class _Exact:
    """Ends and packs rows in one call: on the CPU, on the kernels."""

    has_padding = False
    """Whether rows have stayed in the block after their end."""

    def __init__(self, problem: Problem) -> None:
        self._never = problem.compact is False
        # With gradients every halted row leaves at once: see `_Padded`.
        scheduled = problem.compact == "auto" and not torch.is_grad_enabled()
        self._schedule = problem.schedule() if scheduled else None

    def advance(
        self,
        results: halting.Results,
        row: Tensor,
        decision: halting.Fused,
        leaves: list[Tensor],
        carried: list[Tensor],
        step: halting.Step,
    ) -> halting.EndedAndPacked:
        rows = row.shape[0]
        schedule = self._schedule
        least = rows + 1 if self._never else 1 if schedule is None else schedule.least(rows)
        done = halting.end_and_pack(results, row, decision, leaves, carried, step, least)
        if 0 < done.running < rows:
            stayed = done.row.shape[0] == rows
            self.has_padding = self.has_padding or stayed
            if schedule is not None:
                if stayed:
                    schedule.kept(rows - done.running)
                else:
                    schedule.packed()
        return done


class _Padded:
    """Ends rows, and packs into a block that may be larger than what runs.

    On CUDA, on the reference, and where halted rows are to stay behind in training. Rows that stay behind are stepped again.
    Their gradient is zero, but zero times the infinity of a step that diverges past their halt would still be NaN: where there
    is a gradient they become copies of running rows, at the price of a packing, so that leaving them never pays.
    """

    def __init__(self, problem: Problem) -> None:
        run = problem.run
        self._stay = problem.compact is False
        self._differentiable = torch.is_grad_enabled()
        self._active = ActiveCount(run.batch, run.max_steps, run.device) if run.device.type == "cuda" else None
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
        act, weight, readout, increments = step.act, step.weight, step.readout, step.increments
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
            carry=None if act is None else act.after,
            weight_out=None if act is None else act.weight,
        )
        rows = row.shape[0]
        if self._active is not None:
            self._active.post()
            running, ended = self._active.bound(), True
            size = rows if self._stay else min(rows, bucket(running))
            packs = running > 0 and (size < rows or self._differentiable)
        else:
            ended = running < self._running or rows == 0  # an empty batch has a gradient too
            size = rows if self._stay else running
            packs = 0 < running < rows and (size < rows or (ended and self._differentiable))
        self._running = running
        plan = self._plan(flag, row, running, size) if packs else None
        if plan is not None or act is not None or (self._differentiable and (ended or weight is not None or increments)):
            leaves, carried = halting.pack_rows(
                *(results, row, flag, plan, leaves, carried), weight=weight, readout=readout, increments=increments, act=act
            )
        if plan is not None:
            row = plan.row
            self.has_padding = self.has_padding or size > running
        elif ended and running > 0:
            row = torch.where(flag == halting.RUNNING, row, -1)
            self.has_padding = True
        return halting.EndedAndPacked(row, running, leaves, carried)

    def _plan(self, flag: Tensor, row: Tensor, running: int, size: int) -> halting.Plan:
        if self._active is not None:
            return halting.plan_packing_padded(flag, row, size)
        plan = halting.plan_packing(flag, row, running)
        return plan if size == running else halting.pad(plan, running, size)


def run_loop(problem: Problem, fused: halting.Fused | None) -> HaltResult:
    """Run every row until it has ended; `fused`: the policy's decision, for the kernel to take."""
    run, policy = problem.run, problem.policy
    weighted, traced = policy.weighted, policy.traced
    results = halting.Results(
        steps=torch.zeros(run.batch, dtype=torch.int64, device=run.device),
        status=torch.zeros(run.batch, dtype=torch.int8, device=run.device),
        leaves=[torch.empty_like(t, memory_format=torch.contiguous_format, requires_grad=False) for t in problem.state],
    )
    on_kernels = run.device.type == "cpu" and not on_reference()
    packing: _Exact | _Padded
    packing = _Exact(problem) if on_kernels and not (problem.compact is False and torch.is_grad_enabled()) else _Padded(problem)
    state, inputs = list(problem.state), list(problem.inputs)
    previous = unflatten(state, problem.structure)
    row = torch.arange(run.batch, device=run.device)
    carry = policy.begin(run)
    arguments = problem.arguments(inputs)
    records: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    costs = log_probs = False
    expected = (False, False, False)
    readout_dtype = None

    for n in range(1, run.max_steps + 1):
        rows = row.shape[0]
        current = problem.steps[n - 1](previous, *arguments)
        leaves = problem.leaves(current, rows)
        current = unflatten(leaves, problem.structure)
        readout = problem.read(current, leaves, rows)
        decision = None
        if fused is not None:
            if fused.head is not None:
                fused = fused._replace(signal=check_logits(fused.head(current), rows, run.device))
            halt = fused
            fields = (weighted, fused.has_cost, False)
        else:
            view = View(run, n, current, previous, readout, row, carry)
            decision = policy.decide(view)
            fields = check_decision(decision, view)
            halt = halting.Fused(halting.GIVEN, decision.halt)
        if n == 1:
            expected = fields
            _, costs, log_probs = fields
            readout_dtype = readout.dtype
            if (weighted or traced) and not fields[0]:
                raise ValueError("decide: expected a weight in the Decision of a weighted or traced policy, got None")
            shape = (run.batch, *readout.shape[1:])
            if weighted:
                results.output = readout.new_zeros(shape, dtype=compute_dtype(readout.dtype), requires_grad=False)
            elif problem.readout is not None:
                results.output = readout.new_empty(shape, requires_grad=False)
            results.totals = [
                torch.zeros(run.batch, dtype=run.scalar, device=run.device) for wanted in (costs, log_probs) if wanted
            ]
        if fields != expected:
            raise ValueError("decide: expected the same fields of the Decision (weight, cost, log_prob) at every step")

        weight = tested = act = None
        increments: list[Tensor] = []
        if decision is not None:
            increments = [_as(t, run.scalar) for t in (decision.cost, decision.log_prob) if t is not None]
            weight = _as(decision.weight, run.scalar) if weighted and decision.weight is not None else None
            tested = decision.logits
        elif fused is not None and fused.carried and fused.signal is not None:
            after = carry[0].detach().clone()
            weights = torch.empty_like(after)
            act = halting.ActNode(fused.signal, carry[0], after, weights, (n, run.min_steps, run.max_steps), fused.threshold)
        if traced and decision is not None and decision.weight is not None:
            records.append((readout, decision.weight, row, torch.full_like(row, n)))
        separate = readout if results.output is not None else None
        taken = halting.Step(n, run.min_steps, run.max_steps, weight, separate, increments, run.sample_ids, tested, act)
        carried = [*inputs, *(() if decision is None else decision.carry)]
        done = packing.advance(results, row, halt, leaves, carried, taken)
        if done.running == 0:
            break
        if done.row is not row:
            row = done.row
            inputs = done.carried[: len(inputs)]
            arguments = problem.arguments(inputs)
        carry = tuple(done.carried[len(inputs) :])
        previous = unflatten(done.leaves, problem.structure)

    trace = _trace(records, packing.has_padding) if traced else None
    broken = results.status == Status.NONFINITE
    if torch.is_grad_enabled() and (run.device.type == "cuda" or bool(broken.any())):
        _block_gradient(results, broken)
        if trace is not None:
            at = broken[trace.row]
            trace = trace._replace(outputs=_blocked(trace.outputs, at), weights=_blocked(trace.weights, at))
    totals = list(results.totals)
    return HaltResult(
        output=results.leaves[0] if results.output is None else results.output.to(readout_dtype),
        state=unflatten(results.leaves, problem.structure),
        steps=results.steps,
        cost=totals.pop(0) if costs else results.steps.to(run.scalar),
        status=results.status,
        trace=trace,
        log_prob=totals.pop(0) if log_probs else None,
    )


def _block_gradient(results: halting.Results, broken: Tensor) -> None:
    """Let no gradient into the rows that are not finite: where the loss is NaN too, it would reach the parameters."""
    results.leaves = [_blocked(t, broken) for t in results.leaves]
    results.totals = [_blocked(t, broken) for t in results.totals]
    if results.output is not None:
        results.output = _blocked(results.output, broken)


def _blocked(tensor: Tensor, rows: Tensor) -> Tensor:
    if not tensor.requires_grad:
        return tensor
    return torch.where(rows.view(-1, *(1 for _ in tensor.shape[1:])), tensor.detach(), tensor)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _trace(records: list[tuple[Tensor, Tensor, Tensor, Tensor]], has_padding: bool) -> Trace:
    outputs, weights, row, step = (torch.cat(part) for part in zip(*records, strict=True))
    if has_padding:
        active = (row >= 0).nonzero()[:, 0]
        outputs, weights, row, step = outputs[active], weights[active], row[active], step[active]
    return Trace(outputs, weights, row, step)
