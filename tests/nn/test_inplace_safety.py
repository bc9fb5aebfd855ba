"""The inference loop writes blocks in place only where nobody else sees it, never to the user's tensors."""

from __future__ import annotations

import gc
import itertools
import re
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import adaptcomp_ext as ac
from tests.helpers.halting import COMPACT, DIM, POLICIES, identical, leaves, make, mode, tree_arguments
from tests.helpers.processes import run_python

MODES = ["grad", "no_grad", "inference"]
N = torch.tensor([3, 1, 4, 1, 5, 2, 6, 5, 3, 5, 1, 2])
BATCH = 12


def block(seed=0, device="cpu"):
    return torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(seed)).to(device)


def run(step, *arguments, how="no_grad", compact=True, device="cpu", readout=None):
    with mode(how):
        return ac.AdaptiveHalt(step, ac.FixedSteps(N.to(device)), 6, compact=compact, readout=readout)(
            *arguments
        )


@pytest.mark.promise("untouched")
@pytest.mark.parametrize("form", ["tensor", "nested"])
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("name", POLICIES)
def test_state_and_inputs_are_left_alone(name, how, form, device):
    step, policy, h, x = make(name, BATCH, form, device=device)
    state, inputs = tree_arguments(form, h, x)
    tensors = [*leaves(state), *leaves(inputs), *policy.parameters(), *policy.buffers()]
    before = [(t.clone(), t._version) for t in tensors]
    for compact in COMPACT:
        with mode(how):
            ac.AdaptiveHalt(step, policy, 6, compact=compact)(state, *inputs)
    for t, (copy, version) in zip(tensors, before, strict=True):
        assert identical(t, copy) and t._version == version


class Keeping:
    """Return h + 1, h + 2, ...; keep a reference to each result, and a copy of it."""

    def __init__(self, keep):
        self.keep = keep
        self.kept = []
        self.copies = []

    def __call__(self, h, *_):
        out = h + 1
        self.copies.append(out.clone())
        self.kept.append(self.keep(out))
        return out


KEEP = {
    "tensor": lambda t: t,
    "view": lambda t: t[:, 1:],
    "view_of_all": lambda t: t.view(-1),
    "detached": lambda t: t.detach(),
    "alias": lambda t: t.view_as(t),
    "numpy": lambda t: t.numpy(),
    "dlpack": lambda t: np.from_dlpack(t),
    "torch_dlpack": lambda t: torch.from_dlpack(t),
    "storage": lambda t: t.untyped_storage(),
    "data": lambda t: t.data,
    "closure": lambda t: lambda: t,
    "in_a_dict": lambda t: {"a": [t]},
    "parameter": lambda t: nn.Parameter(t, requires_grad=False),
    "memoryview": lambda t: memoryview(t.numpy()),
    "expanded": lambda t: t[None].expand(2, *t.shape),
}


def read_kept(name, kept, like):
    value = kept() if name == "closure" else kept["a"][0] if name == "in_a_dict" else kept
    if name == "storage":
        return torch.empty(0, dtype=like.dtype).set_(value, 0, like.shape)
    if name == "memoryview":
        return torch.from_numpy(np.asarray(value).copy())
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    return value


@pytest.mark.promise("untouched")
@pytest.mark.parametrize("how", ["no_grad", "inference"])
@pytest.mark.parametrize("keep", KEEP)
def test_what_the_step_kept_of_its_result_stays_as_it_was(keep, how):
    for compact in COMPACT:
        step = Keeping(KEEP[keep])
        h = block()
        result = run(step, h, how=how, compact=compact)
        for kept, copy in zip(step.kept, step.copies, strict=True):
            got = read_kept(keep, kept, copy)
            want = {
                "view": copy[:, 1:],
                "view_of_all": copy.view(-1),
                "expanded": copy[None].expand(2, *copy.shape),
            }
            assert torch.equal(got, want.get(keep, copy))
        assert torch.equal(result.output, run(lambda h: h + 1, h, how=how, compact=False).output)


