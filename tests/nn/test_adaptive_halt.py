"""The halting loop: the rows that the step gets, the forms of state and inputs, and the edge cases."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import adaptcomp_ext as ac
from tests.helpers.halting import (
    BUILT_IN,
    COMPACT,
    DIM,
    HALTED,
    MAX_STEPS,
    MODES,
    POLICIES,
    WITH_GRADIENTS,
    Budget,
    Cell,
    Head,
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

ALL_MODES = [*MODES, "inference"]


class Recorder:
    """Wraps a step, and records the batch rows (column 0 of x) of each call."""

    def __init__(self, step):
        self.step = step
        self.calls = []

    def __call__(self, h, x):
        self.calls.append(x[:, 0].long().tolist())
        return self.step(h, x)


def numbered(batch, device="cpu"):
    """A state of zeros and an input whose column 0 is the row's number."""
    h = torch.zeros(batch, 2, device=device)
    return h, torch.stack([torch.arange(batch, device=device, dtype=torch.float32)] * 2, 1)


# --- which rows the step sees -------------------------------------------------------------------------------
@pytest.mark.promise("no work")
@pytest.mark.parametrize("how", ALL_MODES)
def test_only_active_rows_are_stepped_when_compact(how):
    n = torch.tensor([3, 1, 4, 1, 5, 2, 6, 5, 3, 5])
    h, x = numbered(10)
    step = Recorder(lambda h, x: h + 1)
    with mode(how):
        result = ac.AdaptiveHalt(step, ac.FixedSteps(n), 6, compact=True)(h, x)
    assert [sorted(rows) for rows in step.calls] == [[r for r in range(10) if n[r] >= k] for k in range(1, 7)]
    assert torch.equal(result.steps, n)
    assert torch.equal(result.output[:, 0], n.float())
    if how in WITH_GRADIENTS:
        assert all(rows == sorted(rows) for rows in step.calls)


@pytest.mark.promise("no work")
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("how", ["grad", "no_grad"])
def test_row_evaluations_are_the_sum_of_the_steps(how, name):
    step, policy, h, x = make(name, 12)
    seen = Recorder(step)
    with mode(how):
        result = ac.AdaptiveHalt(seen, policy, 6, compact=True)(h, x)
    assert sum(map(len, seen.calls)) == int(result.steps.sum())


@pytest.mark.parametrize("how", ALL_MODES)
def test_without_compaction_the_block_keeps_its_size(how):
    n = torch.tensor([3, 1, 2, 5])
    h, x = numbered(4)
    step = Recorder(lambda h, x: h + 1)
    with mode(how):
        result = ac.AdaptiveHalt(step, ac.FixedSteps(n), 9, compact=False)(h, x)
    assert [len(rows) for rows in step.calls] == [4] * 5  # and it ends with the last row
    assert torch.equal(result.output[:, 0], n.float())


def test_auto_packs_at_once_with_gradients():
    n = torch.tensor([1, 2, 3, 3])
    h, x = numbered(4)
    step = Recorder(lambda h, x: h + 1)
    ac.AdaptiveHalt(step, ac.FixedSteps(n), 4, compact="auto")(h.requires_grad_(), x)
    assert [len(rows) for rows in step.calls] == [4, 3, 2]


@pytest.mark.promise("no work")
@pytest.mark.parametrize("how", ALL_MODES)
@pytest.mark.parametrize("compact", COMPACT)
def test_nothing_runs_after_the_last_row_has_halted(how, compact):
    calls = []

    def step(h):
        calls.append(h.shape[0])
        return h + 1

    with mode(how):
        ac.AdaptiveHalt(step, ac.FixedSteps(2), 100, compact=compact)(torch.zeros(5, 1))
    assert calls == [5, 5]


@pytest.mark.parametrize("how", ALL_MODES)
def test_rows_left_behind_do_no_harm_when_they_diverge(how):
    """With compact=False the step continues past a row's halt, perhaps to infinity."""
    h = torch.full((2, 1), 2.0, requires_grad=how in WITH_GRADIENTS)
    a = torch.tensor(1.0, requires_grad=True)
    x = torch.tensor([[10.0], [1.0]])  # 2, 2**10, 2**100, infinity
    with mode(how):
        result = ac.AdaptiveHalt(
            lambda h, x: (h * a) ** x, ac.FixedSteps(torch.tensor([2, 9])), 9, compact=False
        )(h, x)
    assert result.steps.tolist() == [2, 9] and result.status.tolist() == [HALTED, HALTED]
    assert result.output[:, 0].tolist() == [2.0**100, 2.0]
    if how in WITH_GRADIENTS:
        result.output.sum().backward()
        assert bool(a.grad.isfinite()) and bool(h.grad.isfinite().all())


