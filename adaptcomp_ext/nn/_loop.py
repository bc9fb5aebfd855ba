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
from adaptcomp_ext.ops._backend import compute_dtype


class _Packing:
    """Decides after each step which row goes where in the next block."""

    def __init__(self, problem: Problem) -> None:
        run = problem.run
        self._mode = problem.compact
        self._active = ActiveCount(run.batch, run.max_steps, run.device) if run.device.type == "cuda" else None
        self._schedule = problem.schedule() if self._mode == "auto" else None
        self.running = run.batch
        """On the CPU the rows that run, on CUDA an upper bound."""
        self.ended = False
        """Whether a row ended in the last step; on CUDA, whether one may have."""

    @property
    def device_count(self) -> Tensor | None:
        return None if self._active is None else self._active.running

    def plan(self, flag: Tensor, row: Tensor, running: int, differentiable: bool) -> halting.Plan | None:
        """Where each row goes, or None where all stay."""
        rows = row.shape[0]
        if self._active is not None:
            return self._plan_on_device(flag, row, differentiable, self._active)
        self.ended = running < self.running or rows == 0  # an empty batch has a gradient too
        self.running = running
        if running in (0, rows):
            return None
        # Rows that stay behind are stepped again. Their gradient is zero, but zero times the infinity of a step that diverges
        # past their halt would still be NaN: where there is a gradient they become copies of running rows, at the price of a
        # packing, so that leaving them never pays.
        if self._mode is False:
            if not (self.ended and differentiable):
                return None
            return halting.pad(halting.plan_packing(flag, row, running), running, rows)
        if self._schedule is not None and not differentiable:
            if rows - running < self._schedule.least(rows):
                self._schedule.kept(rows - running)
                return None
            self._schedule.packed()
        return halting.plan_packing(flag, row, running)

    def _plan_on_device(self, flag: Tensor, row: Tensor, differentiable: bool, active: ActiveCount) -> halting.Plan | None:
        rows = row.shape[0]
        active.post()
        self.ended = True
        self.running = active.bound()
        size = rows if self._mode is False else min(rows, bucket(self.running))
        if self.running == 0 or (size == rows and not differentiable):
            return None
        return halting.plan_packing_padded(flag, row, size)


def run_loop(problem: Problem, fused: halting.Fused | None) -> HaltResult:
    """Run every row until it has ended; `fused`: the policy's decision, for the kernel to take."""
    run, policy = problem.run, problem.policy
    weighted, traced = policy.weighted, policy.traced
    results = halting.Results(
        steps=torch.zeros(run.batch, dtype=torch.int64, device=run.device),
        status=torch.zeros(run.batch, dtype=torch.int8, device=run.device),
        leaves=[torch.empty_like(t, memory_format=torch.contiguous_format, requires_grad=False) for t in problem.state],
    )
    packing = _Packing(problem)
    state, inputs = list(problem.state), list(problem.inputs)
    previous = unflatten(state, problem.structure)
    row = torch.arange(run.batch, device=run.device)
    carry = policy.begin(run)
    arguments = problem.arguments(inputs)
    has_padding = False
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
            halt: Tensor | halting.Fused = fused
            fields = (weighted, fused.has_cost, False)
        else:
            view = View(run, n, current, previous, readout, row, carry)
            decision = policy.decide(view)
            fields = check_decision(decision, view)
            halt = decision.halt
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

        weight = tested = act = after = None
        increments: list[Tensor] = []
        if decision is not None:
            increments = [_as(t, run.scalar) for t in (decision.cost, decision.log_prob) if t is not None]
            weight = _as(decision.weight, run.scalar) if weighted and decision.weight is not None else None
            tested = decision.logits
        elif fused is not None and fused.carried and fused.signal is not None:
            after = carry[0].detach().clone()
            weights = torch.empty_like(after)
            act = halting.ActNode(fused.signal, carry[0], after, weights, (n, run.min_steps, run.max_steps), fused.threshold)
        separate = readout if results.output is not None else None
        flag, running = halting.halt_rows(
            results,
            row,
            halt,
            leaves,
            step=n,
            min_steps=run.min_steps,
            max_steps=run.max_steps,
            weight=weight,
            readout=separate,
            increments=increments,
            running=packing.device_count,
            sample_ids=run.sample_ids,
            tested=tested,
            carry=after,
            weight_out=None if act is None else act.weight,
        )
        if traced and decision is not None and decision.weight is not None:
            records.append((readout, decision.weight, row, torch.full_like(row, n)))

        differentiable = torch.is_grad_enabled()
        plan = packing.plan(flag, row, running, differentiable)
        carried = [*inputs, *(() if decision is None else decision.carry)]
        if plan is not None or act is not None or (differentiable and (packing.ended or weighted or increments)):
            leaves, carried = halting.pack_rows(
                *(results, row, flag, plan, leaves, carried),
                weight=weight,
                readout=separate,
                increments=increments,
                act=act,
            )
        if packing.running == 0:
            break
        if plan is not None:
            row = plan.row
            inputs = carried[: len(inputs)]
            arguments = problem.arguments(inputs)
            has_padding = has_padding or packing.device_count is not None or row.shape[0] > packing.running
        elif packing.ended:
            row = torch.where(flag == halting.RUNNING, row, -1)
            has_padding = True
        carry = tuple(carried[len(inputs) :])
        previous = unflatten(leaves, problem.structure)

    trace = _trace(records, has_padding) if traced else None
    broken = results.status == Status.NONFINITE
    if torch.is_grad_enabled() and (packing.device_count is not None or bool(broken.any())):
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