@pytest.mark.parametrize("how", ["no_grad", "inference"])
def test_a_scripted_step_may_keep_its_result(how):
    """C++ holds a reference, which Python's count does not include."""

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = torch.zeros(0)
            self.copy = torch.zeros(0)
            self.wrong = 0

        def forward(self, h):
            if self.last.numel() > 0 and not torch.equal(self.last, self.copy):
                self.wrong = self.wrong + 1
            out = h + 1
            self.last = out
            self.copy = out.clone()
            return out

    try:
        step = torch.jit.script(Module())
    except RuntimeError as error:
        pytest.skip(f"torch.jit.script: {error}")
    run(step, block(), how=how)
    assert step.wrong == 0


@pytest.mark.parametrize("how", ["no_grad", "inference"])
def test_hooks_may_keep_results(how):
    cell = nn.Linear(DIM, DIM)
    kept, copies = [], []
    cell.register_forward_hook(lambda m, i, out: (kept.append(out), copies.append(out.clone()), None)[2])
    run(cell, block(), how=how)
    assert all(map(torch.equal, kept, copies))


@pytest.mark.promise("untouched")
@pytest.mark.parametrize("how", ["no_grad", "inference"])
def test_readouts_heads_and_policies_may_keep_what_they_see(how):
    kept = []

    def seen(tag, state):
        kept.append((tag, state, state.clone()))
        return state

    with mode(how):
        policy = ac.PonderNet(lambda h: seen("head", h)[:, 0]).eval()
        ac.AdaptiveHalt(
            lambda h, x: h * 0.9 + x, policy, 6, readout=lambda h: seen("readout", h), compact=True
        )(block(), block(1))
    assert len(kept) > 4
    for tag, state, copy in kept:
        assert torch.equal(state, copy), tag


@pytest.mark.promise("untouched")
@pytest.mark.parametrize("how", ["no_grad", "inference"])
def test_step_may_keep_its_arguments(how):
    """The inputs of a call are the loop's copies: compacted in place unless another reference exists."""
    kept = []

    def step(h, x, y):
        for t in (h, x, y["z"], x[:, 1:]):
            kept.append((t, t.clone()))
        return h + x

    run(step, block(), block(1), {"z": block(2)}, how=how)
    for t, copy in kept:
        assert torch.equal(t, copy)


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("compact", COMPACT)
def test_step_may_keep_views_of_its_inputs_as_state(how, compact):
    """The step returns an input as its state, so that both share memory."""
    x = block(1)
    result = run(lambda h, x: x, block(), x, how=how, compact=compact)
    assert torch.equal(result.output, x) and torch.equal(x, block(1))
    result = run(lambda s, x: (s[1], x), (block(), block(2)), x, how=how, compact=compact)
    want = torch.where((N == 1)[:, None], block(2), x)
    assert torch.equal(result.state[0], want) and torch.equal(result.state[1], x)


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("compact", COMPACT)
def test_the_same_tensor_as_state_and_input_and_input_again(how, compact):
    t = block()
    before = t.clone()
    result = run(lambda h, x, y, z: h + x - y + z, t, t, t, t, how=how, compact=compact)
    assert torch.equal(t, before)
    torch.testing.assert_close(result.output, t * (N + 1)[:, None])
    pair = run(lambda s, x: (s[0] + x, s[1] - x), (t, t), t, how=how, compact=compact)
    assert torch.equal(t, before)
    torch.testing.assert_close(pair.state[1], t * (1 - N)[:, None])


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("compact", COMPACT)
def test_overlapping_inputs(how, compact):
    """Two inputs share memory."""
    base = torch.randn(BATCH + 3, DIM)
    before = base.clone()
    h, x, y = base[:BATCH], base[3:], base[1:-2]
    result = run(lambda h, x, y: h + x - y, h, x, y, how=how, compact=compact)
    assert torch.equal(base, before)
    torch.testing.assert_close(result.output, h + (x - y) * N[:, None], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["no_grad", "inference"])
