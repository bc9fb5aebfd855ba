"""Modules for each step, functions that take inputs and number, stages that change shapes, traces."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

import adaptcomp_ext as ac
from adaptcomp_ext.nn.halting.calling import Form, form_of

M, D, C = 4, 8, 3
STEPS = torch.tensor([1, 2, 3, 4, 1, 2, 3, 4, 2])
B = len(STEPS)


def manual(seed: int = 0) -> None:
    torch.manual_seed(seed)


class Layer(nn.Module):
    def __init__(self, inputs: int = D, outputs: int = D) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x))


class Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).relu()


class Pool(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.mean((2, 3)))


def layers() -> nn.ModuleList:
    manual()
    return nn.ModuleList([Layer() for _ in range(M)])


def exits() -> nn.ModuleList:
    manual(1)
    return nn.ModuleList([nn.Linear(D, C) for _ in range(M)])


def stages() -> tuple[nn.ModuleList, nn.ModuleList]:
    """Return a small ResNet's stages, the first two of one shape, and their exits."""
    manual()
    convolutions = [Conv(2, 4, 1), Conv(4, 4, 1), Conv(4, 6, 2), Conv(6, 6, 2)]
    return nn.ModuleList(convolutions), nn.ModuleList([Pool(4), Pool(4), Pool(6), Pool(6)])


def by_hand(steps, readouts, x, taken):
    """Return each row's last state and readout, one row at a time."""
    states, outputs = [], []
    for i, count in enumerate(taken.tolist()):
        state = x[i : i + 1]
        for step in list(steps)[:count]:
            state = step(state)
        states.append(state)
        outputs.append(readouts[count - 1](state))
    return states, torch.cat(outputs)


def gradients(loss: torch.Tensor, module: nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters()), allow_unused=True))


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("compact", [True, False])
def test_each_exit_reads_with_its_own_module(graph, compact):
    steps, readouts, x = layers(), exits(), torch.randn(B, D)
    halt = ac.AdaptiveHalt(steps, ac.FixedSteps(STEPS), max_steps=M, readout=readouts, compact=compact)
    with torch.set_grad_enabled(graph):
        result = halt(x)
    _, expected = by_hand(steps, readouts, x, STEPS)
    torch.testing.assert_close(result.output, expected)
    if graph:
        found = gradients(result.output.square().sum(), halt)
        wanted = gradients(expected.square().sum(), halt)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("graph", [False, True])
def test_confidence_reads_the_exit_of_its_step(graph):
    steps, readouts, x = layers(), exits(), torch.randn(64, D)
    halt = ac.AdaptiveHalt(steps, ac.Confidence(0.45), max_steps=M, readout=readouts)
    with torch.set_grad_enabled(graph):
        taken = halt(x).steps
    state, expected = x, torch.full((64,), M)
    for n in range(M, 0, -1):
        state = x
        for step in steps[:n]:
            state = step(state)
        sure = readouts[n - 1](state).softmax(1).amax(1) >= 0.45
        expected = torch.where(sure, n, expected)
    assert torch.equal(taken, expected) and len(taken.unique()) > 2


