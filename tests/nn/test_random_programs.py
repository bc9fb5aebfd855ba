"""Random programs against the dense loop and the reference: policies, shapes, dtypes, patterns and bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import adaptcomp_ext as ac
from tests.helpers.halting import (
    COMPACT,
    POLICIES,
    WITH_GRADIENTS,
    Tree,
    check,
    dense,
    identical,
    leaves,
    make,
    mode,
    scaled,
    tree_arguments,
)

SETTINGS = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@st.composite
def programs(draw):
    max_steps = draw(st.integers(1, 8))
    return {
        "name": draw(st.sampled_from(POLICIES)),
        "batch": draw(st.one_of(st.integers(1, 5), st.sampled_from([17, 33, 70]))),
        "form": draw(st.sampled_from(["tensor", "tuple", "nested"])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64, torch.float64, torch.bfloat16])),
        "seed": draw(st.integers(0, 10_000)),
        "compact": draw(st.sampled_from(COMPACT)),
        "how": draw(st.sampled_from(["grad", "grad_large", "no_grad", "inference", "reference"])),
        "max_steps": max_steps,
        "min_steps": draw(st.integers(1, max_steps)),
        "readout": draw(st.sampled_from([None, scaled])),
        "wide": draw(st.booleans()),
        "bias": draw(st.sampled_from([-4.0, -1.0, 0.5, 3.0])),
        "n": draw(st.lists(st.integers(1, 10), min_size=1, max_size=6)),
        "broken": draw(st.one_of(st.none(), st.integers(0, 69))),
    }


def build(p):
    step, policy, h, x = make(
        p["name"],
        p["batch"],
        p["form"],
        p["dtype"],
        seed=p["seed"],
        wide=p["wide"],
        requires_grad=p["how"] in WITH_GRADIENTS,
    )
    if hasattr(policy, "head"):
        policy.head.bias.data.fill_(p["bias"])
    if p["name"] == "fixed_tensor":
        policy = ac.FixedSteps(torch.tensor(p["n"]).repeat(p["batch"])[: p["batch"]])
    if p["broken"] is not None and p["broken"] < p["batch"]:
        x = x.detach().clone()
        x[p["broken"]] = float("nan")
    return step, policy, h, x


def masked(result, keep):
    """Select the healthy rows: the results of a broken one are not promised."""
    trace = result.trace
    if trace is not None:
        rows = keep[trace[2]]
        trace = ac.Trace(*(t[rows] for t in trace))
    return result._replace(
        output=result.output[keep],
        state=torch.utils._pytree.tree_map(lambda t: t[keep], result.state),
        cost=result.cost[keep],
        trace=trace,
        log_prob=None if result.log_prob is None else result.log_prob[keep],
    )


@pytest.mark.promise("formula")
@given(programs())
@SETTINGS
def test_against_the_dense_loop(p):
    step, policy, h, x = build(p)
    state, inputs = tree_arguments(p["form"], h, x)
    bounds = {"max_steps": p["max_steps"], "min_steps": p["min_steps"], "readout": p["readout"]}
    with mode(p["how"]):
        result = ac.AdaptiveHalt(step, policy, compact=p["compact"], **bounds)(state, *inputs)
    expected = dense(step, policy, state, *inputs, **bounds)
    keep = expected.status != ac.Status.NONFINITE
    check(
        masked(result, keep), masked(expected, keep), torch.float32 if p["dtype"] == torch.bfloat16 else None
    )


@pytest.mark.promise("formula")
@given(programs())
@SETTINGS
def test_against_the_reference(p):
    """Return results, and the gradients of every leaf and parameter."""

    def run(reference):
        step, policy, h, x = build(p)
        h, x = h.detach().requires_grad_(), x.detach().requires_grad_()
        state, inputs = tree_arguments(p["form"], h, x)
        bounds = {"max_steps": p["max_steps"], "min_steps": p["min_steps"], "readout": p["readout"]}
        with mode("reference" if reference else "grad"):
            result = ac.AdaptiveHalt(step, policy, compact=p["compact"], **bounds)(state, *inputs)
            keep = result.status != ac.Status.NONFINITE
            loss = (result.output[keep].double() ** 2).sum()
            for t in leaves(result.state):
                loss = loss + (t[keep].double() ** 2).sum() * 0.1
            if result.cost.requires_grad:
                loss = loss + result.cost[keep].double().sum()
            loss.backward()
        return masked(result, keep), result.steps, keep, [h.grad[keep], x.grad[keep]]

    got, want = run(False), run(True)
    assert torch.equal(got[1], want[1]) and torch.equal(got[2], want[2])
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2}[p["dtype"]]
    for a, b in zip(leaves(got[0]), leaves(want[0]), strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, equal_nan=True)
    for a, b in zip(got[3], want[3], strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.promise("row alone")
@given(programs(), st.data())
@SETTINGS
def test_any_part_of_a_batch_gives_the_same_bits(p, data):
    step, policy, h, x = build(p)
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, p["batch"] - 1), min_size=1, max_size=12)))
    ids = torch.arange(p["batch"]) * 7

    def run(rows, compact):
        some = ac.FixedSteps(policy.n[rows]) if p["name"] == "fixed_tensor" else policy
        bounds = {"max_steps": p["max_steps"], "min_steps": p["min_steps"], "readout": p["readout"]}
        with mode(p["how"]):
            return ac.AdaptiveHalt(Tree(step.cell, "tuple"), some, compact=compact, **bounds)(
                (h[rows], rows, h[rows][:, :1, None].expand(-1, 2, 3)), x[rows], sample_ids=ids[rows]
            )

    whole, some = run(torch.arange(p["batch"]), p["compact"]), run(chosen, not p["compact"])
    if p["how"] == "reference" and p["name"] in ("act", "ponder"):
        return  # torch's vectorised sigmoid and exp may round a row differently in another place
    for a, b in zip(leaves(whole._replace(trace=None)), leaves(some._replace(trace=None)), strict=True):
        assert (a is b is None) or identical(a[chosen], b)
