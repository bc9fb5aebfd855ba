"""The cost of training: a halted row takes no memory and no work, forward or backward."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import adaptcomp_ext as ac
from tests.helpers.halting import COMPACT, DIM, POLICIES, identical, leaves, make

pytestmark = pytest.mark.usefixtures("block_size")


class Counting(torch.autograd.Function):
    """A tanh that counts its rows, forward and backward."""

    forward_rows = 0
    backward_rows = 0

    @staticmethod
    def forward(ctx, h):
        out = h.tanh()
        ctx.save_for_backward(out)
        Counting.forward_rows += h.shape[0]
        return out

    @staticmethod
    def backward(ctx, g):
        (out,) = ctx.saved_tensors
        Counting.backward_rows += g.shape[0]
        return g * (1 - out * out)


@pytest.mark.promise("no work")
@pytest.mark.parametrize("compact", [True, "auto"])
@pytest.mark.parametrize("name", [n for n in POLICIES if n != "ponder"])
def test_a_halted_row_costs_nothing_forward_and_backward(name, compact):
    _, policy, h, x = make(name, 40, requires_grad=True)
    Counting.forward_rows = Counting.backward_rows = 0
    result = ac.AdaptiveHalt(lambda h, x: Counting.apply(h + x), policy, 8, compact=compact)(h, x)
    result.output.sum().backward()
    assert Counting.forward_rows == Counting.backward_rows == int(result.steps.sum()) < 8 * 40


def saved_bytes(run):
    """Return the bytes of the distinct storages that the backward pass holds."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    held = sum(storages.values())
    assert result.output.requires_grad
    return held


@pytest.mark.promise("memory")
@pytest.mark.parametrize("policy", ["fixed", "act"])
def test_memory_grows_with_the_sum_of_the_steps_and_not_with_batch_times_max_steps(policy):
    batch, dim, steps = 256, 64, 16
    h, x = torch.randn(batch, dim), torch.randn(batch, dim)
    weight = nn.Parameter(torch.randn(dim))

    def run(n):
        def step(state, x):
            return (state[0] * weight + x).tanh(), state[1] + 1, state[2]

        act = ac.ACT(lambda state: torch.where(state[1] >= n[state[2]], 20.0, -20.0))
        halt = ac.AdaptiveHalt(step, ac.FixedSteps(n) if policy == "fixed" else act, steps, compact=True)
        return saved_bytes(lambda: halt((h, torch.zeros(batch, dtype=torch.int64), torch.arange(batch)), x))

    row = 4 * dim
    schedules = [
        torch.randint(1, 8, (batch,), generator=torch.Generator().manual_seed(0)),
        torch.where(torch.arange(batch) == 0, steps, 1),
        torch.arange(batch) % steps + 1,
    ]
    for n in schedules:
        # Two tensors a step and row: the step's result, and the copy of the rows that go on.
        assert run(n) < 2.3 * row * (int(n.sum()) + batch)
    assert run(schedules[1]) < 0.15 * run(torch.full((batch,), steps))


def test_longer_max_steps_cost_nothing_once_all_rows_have_halted():
    h = torch.randn(64, 32, requires_grad=True)
    n = torch.arange(64) % 4 + 1
    few, many = (
        saved_bytes(lambda m=m: ac.AdaptiveHalt(lambda h: h.tanh(), ac.FixedSteps(n), m)(h)) for m in (4, 400)
    )
    assert few == many


def test_inputs_without_gradient_get_none(device):
    """A context that needs no gradient must not make the step compute one."""
    seen = []

    def step(h, x):
        seen.append((h.requires_grad, x.requires_grad))
        return h * 0.9 + x

    n = torch.arange(8, device=device) % 4 + 1
    h = torch.randn(8, DIM, device=device, requires_grad=True)
    ac.AdaptiveHalt(step, ac.FixedSteps(n), 4, compact=True)(
        h, torch.randn(8, DIM, device=device)
    ).output.sum().backward()
    assert seen == [(True, False)] * 4


@pytest.mark.parametrize("compact", COMPACT)
@pytest.mark.parametrize("name", POLICIES)
def test_a_loop_without_parameters_or_gradients_gives_results_without(name, compact, device):
    step, policy, h, x = make(name, 9, device=device)
    for p in (*step.parameters(), *policy.parameters()):
        p.requires_grad_(False)
    result = ac.AdaptiveHalt(step, policy, 5, compact=compact)(h, x)
    assert not any(t.requires_grad for t in leaves(result) if t is not None)


@pytest.mark.parametrize("name", POLICIES)
def test_training_lowers_a_loss(name):
    step, policy, h, x = make(name, 32)
    halt = ac.AdaptiveHalt(step, policy, 5)
    target = torch.randn(32, DIM, generator=torch.Generator().manual_seed(9)).clamp(-0.8, 0.8)
    optimizer = torch.optim.Adam(halt.parameters(), 0.05)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        result = halt(h, x)
        loss = ((result.output - target) ** 2).mean()
        (loss + 0.01 * result.cost.mean()).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_ponder_cost_teaches_act_to_halt_sooner():
    step, policy, h, x = make("act", 64)
    policy.head.bias.data.fill_(-2.0)
    halt = ac.AdaptiveHalt(step, policy, 12)
    optimizer = torch.optim.Adam(policy.parameters(), 0.1)
    before = float(halt(h, x).steps.double().mean())
    for _ in range(30):
        optimizer.zero_grad()
        halt(h, x).cost.mean().backward()
        optimizer.step()
    assert float(halt(h, x).steps.double().mean()) < before - 1