@pytest.mark.parametrize("policy", [ac.ACT, ac.PonderNet])
@pytest.mark.parametrize("graph", [False, True])
def test_a_head_for_each_step(policy, graph):
    """The logits of step n come from head n: a head that is sure at one step alone ends all rows there."""
    heads = nn.ModuleList([nn.Linear(D, 1) for _ in range(M)])
    for n, head in enumerate(heads, 1):
        nn.init.zeros_(head.weight)
        nn.init.constant_(head.bias, 40.0 if n == 3 else -40.0)
    halt = ac.AdaptiveHalt(layers(), policy(heads), max_steps=M)
    with torch.set_grad_enabled(graph):
        result = halt.train(graph)(torch.randn(B, D))
    if result.trace is None:
        assert result.steps.tolist() == [3] * B
    else:  # PonderNet in training takes all steps
        at_three = result.trace.weights[result.trace.step == 3]
        torch.testing.assert_close(at_three, torch.ones(B))


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("compact", [True, False, "auto"])
def test_stages_change_the_shape_of_the_state(graph, compact):
    (steps, readouts), x = stages(), torch.randn(B, 2, 8, 8)
    halt = ac.AdaptiveHalt(steps, ac.FixedSteps(STEPS), max_steps=M, readout=readouts, compact=compact)
    with torch.set_grad_enabled(graph):
        result = halt(x)
        with ac.reference_kernels():
            reference = halt(x)
    states, expected = by_hand(steps, readouts, x, STEPS)
    torch.testing.assert_close(result.output, expected)
    assert len(result.state) == M
    for n, (state, other) in enumerate(zip(result.state, reference.state, strict=True), 1):
        rows = (n == STEPS).nonzero()[:, 0].tolist()
        torch.testing.assert_close(state, torch.cat([states[i] for i in rows]))
        torch.testing.assert_close(state, other)
    if graph:
        found = gradients(result.output.sum() + sum(s.square().sum() for s in result.state), halt)
        wanted = gradients(expected.sum() + sum(s.square().sum() for s in states), halt)
        torch.testing.assert_close(found, wanted)


def test_a_row_has_the_same_bits_alone_while_shapes_change():
    (steps, readouts), x = stages(), torch.randn(B, 2, 8, 8)
    for stage in steps:  # products of a row's own: torch's convolutions round by the batch
        stage.forward = lambda x, s=stage: torch.cat([s.conv(row[None]).relu() for row in x])
    for readout in readouts:
        readout.forward = lambda x, r=readout: torch.cat([r.linear(row.mean((1, 2))[None]) for row in x])
    halt = ac.AdaptiveHalt(steps, ac.Confidence(0.39), max_steps=M, readout=readouts, check_rows=False)
    with torch.no_grad():
        result = halt(x)
        alone = [halt(x[i : i + 1]) for i in range(B)]
    assert len(result.steps.unique()) > 1
    assert torch.equal(result.output, torch.cat([one.output for one in alone]))
    assert torch.equal(result.steps, torch.cat([one.steps for one in alone]))


def test_the_first_stage_alone_changes_the_shape():
    """No row has ended before it: the states are of one shape, and no readout is needed."""
    manual()
    steps, x = nn.ModuleList([Layer(5, D), Layer()]), torch.randn(B, 5)
    taken = STEPS.clamp(max=2)
    halt = ac.AdaptiveHalt(steps, ac.FixedSteps(taken), max_steps=2)
    states, _ = by_hand(steps, [nn.Identity()] * 2, x, taken)
    for graph in (False, True):
        with torch.set_grad_enabled(graph):
            result = halt(x)
        torch.testing.assert_close(result.state, torch.cat(states))
        torch.testing.assert_close(result.output, torch.cat(states))


@pytest.mark.parametrize("graph", [False, True])
def test_a_row_that_overflows_at_a_stage_of_another_shape(graph):
    class First(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))[:, :C]

    (steps, _), x = stages(), torch.randn(B, 2, 8, 8)
    readouts = nn.ModuleList([First() for _ in steps])  # without weights, whose gradient would be 0 * inf
    x[3] = 3e38  # which overflows in the first stage
    halt = ac.AdaptiveHalt(steps, ac.FixedSteps(STEPS), max_steps=M, readout=readouts, check_rows=False)
    with torch.set_grad_enabled(graph):
        result = halt(x)
    assert result.status[3] == ac.Status.NONFINITE and result.steps[3] == 1
    others = [i for i in range(B) if i != 3]
    _, expected = by_hand(steps, readouts, x, STEPS)
    torch.testing.assert_close(result.output[others], expected[others])
    if graph:
        loss = result.output.nan_to_num().sum() + sum(s.nan_to_num().sum() for s in result.state)
        assert all(g.isfinite().all() for g in gradients(loss, halt))


