"""The loop on CUDA: it does not wait, compacts by a late count, and works in graphs, streams and devices."""

from __future__ import annotations

import warnings

import pytest
import torch

import adaptcomp_ext as ac
from tests.helpers.halting import (
    COMPACT,
    DIM,
    POLICIES,
    TOLERANCE,
    check,
    dense,
    identical,
    leaves,
    make,
    mode,
    tree_arguments,
)
from tests.helpers.tensors import SYNCHRONISED

UNTRACED = [name for name in POLICIES if name != "ponder"]


@pytest.fixture
def cuda():
    if not ac.build_info()["cuda"]:
        pytest.skip("adaptcomp_ext was built without CUDA")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


class NoSync:
    """In the block, an operation that makes the host wait raises (or, with "warn", is counted)."""

    def __init__(self, how="error"):
        self.how = how

    def __enter__(self):
        torch.cuda.synchronize()
        self.before = torch.cuda.get_sync_debug_mode()
        self.caught = warnings.catch_warnings(record=True)
        self.log = self.caught.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode(self.how)
        return self

    def __exit__(self, *error):
        torch.cuda.set_sync_debug_mode(self.before)
        self.caught.__exit__(*error)

    @property
    def count(self):
        return sum(SYNCHRONISED in str(w.message) for w in self.log)


class Quiet(ac.Policy):
    """Like Budget, without its own checks, which wait for the device."""

    def __init__(self, weighted):
        super().__init__()
        self._weighted = weighted

    @property
    def weighted(self):
        return self._weighted

    def begin(self, run):
        return (torch.zeros(run.batch, dtype=run.scalar, device=run.device),)

    def decide(self, view):
        spent = view.carry[0] + view.state.abs().mean(1).to(view.carry[0].dtype)
        return ac.Decision(spent > 1.2, weight=spent if self._weighted else None, cost=spent, carry=(spent,))


def without_waiting(name, batch, device, **options):
    step, policy, h, x = make(name, batch, device=device, **options)
    return step, Quiet(name.startswith("weighted")) if "budget" in name else policy, h, x


@pytest.mark.promise("no wait")
@pytest.mark.cuda
@pytest.mark.parametrize("lag", [2, None])
@pytest.mark.parametrize("compact", COMPACT)
@pytest.mark.parametrize("how", ["grad", "no_grad", "inference"])
@pytest.mark.parametrize("name", UNTRACED)
def test_the_host_never_waits_for_the_device(name, how, compact, lag, cuda):
    """With a lag the host waits for an event amid the queued work, not for the device."""
    step, policy, h, x = without_waiting(name, 300, cuda, requires_grad=how == "grad")
    halt = ac.AdaptiveHalt(step, policy, 8, compact=compact, lag=lag)
    with mode(how):
        halt(h, x)  # whatever is initialised on first use
        with NoSync():
            result = halt(h, x)
            if how == "grad":
                (result.output.sum() + result.state.sum()).backward()
    torch.cuda.synchronize()
    assert int(result.steps.min()) >= 1


@pytest.mark.cuda
def test_a_trace_makes_the_host_wait_once_at_the_end(cuda):
    """The host needs the size of the trace."""
    counts = []
    for steps in (3, 12):
        step, policy, h, x = make("ponder", 200, device=cuda, requires_grad=True, epsilon=0.2)
        halt = ac.AdaptiveHalt(step, policy, steps)
        halt(h, x)
        with NoSync("warn") as watch:
            halt(h, x)
        counts.append(watch.count)
    assert counts[0] == counts[1] <= 5


