"""The halting loop out of place: for training, custom policies, and the reference.

It does not write to the step's results, because autograd may have saved them. After each step the active rows
are copied into a new, smaller block, in order. The user's functions may write to their own results: without
gradients the loop keeps copies over a step; with gradients such a write raises an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from adaptcomp_ext.nn.halting.block import Problem
from adaptcomp_ext.nn.halting.first_step import search
from adaptcomp_ext.nn.halting.fusing import begin
from adaptcomp_ext.nn.halting.packing import choose
from adaptcomp_ext.nn.halting.policy import (
    Policy,
    View,
    check_decision,
    decision_of,
    head_logits_of,
    plain_decision,
)
from adaptcomp_ext.nn.result import HaltResult, Status, Trace
from adaptcomp_ext.ops import halting
from adaptcomp_ext.ops._backend import compute_dtype, on_cuda
from adaptcomp_ext.ops._plain import dressed


def run_loop(problem: Problem, fused: halting.Fused | None) -> HaltResult:
    """Run every row until it ends; `fused`: the policy's decision in the kernel's terms, if it has one."""
    with explained_writes(problem):
        return _run(problem, fused)


@contextlib.contextmanager
def explained_writes(problem: Problem) -> Iterator[None]:
    """Turn torch's error for a change in place of a tensor that a gradient needs into one of ours."""
    try:
        yield
    except RuntimeError as error:
        explain_write(error, problem.policy)
        raise


def explain_write(error: RuntimeError, policy: Policy) -> None:
    """Raise an error of ours if this one is torch's for a change in place."""
    if halting.changes_in_place(error):
        raise _written_to("step", "the state that it is given", policy) from error


def _written_to(name: str, what: str, policy: Policy) -> RuntimeError:
    kind = type(policy).__name__
    return RuntimeError(
        f"{name}: expected {what} to be left as it is, because the gradient of the result with {kind} "
        "needs it, got a change in place; return a new tensor, or run under torch.no_grad()"
    )