def test_shapes_change_without_a_readout():
    steps, _ = stages()
    halt = ac.AdaptiveHalt(steps, ac.FixedSteps(STEPS), max_steps=M)
    for graph in (False, True):
        with (
            torch.set_grad_enabled(graph),
            pytest.raises(ValueError, match=r"readout: expected one where stages"),
        ):
            halt(torch.randn(B, 2, 8, 8))


def test_a_step_that_is_no_list_keeps_its_shape():
    halt = ac.AdaptiveHalt(lambda h: h[:, 1:], ac.FixedSteps(2), readout=lambda h: h[:, 0])
    with pytest.raises(ValueError, match="step: expected it to keep the state's shape"):
        halt(torch.randn(B, D))


@pytest.mark.parametrize("wrong", [lambda x: x[1:].contiguous(), lambda x: x.double()])
def test_a_stage_keeps_rows_and_dtype(wrong):
    class Wrong(nn.Module):
        def forward(self, x):
            return wrong(x)

    steps = nn.ModuleList([Layer(), Wrong()])
    halt = ac.AdaptiveHalt(steps, ac.FixedSteps(2), readout=exits(), max_steps=2, check_rows=False)
    with pytest.raises((TypeError, ValueError), match="step: expected it to keep"):
        halt(torch.randn(B, D))


@pytest.mark.parametrize("graph", [False, True])
def test_every_function_gets_inputs_and_number_where_it_asks(graph):
    """The readout and the head see the inputs of the rows that are left, and the step's number."""
    seen = []

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(D, 1)

        def forward(self, state, x, *, n):
            assert len(state) == len(x)
            seen.append(n)
            return self.linear(state + x)[:, 0]

    def step(state, x, n):
        return state + n * x

    def readout(state, x, n=None):
        return state * n - x

    manual()
    halt = ac.AdaptiveHalt(step, ac.ACT(Head()), max_steps=M, readout=readout, check_rows=False)
    halt.policy.head.linear.bias.data.fill_(-0.5)
    x = torch.randn(B, D)
    with torch.set_grad_enabled(graph):
        result = halt(torch.zeros(B, D), x)
    assert seen == list(range(1, len(seen) + 1)) and len(result.steps.unique()) > 1
    accumulated, total, running = torch.zeros(B), torch.zeros(B, D), torch.ones(B, dtype=torch.bool)
    state = torch.zeros(B, D)
    for n in range(1, M + 1):
        state = state + n * x
        h = torch.sigmoid(halt.policy.head.linear(state + x)[:, 0]).detach()
        ends = (accumulated + h >= halt.policy.threshold) | torch.tensor(n == M)
        weight = torch.where(ends, 1 - accumulated, h) * running
        total, accumulated = total + weight[:, None] * (state * n - x), accumulated + h
        running = running & ~ends
    torch.testing.assert_close(result.output.detach(), total)


def test_pondernet_in_training_gives_its_head_the_inputs():
    class Head(nn.Module):
        def forward(self, state, x):
            return x[:, 0] * 0 - 1

    halt = ac.AdaptiveHalt(lambda s, x: s + x, ac.PonderNet(Head()), max_steps=M)
    assert halt(torch.zeros(B, D), torch.randn(B, D)).steps.tolist() == [M] * B


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class Numbered(nn.Module):
    def forward(self, state, x, n):
        return state


