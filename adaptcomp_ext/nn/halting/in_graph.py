"""`AdaptiveHalt` in a graph of torch.compile: what the compiler needs to know of its result beforehand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adaptcomp_ext.nn._in_graph import Known, constant, uses_foreign_tensors
from adaptcomp_ext.nn.halting.calling import call_at, form_of
from adaptcomp_ext.nn.halting.policies.pondernet import PonderNet
from adaptcomp_ext.nn.halting.policies.q_halt import QHalt
from adaptcomp_ext.nn.result import HaltResult, Trace
from adaptcomp_ext.ops import opaque
from adaptcomp_ext.ops.opaque import Field, decode, enrolled

_ROWS = 2  # of the probe; any number but 1, for steps that squeeze


@constant
def known_of(
    number: int, call: str, forms: tuple[tuple[Any, ...], ...], settings: tuple[Any, ...]
) -> Known | None:
    """Return what is known of a run's result before it runs; None if that is not enough for a graph.

    The functions are called once with tensors that have shapes and no values. For the arguments see
    `adaptcomp_ext.nn._in_graph`.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # as slow to import as torch: Dynamo has it

    try:
        halt = enrolled(number)
        head = getattr(halt.policy, "head", None)
        if uses_foreign_tensors(halt, [("step", halt.step), ("readout", halt.readout), ("head", head)]):
            return None
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            leaves = [
                torch.empty((_ROWS, *shape), dtype=getattr(torch, dtype), device=device)
                for shape, dtype, device in forms
            ]
            fields = _probe(halt, *decode(call, leaves))
    except Exception:  # a function that reads values, or errors that the run will raise again, better
        return None
    if fields is None:
        return None
    traced = sum(not field.rows for field in fields)
    policy = halt.policy
    samples = isinstance(policy, PonderNet) and not policy.training
    unused = ("policy.",) if samples or isinstance(policy, QHalt) else ()
    return Known(repr([tuple(field) for field in fields]), policy.has_log_prob, traced, unused)


def _probe(halt: Any, state: Any, *inputs: Any) -> list[Field] | None:
    policy, step = halt.policy, halt.step
    leaves = pytree.tree_leaves(state)
    scalar = torch.float64 if torch.float64 in [t.dtype for t in leaves] else torch.float32
    shapes = [t.shape for t in leaves]
    for n, each in enumerate(step if isinstance(step, nn.ModuleList) else [step], 1):
        options = {"n": n} if form_of(each).has_n(len(inputs)) else {}
        state = each(state, *inputs, **options)
        if [t.shape for t in pytree.tree_leaves(state)] != shapes:
            return None  # the list of states of a run has a length that the data decide
    readout = pytree.tree_leaves(state)[0]
    if halt.readout is not None:
        readout = call_at("readout", halt.readout, state, inputs, 1)
    fields = [_field(readout), *(_field(t) for t in leaves)]
    fields += [Field((), "int64"), Field((), _name(scalar)), Field((), "int8")]
    if policy.has_log_prob:
        fields.append(Field((), _name(scalar)))
    if policy.traced or halt.keep_trace:
        fields.append(_field(readout)._replace(rows=False))
        if policy.traced:
            fields.append(Field((), _name(scalar), False))
        fields += [Field((), "int64", False)] * 2
    return fields


def _field(tensor: Tensor) -> Field:
    return Field(tuple(tensor.shape[1:]), _name(tensor.dtype))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def results_of(result: HaltResult) -> list[Tensor]:
    """Return the tensors of a result in the order of its fields."""
    found = [result.output, *pytree.tree_leaves(result.state), result.steps, result.cost, result.status]
    if result.log_prob is not None:
        found.append(result.log_prob)
    if result.trace is not None:
        found += [t for t in result.trace if t is not None]
    return found


# Dynamo reads it, so that it has to stay simple.
def result_of(known: Known, tensors: list[Any], state: Any) -> HaltResult:
    """Return the result that has these tensors: the inverse of `results_of`, with the form of `state`."""
    rest = list(tensors)
    output = rest.pop(0)
    last = opaque.rebuild(state, rest)
    steps, cost, status = rest.pop(0), rest.pop(0), rest.pop(0)
    log_prob = rest.pop(0) if known[1] else None
    trace = None
    if known[2]:
        weights = rest.pop(1) if known[2] == 4 else None
        trace = Trace(rest[0], weights, rest[1], rest[2])
    return HaltResult(output, last, steps, cost, status, trace, log_prob)