@pytest.mark.parametrize("compact", COMPACT)
def test_step_returning_a_parameter_or_a_table(how, compact):
    table = nn.Parameter(block(3))
    before = table.detach().clone()
    run(lambda h: table[: h.shape[0]], block(), how=how, compact=compact)
    run(lambda h: table if h.shape[0] == BATCH else h + 1, block(), how=how, compact=compact)
    run(lambda h: table.data if h.shape[0] == BATCH else h + 1, block(), how=how, compact=compact)
    assert torch.equal(table, before)


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("compact", COMPACT)
def test_memory_of_numpy(how, compact):
    array, table = block(4).numpy().copy(), block(5).numpy().copy()
    before = array.copy(), table.copy()
    run(lambda h, x: h + x, torch.from_numpy(array), torch.from_numpy(array), how=how, compact=compact)
    # A fresh tensor object each time, over memory that torch does not own.
    run(lambda h: torch.from_numpy(table)[: h.shape[0]], block(), how=how, compact=compact)
    run(lambda h: torch.from_numpy(table[: h.shape[0]]), block(), how=how, compact=compact)
    run(
        lambda h: torch.frombuffer(table, dtype=torch.float32)[: h.shape[0] * DIM].view(-1, DIM),
        block(),
        how=how,
        compact=compact,
    )
    assert np.array_equal(array, before[0]) and np.array_equal(table, before[1])


@pytest.mark.parametrize("how", ["no_grad", "inference"])
@pytest.mark.parametrize("compact", COMPACT)
def test_a_state_object_that_the_step_keeps(how, compact):
    """The container and its tensors stay as they are."""
    kept = []

    def step(state):
        state = {"h": state["h"] + 1, "pair": [state["pair"][0] * 2, state["pair"][1]]}
        kept.append((state, [t.clone() for t in leaves(state)]))
        return state

    run(step, {"h": block(), "pair": [block(1), torch.arange(BATCH)]}, how=how, compact=compact)
    for state, copies in kept:
        assert all(map(torch.equal, leaves(state), copies))
        assert len(state["pair"]) == 2


@pytest.mark.parametrize("how", MODES)
def test_a_step_that_works_in_place_on_its_own_tensors(how):
    """Only the step writes to its result, and later reads what it wrote."""

    def step(h):
        out = h.clone()
        out += 1
        return out.mul_(1.0)

    assert torch.equal(run(step, torch.zeros(BATCH, 1), how=how).output[:, 0], N.float())


@pytest.mark.promise("untouched")
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("name", POLICIES)
def test_results_are_not_shared_with_the_arguments_or_the_next_call(name, how):
    step, policy, h, x = make(name, BATCH)
    halt = ac.AdaptiveHalt(lambda h, x: h, policy, 4)
    with mode(how):
        one = halt(h, x)
        copies = [t.clone() for t in leaves(one) if t is not None]
        pointers = {t.untyped_storage().data_ptr() for t in leaves(one) if t is not None}
        assert not pointers & {h.untyped_storage().data_ptr(), x.untyped_storage().data_ptr()}
        halt(h * 2, x)
        ac.AdaptiveHalt(step, policy, 4)(h, x)
    assert all(
        identical(a, b) for a, b in zip([t for t in leaves(one) if t is not None], copies, strict=True)
    )


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("name", POLICIES)
def test_nothing_is_kept_after_a_call(name, how):
    """There is no cache and no cycle: the steps' results are freed with the result, without the collector."""
    step, policy, h, x = make(name, BATCH)
    refs = []

    def watched(h, x):
        out = step(h, x)
        refs.append(weakref.ref(out))
        return out

    gc.disable()
    try:
        with mode(how):
            result = ac.AdaptiveHalt(watched, policy, 4)(h, x)
        del result
        assert refs and all(ref() is None for ref in refs)
    finally:
        gc.enable()


def test_training_fails_loudly_if_the_step_overwrites_what_it_returned():
    """The loop's own writes bump the version counter, so that autograd raises."""
    step, policy, h, x = make("act", 6)
    result = ac.AdaptiveHalt(step, policy, 4)(h, x)
    loss = (result.output**2).sum()
    result.output.data.add_(0)  # invisible on purpose
    loss.backward()
    result = ac.AdaptiveHalt(step, policy, 4)(h, x)
    loss = (result.output**2).sum()
    with torch.no_grad():
        result.output.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("how", ["no_grad", "inference"])