FORMS = {
    "state alone": (lambda s: s, Form()),
    "default": (lambda s, temperature=1.0: s, Form()),
    "input": (lambda s, x: s, Form(inputs=True)),
    "all inputs": (lambda s, *inputs: s, Form(inputs=True)),
    "anything": (lambda *a, **k: a[0], Form()),
    "keyword": (lambda s, *, n: s, Form(place=0)),
    "number": (lambda s, n: s, Form(place=1)),
    "first": (lambda n: n, Form()),
    "both": (lambda s, x, n: s, Form(inputs=True, place=2)),
    "bound": (functools.partial(lambda s, n: s, n=3), Form()),
    "builtin": (torch.tanh, Form()),
    "module": (Numbered(), Form(inputs=True, place=2)),
    "wrapped": (Wrapper(Numbered()), Form(inputs=True, place=2)),
    "compiled": (torch.compile(Numbered()), Form(inputs=True, place=2)),
    "linear": (nn.Linear(2, 2), Form()),
    "bilinear": (nn.Bilinear(2, 2, 2), Form(inputs=True)),
}


@pytest.mark.parametrize("name", FORMS)
def test_what_a_signature_asks_for(name):
    function, form = FORMS[name]
    assert form_of(function) == form


def test_an_input_that_fills_the_parameter_n_is_the_users():
    """``step(state, n)`` with one input: n is that input."""
    halt = ac.AdaptiveHalt(lambda s, n: s + n, ac.FixedSteps(3), max_steps=3)
    x = torch.randn(B, D)
    torch.testing.assert_close(halt(torch.zeros(B, D), x).output, 3 * x)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("policy", ["act", "confidence", "fixed", "custom"])
@pytest.mark.parametrize("compact", [True, False])
def test_keep_trace_has_the_readouts_of_all_steps(graph, policy, compact):
    class Custom(ac.Policy):
        def decide(self, view):
            return ac.Decision(view.readout[:, 0] > 0)

    manual()
    policies = {
        "act": ac.ACT(nn.Linear(D, 1)),
        "confidence": ac.Confidence(0.42),
        "fixed": ac.FixedSteps(STEPS),
        "custom": Custom(),
    }
    steps, readouts, x = layers(), exits(), torch.randn(B, D)
    halt = ac.AdaptiveHalt(
        steps, policies[policy], max_steps=M, readout=readouts, keep_trace=True, compact=compact
    )
    with torch.set_grad_enabled(graph):
        result = halt(x)
        halt.keep_trace = False
        other = halt(x)
    trace = result.trace
    assert other.trace is None and trace.weights is None
    torch.testing.assert_close(result.output, other.output)
    assert torch.equal(result.steps, other.steps)
    assert torch.equal(torch.bincount(trace.row, minlength=B), result.steps)
    for output, row, step in zip(trace.outputs, trace.row.tolist(), trace.step.tolist(), strict=True):
        state = x[row : row + 1]
        for layer in steps[:step]:
            state = layer(state)
        torch.testing.assert_close(output, readouts[step - 1](state)[0])
    order = list(zip(trace.step.tolist(), trace.row.tolist(), strict=True))
    assert order == sorted(order)
    if graph:
        assert trace.outputs.requires_grad


def test_a_known_call_notices_a_new_head_and_a_new_mode():
    manual()
    halt = ac.AdaptiveHalt(Layer(), ac.ACT(nn.Linear(D, 1)), max_steps=M)
    x = torch.randn(B, D)
    with torch.no_grad():
        halt(x), halt(x)
        halt.policy.head = nn.ModuleList([nn.Linear(D, 1) for _ in range(M)])
        for n, head in enumerate(halt.policy.head, 1):
            nn.init.zeros_(head.weight)
            nn.init.constant_(head.bias, 40.0 if n == 2 else -40.0)
        assert halt(x).steps.tolist() == [2] * B
        del halt.policy.head
        halt.policy.head = lambda state, n: torch.full((len(state),), 40.0 if n == 3 else -40.0)
        assert halt(x).steps.tolist() == [3] * B
        del halt.policy.head
        halt.policy.head = nn.Linear(D, 1)
        halt(x), halt(x)
        halt.keep_trace = True
        assert halt(x).trace is not None


