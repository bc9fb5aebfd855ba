"""AdaptiveHalt with torch: compile, autocast, copies, pickles, state dicts, DDP, threads, inference mode."""

from __future__ import annotations

import copy
import io
import os
import pickle
import socket
import threading

import pytest
import torch
from torch import nn

import adaptcomp_ext as ac
from adaptcomp_ext.ops._plain import TELLS_EXPORT
from tests.helpers.halting import (
    COMPACT,
    DIM,
    MODES,
    POLICIES,
    Cell,
    check,
    dense,
    identical,
    leaves,
    make,
    mode,
)
from tests.helpers.processes import run_python


def same(a, b):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        assert (x is None and y is None) or identical(x, y)


# --- torch.compile ------------------------------------------------------------------------------------------
class Graphs:
    """A backend that runs eagerly and counts the graphs it was given."""

    def __init__(self):
        self.count = 0

    def __call__(self, module, example_inputs):
        self.count += 1
        return module.forward


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


@pytest.mark.promise("compile")
@pytest.mark.parametrize("how", ["grad", "no_grad", "inference"])
def test_a_compiled_step_is_not_compiled_again_for_every_size(how, graphs):
    cell = Cell()
    step = torch.compile(cell, dynamic=True, backend=graphs)
    for batch in (40, 64, 23, 40):
        h, x = torch.randn(batch, DIM), torch.randn(batch, DIM)
        policy = ac.FixedSteps(torch.arange(batch) % 13 + 1)
        with mode(how):
            result = ac.AdaptiveHalt(step, policy, 13, compact=True)(h, x)
            same(result, ac.AdaptiveHalt(cell, policy, 13, compact=True)(h, x))
    assert graphs.count <= 3


@pytest.mark.promise("compile")
@pytest.mark.parametrize("name", ["act", "ponder_eval", "max_prob"])
def test_a_compiled_step_trains(name, graphs):
    step, policy, h, x = make(name, 17, requires_grad=True)
    compiled = torch.compile(step, dynamic=True, backend=graphs)
    eager, got = (
        torch.autograd.grad(ac.AdaptiveHalt(run, policy, 6)(h, x).output.sum(), h)[0]
        for run in (step, compiled)
    )
    torch.testing.assert_close(got, eager)
    assert graphs.count <= 3


@pytest.mark.promise("compile")
@pytest.mark.parametrize("how", ["grad", "no_grad"])
@pytest.mark.parametrize("name", ["act", "fixed_tensor"])
def test_a_model_with_a_halting_loop_in_it_can_be_compiled(name, how, graphs):
    """The loop is one operator of the graph."""
    step, policy, h, x = make(name, 9)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = nn.Linear(DIM, DIM)
            self.halt = ac.AdaptiveHalt(step, policy, 5)

        def forward(self, h, x):
            return self.halt(self.inside(h), x).output * 2

    model = Model()
    compiled = torch.compile(model, backend=graphs)
    for scale in (1.0, 3.0):  # other data, other numbers of steps
        with mode(how):
            torch.testing.assert_close(compiled(h * scale, x), model(h * scale, x))
    assert graphs.count == (1 if TELLS_EXPORT else 2)


@pytest.mark.parametrize("how", ["grad", "no_grad"])
def test_a_compiled_step_in_a_compiled_model(how, graphs):
    cell = Cell()
    halt = ac.AdaptiveHalt(
        torch.compile(cell, dynamic=True, backend=graphs), ac.FixedSteps(torch.arange(9) + 1), 9
    )
    h, x = torch.randn(9, DIM), torch.randn(9, DIM)
    with mode(how):
        got = torch.compile(lambda h, x: halt(h + 1, x).output * 2, backend=graphs)(h, x)
        torch.testing.assert_close(got, ac.AdaptiveHalt(cell, halt.policy, 9)(h + 1, x).output * 2)
    assert 3 <= graphs.count <= 5