@pytest.mark.promise("formula")
@pytest.mark.cuda
@pytest.mark.parametrize("how", ["grad", "no_grad"])
@pytest.mark.parametrize("name", UNTRACED)
def test_cpu_and_cuda_agree(name, how, cuda):
    step, policy, h, x = make(name, 300, "nested", torch.float64)
    state, inputs = tree_arguments("nested", h, x)
    with mode(how):
        expected = ac.AdaptiveHalt(step, policy, 7)(state, *inputs)
    step, policy, h, x = make(name, 300, "nested", torch.float64, cuda)
    state, inputs = tree_arguments("nested", h, x)
    with mode(how):
        result = ac.AdaptiveHalt(step, policy, 7)(state, *inputs)
    assert torch.equal(result.steps.cpu(), expected.steps) and torch.equal(
        result.status.cpu(), expected.status
    )
    tolerance = TOLERANCE[torch.float64]
    torch.testing.assert_close(result.output.cpu(), expected.output, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(result.cost.cpu(), expected.cost, atol=tolerance, rtol=tolerance)


@pytest.mark.promise("graphs")
@pytest.mark.cuda
@pytest.mark.parametrize("how", ["no_grad", "grad"])
@pytest.mark.parametrize("compact", COMPACT)
@pytest.mark.parametrize("name", UNTRACED)
def test_capture_and_replay(name, compact, how, cuda):
    """A graph holds every step: with new data and halting patterns its replay equals an eager call."""
    step, policy, h, x = without_waiting(name, 150, cuda)
    halt = ac.AdaptiveHalt(step, policy, 6, compact=compact)
    h0, x0 = h.clone(), x.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with mode(how):
        with torch.cuda.stream(side):
            for _ in range(2):
                halt(h0, x0)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = halt(h0, x0)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            h0.copy_(torch.randn(150, DIM, generator=generator) * (seed + 0.3))
            x0.copy_(torch.randn(150, DIM, generator=generator))
            graph.replay()
            torch.cuda.synchronize()
            eager = halt(h0.clone(), x0.clone())
            for a, b in zip(leaves(captured), leaves(eager), strict=True):
                assert (a is None and b is None) or identical(a.cpu(), b.cpu())


@pytest.mark.promise("streams")
@pytest.mark.cuda
@pytest.mark.parametrize("how", ["grad", "no_grad"])
@pytest.mark.parametrize("name", POLICIES)
def test_two_streams(name, how, cuda):
    """All work is queued on the current stream: a long delay on one stream does not reach the other.

    Without a lag, or the second would be queued when the first is nearly done.
    """
    problems = [make(name, 200, device=cuda, seed=s) for s in range(2)]
    with mode(how):
        expected = [ac.AdaptiveHalt(step, policy, 6)(h, x) for step, policy, h, x in problems]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in problems]
        results = []
        for stream, (step, policy, h, x) in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                late_h, late_x = torch.zeros_like(h), torch.zeros_like(x)
                torch.cuda._sleep(20_000_000)
                late_h.copy_(h.detach())  # not there yet when the loop is queued
                late_x.copy_(x.detach())
                results.append(ac.AdaptiveHalt(step, policy, 6, lag=None)(late_h, late_x))
        torch.cuda.synchronize()
    for got, want in zip(results, expected, strict=True):
        for a, b in zip(leaves(got), leaves(want), strict=True):
            assert (a is None and b is None) or identical(a.cpu(), b.cpu())


@pytest.mark.promise("streams")
@pytest.mark.cuda
@pytest.mark.parametrize("how", ["grad", "no_grad"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_device_that_is_not_the_current_one(name, how, cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    step, policy, h, x = make(name, 100, device="cuda:1", requires_grad=how == "grad")
    with torch.cuda.device(0), mode(how):
        result = ac.AdaptiveHalt(step, policy, 6)(h, x)
        if how == "grad":
            result.output.sum().backward()
    assert result.output.device == torch.device("cuda:1")
    check(result, dense(step, policy, h, x, max_steps=6))


@pytest.mark.cuda
def test_tensors_on_two_devices_are_refused(cuda):
    h = torch.zeros(4, 2, device=cuda)
    halt = ac.AdaptiveHalt(lambda h, *_: h, ac.FixedSteps(1), 3)
    with pytest.raises(ValueError, match=r"inputs\[0\]: expected a tensor on cuda"):
        halt(h, h.cpu())
    with pytest.raises(ValueError, match="step: expected it to keep the state on cuda"):
        ac.AdaptiveHalt(lambda h: h.cpu(), ac.FixedSteps(1), 3)(h)
    with pytest.raises(ValueError, match=r"head: .*cpu"):
        ac.AdaptiveHalt(lambda h: h, ac.ACT(lambda h: h[:, 0].cpu()), 3)(h)
    with pytest.raises(ValueError, match="n: expected a tensor on cuda"):
        ac.AdaptiveHalt(lambda h: h, ac.FixedSteps(torch.ones(4, dtype=torch.int64)), 3)(h)
