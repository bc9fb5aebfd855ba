"""EnergyDescent with torch: compile, autocast, copies, pickles, state dicts, DDP, threads; and on CUDA."""

from __future__ import annotations

import copy
import io
import pickle
import socket
import threading
import warnings

import pytest
import torch
from torch import nn

import adaptcomp_ext as ac
from tests.helpers.energies import DIM, Mlp, Wells, options_of, problem
from tests.helpers.halting import identical
from tests.helpers.processes import run_python

MODES = ["unrolled", ("truncated", 2), "stepwise", "implicit", "detached"]


def module_of(gradient="unrolled", energy=None):
    """The energy's rows have the same bits anywhere in memory, which a BLAS need not give."""
    size = nn.Parameter(torch.tensor(0.1))
    return ac.EnergyDescent(
        Wells() if energy is None else energy, size, 5, 1e-3, gradient=gradient, keep_trace=True
    )


def train(descend, y0, x):
    result = descend(y0, x)
    loss = result.y.square().sum() + result.energy.sum() + result.trace.outputs.sum()
    loss.backward()
    return [*result[:4], *(p.grad for p in descend.parameters())]


def same(a, b):
    assert all((x is None and y is None) or identical(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.promise("compile")
@pytest.mark.parametrize("gradient", MODES, ids=str)
def test_a_model_with_a_descent_in_it_can_be_compiled(gradient):
    torch._dynamo.reset()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.descend = nn.Linear(DIM, DIM), module_of(gradient, Mlp())

        def forward(self, y0, x):
            result = self.descend(y0 * 2, self.encode(x).tanh())
            return result.y.sin(), result.energy * 2, result.steps

    torch.manual_seed(1)
    model = Model()
    twin = copy.deepcopy(model)
    for batch in (5, 9):
        y0, x = problem(batch)
        for run in (twin, torch.compile(model, backend="aot_eager")):
            y, energy, _ = run(y0, x)
            (y.sum() + energy.sum()).backward()
        got, want = model.descend(y0, x), twin.descend(y0, x)
        assert torch.equal(got.steps, want.steps)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad)
    torch._dynamo.reset()


@pytest.mark.promise("autocast")
@pytest.mark.parametrize("gradient", MODES, ids=str)
def test_autocast(gradient):
    """The energy runs in bfloat16, forward and backward; points, energies and gradients stay float32."""
    y0, x = problem(6, scale=0.5)
    descend = module_of(gradient, Mlp())
    seen = []
    descend.energy.net[0].register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        result = descend(y0, x)
        loss = result.y.square().sum() + result.energy.sum()
    assert result.y.dtype == result.energy.dtype == torch.float32
    loss.backward()  # outside the context
    assert set(seen) == {torch.bfloat16}
    assert descend.energy.net[0].weight.grad.dtype == torch.float32
    torch.testing.assert_close(result.y, module_of(gradient, Mlp())(y0, x).y, atol=3e-2, rtol=3e-2)
    if gradient == "stepwise":  # whose graph is PyTorch's own
        return
    # A backward pass inside such a context changes nothing for a descent outside of it.
    found = []
    for enabled in (False, True):
        descend.zero_grad()
        result = descend(y0, x)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            result.energy.sum().backward()
        found.append(descend.energy.net[0].weight.grad)
    torch.testing.assert_close(*found)


@pytest.mark.promise("modules")
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
def test_copies_behave_like_the_original(copied, used):
    y0, x = problem(6)
    descend = module_of()
    if used:
        train(descend, y0, x)
        descend.zero_grad()
    if copied == "deepcopy":
        other = copy.deepcopy(descend)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(descend))
    else:
        stream = io.BytesIO()
        torch.save(descend, stream)
        stream.seek(0)
        other = torch.load(stream, weights_only=False)
    same(train(other, y0, x), train(descend, y0, x))