# --- autocast -----------------------------------------------------------------------------------------------
@pytest.mark.promise("autocast")
@pytest.mark.parametrize("how", MODES)
def test_autocast(how):
    """The step and the head compute in bfloat16; the state keeps its dtype."""
    inner, read, head = nn.Linear(DIM, DIM), nn.Linear(DIM, 3), nn.Linear(DIM, 1)
    seen = set()

    def step(h, x):
        out = inner(h)
        seen.add(out.dtype)
        return out + x.to(out.dtype)

    h, x = torch.randn(9, DIM), torch.randn(9, DIM)
    for policy in (
        ac.ACT(head),
        ac.PonderNet(head),
        ac.PonderNet(head).eval(),
        ac.Confidence(0.5),
        ac.FixedSteps(2),
    ):
        halt = ac.AdaptiveHalt(step, policy, 4, readout=lambda h: read(h))
        with mode(how):
            with torch.autocast("cpu", torch.bfloat16):
                result = halt(h, x)
            exact = halt(h, x)
        assert result.state.dtype == torch.float32 and result.output.dtype == torch.bfloat16
        assert result.cost.dtype == torch.float32
        if isinstance(policy, ac.FixedSteps):
            torch.testing.assert_close(result.output.float(), exact.output, atol=0.1, rtol=0.1)
        if how == "grad":
            inner.weight.grad = None
            result.output.float().sum().backward()
            assert inner.weight.grad.dtype == torch.float32 and bool(inner.weight.grad.isfinite().all())
    assert torch.bfloat16 in seen


@pytest.mark.promise("autocast")
def test_autocast_does_not_excuse_an_integer():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="dtype"):
        ac.AdaptiveHalt(lambda h: h.long(), ac.FixedSteps(2), 3)(torch.zeros(2, 1))


# --- copies -------------------------------------------------------------------------------------------------
def module_of(name):
    step, policy, h, x = make(name, 9, seed=3)
    return ac.AdaptiveHalt(step, policy, 5, min_steps=2, compact="auto"), h, x


def through_pickle(halt):
    return pickle.loads(pickle.dumps(halt))


def through_torch_save(halt):
    buffer = io.BytesIO()
    torch.save(halt, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.promise("modules")
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, through_pickle, through_torch_save])
@pytest.mark.parametrize("name", POLICIES)
def test_copies_behave_like_the_original(name, copied, used):
    halt, h, x = module_of(name)
    if used:
        halt(h, x)
        with torch.no_grad():
            halt(h, x)
    twin = copied(halt)
    same(halt(h, x), twin(h, x))
    assert twin.extra_repr() == halt.extra_repr() and list(twin.state_dict()) == list(halt.state_dict())
    if copied is not copy.copy:
        assert not {p.data_ptr() for p in halt.parameters()} & {p.data_ptr() for p in twin.parameters()}


