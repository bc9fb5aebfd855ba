"""A row's result is bitwise the same alone and in any batch, compacted or not; broken rows do no harm."""

from __future__ import annotations

import math

import pytest
import torch

import adaptcomp_ext as ac
from tests.helpers.halting import (
    COMPACT,
    DIM,
    MODES,
    NONFINITE,
    POLICIES,
    SAMPLED,
    WITH_HEAD,
    Through,
    check,
    dense,
    identical,
    leaves,
    make,
    make_policy,
    mode,
    scaled,
    tree_arguments,
)

pytestmark = pytest.mark.usefixtures("block_size")

NAN, INF = float("nan"), float("inf")
STEPS = 6


def per_row(
    name, batch, chosen, compact, form="tuple", how="grad", dtype=torch.float32, device="cpu", max_steps=STEPS
):
    """Return results and gradients of the chosen rows, run by themselves in that order."""
    step, policy, h, x = make(name, batch, form, dtype, device)
    chosen = torch.as_tensor(chosen, device=device)
    if name == "fixed_tensor":
        policy = ac.FixedSteps(policy.n[chosen])
    grad = how != "no_grad"
    h, x = h[chosen].requires_grad_(grad), x[chosen].requires_grad_(grad)
    state, inputs = tree_arguments(form, h, x)
    if form == "tuple":
        state = (state[0], chosen, state[2] * 0 + h.detach()[:, :1, None])
    ids = chosen * 3 + 1 if name in SAMPLED else None
    with mode(how):
        result = ac.AdaptiveHalt(step, policy, max_steps, compact=compact)(state, *inputs, sample_ids=ids)
    out = [*leaves(result[:5])]
    if result.log_prob is not None:
        out.append(result.log_prob)
    if grad:
        loss = (result.output**2).sum() + sum(t.sum() for t in leaves(result.state) if t.is_floating_point())
        if result.cost.requires_grad:
            loss = loss + result.cost.sum()
        if result.log_prob is not None:
            loss = loss + result.log_prob.sum()
        if result.trace is not None:
            loss = loss + (result.trace.outputs * result.trace.weights[:, None]).sum()
        loss.backward()
        out += [h.grad, x.grad]
    return out


