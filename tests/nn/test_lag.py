"""Blocks compacted by a late count: on CUDA, and on CUDA's kernels compiled for the host (cuda_host)."""

from __future__ import annotations

import functools

import pytest
import torch

import adaptcomp_ext as ac
from adaptcomp_ext.nn import _active
from adaptcomp_ext.nn._active import bucket
from adaptcomp_ext.ops._backend import EMULATED
from tests.helpers.energies import Wells, options_of, problem
from tests.helpers.halting import COMPACT, POLICIES, identical, leaves, make, mode


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.cuda)])
def late(request):
    """A device whose count comes late."""
    if request.param == "host":
        if not EMULATED:
            pytest.skip("on the CPU the count is known at once")
        return torch.device("cpu")
    if not (ac.build_info()["cuda"] and torch.cuda.is_available()):
        pytest.skip("no CUDA device, or built without CUDA")
    return torch.device("cuda", torch.cuda.current_device())


LAGS = [2, 1, 3, 10**6, None]  # a million: the host learns nothing


@pytest.mark.promise("stale count")
@pytest.mark.parametrize("compact", COMPACT)
@pytest.mark.parametrize("how", ["grad", "no_grad"])
@pytest.mark.parametrize("name", POLICIES)
def test_how_stale_the_count_is_changes_no_bit(name, how, compact, late):
    results = []
    for lag in LAGS:
        step, policy, h, x = make(name, 300, device=late, requires_grad=how == "grad")
        with mode(how):
            result = ac.AdaptiveHalt(step, policy, 8, compact=compact, lag=lag)(h, x)
        if how == "grad":
            (result.output**2).sum().backward()
        results.append([*leaves(result), *([h.grad, x.grad] if how == "grad" else [])])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert (a is None and b is None) or identical(a.cpu(), b.cpu())