@pytest.mark.parametrize("role", ["readout", "head"])
def test_lists_of_the_wrong_length(role):
    short = nn.ModuleList([nn.Linear(D, 1) for _ in range(2)])
    readout, head = (short, nn.Linear(D, 1)) if role == "readout" else (None, short)
    halt = ac.AdaptiveHalt(Layer(), ac.ACT(head), max_steps=3, readout=readout)
    with pytest.raises(ValueError, match=rf"{role}: expected a ModuleList with a module for each of 3 steps"):
        halt(torch.randn(B, D))
    with pytest.raises(ValueError, match=rf"{role}: expected a ModuleList with at least one module"):
        if role == "readout":
            halt.readout = nn.ModuleList()
        else:
            halt.policy.head = nn.ModuleList()
    halt.max_steps = 2
    assert halt(torch.randn(B, D)).steps.max() <= 2


@pytest.mark.parametrize("role", ["readout", "head"])
def test_a_module_of_a_list_that_mixes_rows_is_named(role):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(D, 1)

        def forward(self, h):
            return self.linear(h - h.mean(0))

    listed = nn.ModuleList([nn.Linear(D, 1), Mixed(), nn.Linear(D, 1)])
    readout, head = (listed, nn.Linear(D, 1)) if role == "readout" else (None, listed)
    halt = ac.AdaptiveHalt(Layer(), ac.ACT(head), max_steps=3, readout=readout)
    with pytest.raises(
        ValueError, match=rf"{role}\[1\]: expected each row's result to depend on that row alone"
    ):
        halt(torch.randn(B, D))


def test_a_stage_of_another_shape_that_mixes_rows_is_named():
    steps, readouts = stages()
    steps[3] = nn.Sequential(steps[3], nn.BatchNorm2d(6, track_running_stats=False))
    halt = ac.AdaptiveHalt(steps, ac.FixedSteps(STEPS), max_steps=M, readout=readouts)
    with pytest.raises(ValueError, match="BatchNorm2d"):
        halt(torch.randn(B, 2, 8, 8))
    steps[3] = nn.Sequential(steps[3][0], nn.Softmax(0))
    with pytest.raises(ValueError, match=r"step\[3\].*Softmax"):
        ac.AdaptiveHalt(steps, ac.FixedSteps(STEPS), max_steps=M, readout=readouts)(torch.randn(B, 2, 8, 8))


def test_copies_and_pickles():
    steps, readouts, x = layers(), exits(), torch.randn(B, D)
    halt = ac.AdaptiveHalt(steps, ac.Confidence(0.45), max_steps=M, readout=readouts, keep_trace=True)
    with torch.no_grad():
        result = halt(x)
        for other in (copy.deepcopy(halt), pickle.loads(pickle.dumps(halt))):
            again = other(x)
            assert torch.equal(again.output, result.output)
            assert torch.equal(again.trace.outputs, result.trace.outputs)
    assert set(halt.state_dict()) >= {"step.0.linear.weight", "readout.3.bias"}


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_keep_trace_is_a_bool(value):
    with pytest.raises(TypeError, match="keep_trace: expected a bool, got"):
        ac.AdaptiveHalt(Layer(), ac.FixedSteps(1), keep_trace=value)


def test_a_cell_with_a_list_of_readouts_takes_the_loop():
    cell = ac.cells.GRU(D, D)
    halt = ac.AdaptiveHalt(cell, ac.FixedSteps(STEPS), max_steps=M, readout=exits())
    h, x = torch.zeros(B, D), torch.randn(B, D)
    assert "readout" in halt.plan(h, x).why
    state, _ = by_hand([lambda s: s] * M, exits(), h, STEPS)
    result = halt(h, x)
    outputs = []
    for i, count in enumerate(STEPS.tolist()):
        state = h[i : i + 1]
        for _ in range(count):
            state = cell(state, x[i : i + 1])
        outputs.append(halt.readout[count - 1](state))
    torch.testing.assert_close(result.output, torch.cat(outputs))
    halt.readout = None
    halt.keep_trace = True
    assert "keep_trace" in halt.plan(h, x).why and halt(h, x).trace is not None