# --- ModuleList: early exit ---------------------------------------------------------------------------------
@pytest.mark.covering(2)
@pytest.mark.parametrize("how", ALL_MODES)
@pytest.mark.parametrize("name", POLICIES)
def test_module_list_gives_each_step_its_layer(name, how, device):
    layers = nn.ModuleList(Cell(device=device, seed=s) for s in range(4))
    _, policy, h, x = make(name, 8, device=device)
    for compact in COMPACT:
        with mode(how):
            result = ac.AdaptiveHalt(layers, policy, max_steps=16, compact=compact)(h, x)
        check(result, dense(layers, policy, h, x, max_steps=16))
        assert int(result.steps.max()) <= 4


def test_module_list_ends_at_the_smaller_of_its_length_and_max_steps():
    order = []

    class Layer(nn.Module):
        def __init__(self, i):
            super().__init__()
            self.i = i

        def forward(self, h):
            order.append(self.i)
            return h

    layers = nn.ModuleList(Layer(i) for i in range(4))
    assert ac.AdaptiveHalt(layers, ac.FixedSteps(9), 99)(torch.zeros(2, 1)).status.tolist() == [MAX_STEPS] * 2
    ac.AdaptiveHalt(layers, ac.FixedSteps(9), 2)(torch.zeros(2, 1))
    assert order == [0, 1, 2, 3, 0, 1]


# --- the edges ----------------------------------------------------------------------------------------------
@pytest.mark.promise("small")
@pytest.mark.covering(2)
@pytest.mark.parametrize("how", ALL_MODES)
@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("name", POLICIES)
def test_tiny_batches_and_one_step(name, batch, how, device):
    step, policy, h, x = make(name, batch, "nested", device=device, requires_grad=how in WITH_GRADIENTS)
    state, inputs = tree_arguments("nested", h, x)
    for max_steps, compact in itertools.product((1, 3), COMPACT):
        with mode(how):
            result = ac.AdaptiveHalt(step, policy, max_steps, compact=compact)(state, *inputs)
        assert result.output.shape == (batch, DIM) and result.cost.shape == (batch,)
        assert result.steps.shape == result.status.shape == (batch,)
        if batch:
            check(result, dense(step, policy, state, *inputs, max_steps=max_steps))
        if how in WITH_GRADIENTS:
            (result.output.sum() + result.cost.sum()).backward()


@pytest.mark.promise("small")
def test_an_empty_batch_is_differentiable(device):
    step, policy, h, x = make("act", 0, device=device, requires_grad=True)
    result = ac.AdaptiveHalt(step, policy, 4)(h, x)
    result.output.sum().backward()
    assert h.grad.shape == (0, DIM) and float(step.cell.a.grad.abs().sum()) == 0
    assert ac.AdaptiveHalt(step, make_policy("ponder", 0, device=device), 4)(h, x).trace.row.shape == (0,)


@pytest.mark.parametrize("compact", COMPACT)
@pytest.mark.parametrize("how", ALL_MODES)
@pytest.mark.parametrize("shape", [(6,), (6, 0), (6, 1), (6, 2, 0, 3), (6, 2, 3, 2)], ids=str)
def test_state_shapes(shape, how, compact, device):
    h = torch.ones(shape, device=device)
    n = torch.tensor([1, 3, 2, 5, 4, 1], device=device)
    with mode(how):
        result = ac.AdaptiveHalt(lambda h: h + 1, ac.FixedSteps(n), 4, compact=compact)(h)
    want = 1 + n.clamp(max=4).view(-1, *(1 for _ in shape[1:])).expand(shape)
    assert torch.equal(result.output, want.float()) and torch.equal(result.steps, n.clamp(max=4))


@pytest.mark.parametrize("how", ALL_MODES)
@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.float16, torch.bfloat16],
    ids=str,
)
def test_state_leaves_of_any_dtype_are_carried(dtype, how, device):
    """A leaf of an odd size, which the step hands on, between two floating-point ones."""
    batch = 7
    kept = (torch.arange(batch * 3, device=device).view(batch, 3) % 2).to(dtype)
    h = torch.zeros(batch, 2, device=device)
    n = torch.arange(batch, device=device) % 4 + 1
    with mode(how):
        result = ac.AdaptiveHalt(
            lambda s: (s[0] + 1, s[1].clone(), s[2] * 2), ac.FixedSteps(n), 9, compact=True
        )((h, kept, h + 1))
    assert torch.equal(result.state[1], kept) and result.state[1].dtype == dtype
    assert torch.equal(result.state[2][:, 0], 2.0**n)