def _run(problem: Problem, fused: halting.Fused | None) -> HaltResult:
    run, policy = problem.run, problem.policy
    if fused is not None and halting.KERNELS[fused.policy].compiled_only:
        fused = None
    weighted, traced = policy.weighted, policy.traced or problem.keep_trace
    results = halting.Results(
        steps=torch.zeros(run.batch, dtype=torch.int64, device=run.device),
        status=torch.zeros(run.batch, dtype=torch.int8, device=run.device),
        leaves=problem.room(problem.state),
    )
    of_shapes: list[tuple[int, list[Tensor]]] = []  # of the shapes of a state before its present ones
    since = 1
    state, inputs = list(problem.state), list(problem.inputs)
    previous = problem.tree(state)
    row = torch.arange(run.batch, device=run.device)
    carry = begin(policy, run, fused is not None and fused.carried)
    make_node = None if fused is None else halting.KERNELS[fused.policy].node
    arguments = problem.arguments(inputs)
    records: list[tuple[Tensor | None, ...]] = []
    versions: list[tuple[Tensor, int]] = []
    costs = log_probs = False
    expected = (False, False, False)
    readout_dtype = None
    packing = choose(problem)
    together = problem.together

    has_containers = problem.has_containers
    for n, step in enumerate(problem.steps, 1):
        rows = row.shape[0]
        current = step(previous, *arguments)
        leaves = problem.leaves(current, rows)
        room = problem.change_shapes(leaves, n) if problem.staged else None
        if room is not None:
            if n > 1:
                of_shapes.append((since, results.leaves))
            results.leaves, since = room, n
        current = problem.tree(leaves)
        readout = problem.read(current, leaves, rows)
        decision = None
        if fused is not None:
            if fused.head is not None:
                fused = fused._replace(signal=head_logits_of(fused.head, current, rows, run.device))
            halt = fused
            fields = (weighted, fused.has_cost, False)
        else:
            view = View(
                run, n, current, previous, dressed(readout, problem.readout_kind), row, carry, arguments
            )
            decision = decision_of(policy, view)
            if problem.watch is not None:
                problem.watch("policy", decision)
            decision = plain_decision(decision)
            fields = check_decision(decision, view)
            halt = halting.Fused(halting.GIVEN, decision.halt)
        if n == 1:
            if problem.holder is not None:
                decided: list[Tensor | None] = [fused.signal] if fused is not None else []
                if decision is not None:
                    decided = [decision.weight, decision.cost, decision.log_prob, decision.logits]
                    decided += decision.carry
                search(problem.holder, problem, leaves, readout, decided)
            expected = fields
            _, costs, log_probs = fields
            readout_dtype = readout.dtype
            if (weighted or policy.traced) and not fields[0]:
                raise ValueError(
                    "decide: expected a weight in the Decision of a weighted or traced policy, got None"
                )
            shape = (run.batch, *readout.shape[1:])
            if weighted:
                results.output = readout.new_zeros(
                    shape, dtype=compute_dtype(readout.dtype), requires_grad=False
                )
            elif problem.readout is not None:
                results.output = readout.new_empty(shape, requires_grad=False)
            results.totals = [
                torch.zeros(run.batch, dtype=run.scalar, device=run.device)
                for wanted in (costs, log_probs)
                if wanted
            ]
        if fields != expected:
            raise ValueError(
                "decide: expected the same fields of the Decision (weight, cost, log_prob) at every step"
            )

        bounds = (n, run.min_steps, run.max_steps)
        weight = tested = node = None
        increments: list[Tensor] = []
        if decision is not None:
            increments = [_as(t, run.scalar) for t in (decision.cost, decision.log_prob) if t is not None]
            weight = _as(decision.weight, run.scalar) if weighted and decision.weight is not None else None
            tested = decision.logits
        elif make_node is not None:
            node = make_node(halt, carry[0], bounds)
        if traced:
            given = decision.weight if decision is not None and policy.traced else None
            kept = _unchanging(readout), None if given is None else _unchanging(given)
            versions += [(t, t._version) for t in kept if t is not None and t.requires_grad]
            records.append((*kept, row, torch.full_like(row, n)))
        separate = readout if results.output is not None else None
        read_leaf = problem.read_leaf(readout, leaves)
        taken = halting.Step(*bounds, weight, separate, increments, run.sample_ids, tested, node, read_leaf)
        carried = [*inputs, *(() if decision is None else decision.carry)]
        done = packing.advance(results, row, halt, leaves, carried, taken)
        if done.running == 0:
            last = together is None or n == run.max_steps or not together.any_runs(0, run.device)
            if last:
                break
            # Other processes go on: a block of no rows takes their steps, forward and backward.
            moved_on = [t[:0] for t in done.carried[: len(inputs)]]
            moved_on += [t[:0] for t in done.carried[len(inputs) :] or carry]
            done = halting.EndedAndPacked(row[:0], 0, [t[:0] for t in done.leaves], moved_on)
        elif together is not None and n < run.max_steps:
            together.any_runs(done.running, run.device)
        moved = done.row is not row
        if moved:
            row = done.row
            inputs = done.carried[: len(inputs)]
        if moved or has_containers:
            arguments = problem.arguments(inputs)
        carry = tuple(done.carried[len(inputs) :])
        if decision is not None and decision.carry:
            carry = _apart(carry, [readout, *leaves])
        previous = problem.tree(done.leaves)

    if any(t._version != version for t, version in versions):
        raise _written_to("step or readout", "what they and the policy returned", policy)
    trace = _trace(records, packing.has_padding) if traced else None
    broken = results.status == Status.NONFINITE
    if torch.is_grad_enabled() and (on_cuda(run.device) or bool(broken.any())):
        results.block_gradient(broken)
        of_shapes = [(n, [halting.block_gradient(t, broken) for t in leaves]) for n, leaves in of_shapes]
        if trace is not None:
            at = broken[trace.row]
            trace = trace._replace(outputs=halting.block_gradient(trace.outputs, at))
            if trace.weights is not None:
                trace = trace._replace(weights=halting.block_gradient(trace.weights, at))
    totals = list(results.totals)
    output = results.leaves[0] if results.output is None else results.output.to(readout_dtype)
    if trace is not None:
        trace = trace._replace(outputs=dressed(trace.outputs, problem.readout_kind))
    return HaltResult(
        output=dressed(output, problem.readout_kind),
        state=problem.last_states([*of_shapes, (since, results.leaves)], results.steps),
        steps=results.steps,
        cost=totals.pop(0) if costs else results.steps.to(run.scalar),
        status=results.status,
        trace=trace,
        log_prob=totals.pop(0) if log_probs else None,
    )


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _unchanging(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy if it has no gradient: only tensors with one are checked for changes."""
    return tensor if tensor.requires_grad else tensor.clone()


def _apart(carry: tuple[Tensor, ...], seen: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the carry, with copies of tensors that share memory with tensors that the step gets again."""
    memory = {_memory(t) for t in seen}
    return tuple([t.clone() if _memory(t) in memory else t for t in carry])


def _memory(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a wrapper of a transform: it may share any memory
        return 0


def _trace(records: list[tuple[Tensor | None, ...]], has_padding: bool) -> Trace:
    def joined(parts: tuple[Tensor | None, ...]) -> Any:
        tensors = [t for t in parts if t is not None]
        return torch.cat(tensors) if tensors else None

    outputs, weights, row, step = (joined(parts) for parts in zip(*records, strict=True))
    if has_padding:
        active = (row >= 0).nonzero()[:, 0]
        outputs, row, step = outputs[active], row[active], step[active]
        weights = None if weights is None else weights[active]
    return Trace(outputs, weights, row, step)