@pytest.mark.promise("modules")
def test_state_dict_round_trip():
    descend = module_of()
    assert set(descend.state_dict()) == {"step_size", "energy.a", "energy.b", "energy.c"}
    other = ac.EnergyDescent(Wells(seed=5), nn.Parameter(torch.tensor(0.7)), 5, 1e-3, keep_trace=True)
    other.load_state_dict(descend.state_dict())
    y0, x = problem(6)
    same(train(other, y0, x), train(descend, y0, x))


@pytest.mark.promise("modules")
def test_moving_to_another_dtype():
    descend = module_of().double()
    y0, x = problem(4, torch.float64)
    assert descend(y0, x).y.dtype == torch.float64
    assert "max_steps=5" in repr(descend)


@pytest.mark.promise("modules")
@pytest.mark.parametrize("gradient", MODES, ids=str)
def test_results_can_be_pickled_and_copied(gradient):
    y0, x = problem(4)
    with torch.no_grad():
        result = module_of(gradient)(y0, x)
    for other in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert isinstance(other, ac.EnergyResult)
        same(torch.utils._pytree.tree_leaves(other), torch.utils._pytree.tree_leaves(result))
    assert len(torch.utils._pytree.tree_leaves(result)) == 8


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
    y0, x = problem(6)
    for gradient in MODES:
        descend = module_of(gradient)
        twin = copy.deepcopy(descend)
        parallel = nn.parallel.DistributedDataParallel(twin, find_unused_parameters=True)
        for model in (descend, parallel):
            result = model(y0, x)
            assert isinstance(result, ac.EnergyResult)
            (result.y.square().sum() + result.energy.sum()).backward()
        for a, b in zip(descend.parameters(), twin.parameters(), strict=True):
            assert (a.grad is None or not a.grad.any()) if b.grad is None else identical(a.grad, b.grad)


@pytest.mark.promise("processes")
def test_python_threads_do_not_disturb_each_other():
    y0, x = problem(40)
    want = train(module_of(), y0, x)
    got = {}

    def work(i):
        got[i] = train(module_of(), y0, x)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(4):
        same(got[i], want)


@pytest.mark.parametrize("gradient", MODES, ids=str)
def test_inference_mode_and_tensors_from_it(gradient):
    descend = module_of(gradient)
    y0, x = problem(6)
    with torch.no_grad():
        want = descend(y0, x)
    with torch.inference_mode():
        made = (y0 * 1, x * 1)
        same(descend(*made)[:4], want[:4])
    same([t.detach() for t in descend(*made)[:4]], want[:4])  # outside, with gradients
    result = descend(y0, x)
    if gradient != "detached":
        result.y.sum().backward()


@pytest.mark.parametrize("gradient", MODES, ids=str)
def test_a_descent_within_a_descent(gradient):
    """The energy is itself the result of a descent: the distance to a minimum."""
    inner = ac.EnergyDescent(lambda y, x: (y - x).square().sum(1), 0.2, 3, 0.0)

    def energy(y, x):
        return inner(y, x).y.square().sum(1) + y.square().sum(1) * 0.1

    y0, x = problem(4, torch.float64, requires_grad=True)
    result = ac.EnergyDescent(energy, 0.1, 3, 0.0, gradient=gradient)(y0, x)
    with ac.reference_kernels():
        want = ac.EnergyDescent(energy, 0.1, 3, 0.0, gradient=gradient)(y0, x)
    torch.testing.assert_close(result.y, want.y)
    found = [
        torch.autograd.grad(r.y.square().sum() + r.energy.sum(), [x], allow_unused=True)[0]
        for r in (result, want)
    ]
    torch.testing.assert_close(*found)