@pytest.mark.promise("compaction")
@pytest.mark.parametrize("name", POLICIES)
def test_gradients_do_not_depend_on_compaction(name, device):
    """Rows have bitwise equal gradients, parameters up to the order of a sum."""
    got = []
    for compact in COMPACT:
        step, policy, h, x = make(name, 12, device=device, requires_grad=True)
        result = ac.AdaptiveHalt(step, policy, 6, compact=compact)(h, x)
        ((result.output**2).sum() + result.cost.sum() * 0.1).backward()
        got.append((h.grad, x.grad, [p.grad for p in step.parameters()]))
    for h_grad, x_grad, parameters in got[1:]:
        assert identical(h_grad, got[0][0]) and identical(x_grad, got[0][1])
        for a, b in zip(parameters, got[0][2], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", POLICIES)
def test_the_graph_can_be_walked_twice(name, device):
    step, policy, h, x = make(name, 9, device=device, requires_grad=True)
    output = ac.AdaptiveHalt(step, policy, 5)(h, x).output
    (a,) = torch.autograd.grad(output.sum(), h, retain_graph=True)
    (b,) = torch.autograd.grad(output.sum(), h)
    assert identical(a, b)


@pytest.mark.promise("checkpoint")
@pytest.mark.parametrize("where", ["step", "loop"])
@pytest.mark.parametrize("name", POLICIES)
def test_checkpointing(name, where, device):
    got = []
    for on in (False, True):
        step, policy, h, x = make(name, 9, device=device, requires_grad=True)
        inner = functools.partial(checkpoint, step, use_reentrant=False) if on and where == "step" else step
        halt = ac.AdaptiveHalt(inner, policy, 5)
        result = checkpoint(halt, h, x, use_reentrant=False) if on and where == "loop" else halt(h, x)
        (result.output**2).sum().backward()
        got.append((result.output, h.grad, x.grad))
    for a, b in zip(*got, strict=True):
        assert identical(a, b)


@pytest.mark.promise("checkpoint")
@pytest.mark.covering(2)
@pytest.mark.parametrize("derived", [False, True])
@pytest.mark.parametrize("compact", COMPACT)
@pytest.mark.parametrize("name", POLICIES)
def test_reentrant_checkpointing_draws_the_same_dropout(name, compact, derived, device):
    """A pass without gradients compacts as one with gradients: it is derived, because no input tells it."""
    step, policy, h, x = make(name, 32, device=device, requires_grad=True)
    noisy = lambda s, x: torch.nn.functional.dropout(step(s, x), 0.5)  # noqa: E731
    halt = ac.AdaptiveHalt(noisy, policy, 5, compact=compact)
    outputs = []

    def run(h, x):
        result = halt(h * 1, x * 1) if derived else halt(h, x)
        outputs.append(result.output.detach().clone())
        return result.output

    torch.manual_seed(0)
    checkpoint(run, h, x, use_reentrant=True).sum().backward()
    assert identical(*outputs)


def test_a_step_that_differentiates_without_gradients_outside(device):
    """A step of a descent does so, and its result then needs a gradient."""
    x = torch.randn(8, 3, device=device)
    n = torch.tensor([1, 5, 2, 4, 3, 6, 2, 5], device=device)

    def step(y, x):
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            (g,) = torch.autograd.grad(((y - x) ** 2).sum(), y)
            return y - 0.1 * g

    want = x * (1 - 0.8 ** n[:, None])
    for compact in COMPACT:
        for reference in (False, True):
            with torch.no_grad(), ac.reference_kernels() if reference else contextlib.nullcontext():
                for policy in (ac.FixedSteps(n), AsFixed(n)):
                    result = ac.AdaptiveHalt(step, policy, 8, compact=compact)(torch.zeros_like(x), x)
                    torch.testing.assert_close(result.output, want)
                    assert not result.output.requires_grad and not result.state.requires_grad


class AsFixed(ac.FixedSteps):
    """A FixedSteps that decides in Python, not in the kernel."""

    def decide(self, view):
        return super().decide(view)


def test_frozen_head_and_trained_step(device):
    step, policy, h, x = make("act", 9, device=device)
    for p in policy.parameters():
        p.requires_grad_(False)
    result = ac.AdaptiveHalt(step, policy, 5)(h, x)
    (result.output.sum() + result.cost.sum()).backward()
    assert step.cell.a.grad.abs().sum() > 0 and policy.head.k.grad is None


def test_detached_steps_give_truncated_gradients(device):
    """A step that detaches its input: only the last step of each row is differentiated."""
    a = torch.tensor(2.0, device=device, requires_grad=True)
    n = torch.tensor([1, 2, 3], device=device)
    result = ac.AdaptiveHalt(lambda h: h.detach() * a, ac.FixedSteps(n), 4)(torch.ones(3, 1, device=device))
    result.output.sum().backward()
    assert float(a.grad) == 1 + 2 + 4