def test_thirty_two_leaves_at_most(device):
    n = torch.tensor([2, 1, 3], device=device)
    state = [torch.full((3, 2), float(i), device=device, requires_grad=True) for i in range(32)]
    for how in ALL_MODES:
        with mode(how):
            result = ac.AdaptiveHalt(lambda s: [t + 1 for t in s], ac.FixedSteps(n), 4)(state)
        for i, t in enumerate(result.state):
            assert torch.equal(t[:, 0], i + n.float())
    with pytest.raises(ValueError, match="32"):
        ac.AdaptiveHalt(lambda s: s, ac.FixedSteps(1), 4)([*state, state[0]])


def test_bounds_may_change_between_calls(device):
    halt = ac.AdaptiveHalt(lambda h: h + 1, ac.FixedSteps(99), 3)
    assert halt(torch.zeros(2, 1, device=device)).steps.tolist() == [3, 3]
    halt.max_steps = 7
    assert halt(torch.zeros(2, 1, device=device)).steps.tolist() == [7, 7]
    halt.policy.n, halt.min_steps = 1, 5
    assert halt(torch.zeros(2, 1, device=device)).steps.tolist() == [5, 5]
    halt.min_steps = 8
    with pytest.raises(ValueError, match="min_steps"):
        halt(torch.zeros(2, 1, device=device))


def test_result_is_a_named_tuple_and_a_pytree(device):
    step, policy, h, x = make("ponder", 4, device=device)
    result = ac.AdaptiveHalt(step, policy, 3)(h, x)
    output, state, steps, cost, status, trace, log_prob = result
    assert torch.utils._pytree.tree_map(lambda t: t, result)._fields == result._fields
    assert output is result.output and steps is result.steps and cost is result.cost and log_prob is None
    assert state is result.state and status is result.status and trace is result.trace
    assert ac.Status(int(result.status[0])).name == "HALTED" and HALTED == ac.Status.HALTED


# --- memory formats -----------------------------------------------------------------------------------------
def transposed(t):
    return t.t().contiguous().t()


def strided(t):
    return torch.stack([t, t * 0 + 9], 2)[:, :, 0]


def offset(t):
    return torch.cat([t.new_full((1,), 9.0), t.flatten()])[1:].view(t.shape)


def middle(t):
    return torch.cat([t[:1] * 0 + 9, t, t[:1] * 0 + 9])[1 : 1 + t.shape[0]]


def from_numpy(t):
    return torch.from_numpy(t.detach().cpu().numpy().copy()).to(t.device)


FORMATS = [transposed, strided, offset, middle, from_numpy]


@pytest.mark.promise("layout")
@pytest.mark.covering(2)
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", POLICIES)
def test_layout_of_state_and_inputs_does_not_matter(name, layout, how, device):
    step, policy, h, x = make(name, 9, device=device)
    for compact in (True, False):
        halt = ac.AdaptiveHalt(step, policy, 5, compact=compact)
        with mode(how):
            a, b = halt(h, x), halt(layout(h), layout(x))
        for got, want in zip(leaves(b), leaves(a), strict=True):
            assert got is want is None or identical(got, want)


@pytest.mark.promise("layout")
@pytest.mark.covering(2)
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("layout", [transposed, strided, offset, middle])
@pytest.mark.parametrize("name", POLICIES)
def test_layout_of_what_the_step_returns_does_not_matter(name, layout, how, device):
    step, policy, h, x = make(name, 9, device=device)
    with mode(how):
        a = ac.AdaptiveHalt(step, policy, 5)(h, x)
        b = ac.AdaptiveHalt(lambda h, x: layout(step(h, x)), policy, 5)(h, x)
        c = ac.AdaptiveHalt(step, policy, 5, readout=layout)(h, x)
    for got, want, read in zip(leaves(b), leaves(a), leaves(c), strict=True):
        assert got is want is None or (identical(got, want) and identical(read, want))


@pytest.mark.promise("layout")
@pytest.mark.parametrize("how", ALL_MODES)
def test_expanded_tensors(how, device):
    step, policy, _, _ = make("act", 6, device=device)
    h, x = torch.ones(1, DIM, device=device).expand(6, DIM), torch.ones(6, 1, device=device).expand(6, DIM)
    with mode(how):
        a = ac.AdaptiveHalt(step, policy, 5)(h, x)
        b = ac.AdaptiveHalt(lambda h, x: step(h, x)[:, :1].expand(-1, DIM), policy, 5)(h, x)
    check(a, dense(step, policy, h, x, max_steps=5))
    assert b.output.shape == (6, DIM)


# --- what a step may return ---------------------------------------------------------------------------------
def same(h, x):
    return h


def view_of_input(h, x):
    return h.view_as(h)


def slice_of_larger(h, x):
    return torch.cat([h, h * 7], 1)[:, :DIM]


def the_context(h, x):
    return x


RETURNED = [same, view_of_input, slice_of_larger, the_context]