@pytest.mark.promise("stale count")
@pytest.mark.parametrize("name", ["plain", "backtracking, momentum", "everything"])
@pytest.mark.parametrize(
    "gradient", ["unrolled", ("truncated", 2), "stepwise", "implicit", "detached"], ids=str
)
def test_how_stale_the_count_is_changes_no_bit_of_a_descent(late, gradient, name, monkeypatch):
    results = []
    for lag in LAGS:
        monkeypatch.setattr(
            "adaptcomp_ext.nn.descent.loop.ActiveCount", functools.partial(_active.ActiveCount, lag=lag)
        )
        y0, x = problem(300, device=late, requires_grad=True)
        descend = ac.EnergyDescent(Wells(device=late), gradient=gradient, keep_trace=True, **options_of(name))
        result = descend(y0, x)
        loss = result.y.square().sum() + result.energy.sum()
        found = torch.autograd.grad(loss, [y0, x], allow_unused=True)
        results.append([*torch.utils._pytree.tree_leaves(result), *(g for g in found if g is not None)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert identical(a.cpu(), b.cpu())


@pytest.mark.parametrize("lag", [1, 2, 3])
@pytest.mark.parametrize("how", ["grad", "no_grad"])
def test_blocks_shrink_to_the_bucket_of_the_count_that_the_lag_allows(how, lag, late):
    sizes = []

    def step(h):
        sizes.append(h.shape[0])
        return h + 1

    n = torch.arange(1000, device=late) % 10 + 1
    with mode(how):
        result = ac.AdaptiveHalt(step, ac.FixedSteps(n), 12, compact=True, lag=lag)(
            torch.zeros(1000, 4, device=late)
        )
    assert torch.equal(result.steps, n)
    # One step more for each by which the host is late; then it knows that no row is left.
    running = [1000] * (lag - 1) + [1000 - 100 * k for k in range(10)]
    assert sizes == [1000] + [min(1000, bucket(count)) for count in running[1:]]


@pytest.mark.parametrize("how", ["grad", "no_grad"])
def test_padding_rows_hold_only_values_that_running_rows_have(how, late):
    """Blocks are larger than the running rows; copies fill the rest, so that no step sees a divergence."""
    seen = []

    def step(h):
        seen.append(h.detach().clone())
        return h + 1

    start = torch.arange(100, device=late, dtype=torch.float32)[:, None] * 1000
    n = torch.where(torch.arange(100, device=late) < 95, 1, 4)
    with mode(how):
        ac.AdaptiveHalt(step, ac.FixedSteps(n), 4, compact=True, lag=1)(start)
    running = {95000, 96000, 97000, 98000, 99000}
    for k, block in enumerate(seen[1:], 1):
        assert {int(v) - k for v in block[:, 0].tolist()} == running


@pytest.mark.parametrize("lag", LAGS)
def test_a_step_that_no_row_is_left_for_takes_no_part_in_the_gradient(lag, late):
    """Until the host learns that all rows have ended, steps get zeros, where a root has no derivative."""
    h = torch.full((40, 3), 4.0, device=late, requires_grad=True)
    a = torch.ones((), device=late, requires_grad=True)
    result = ac.AdaptiveHalt(lambda h: (h * a).sqrt() + 1, ac.FixedSteps(2), 9, lag=lag)(h)
    result.output.sum().backward()
    assert bool(h.grad.isfinite().all())
    if lag in (1, 2):
        assert bool(a.grad.isfinite())


@pytest.mark.parametrize("compact", COMPACT)
def test_gradients_past_a_divergence_stay_finite(compact, late):
    h = torch.full((64, 1), 2.0, device=late, requires_grad=True)
    a = torch.ones((), device=late, requires_grad=True)
    x = torch.where(torch.arange(64, device=late)[:, None] < 32, 10.0, 1.0)
    n = torch.where(torch.arange(64, device=late) < 32, 2, 9)
    ac.AdaptiveHalt(lambda h, x: (h * a) ** x, ac.FixedSteps(n), 9, compact=compact)(h, x).output[
        32:
    ].sum().backward()
    assert bool(a.grad.isfinite()) and bool(h.grad.isfinite().all())


# --- launches -----------------------------------------------------------------------------------------------
FREE = {
    "empty",
    "empty_like",
    "new_empty",
    "item",
    "unbind",
    "slice",
    "split_with_sizes",
    "detach",
    "view",
    "alias",
    "to",
    "narrow",
}
FUSED = ["act", "ponder_eval", "max_prob", "margin", "entropy", "fixed_int", "fixed_tensor"]


class Launches:
    """Count launches between two calls of a step: our kernels, copies of the count, operations of torch."""

    def __init__(self, monkeypatch, step, policy):
        self.step = step
        self.copies = 0
        self.between = []
        self._before = None
        send = _active._Copy.send

        def counted(copy, count):
            self.copies += 1
            send(copy, count)

        monkeypatch.setattr(_active._Copy, "send", counted)
        if "head" in policy._modules:
            head = policy._modules.pop("head")

            def users(state):
                with torch.profiler.record_function("users"):
                    return head(state)

            policy.head = users

    def __call__(self, h, x):
        now = (ac._C.emulation.launches, self.copies, h.shape[0])
        if self._before is not None:
            self.between.append((now[0] - self._before[0], now[1] - self._before[1], self._before[2], now[2]))
        self._before = now
        with torch.profiler.record_function("users"):
            return self.step(h, x)


@pytest.mark.promise("launches")
@pytest.mark.skipif(not EMULATED, reason="the emulator counts the launches")
@pytest.mark.parametrize("how", ["grad", "no_grad"])
@pytest.mark.parametrize("name", FUSED)
def test_a_step_takes_four_launches_at_most(name, how, monkeypatch):
    """The launches are: end rows, send the count, plan, move; in inference two if nothing is compacted."""
    step, policy, h, x = make(name, 300, requires_grad=how == "grad")
    counted = Launches(monkeypatch, step, policy)
    halt = ac.AdaptiveHalt(counted, policy, 8, compact=True)
    with mode(how), torch.autograd.profiler.profile() as profile:
        halt(h, x)
    assert len(counted.between) >= 3
    for kernels, copies, before, after in counted.between:
        shrinks = after < before
        assert (kernels, copies) == ((3, 1) if shrinks or how == "grad" else (1, 1))
    outermost = sorted(
        (e for e in profile.function_events if e.cpu_parent is None), key=lambda e: e.time_range.start
    )
    names = [e.name for e in outermost]
    last = len(names) - 1 - names[::-1].index("users")
    first = [i for i, n in enumerate(names) if n == "users"][2 * (1 + (name in ("act", "ponder_eval")))]
    launched = [
        n for n in names[first:last] if n.startswith("aten::") and n.removeprefix("aten::") not in FREE
    ]
    assert set(launched) <= {"aten::copy_"}
    assert launched.count("aten::copy_") <= len(counted.between)


@pytest.mark.promise("launches")
@pytest.mark.skipif(not EMULATED, reason="the emulator counts the launches")
@pytest.mark.parametrize("name", FUSED)
def test_a_step_takes_one_launch_backward(name):
    """One kernel computes the adjoint of halting and compaction, compacted or not."""
    step, policy, h, x = make(name, 300, requires_grad=True)
    result = ac.AdaptiveHalt(step, policy, 8, compact=True)(h, x)
    before = ac._C.emulation.launches
    result.output.sum().backward()
    assert 1 <= ac._C.emulation.launches - before <= int(result.steps.max())


@pytest.mark.skipif(not EMULATED, reason="the emulator counts the launches")
@pytest.mark.parametrize("lag", [1, 2])
def test_nothing_is_planned_in_training_where_the_host_knows_that_no_row_has_ended(lag, monkeypatch):
    n = torch.full((300,), 6)
    n[:100] = 4
    step, _, h, x = make("fixed_int", 300, requires_grad=True)
    policy = ac.FixedSteps(n)
    counted = Launches(monkeypatch, step, policy)
    result = ac.AdaptiveHalt(counted, policy, 8, min_steps=4, lag=lag)(h, x)
    assert torch.equal(result.steps, n)
    planned = [kernels == 3 for kernels, *_ in counted.between]
    # After steps 4 (where rows end) and 5; with a lag of one the host knows that none has ended in step 5.
    assert planned == [False, False, False, True, lag == 2, *([True] if lag == 2 else [])]