def test_an_energy_that_differentiates_on_its_own():
    def energy(y, x):
        (force,) = torch.autograd.grad((x * y**4).sum(), y, create_graph=True)
        return force.square().sum(1) + y.square().sum(1)

    y0, x = problem(4, torch.float64, requires_grad=True, scale=0.5)
    for mode in ("unrolled", "stepwise"):
        result = ac.EnergyDescent(energy, 0.001, 3, 0.0, gradient=mode)(y0, x)
        with ac.reference_kernels():
            want = ac.EnergyDescent(energy, 0.001, 3, 0.0, gradient=mode)(y0, x)
        torch.testing.assert_close(result.y, want.y)
        found = [torch.autograd.grad(r.y.sum() + r.energy.sum(), x)[0] for r in (result, want)]
        torch.testing.assert_close(found[0], found[1])
    with torch.no_grad():
        torch.testing.assert_close(ac.EnergyDescent(energy, 0.001, 3, 0.0)(y0, x).y, want.y)


@pytest.mark.promise("processes")
def test_a_forked_child_can_run_after_its_parent_has():
    done = run_python(
        "-c",
        """
import os, torch, adaptcomp_ext as ac
torch.set_num_threads(1)
descend = ac.EnergyDescent(lambda y: y.square().sum(1), 0.1, 5, gradient="detached")
descend(torch.ones(2000, 100))
child = os.fork()
if child == 0:
    descend(torch.ones(2000, 100))
    os._exit(0)
raise SystemExit(os.waitpid(child, 0)[1])
""",
    )
    assert done.returncode == 0, done.stderr


# --- CUDA ---------------------------------------------------------------------------------------------------
@pytest.fixture
def cuda():
    if not ac.build_info()["cuda"]:
        pytest.skip("adaptcomp_ext was built without CUDA")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.promise("no wait")
@pytest.mark.cuda
@pytest.mark.parametrize("how", ["grad", "no_grad"])
@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize("gradient", ["unrolled", ("truncated", 2), "detached"], ids=str)
def test_the_host_never_waits_while_rows_descend(cuda, gradient, name, how):
    y0, x = problem(300, device=cuda)
    descend = ac.EnergyDescent(Wells(device=cuda), gradient=gradient, **options_of(name))
    with torch.set_grad_enabled(how == "grad"):
        descend(y0, x)  # which looks for mixed rows, and initialises what is initialised on first use
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = descend(y0, x)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    assert int(result.steps.min()) >= 1


@pytest.mark.promise("formula")
@pytest.mark.cuda
@pytest.mark.parametrize("gradient", MODES, ids=str)
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_cpu_and_cuda_agree(cuda, name, gradient):
    found = []
    for device in ("cpu", cuda):
        y0, x = problem(300, torch.float64, device, requires_grad=True)
        descend = ac.EnergyDescent(
            Wells(torch.float64, device), gradient=gradient, keep_trace=True, **options_of(name)
        )
        result = descend(y0, x)
        loss = result.y.square().sum() + result.energy.sum() + result.trace.outputs.sum()
        leaves = [y0, x, *descend.parameters()]
        grads = [g for g in torch.autograd.grad(loss, leaves, allow_unused=True) if g is not None]
        found.append([t.detach().cpu() for t in (*torch.utils._pytree.tree_leaves(result), *grads)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.promise("graphs")
@pytest.mark.cuda
def test_capture_and_replay(cuda):
    y0, x = problem(64, device=cuda)
    descend = ac.EnergyDescent(Wells(device=cuda), gradient="detached", **options_of("momentum"))
    with torch.no_grad(), warnings.catch_warnings():
        want = descend(y0, x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                descend(y0, x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = descend(y0, x)
        for t in result[:4]:
            t.zero_()
        graph.replay()
    same([t.cpu() for t in result[:4]], [t.cpu() for t in want[:4]])


@pytest.mark.promise("streams")
@pytest.mark.cuda
def test_on_another_stream(cuda):
    y0, x = problem(300, device=cuda)
    descend = ac.EnergyDescent(Wells(device=cuda), **options_of("everything"))
    want = descend(y0, x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        got = descend(y0, x)
    torch.cuda.synchronize()
    same([t.cpu() for t in got[:4]], [t.cpu() for t in want[:4]])