@pytest.mark.covering(2)
@pytest.mark.parametrize("how", ALL_MODES)
@pytest.mark.parametrize("step", RETURNED)
@pytest.mark.parametrize("name", POLICIES)
def test_step_may_return_what_it_was_given(name, step, how, device):
    _, policy, h, x = make(name, 9, device=device, requires_grad=how in WITH_GRADIENTS)
    if name.endswith("budget"):
        policy.limit = 0.7
    before = h.detach().clone(), x.detach().clone()
    for compact in COMPACT:
        with mode(how):
            result = ac.AdaptiveHalt(step, policy, 5, compact=compact)(h, x)
        check(result, dense(step, policy, h, x, max_steps=5))
        assert torch.equal(h, before[0]) and torch.equal(x, before[1])
        if how in WITH_GRADIENTS:
            result.output.sum().backward()


@pytest.mark.parametrize("how", ["no_grad", "inference"])
@pytest.mark.parametrize("compact", COMPACT)
@pytest.mark.parametrize(
    "name", BUILT_IN
)  # the others look at the state before the step, which is overwritten
def test_step_may_write_to_a_buffer_of_its_own_and_return_it(name, compact, how, device):
    step, policy, h, x = make(name, 9, device=device)
    buffer = torch.full((9, DIM), 5.0, device=device)

    def buffered(h, x):
        buffer[: h.shape[0]] = step(h, x)
        return buffer[: h.shape[0]]

    with mode(how):
        got = ac.AdaptiveHalt(buffered, policy, 5, compact=compact)(h, x)
        want = ac.AdaptiveHalt(step, policy, 5, compact=compact)(h, x)
    assert identical(got.output, want.output) and torch.equal(got.steps, want.steps)


@pytest.mark.parametrize("how", ALL_MODES)
def test_step_may_return_one_tensor_for_two_leaves(how, device):
    n = torch.tensor([1, 4, 2, 3], device=device)

    def step(state):
        h = state[0] + state[1]
        return h, h

    with mode(how):
        result = ac.AdaptiveHalt(step, ac.FixedSteps(n), 5, compact=True)(
            (torch.ones(4, 2, device=device),) * 2
        )
    assert torch.equal(result.state[0][:, 0], 2.0**n) and torch.equal(result.state[1], result.state[0])


@pytest.mark.parametrize("how", ALL_MODES)
def test_step_may_return_two_halves_of_one_tensor(how, device):
    n = torch.tensor([1, 4, 2, 3], device=device)

    def step(state):
        both = torch.cat([state[0] + 1, state[1] + 2])
        return both.chunk(2)

    with mode(how):
        result = ac.AdaptiveHalt(step, ac.FixedSteps(n), 5, compact=True)(
            (torch.zeros(4, 2, device=device), torch.zeros(4, 2, device=device))
        )
    assert torch.equal(result.state[0][:, 0], n.float()) and torch.equal(result.state[1][:, 0], 2.0 * n)


@pytest.mark.parametrize("how", ALL_MODES)
def test_parameters_as_state(how, device):
    h = nn.Parameter(torch.ones(3, 2, device=device))
    with mode(how):
        result = ac.AdaptiveHalt(lambda h: h * 2, ac.FixedSteps(torch.tensor([1, 2, 3], device=device)), 5)(h)
    assert result.output[:, 0].tolist() == [2, 4, 8] and type(result.state) is torch.Tensor


# --- user-defined policies ----------------------------------------------------------------------------------
def test_documented_example_of_a_policy(device):
    class Still(ac.Policy):
        def decide(self, view):
            return ac.Decision(halt=(view.state - view.previous).norm(dim=1) < 1e-3)

    result = ac.AdaptiveHalt(lambda h: h * 0.5, Still(), 60)(
        torch.tensor([[1.0], [1e-4], [100.0]], device=device)
    )
    assert result.steps.tolist() == [10, 1, 17]


def test_base_class_asks_for_decide():
    with pytest.raises(NotImplementedError, match="Policy must implement decide"):
        ac.AdaptiveHalt(lambda h: h, ac.Policy(), 2)(torch.zeros(1, 1))


def test_policy_with_readout_and_trace(device):
    """A policy that keeps its trace, as PonderNet does."""

    class Traced(Budget):
        @property
        def traced(self):
            return True

    step, _, h, x = make("budget", 6, device=device)
    result = ac.AdaptiveHalt(step, Traced(Head(device=device), weighted=True), 5, readout=scaled)(h, x)
    assert result.trace.outputs.shape == (int(result.steps.sum()), 3)
    total = torch.zeros_like(result.output).index_add(
        0, result.trace.row, result.trace.outputs * result.trace.weights[:, None]
    )
    torch.testing.assert_close(total, result.output)