@pytest.mark.promise("modules")
@pytest.mark.parametrize("name", POLICIES)
def test_state_dict_round_trip(name):
    halt, h, x = module_of(name)
    step, policy, _, _ = make(name, 9, seed=8)
    other = ac.AdaptiveHalt(step, policy, 5, min_steps=2)
    if name == "fixed_tensor":
        other.policy.n += 1
        assert "policy.n" in halt.state_dict()
    buffer = io.BytesIO()
    torch.save(halt.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    same(halt(h, x), other(h, x))


@pytest.mark.promise("modules")
def test_parameters_are_those_of_step_head_and_readout():
    step, policy, _, _ = make("act")
    halt = ac.AdaptiveHalt(step, policy, 3, readout=nn.Linear(DIM, 2))
    names = {n for n, _ in halt.named_parameters()}
    assert names == {
        "step.cell.a",
        "step.cell.c",
        "policy.head.k",
        "policy.head.bias",
        "readout.weight",
        "readout.bias",
    }


@pytest.mark.promise("modules")
@pytest.mark.parametrize("name", POLICIES)
def test_results_can_be_pickled_and_copied(name):
    halt, h, x = module_of(name)
    with torch.no_grad():
        result = halt(h, x)
    same(result, pickle.loads(pickle.dumps(result)))
    same(result, copy.deepcopy(result))


@pytest.mark.promise("modules")
def test_moving_to_another_dtype():
    halt, h, x = module_of("act")
    result = halt.double()(h.double(), x.double())
    assert result.output.dtype == result.cost.dtype == torch.float64


def test_training_switch_reaches_the_policy():
    halt, h, x = module_of("ponder")
    assert halt.train()(h, x).trace is not None and halt.eval()(h, x).trace is None


# --- parallelism --------------------------------------------------------------------------------------------
@pytest.fixture
def process_group():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.promise("distributed")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_distributed_data_parallel(process_group):
    for name in POLICIES:
        halt, h, x = module_of(name)
        twin = copy.deepcopy(halt)
        parallel = nn.parallel.DistributedDataParallel(twin, find_unused_parameters=True)
        for model in (halt, parallel):
            result = model(h, x)
            assert isinstance(result, ac.HaltResult)
            (result.output.sum() + result.cost.sum()).backward()
        for a, b in zip(halt.parameters(), twin.parameters(), strict=True):
            assert (a.grad is None or not a.grad.any()) if b.grad is None else identical(a.grad, b.grad)


@pytest.mark.promise("threads")
@pytest.mark.parametrize("name", POLICIES)
def test_the_number_of_threads_changes_no_bit(name, threads):
    got = []
    for count in (1, 2, 1):
        threads(count)
        step, policy, h, x = make(name, 300, requires_grad=True)
        for compact in COMPACT:
            result = ac.AdaptiveHalt(step, policy, 5, compact=compact)(h, x)
            h.grad = None
            (result.output**2).sum().backward()
            with torch.no_grad():
                got.append(
                    [
                        *leaves(result),
                        h.grad,
                        *leaves(ac.AdaptiveHalt(step, policy, 5, compact=compact)(h, x)),
                    ]
                )
    for other in got[1:]:
        same(got[0], other)


@pytest.mark.promise("processes")
def test_python_threads_do_not_disturb_each_other():
    """One module, several threads; half of them on the reference."""
    halt, h, x = module_of("act")
    with torch.no_grad():
        expected = halt(h, x)
    wrong = []

    def work(i):
        for _ in range(15):
            with torch.no_grad(), mode("reference" if i % 2 else "no_grad"):
                result = halt(h, x)
            if not (
                torch.equal(result.steps, expected.steps)
                and torch.allclose(result.output, expected.output, atol=1e-6)
            ):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


@pytest.mark.promise("processes")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_child_can_run_after_its_parent_has():
    """The child process has one thread, like a data loader's worker."""
    code = """
import os, torch, adaptcomp_ext as ac
torch.set_num_threads(1)
def run():
    with torch.no_grad():
        halt = ac.AdaptiveHalt(lambda h: h + 1, ac.FixedSteps(torch.arange(5000) % 9 + 1), 9)
        return halt(torch.zeros(5000, 8)).output.sum().item()
here = run()
child = os.fork()
if child == 0:
    os._exit(0 if run() == here else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


# --- grad modes ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("compact", COMPACT)
@pytest.mark.parametrize("name", POLICIES)
def test_inference_mode(name, compact):
    step, policy, h, x = make(name, 9)
    halt = ac.AdaptiveHalt(step, policy, 5, compact=compact)
    with torch.inference_mode():
        result = halt(h, x)
        inside = halt(h.clone(), x.clone())
    with torch.no_grad():
        expected = halt(h, x)
    same(result, expected)
    same(inside, expected)
    assert result.output.is_inference() and not expected.output.is_inference()
    check(expected, dense(step, policy, h, x, max_steps=5))


@pytest.mark.parametrize("name", POLICIES)
def test_no_grad_inside_the_step(name):
    step, policy, h, x = make(name, 9, requires_grad=True)

    @torch.no_grad()
    def frozen(h, x):
        return step(h, x)

    same(ac.AdaptiveHalt(frozen, policy, 5)(h, x)[2:3], ac.AdaptiveHalt(step, policy, 5)(h, x)[2:3])


@pytest.mark.parametrize("how", MODES)
def test_a_loop_within_a_loop(how):
    """The step is a halting loop itself."""
    inner = ac.AdaptiveHalt(lambda h: h + 1, ac.FixedSteps(3), 5)
    outer = ac.AdaptiveHalt(
        lambda h: inner(h).output, ac.FixedSteps(torch.tensor([1, 2, 4])), 5, compact=True
    )
    with mode(how):
        assert outer(torch.zeros(3, 1)).output[:, 0].tolist() == [3, 6, 12]


def test_a_thousand_steps_and_a_long_chain_of_gradients():
    h = torch.zeros(3, 1, requires_grad=True)
    result = ac.AdaptiveHalt(lambda h: h + 0.001, ac.FixedSteps(torch.tensor([1000, 1, 500])), 1000)(h)
    result.output.sum().backward()
    assert result.steps.tolist() == [1000, 1, 500] and h.grad[:, 0].tolist() == [1, 1, 1]
