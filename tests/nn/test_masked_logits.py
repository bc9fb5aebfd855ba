"""Classes masked with −inf: every policy gives the result without those classes; NaN and +inf end a row.

−inf is an ordinary value in a readout of the user's, in the leaf of the state that is that readout, in the
state where `Confidence` reads it, and in a halting logit. It is none in the rest of the state, where it comes
of a step that diverges."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import adaptcomp_ext as ac
from tests.helpers.halting import (
    COMPACT,
    DIM,
    HALTED,
    MAX_STEPS,
    MODES,
    NONFINITE,
    Cell,
    Head,
    Through,
    identical,
    mode,
)

INF, NAN = math.inf, math.nan
ROWS, STEPS, CLASSES = 11, 6, 5
LEFT = [0, 2, 3]  # the classes that are not masked
MASK = torch.tensor([False, True, False, False, True])
POLICIES = ["act", "ponder", "ponder_eval", "max_prob", "margin", "entropy", "relative", "absolute", "fixed"]


def make_policy(name, classes, device):
    if name == "act":
        return ac.ACT(Head(device=device), threshold=0.9)
    if name.startswith("ponder"):
        return ac.PonderNet(Head(device=device)).train(name == "ponder")
    if name in ("relative", "absolute"):
        return ac.Convergence({"relative": 0.8, "absolute": 2.0}[name], name)
    if name == "fixed":
        return ac.FixedSteps(torch.arange(ROWS, device=device) % STEPS + 1)
    threshold = {"max_prob": 0.9, "margin": 0.8, "entropy": 0.7}[name]
    if name == "entropy":  # of as many classes as are left, in units of the logarithm of all of them
        threshold = 1 - (1 - threshold) * math.log(CLASSES) / math.log(classes)
    return ac.Confidence(threshold, name)


def scores(h):
    """A readout from [n, DIM] to class logits [n, 5]."""
    return torch.cat([h, h[:, :1] - h[:, 1:2]], dim=1) * 4


def run(name, readout, device, compact=True, how="grad", classes=CLASSES, **options):
    g = torch.Generator().manual_seed(3)
    h, x = (torch.randn(ROWS, DIM, generator=g).to(device).requires_grad_(how != "no_grad") for _ in range(2))
    cell, policy = Cell(device=device), make_policy(name, classes, device)
    with mode(how):
        result = ac.AdaptiveHalt(cell, policy, STEPS, readout=readout, compact=compact, **options)(h, x)
    return result, [h, x, *cell.parameters(), *policy.parameters()]


def gradients(loss, tensors):
    return torch.autograd.grad(loss, tensors, allow_unused=True)


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("name", POLICIES)
def test_masked_classes_are_as_good_as_none(name, how, device):
    mask = MASK.to(device)
    for compact in COMPACT:
        masked, tensors = run(name, lambda h: scores(h).masked_fill(mask, -INF), device, compact, how)
        fewer, tensors_of_fewer = run(
            name, lambda h: scores(h)[:, LEFT], device, compact, how, classes=len(LEFT)
        )
        assert NONFINITE not in masked.status.tolist()
        assert name == "ponder" or len(set(masked.steps.tolist())) > 1
        assert identical(masked.steps, fewer.steps) and identical(masked.status, fewer.status)
        assert bool((masked.output[:, mask] == -INF).all())
        assert identical(masked.output[:, LEFT], fewer.output)
        assert identical(masked.cost, fewer.cost)
        if how == "no_grad":
            continue
        target = torch.arange(ROWS, device=device) % len(LEFT)
        loss = (
            F.cross_entropy(masked.output, torch.tensor(LEFT, device=device)[target])
            + masked.cost.float().mean()
        )
        loss_of_fewer = F.cross_entropy(fewer.output, target) + fewer.cost.float().mean()
        torch.testing.assert_close(loss, loss_of_fewer)
        got, want = gradients(loss, tensors), gradients(loss_of_fewer, tensors_of_fewer)
        for g, e in zip(got, want, strict=True):
            torch.testing.assert_close(g, e)
        assert got[0] is not None and bool(got[0].any(dim=1).all())  # the loss reaches every row


@pytest.mark.parametrize("how", ["grad", "reference"])
def test_the_trace_of_pondernet_holds_the_masks(how, device):
    mask = MASK.to(device)
    result, tensors = run("ponder", lambda h: scores(h).masked_fill(mask, -INF), device, how=how)
    assert bool((result.trace.outputs[:, mask] == -INF).all())
    loss = (
        F.cross_entropy(result.trace.outputs, result.trace.row % 1, reduction="none") * result.trace.weights
    ).sum()
    fewer, tensors_of_fewer = run("ponder", lambda h: scores(h)[:, LEFT], device, how=how, classes=3)
    want = (
        F.cross_entropy(fewer.trace.outputs, fewer.trace.row % 1, reduction="none") * fewer.trace.weights
    ).sum()
    torch.testing.assert_close(loss, want)
    for g, e in zip(gradients(loss, tensors), gradients(want, tensors_of_fewer), strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("name", ["act", "max_prob", "relative", "fixed"])
def test_masks_that_differ_from_row_to_row(name, how, dtype, device):
    """Row r has r classes left; one without any has no distribution, and ends."""
    n, width = 40, 39
    left = torch.arange(width, device=device) < torch.arange(n, device=device)[:, None]
    logits = torch.linspace(0, 1, width, dtype=dtype, device=device)
    policy = {
        "act": ac.ACT(lambda s: s[0][:, 0] * 0, threshold=0.9),  # h = 1/2: two steps
        "max_prob": ac.Confidence(0.5),
        "relative": ac.Convergence(0.0),
        "fixed": ac.FixedSteps(2),
    }[name]
    state = (torch.zeros(n, 1, dtype=dtype, device=device), left)
    with mode(how):
        result = ac.AdaptiveHalt(lambda s: s, policy, 3, readout=lambda s: torch.where(s[1], logits, -INF))(
            state
        )
    p = torch.where(left, logits.double(), -INF).softmax(1).amax(1)
    steps = torch.where(p >= 0.5, 1, 3) if name == "max_prob" else torch.full((n,), 2, device=device)
    status = torch.where((p >= 0.5) | (name != "max_prob"), HALTED, MAX_STEPS)
    assert result.status[0] == NONFINITE and result.steps[0] == 1
    assert torch.equal(result.status[1:].long(), status[1:]) and torch.equal(result.steps[1:], steps[1:])
    assert torch.equal(result.output[1:], torch.where(left, logits, -INF)[1:])


@pytest.mark.promise("not finite")
@pytest.mark.parametrize("value", [NAN, INF, "all masked"])
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("name", POLICIES)
def test_nan_plus_infinity_and_a_row_without_classes_end_it(name, how, value, device):
    mask = MASK.to(device)

    def readout(state):
        logits = scores(state[0]).masked_fill(mask, -INF)
        bad = (state[1] == 4)[:, None]
        if value == "all masked":
            return torch.where(bad, -INF, logits)
        return torch.where(bad & (torch.arange(CLASSES, device=device) == 2), value, logits)

    cell = Cell(device=device)
    h = torch.linspace(-1, 1, ROWS * DIM, device=device).view(ROWS, DIM).requires_grad_(how != "no_grad")
    policy = make_policy(name, CLASSES, device)
    with mode(how):
        state = (h, torch.arange(ROWS, device=device))
        result = ac.AdaptiveHalt(lambda s: (cell(s[0], 0.3), s[1]), policy, STEPS, readout=readout)(state)
    others = torch.arange(ROWS, device=device) != 4
    assert result.status[4] == NONFINITE and result.steps[4] == 1
    assert bool((result.status[others] != NONFINITE).all())
    if how != "no_grad":
        F.cross_entropy(
            result.output, torch.zeros(ROWS, dtype=torch.int64, device=device), reduction="none"
        ).nansum().backward()
        assert not h.grad[4].any() and bool(h.grad.isfinite().all()) and bool(h.grad[others].any())


# --- the state ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", MODES)
def test_the_state_is_masked_where_confidence_reads_it(how, device):
    def step(logits):
        return torch.where(logits > -INF, logits * 2, -INF)

    logits = torch.tensor(
        [[1.0, 0.5, -INF], [0.1, 0.0, -INF], [-INF, -INF, -INF], [-INF, 1.0, -INF]], device=device
    )
    with mode(how):
        result = ac.AdaptiveHalt(step, ac.Confidence(0.9), 4)(logits)
    assert result.status.tolist() == [HALTED, MAX_STEPS, NONFINITE, HALTED]  # 2ⁿ · 0.5 ≥ log 9 at n = 3
    assert result.steps.tolist() == [3, 4, 1, 1]
    assert torch.equal(result.output[0], torch.tensor([8.0, 4.0, -INF], device=device))


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("name", ["fixed", "act", "max_prob"])
@pytest.mark.parametrize("view", ["itself", "view", "transposed"])
def test_the_state_is_masked_where_it_is_what_the_readout_gives(name, how, view, device):
    """The usual early exit: the state carries the logits of the last head."""
    mask = MASK.to(device)

    def step(state):
        logits = scores(state[0]).masked_fill(mask, -INF)
        return state[0] * 0.5, logits.t().contiguous().t() if view == "transposed" else logits

    h = torch.linspace(-1, 1, ROWS * DIM, device=device).view(ROWS, DIM).requires_grad_(how != "no_grad")
    state = (h, torch.zeros(ROWS, CLASSES, device=device))
    with mode(how):
        readout = (lambda s: s[1].view(-1, CLASSES)) if view == "view" else (lambda s: s[1])
        result = ac.AdaptiveHalt(step, make_policy(name, CLASSES, device), STEPS, readout=readout)(state)
        apart = ac.AdaptiveHalt(
            lambda s: s * 0.5,
            make_policy(name, CLASSES, device),
            STEPS,
            readout=lambda h: (scores(h) * 2).masked_fill(mask, -INF),
        )(h)
    assert NONFINITE not in result.status.tolist()
    assert torch.equal(result.steps, apart.steps) and torch.equal(result.output, apart.output)


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("name", ["fixed", "act", "relative", "max_prob"])
def test_elsewhere_in_the_state_minus_infinity_ends_the_row(name, how, device):
    """Outside of a readout of logits −inf ends the row, because it comes from a step that diverges."""
    h, other = torch.ones(3, DIM, device=device), torch.ones(3, 2, device=device)
    target = other if name == "max_prob" else h
    target[1, 0] = -INF
    with mode(how):
        result = ac.AdaptiveHalt(
            lambda s: (s[0] * 1, s[1] * 1),
            make_policy(name, CLASSES, device) if name != "fixed" else ac.FixedSteps(2),
            3,
        )((h, other))
    assert (result.status == NONFINITE).tolist() == [False, True, False]


# --- halting logits -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("name", ["act", "ponder", "ponder_eval"])
def test_a_halting_logit_of_minus_infinity_is_a_step_at_which_no_row_halts(name, how, device):
    """The halting probability is zero, as before `min_steps`."""

    def allowed_from_the_third(z, state):
        return torch.where(state[1] >= 3, z, -INF)

    def solve(policy, min_steps):
        cell = Cell(device=device)
        h = torch.linspace(-1, 1, ROWS * DIM, device=device).view(ROWS, DIM).requires_grad_(how != "no_grad")
        with mode(how):
            state = (h, torch.zeros(ROWS, dtype=torch.int64, device=device))
            halt = ac.AdaptiveHalt(lambda s: (cell(s[0], 0.3), s[1] + 1), policy, STEPS, min_steps=min_steps)
            result = halt(state)
        g = (
            None
            if how == "no_grad"
            else gradients(result.output.sum() + result.cost.float().sum(), [h, *policy.parameters()])
        )
        return result, g

    masked = make_policy(name, CLASSES, device)
    masked.head = Through(masked.head, allowed_from_the_third)
    got, g_got = solve(masked, 1)
    if name == "ponder":  # whose prior depends on min_steps
        assert got.status.tolist() == [HALTED] * ROWS
        assert bool((got.trace.weights[got.trace.step < 3] == 0).all()) and bool(got.cost.isfinite().all())
        assert g_got is None or all(bool(g.isfinite().all()) for g in g_got)
        total = torch.zeros(ROWS, device=device).index_add(0, got.trace.row, got.trace.weights)
        torch.testing.assert_close(total, torch.ones_like(total))
        return
    want, g_want = solve(make_policy(name, CLASSES, device), 3)
    for a, b in zip(got[:5], want[:5], strict=True):
        for x, y in zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True):
            assert identical(x, y)
    assert int(got.steps.min()) >= 3
    for a, b in zip(g_got or (), g_want or (), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("how", MODES)
def test_never_halting_runs_to_the_last_step(how, device):
    policy = ac.ACT(lambda h: torch.full_like(h[:, 0], -INF))
    h = torch.ones(3, DIM, device=device, requires_grad=how != "no_grad")
    with mode(how):
        result = ac.AdaptiveHalt(lambda h: h + 1, policy, 4)(h)
    assert result.status.tolist() == [MAX_STEPS] * 3
    assert torch.equal(
        result.output, torch.full((3, DIM), 5.0, device=device)
    )  # the remainder is the only weight
    assert result.cost.tolist() == [5.0] * 3


# --- convergence --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("norm", ["relative", "absolute"])
@pytest.mark.parametrize("how", MODES)
def test_a_class_that_is_masked_anew_is_a_change(norm, how, device):
    """Row 0 keeps its mask; at step 3, row 1 masks a class and row 2 unmasks one; nothing else changes."""
    always = torch.tensor([[0.0, 1.0, -INF], [2.0, 1.0, -INF], [0.0, 1.0, -INF]], device=device)
    late = torch.tensor([[0.0, 1.0, -INF], [-INF, 1.0, -INF], [0.0, 1.0, 3.0]], device=device)
    with mode(how):
        halt = ac.AdaptiveHalt(
            lambda s: (s[0] + 1, s[1]),
            ac.Convergence(1e-6, norm, patience=3),
            9,
            readout=lambda s: torch.where((s[0] >= 3)[:, None], late[s[1]], always[s[1]]),
        )
        rows = torch.arange(3, device=device)
        result = halt((torch.zeros(3, dtype=torch.int64, device=device), rows))
    assert result.steps.tolist() == [4, 6, 6] and result.status.tolist() == [HALTED] * 3


@pytest.mark.parametrize("how", MODES)
def test_a_norm_that_overflows_halts_nothing(how, device):
    with mode(how):
        result = ac.AdaptiveHalt(lambda h: h * 1.01, ac.Convergence(1e-6), 4)(
            torch.full((2, DIM), 1e20, device=device)
        )
    assert result.status.tolist() == [MAX_STEPS] * 2