def test_memory_that_nobody_else_sees_is_used_again(how):
    """Where no reference exists, the step's result and the copies of the inputs are reused."""
    results, states, inputs = [], [], []

    def step(h, x):
        states.append(h.data_ptr())
        inputs.append(x.data_ptr())
        out = h + x
        results.append(out.data_ptr())
        return out

    run(step, block(), block(1), how=how)
    assert len(results) == 6
    assert results[:-1] == states[1:]
    assert len(set(inputs[1:])) == 1 and inputs[0] != inputs[1]


@pytest.mark.parametrize("compact", COMPACT)
def test_a_step_with_an_inference_mode_of_its_own(compact):
    """Inference tensors must not be written outside of inference mode, and cannot be resized there."""

    @torch.inference_mode()
    def step(h, x):
        return h + x

    expected = run(lambda h, x: h + x, block(), block(1), how="no_grad", compact=compact)
    result = run(step, block(), block(1), how="no_grad", compact=compact)
    assert torch.equal(result.output, expected.output)


CHANGED = """
import torch, adaptcomp_ext as ac

CHANGES = {
    "released": lambda t: t.untyped_storage().resize_(0),
    "smaller storage": lambda t: t.untyped_storage().resize_(4),
    "resized": lambda t: t.resize_(0),
    "larger": lambda t: t.resize_(64, 3),
    "set": lambda t: t.set_(torch.zeros(1)),
    "data": lambda t: setattr(t, "data", torch.zeros(1)),
}
N = torch.arange(1, 9)

class Own(ac.Policy):
    def decide(self, view):
        return ac.Decision(N[view.row] <= view.step)

POLICIES = {
    "FixedSteps": lambda: ac.FixedSteps(N.clone()),
    "ACT": lambda: ac.ACT(lambda s: s[:, 0]),
    "PonderNet": lambda: ac.PonderNet(lambda s: s[:, 0], epsilon=0.5),
    "Own": Own,
}

def attempt(name, run, grad):
    try:
        with torch.set_grad_enabled(grad):
            got = run()
        print(name, "ran", flush=True)
    except Exception as error:
        print(name, type(error).__name__, error, flush=True)

start = torch.full((8, 3), -9.0)
start[0] = 9.0
for change in CHANGES:
    for policy, make in POLICIES.items():
        for grad in (False, True):
            def step(s, x):
                out = s + x
                CHANGES[change](x)
                return out
            x = torch.zeros(8, 3)
            attempt(f"input|{change}|{policy}|{grad}|",
                    lambda: ac.AdaptiveHalt(step, make(), 8, compact=True)(start.clone(), x), grad)
    if change == "smaller storage":
        continue
    for grad in (False, True):
        for place in ("head", "readout"):
            def change_it(s):
                out = s[:, 0].clone()
                CHANGES[change](s)
                return out
            policy, readout = (ac.ACT(change_it), None) if place == "head" else (ac.FixedSteps(N), change_it)
            halt = ac.AdaptiveHalt(lambda s: s + 1, policy, 8, compact=True, readout=readout)
            attempt(f"state|{change}|{place}|{grad}|", lambda: halt(start.clone()), grad)

n, ids = torch.arange(1, 9), torch.arange(8)
sampled = ac.PonderNet(lambda s: s[:, 0] * 0 - 1).eval()
for name, of, policy, given in (("n", n, ac.FixedSteps(n), None), ("ids", ids, sampled, ids)):
    outcomes = []
    for harm in (False, True):
        def step(s):
            if harm:
                of.untyped_storage().resize_(0)
            return s + 1
        with torch.no_grad():
            outcomes.append(ac.AdaptiveHalt(step, policy, 8)(torch.zeros(8, 3), sample_ids=given).steps)
    print(f"{name}|released|", "right" if torch.equal(*outcomes) else "wrong", flush=True)
"""


def test_what_the_users_functions_resize_is_refused_before_its_rows_are_moved():
    """A read or write of freed memory would end the process by a signal, so that it runs in a child."""
    done = run_python("-c", CHANGED)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6 * 4 * 2 + 5 * 4 + 2
    for line in lines:
        *where, outcome = line.split("|")
        if where[0] in ("n", "ids"):
            assert outcome == " right", line
        else:
            name = {"input": "inputs", "state": "step"}[where[0]]
            error, argument = outcome.split()[:2]
            assert error in ("ValueError", "TypeError") and argument == f"{name}:", line