@pytest.mark.promise("row alone", "compaction")
@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["grad", "no_grad"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_row_is_the_same_alone_in_any_batch_in_any_order_and_however_packed(name, how, dtype, device):
    batch = 13
    everything = list(range(batch))
    shuffled = torch.randperm(batch, generator=torch.Generator().manual_seed(1)).tolist()
    whole = per_row(name, batch, everything, True, how=how, dtype=dtype, device=device)
    for chosen in ([5], [12], [0, 12], everything[::-1], shuffled, everything[3:9], everything * 3):
        for compact in COMPACT:
            some = per_row(name, batch, chosen, compact, how=how, dtype=dtype, device=device)
            for a, b in zip(whole, some, strict=True):
                assert identical(a[chosen], b)


@pytest.mark.promise("with gradients")
@pytest.mark.parametrize("name", POLICIES)
def test_results_are_the_same_with_and_without_gradients(name, device):
    """Two loops and two kernels have the same arithmetic, also in the training loop's weighted sum."""
    if name == "ponder":
        pytest.skip("has one loop only")
    a = per_row(name, 11, range(11), True, how="grad", device=device)[:7]
    b = per_row(name, 11, range(11), True, how="no_grad", device=device)[:7]
    for got, want in zip(a, b, strict=True):
        assert identical(got, want)


@pytest.mark.promise("threads")
def test_many_rows_and_threads_change_nothing(threads, device):
    for name in ("act", "max_prob", "weighted_budget"):
        threads(1)
        one = per_row(name, 700, range(700), True, device=device)
        threads(2)
        two = per_row(name, 700, range(700), True, device=device)
        some = per_row(name, 700, range(300, 310), True, device=device)
        for a, b, c in zip(one, two, some, strict=True):
            assert identical(a, b) and identical(a[300:310], c)


# --- a NaN or an infinity in one row
# ------------------------------------------------------------------------------------------ Where it appears,
# at which step, and in which row.
PLACES = ["state", "second leaf", "input", "readout", "logit"]
BAD_ROW, BAD_STEP, BATCH = 4, 3, 9


def broken(name, place, value, compact, how, device, spoil=True, min_steps=1, rows=None):
    """Run a problem in which row BAD_ROW breaks at step BAD_STEP; with spoil=False the same one unbroken."""
    rows = list(range(BATCH)) if rows is None else rows
    grad = how != "no_grad"
    step, policy, h, x = make(name, BATCH, device=device, seed=2)
    chosen = torch.tensor(rows, device=device)
    h, x = h[chosen].requires_grad_(grad), x[chosen].requires_grad_(grad)
    count = torch.zeros(len(rows), dtype=torch.int64, device=device)
    second = torch.ones(len(rows), 3, device=device)
    if name == "fixed_tensor":
        policy = ac.FixedSteps(policy.n[chosen].clamp(min=BAD_STEP))
    # Nobody leaves before the break.
    if name == "act":
        policy.head.bias.data.fill_(-2.0)
    if name.endswith("budget"):
        policy.limit = 6.0
    if name in ("max_prob", "margin", "entropy", *SAMPLED):
        min_steps = max(min_steps, BAD_STEP)

    def spoiled(t, tag, count, n=BAD_STEP):
        bad = (tag == BAD_ROW) & (count == n) & spoil
        return torch.where(bad.view(-1, *(1 for _ in t.shape[1:])), torch.full_like(t, value), t)

    def run(state, x, tag, late):
        h, count, second, _ = state
        count = count + 1
        if place == "input":
            x = x + torch.where((count == BAD_STEP) & spoil, late, torch.zeros_like(late))[:, None]
        h = step(h, x)
        if place == "state":
            h = spoiled(h, tag, count)
        if place == "second leaf":
            second = spoiled(second, tag, count)
        return h, count, second * 1, tag

    if place == "logit":
        policy.head = Through(policy.head, lambda z, s: spoiled(z, s[3], s[1]))
    readout = (lambda s: spoiled(scaled(s), s[3], s[1])) if place == "readout" else scaled
    late = torch.where(chosen == BAD_ROW, value, 0.0).to(h.dtype)
    state = (h, count, second, chosen)
    with mode(how):
        result = ac.AdaptiveHalt(run, policy, STEPS, min_steps=min_steps, readout=readout, compact=compact)(
            state, x, chosen, late, sample_ids=chosen
        )
    return result, h, x, [*step.parameters(), *policy.parameters()]


def applicable(name, place):
    return place != "logit" or name in WITH_HEAD or name in SAMPLED


CASES = [(n, p) for n in POLICIES for p in PLACES if applicable(n, p)]


@pytest.mark.promise("not finite")
@pytest.mark.covering(3)
@pytest.mark.parametrize("value", [NAN, -INF])
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize(("name", "place"), CASES)
def test_a_broken_row_ends_as_nonfinite_at_that_step_and_harms_no_other(name, place, how, value, device):
    if place == "logit" and value == -INF:
        value = INF  # where minus infinity is a halting probability of zero
    for compact in COMPACT:
        result, h, x, parameters = broken(name, place, value, compact, how, device)
        healthy, h0, x0, _ = broken(name, place, value, compact, how, device, spoil=False)
        assert int(healthy.steps[BAD_ROW]) >= BAD_STEP, "the case is meant to break before it halts"
        others = [r for r in range(BATCH) if r != BAD_ROW]
        assert result.status[BAD_ROW] == NONFINITE and result.steps[BAD_ROW] == BAD_STEP
        for a, b in zip(leaves(result[:5]), leaves(healthy[:5]), strict=True):
            assert identical(a[others], b[others])
        assert bool((result.status[others] != NONFINITE).all()) and bool(result.cost.isfinite().all())
        if how == "no_grad":
            continue
        for r in (result, healthy):
            keep = torch.tensor(others, device=device)
            loss = (r.output[keep] ** 2).sum() + (r.state[0][keep] ** 3).sum()
            if r.cost.requires_grad:
                loss = loss + r.cost[keep].sum()
            loss.backward()
        assert identical(h.grad[others], h0.grad[others]) and identical(x.grad[others], x0.grad[others])
        if place != "input" and not (place == "state" and "budget" in name):
            # Where the user's own step, head and policy are finite: the rest is what their backward makes of
            # a zero times NaN.
            for p in parameters if place != "state" else parameters[:2]:
                assert p.grad is None or bool(p.grad.isfinite().all())
            assert bool(h.grad[BAD_ROW].isfinite().all())


@pytest.mark.promise("not finite")
@pytest.mark.covering(2)
@pytest.mark.parametrize("how", ["grad", "reference"])
@pytest.mark.parametrize(("name", "place"), [c for c in CASES if c[1] not in ("input", "state")])
def test_a_broken_row_passes_no_gradient_back(name, place, how, device):
    """If the loss is NaN in a broken row, parameters still get the gradient of the other rows alone."""
    result, h, x, parameters = broken(name, place, NAN, True, how, device)
    loss = (result.output**2).sum() + (result.state[0] ** 2).sum()
    if result.cost.requires_grad:
        loss = loss + (result.cost**2).sum()
    loss.backward()
    assert not h.grad[BAD_ROW].any() and not x.grad[BAD_ROW].any()
    for p in parameters:
        assert p.grad is None or bool(p.grad.isfinite().all())


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("name", WITH_HEAD)
def test_a_logit_is_tested_before_min_steps_and_at_the_last_step_too(name, how, value, device):
    result, *_ = broken(name, "logit", value, True, how, device, min_steps=5)
    assert result.status[BAD_ROW] == NONFINITE and result.steps[BAD_ROW] == BAD_STEP
    policy = make_policy(name, 3, device=device)
    policy.head = Through(policy.head, lambda z, _: torch.full_like(z, value))
    with mode(how):
        result = ac.AdaptiveHalt(lambda h: h, policy, 1)(torch.zeros(3, DIM, device=device))
    assert result.status.tolist() == [NONFINITE] * 3


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("place", ["logit", "state", "last state"])
def test_the_cost_of_a_broken_row_is_that_of_the_steps_before(place, how, device):
    """PonderNet's cost for a hazard of 1/2: the sum of p (log p - log prior) over two steps."""
    count = torch.zeros(3, 1, device=device)
    last = 3 if place == "last state" else 4
    breaks = torch.tensor([[False], [True], [False]], device=device)
    shift = torch.zeros((), device=device, requires_grad=how != "no_grad")

    def step(count, breaks):
        count = count + 1
        return torch.where(breaks & (count == 3), NAN, count) if place != "logit" else count

    def head(count):
        bad = (count[:, 0] == 3) & (torch.arange(count.shape[0], device=device) == 1)
        return torch.where(bad & (place == "logit"), NAN, shift.expand(count.shape[0]))

    with mode(how):
        result = ac.AdaptiveHalt(step, ac.PonderNet(head, prior="uniform"), last)(count, breaks)
    assert result.status.tolist() == [1, NONFINITE, 1]
    cost = [
        p * (math.log(p) + math.log(last)) for p in [0.5**n for n in range(1, last)] + [0.5 ** (last - 1)]
    ]
    expected = torch.tensor([sum(cost), sum(cost[:2]), sum(cost)], device=device)
    torch.testing.assert_close(result.cost.detach(), expected)
    if how != "no_grad":
        result.cost.mean().backward()
        assert bool(shift.grad.isfinite())


@pytest.mark.promise("not finite")
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("name", POLICIES)
def test_broken_from_the_start(name, how, device):
    step, policy, h, x = make(name, 5, device=device)
    h = torch.where(torch.arange(5, device=device)[:, None] == 2, NAN, h)
    with mode(how):
        result = ac.AdaptiveHalt(step, policy, 4)(h, x)
    assert result.status[2] == NONFINITE and result.steps[2] == 1
    expected = dense(step, policy, h, x, max_steps=4)
    for r in (result, expected):  # of a broken row: what it had come to before
        r.cost.data[2] = 0
        if r.log_prob is not None:
            r.log_prob.data[2] = 0
    check(result, expected)


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("name", POLICIES)
def test_all_rows_broken(name, how, device):
    step, policy, h, x = make(name, 5, device=device)
    with mode(how):
        result = ac.AdaptiveHalt(step, policy, 4)(h * NAN, x)
    assert result.status.tolist() == [NONFINITE] * 5 and result.steps.tolist() == [1] * 5


@pytest.mark.parametrize("how", MODES)
def test_integers_in_the_state_are_never_nonfinite(how, device):
    """Return the bits of a NaN as an integer."""
    bits = torch.full((3,), NAN, dtype=torch.float64).view(torch.int64).to(device)
    with mode(how):
        result = ac.AdaptiveHalt(lambda s: s, ac.FixedSteps(2), 3)((torch.zeros(3, 1, device=device), bits))
    assert result.status.tolist() == [1, 1, 1] and torch.equal(result.state[1], bits)


@pytest.mark.promise("not finite")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", MODES)
def test_broken_rows_in_every_dtype(dtype, how, device):
    h = torch.ones(70, 33, dtype=dtype, device=device)
    for row, column, value in ((0, 0, NAN), (31, 32, INF), (69, 16, -INF)):
        h[row, column] = value
    with mode(how):
        result = ac.AdaptiveHalt(lambda h: h * 1, ac.FixedSteps(2), 3)(h)
    assert (result.status == NONFINITE).nonzero()[:, 0].tolist() == [0, 31, 69]