# --- functions that reuse their memory: without gradients the results are the same --------------------------
class StillnessAt(ac.Policy):
    """A policy that halts when the readout moves less than before, with a carry in the readout's memory."""

    def decide(self, view):
        before = view.carry[0] if view.carry else torch.zeros_like(view.readout)
        return ac.Decision(
            (view.readout - before).norm(dim=1) < 0.6, carry=(view.readout.view_as(view.readout),)
        )


def reusing(place):
    """Return a step and a readout that overwrite their argument, or their own buffer."""
    memory = torch.empty(BATCH, DIM)

    def into_memory(t):
        return memory[: t.shape[0]].copy_(t.detach())

    step = {"step": lambda h, x: h.mul_(0.5).add_(x), "buffer": lambda h, x: into_memory(h * 0.5 + x)}
    readout = {"readout": lambda h: into_memory(h * 2)}
    return step.get(place, lambda h, x: h * 0.5 + x), readout.get(place, lambda h: h * 2)


@pytest.mark.parametrize("how", ["no_grad", "inference", "reference"])
@pytest.mark.parametrize("place", ["step", "buffer", "readout"])
@pytest.mark.parametrize(
    "policy", [lambda: ac.PonderNet(lambda h: h[:, 0]), StillnessAt, lambda: ac.ACT(lambda h: h[:, 0] - 1)]
)
def test_functions_that_use_their_memory_again(policy, place, how):
    def results(place, compact, apart):
        step, readout = reusing(place)
        with mode(how), torch.set_grad_enabled(False):
            halt = ac.AdaptiveHalt(step, policy(), 6, compact=compact, readout=readout if apart else None)
            return leaves(halt(block(), block(1)))

    for compact, apart in itertools.product(COMPACT, (False, True)):
        for got, right in zip(results(place, compact, apart), results(None, compact, apart), strict=True):
            assert (got is None and right is None) or torch.equal(got, right)


def test_a_readout_without_a_gradient_may_use_its_memory_again_in_training():
    def trace(place):
        step, readout = reusing(place)
        halt = ac.AdaptiveHalt(
            step, ac.PonderNet(lambda h: h[:, 0].detach()), 6, readout=lambda h: readout(h).detach()
        )
        return halt(block(), block(1).requires_grad_()).trace

    assert torch.equal(trace("readout").outputs, trace(None).outputs)


@pytest.mark.parametrize("how", ["grad", "reference"])
@pytest.mark.parametrize("policy", [ac.ACT, ac.PonderNet])
def test_what_the_gradient_needs_must_not_be_changed_in_place(policy, how):
    """The result has the right values, or an error says what is wrong."""

    def run(step, readout=None):
        x = block(1).requires_grad_()
        with mode(how):
            result = ac.AdaptiveHalt(step, policy(lambda h: h[:, 0] - 9), 5, readout=readout)(
                torch.zeros(BATCH, DIM), x
            )
        (gradient,) = torch.autograd.grad(result.output.square().sum() + result.cost.sum(), x)
        return result.output, gradient

    plain = run(lambda h, x: h + x)
    memory = torch.empty(BATCH, DIM)

    def own_memory(h):
        memory.detach_()
        return memory.copy_(h)

    for attempt in (lambda: run(lambda h, x: h.add_(x)), lambda: run(lambda h, x: h + x, own_memory)):
        try:
            got = attempt()
        except RuntimeError as error:
            assert re.match(
                "step(: | or readout: )expected|one of the variables needed for gradient", str(error)
            ), error
        else:
            for value, right in zip(got, plain, strict=True):
                torch.testing.assert_close(value, right)


@pytest.mark.parametrize("policy", [ac.ACT, ac.PonderNet])
def test_a_step_in_place_is_named_in_training(policy):
    halt = ac.AdaptiveHalt(lambda h, x: h.add_(x), policy(lambda h: h[:, 0] - 9), 5)
    with pytest.raises(RuntimeError, match=f"^step: expected the state .* left as it is.*{policy.__name__}"):
        halt(torch.zeros(BATCH, DIM), block(1).requires_grad_())
