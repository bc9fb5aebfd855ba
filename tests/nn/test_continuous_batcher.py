"""The results of a batcher are those of each sample alone, whatever the stream, failures and threads."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import adaptcomp_ext as ac
from adaptcomp_ext.nn import BadSampleError
from adaptcomp_ext.nn.batching.stream import AHEAD
from tests.helpers import halting
from tests.helpers.tensors import assert_bitwise

DIM = halting.DIM
SERVED = [name for name in halting.POLICIES if name not in ("ponder", "fixed_tensor")]
LOOKING_AHEAD = [name for name in SERVED if name not in ("act", "ponder_eval", "weighted_budget")]


def rows_of(tree: Any, row: int) -> Any:
    return pytree.tree_map(lambda t: t[row], tree)


def samples_of(count: int, form: str = "tensor", dtype: torch.dtype = torch.float32, seed: int = 0):
    """Return samples without a batch dimension."""
    g = torch.Generator().manual_seed(seed)
    h, x = (torch.randn(count, DIM, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    state, inputs = halting.tree_arguments(form, h, x)
    return [(rows_of(state, i), *rows_of(inputs, i)) for i in range(count)]


def halt_of(name: str, form: str = "tensor", dtype: torch.dtype = torch.float32, **options: Any):
    step, policy, _, _ = halting.make(name, 1, form, dtype)
    return ac.AdaptiveHalt(step, policy, **{"max_steps": 9, **options})


def alone(halt: nn.Module, sample: tuple[Any, ...], sample_id: int) -> Any:
    """Return the result of a batch of one row."""
    batch = pytree.tree_map(lambda t: t[None], sample)
    with torch.no_grad():
        return halt(*batch, sample_ids=torch.tensor([sample_id]))


def assert_alone(halt: nn.Module, sample: tuple[Any, ...], result: Any, sample_id: int) -> None:
    expected = alone(halt, sample, sample_id)
    assert type(result) is type(expected)
    got, structure = pytree.tree_flatten(result)
    want, expected_structure = pytree.tree_flatten(expected)
    assert structure == expected_structure
    for a, b in zip(got, want, strict=True):
        if b is None:
            assert a is None
        else:
            assert_bitwise(a, b[0])


class Failing(nn.Module):
    """A step that raises at some of its calls."""

    def __init__(self, step: nn.Module, calls: set[int]) -> None:
        super().__init__()
        self.step, self.calls, self.count = step, calls, 0

    def forward(self, state: Any, *inputs: Any) -> Any:
        self.count += 1
        if self.count in self.calls:
            raise OSError(f"call {self.count}")
        return self.step(state, *inputs)


@pytest.mark.promise("row alone")
@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(SERVED),
    form=st.sampled_from(["tensor", "tuple", "dict"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    count=st.integers(0, 40),
    slots=st.integers(1, 12),
    bounds=st.sampled_from([(1, 9), (1, 1), (3, 5), (4, 4)]),
    reads=st.booleans(),
    ordered=st.booleans(),
    bad=st.sets(st.integers(1, 39), max_size=3),
    seed=st.integers(0, 5),
)
def test_a_stream_gives_what_each_sample_gives_alone(
    name, form, dtype, count, slots, bounds, reads, ordered, bad, seed
):
    least, most = bounds
    readout = halting.scaled if reads else None
    halt = halt_of(name, form, dtype, min_steps=least, max_steps=most, readout=readout)
    samples = samples_of(count, form, dtype, seed)
    given_samples = [sample if i not in bad else (sample[0],) for i, sample in enumerate(samples)]
    batcher = ac.ContinuousBatcher(halt, slots, ordered)
    found = list(batcher.run(given_samples, errors="return"))
    if ordered:
        found = list(enumerate(found))
    assert sorted(index for index, _ in found) == list(range(count))
    for index, result in found:
        if index in bad:
            assert isinstance(result, BadSampleError) and result.index == index
        else:
            assert_alone(halt, samples[index], result, index)
    statistics = batcher.statistics
    refused = len([i for i in bad if i < count])
    assert (statistics.samples, statistics.failures) == (count, refused)
    assert statistics.results == count - refused
    assert statistics.row_steps == sum(int(r.steps) for i, r in found if i not in bad)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(SERVED),
    slots=st.integers(1, 9),
    calls=st.sets(st.integers(1, 30), max_size=4),
    seed=st.integers(0, 3),
)
def test_a_step_that_raises_fails_the_samples_in_flight_alone(name, slots, calls, seed):
    halt = halt_of(name)
    samples = samples_of(35, seed=seed)
    failing = ac.AdaptiveHalt(Failing(halt.step, calls), halt.policy, max_steps=9, check_rows=False)
    batcher = ac.ContinuousBatcher(failing, slots)
    found = list(batcher.run(samples, errors="return"))
    assert len(found) == 35
    failures = 0
    for index, result in enumerate(found):
        if isinstance(result, ac.SampleError):
            failures += 1
            assert result.index == index and str(index) in str(result)
            assert isinstance(result.__cause__, OSError)
        else:
            assert_alone(halt, samples[index], result, index)
    assert failures <= slots * len(calls)
    assert failures > 0 or not calls or min(calls) > failing.step.count
    assert (batcher.statistics.failures, batcher.statistics.samples) == (failures, 35)


def test_errors_are_raised_in_the_place_of_results_and_the_iterator_goes_on():
    halt, samples = halt_of("act"), samples_of(9)
    samples[4] = (torch.zeros(DIM + 1), samples[4][1])
    results = ac.ContinuousBatcher(halt, 3).run(samples)
    for index in range(9):
        if index == 4:
            with pytest.raises(ac.SampleError, match=r"sample 4: state: expected shape \[4\]") as caught:
                next(results)
            assert isinstance(caught.value, (TypeError, ValueError)) and caught.value.index == 4
        else:
            assert_alone(halt, samples[index], next(results), index)
    with pytest.raises(StopIteration):
        next(results)


@pytest.mark.promise("bad input")
@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        ((torch.zeros(3), torch.zeros(DIM)), ValueError, r"state: expected shape \[4\] like the first"),
        ((torch.zeros(DIM), torch.zeros(DIM, 1)), ValueError, r"inputs\[0\]: expected shape \[4\]"),
        ((torch.zeros(DIM).double(), torch.zeros(DIM)), TypeError, r"state: expected torch.float32"),
        ((torch.zeros(DIM),), ValueError, "sample: expected 2 elements like the first sample, got 1"),
        (((torch.zeros(DIM),), torch.zeros(DIM)), TypeError, "state: expected the structure"),
        (torch.zeros(2, DIM), TypeError, r"sample: expected a tuple \(state, \*inputs\), got a tensor"),
        ((torch.zeros(DIM), 3.0), TypeError, r"inputs\[0\]: expected the structure|expected a Tensor"),
        ((torch.zeros(DIM, device="meta"), torch.zeros(DIM)), ValueError, "state: expected a tensor on cpu"),
    ],
)
def test_a_sample_of_another_form_fails_alone(bad, kind, message):
    halt, samples = halt_of("act"), samples_of(8)
    samples[5] = bad
    with ac.ContinuousBatcher(halt, 4) as batcher:
        futures = [batcher.submit(sample) for sample in samples]
        found = list(batcher.run(samples, errors="return"))
        for index in range(8):
            if index != 5:
                assert_alone(halt, samples[index], found[index], index)
                assert_alone(halt, samples[index], futures[index].result(), index)
                continue
            for error in (found[5], futures[5].exception()):
                assert isinstance(error, kind) and isinstance(error.__cause__, kind)
                with pytest.raises(ac.SampleError, match=message):
                    raise error


def test_samples_of_other_layouts_are_taken():
    halt, samples = halt_of("act"), samples_of(6)
    strided = torch.stack([samples[1][0], samples[1][0]], dim=1)[:, 0]
    given_samples = [
        samples[0],
        (strided, samples[1][1]),
        list(samples[2]),
        (nn.Parameter(samples[3][0]), samples[3][1].clone().requires_grad_()),
        (torch._neg_view(-samples[4][0]), samples[4][1]),
        samples[5],
    ]
    for index, result in enumerate(ac.ContinuousBatcher(halt, 2).run(given_samples)):
        assert_alone(halt, samples[index], result, index)
        assert not result.output.requires_grad


class Rows(Tensor):
    """A subclass that behaves as a plain tensor."""


def test_subclasses_keep_their_class():
    halt, samples = halt_of("act"), samples_of(5)
    wrapped = [tuple(t.as_subclass(Rows) for t in sample) for sample in samples]
    for index, result in enumerate(ac.ContinuousBatcher(halt, 2).run(wrapped)):
        assert type(result.output) is Rows
        assert_bitwise(result.output.as_subclass(Tensor), alone(halt, samples[index], index).output[0])


def test_a_buffer_that_the_stream_writes_again_is_copied():
    halt, samples = halt_of("act"), samples_of(20)
    buffer = torch.zeros(DIM), torch.zeros(DIM)

    def stream():
        for sample in samples:
            for to, value in zip(buffer, sample, strict=True):
                to.copy_(value)
            yield buffer

    for index, result in enumerate(ac.ContinuousBatcher(halt, 6).run(stream())):
        assert_alone(halt, samples[index], result, index)


def test_what_is_accepted_is_finished_before_the_streams_error():
    halt, samples = halt_of("fixed_int"), samples_of(17)

    def stream():
        yield from samples
        raise OSError("the stream broke")

    results = ac.ContinuousBatcher(halt, 4).run(stream())
    for index in range(17):
        assert_alone(halt, samples[index], next(results), index)
    with pytest.raises(OSError, match="the stream broke"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_samples_are_pulled_as_slots_become_free():
    pulled = itertools.count()
    seen = 0

    def stream():
        nonlocal seen
        for sample in itertools.cycle(samples_of(10)):
            seen = next(pulled) + 1
            yield sample

    results = ac.ContinuousBatcher(halt_of("fixed_int"), 8).run(stream())
    assert seen == 0
    for given_out in range(1, 200):
        next(results)
        assert seen <= given_out + 2 * 8


def test_a_slow_sample_holds_back_a_bounded_number_of_results():
    """With one row that takes very long, the others go on, but not for ever."""

    class Countdown(nn.Module):
        def forward(self, state: Tensor) -> Tensor:
            return state - 1

    class Zero(ac.Policy):
        def decide(self, view):
            return ac.Decision(view.state <= 0)

    halt = ac.AdaptiveHalt(Countdown(), Zero(), max_steps=10_000)
    seen = 0

    def stream():
        nonlocal seen
        yield (torch.tensor(2000.0),)
        while True:
            seen += 1
            yield (torch.tensor(1.0),)

    results = ac.ContinuousBatcher(halt, 4).run(stream())
    assert int(next(results).steps) == 2000
    assert 4 * AHEAD - 1 <= seen <= 4 * AHEAD
    assert int(next(results).steps) == 1


@pytest.mark.promise("seed")
def test_random_numbers_are_keyed_by_index_or_by_a_given_id():
    halt, samples = halt_of("ponder_eval"), samples_of(30)
    ids = [7 * i + 3 for i in range(30)]
    batcher = ac.ContinuousBatcher(halt, 5)
    for index, result in enumerate(batcher.run(samples, sample_ids=iter(ids))):
        assert_alone(halt, samples[index], result, ids[index])
    with batcher:
        future = batcher.submit(samples[0], sample_id=11)
        assert_alone(halt, samples[0], future.result(), 11)
    assert len({int(alone(halt, samples[0], i).steps) for i in range(20)}) > 1


@pytest.mark.parametrize("ids", [[1, 2], [1.0] * 5])
def test_wrong_ids_end_the_stream(ids):
    results = ac.ContinuousBatcher(halt_of("act"), 2).run(samples_of(5), sample_ids=ids)
    with pytest.raises((TypeError, ValueError), match="sample_ids: expected"):
        list(results)


# --- what it runs -------------------------------------------------------------------------------------------
class Hidden(ac.PonderNet):
    """The same decisions in Python, with the bits of the kernel's."""

    def decide(self, view):
        return super().decide(view)


class HiddenACT(ac.ACT):
    def decide(self, view):
        assert type(view.step) is int
        return super().decide(view)


def combinations() -> dict[str, ac.Policy]:
    return {
        "any": ac.AnyOf(ac.Convergence(0.2), ac.FixedSteps(5), ac.Confidence(0.5)),
        "all": ac.AllOf(ac.FixedSteps(2), ac.Convergence(0.4, patience=2)),
        "sampled": ac.AnyOf(ac.PonderNet(halting.Head()).eval(), ac.FixedSteps(4)),
        "nested": ac.AnyOf(
            ac.AllOf(ac.FixedSteps(3), ac.Convergence(0.4)), ac.Bernoulli(halting.Head(), seed=1)
        ),
    }


@pytest.mark.parametrize("kind", ["any", "all", "sampled", "nested"])
@pytest.mark.parametrize("lookahead", [0, 1])
def test_combinations_of_policies(kind, lookahead):
    policy = combinations()[kind]
    if lookahead and kind != "sampled":
        policy.lookahead = 1
    halt = ac.AdaptiveHalt(halting.Cell(), policy, max_steps=9).eval()
    samples = samples_of(25)
    for index, result in enumerate(ac.ContinuousBatcher(halt, 6).run(samples)):
        assert_alone(halt, samples[index], result, index)


@pytest.mark.parametrize("kind", [Hidden, HiddenACT])
def test_policies_of_the_kernel_that_decide_in_python(kind):
    halt = ac.AdaptiveHalt(halting.Cell(), kind(halting.Head()), max_steps=9).eval()
    samples = samples_of(25)
    for index, result in enumerate(ac.ContinuousBatcher(halt, 6).run(samples)):
        assert_alone(halt, samples[index], result, index)


@pytest.mark.parametrize("reads", ["inputs", "number", "modules"])
def test_functions_that_take_more_than_the_state(reads):
    cell = halting.Cell()
    readout: Any = {
        "inputs": lambda state, x: state * x,
        "number": lambda state, n: state * n,
        "modules": nn.ModuleList([halting.Through(nn.Identity(), lambda s, _, k=k: s * k) for k in range(9)]),
    }[reads]
    halt = ac.AdaptiveHalt(cell, ac.ACT(halting.Head()), max_steps=9, readout=readout)
    samples = samples_of(25)
    for index, result in enumerate(ac.ContinuousBatcher(halt, 6).run(samples)):
        assert_alone(halt, samples[index], result, index)


class Stage(nn.Module):
    """A stage that makes its own state."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        return state * 0.5 + x * self.k


@pytest.mark.promise("row alone")
@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from([name for name in SERVED if name != "weighted_budget"]),
    lookahead=st.booleans(),
    asks=st.booleans(),
    slots=st.integers(1, 9),
    count=st.integers(0, 40),
    bad=st.sets(st.integers(1, 39), max_size=2),
)
def test_stages(name, lookahead, asks, slots, count, bad):
    """Steps that differ by their number: modules of a list, or a function that asks for the number."""
    policy = halting.make_policy(name, 1)
    if lookahead and name in LOOKING_AHEAD:
        policy.lookahead = 1
    step: Any = (lambda s, x, n: s * 0.5 + x * n) if asks else nn.ModuleList([Stage(k) for k in range(5)])
    halt = ac.AdaptiveHalt(step, policy, max_steps=5, readout=lambda s: s * 2).eval()
    samples = samples_of(count)
    given_samples = [sample if i not in bad else (sample[0],) for i, sample in enumerate(samples)]
    batcher = ac.ContinuousBatcher(halt, slots)
    found = list(batcher.run(given_samples, errors="return"))
    assert len(found) == count
    for index, result in enumerate(found):
        if index in bad:
            assert isinstance(result, BadSampleError) and result.index == index
        else:
            assert_alone(halt, samples[index], result, index)
    assert batcher.statistics.row_steps == sum(int(r.steps) for i, r in enumerate(found) if i not in bad)


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(LOOKING_AHEAD), slots=st.integers(1, 9))
def test_a_lookahead(name, slots):
    halt = halt_of(name)
    halt.policy.lookahead = 1
    samples = samples_of(25)
    for index, result in enumerate(ac.ContinuousBatcher(halt, slots).run(samples)):
        assert_alone(halt, samples[index], result, index)


def test_stages_that_change_the_shape_of_the_state():
    class Wider(nn.Module):
        def forward(self, state: Tensor) -> Tensor:
            return torch.cat([state, state[:, :1] * 1.5], dim=1)

    halt = ac.AdaptiveHalt(
        nn.ModuleList([Wider() for _ in range(4)]),
        ac.ACT(nn.ModuleList([halting.Head() for _ in range(4)])),
        max_steps=4,
        readout=lambda s: s[:, -2:],
    )
    samples = [sample[:1] for sample in samples_of(30)]
    steps = set()
    for index, result in enumerate(ac.ContinuousBatcher(halt, 4).run(samples)):
        expected = alone(halt, samples[index], index)
        steps.add(n := int(result.steps))
        assert_bitwise(result.output, expected.output[0])
        assert_bitwise(result.state, expected.state[n - 1][0])
        assert result.state.shape == (DIM + n,)
    assert len(steps) > 1


def test_blocks_of_stages_stay_full_and_no_row_waits_for_ever():
    halt = ac.AdaptiveHalt(
        nn.ModuleList([Stage(0) for _ in range(6)]), ac.PonderNet(lambda s: s[:, 0] * 0 - 0.5).eval()
    )
    batcher = ac.ContinuousBatcher(halt, 16)
    assert sum(1 for _ in batcher.run(samples_of(8) * 400)) == 3200
    assert batcher.statistics.utilization >= 0.95
    with batcher:
        results = [batcher.submit(sample) for sample in samples_of(8) * 20]
        assert all(int(future.result(60).steps) >= 1 for future in results)


def test_a_step_that_raises_at_a_late_stage_leaves_the_batcher_usable():
    class Breaks(Stage):
        def forward(self, state: Tensor, x: Tensor) -> Tensor:
            if bool((state[:, 0] > 1e5).any()):
                raise OSError("too large")
            return super().forward(state, x)

    halt = ac.AdaptiveHalt(nn.ModuleList([Breaks(k) for k in range(4)]), ac.FixedSteps(4))
    samples = samples_of(40)
    samples[7] = (torch.full((DIM,), 1e6), samples[7][1])
    found = list(ac.ContinuousBatcher(halt, 3).run(samples, errors="return"))
    failed = [i for i, result in enumerate(found) if isinstance(result, ac.SampleError)]
    assert 7 in failed and len(failed) < 30
    for index in set(range(40)) - set(failed):
        assert_alone(halt, samples[index], found[index], index)


def test_a_recurrence_goes_to_its_kernel_in_chunks():
    torch.manual_seed(0)
    halt = ac.AdaptiveHalt(ac.cells.GRU(DIM, DIM), ac.ACT(nn.Linear(DIM, 1)), max_steps=9)
    samples = samples_of(70)
    batcher = ac.ContinuousBatcher(halt, 4)
    for index, result in enumerate(batcher.run(samples)):
        assert_alone(halt, samples[index], result, index)
    assert batcher.statistics.calls == 3
    with batcher:
        futures = [batcher.submit(sample) for sample in samples]
        for index, future in enumerate(futures):
            assert_alone(halt, samples[index], future.result(), index)


def test_the_reference_and_hooks_are_respected():
    halt, samples = halt_of("act"), samples_of(5)
    with ac.reference_kernels():
        for index, result in enumerate(ac.ContinuousBatcher(halt, 2).run(samples)):
            assert_alone(halt, samples[index], result, index)
    called = []
    halt.register_forward_hook(lambda *_: called.append(1))
    list(ac.ContinuousBatcher(halt, 2).run(samples))
    assert called


ENERGIES = {
    "closed": lambda: ac.QuadraticEnergy(torch.eye(DIM), torch.ones(DIM)),
    "autograd": lambda: lambda y, c: ((y - c) ** 2).sum(1) * 0.7,
}


@pytest.mark.parametrize("kind", ENERGIES)
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_descent(kind, noise):
    options = {"step_size": 0.3, "max_steps": 12, "tol": 1e-3, "noise": noise}
    descend = ac.EnergyDescent(ENERGIES[kind](), **options)
    samples = [s if kind == "autograd" else s[:1] for s in samples_of(50)]
    batcher = ac.ContinuousBatcher(descend, 4)
    for index, result in enumerate(batcher.run(samples)):
        assert type(result) is ac.EnergyResult
        assert_alone(descend, samples[index], result, index)
    with batcher:
        assert_alone(descend, samples[3], batcher.submit(samples[3], sample_id=3).result(), 3)


def test_what_has_no_meaning_for_single_samples_is_refused_by_name():
    cell, samples = halting.Cell(), samples_of(3)
    energy = ENERGIES["closed"]()
    cases = [
        (ac.AdaptiveHalt(cell, ac.PonderNet(halting.Head())), r"PonderNet, which in training mode"),
        (ac.AdaptiveHalt(cell, ac.FixedSteps(torch.ones(3, dtype=torch.int64))), "FixedSteps"),
        (ac.AdaptiveHalt(cell, ac.FixedSteps(2), keep_trace=True), "keep_trace"),
        (ac.EnergyDescent(energy, step_size=torch.ones(3)), "step_size"),
        (ac.EnergyDescent(energy, keep_trace=True), "keep_trace"),
    ]
    for module, message in cases:
        batcher = ac.ContinuousBatcher(module)
        with pytest.raises(ValueError, match=f"halt: expected .*{message}"):
            batcher.run(samples)
        with pytest.raises(ValueError, match=f"halt: expected .*{message}"):
            batcher.submit(samples[0])


@pytest.mark.promise("bad input")
def test_wrong_arguments():
    halt = halt_of("act")
    with pytest.raises(TypeError, match="halt: expected an AdaptiveHalt or an EnergyDescent, got Linear"):
        ac.ContinuousBatcher(nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"slots: expected an int, got float 2\.5"):
        ac.ContinuousBatcher(halt, slots=2.5)
    with pytest.raises(ValueError, match="slots: expected an int >= 1, got 0"):
        ac.ContinuousBatcher(halt, slots=0)
    with pytest.raises(TypeError, match="ordered: expected a bool, got int 1"):
        ac.ContinuousBatcher(halt, ordered=1)
    batcher = ac.ContinuousBatcher(halt)
    with pytest.raises(TypeError, match="samples: expected an iterable, got int 3"):
        batcher.run(3)
    with pytest.raises(ValueError, match="errors: expected one of 'raise', 'return', got 'skip'"):
        batcher.run([], errors="skip")
    with pytest.raises(TypeError, match="sample_id: expected an int, got str"):
        batcher.submit(samples_of(1)[0], sample_id="a")


def test_rows_that_see_each_other_are_refused():
    halt = ac.AdaptiveHalt(lambda s, x: s - s.mean(0) + x, ac.FixedSteps(2))
    found = list(ac.ContinuousBatcher(halt, 3).run(samples_of(5), errors="return"))
    assert all(isinstance(error, ac.SampleError) for error in found)
    assert "depend on that row alone" in str(found[0])


@pytest.mark.filterwarnings("ignore:BatchNorm1d takes its statistics")
def test_batch_statistics_are_refused():
    halt = ac.AdaptiveHalt(nn.BatchNorm1d(DIM), ac.FixedSteps(2), check_rows=False)
    with pytest.raises(ValueError, match=r"halt: expected rows that do not depend.*call halt.eval\(\)"):
        next(ac.ContinuousBatcher(halt, 3).run([(torch.zeros(DIM),)] * 5))
    assert len(list(ac.ContinuousBatcher(halt.eval(), 3).run([(torch.zeros(DIM),)] * 5))) == 5


def test_a_step_that_changes_the_state_fails_by_index():
    halt = ac.AdaptiveHalt(lambda s, x: s[:, :2], ac.FixedSteps(2), check_rows=False)
    with pytest.raises(ac.SampleError, match="sample 0: ValueError while it was in flight: step: expected"):
        next(ac.ContinuousBatcher(halt, 3).run(samples_of(5)))


@pytest.mark.promise("untouched")
def test_what_a_step_keeps_is_not_written_to():
    kept: list[tuple[Tensor, Tensor]] = []

    class Keeping(halting.Cell):
        def forward(self, h, x):
            result = super().forward(h, x)
            for t in (h, x, result):
                kept.append((t, t.clone()))
            return result

    halt = ac.AdaptiveHalt(Keeping(), ac.ACT(halting.Head()), max_steps=9)
    samples = samples_of(40)
    copies = [tuple(t.clone() for t in sample) for sample in samples]
    assert len(list(ac.ContinuousBatcher(halt, 4).run(samples))) == 40
    for t, copy in kept:
        assert_bitwise(t, copy)
    for sample, before in zip(samples, copies, strict=True):
        for t, copy in zip(sample, before, strict=True):
            assert_bitwise(t, copy)


@pytest.mark.parametrize("way", ["in place", "swapped", "twice", "the input"])
def test_steps_that_share_memory_with_what_they_are_given(way):
    class Sharing(nn.Module):
        def forward(self, state, x):
            a, b = state
            if way == "in place":
                a.mul_(0.5).add_(x)
                b.add_(a)
                return state
            if way == "swapped":
                return b, a * 0.5 + x
            if way == "twice":
                c = a * 0.5 + b + x
                return c, c
            return a * 0.5 + b, x

    halt = ac.AdaptiveHalt(Sharing(), ac.ACT(halting.Head()), max_steps=9, check_rows=False)
    samples = [((a, b), a * b) for a, b in samples_of(30)]
    for index, result in enumerate(ac.ContinuousBatcher(halt, 4).run(samples)):
        copied = pytree.tree_map(lambda t: t.clone(), samples[index])
        assert_alone(halt, copied, result, index)


def test_nan_rows_harm_no_neighbour():
    halt, samples = halt_of("act"), samples_of(20)
    samples[3] = (torch.full((DIM,), torch.nan), samples[3][1])
    found = list(ac.ContinuousBatcher(halt, 4).run(samples))
    assert int(found[3].status) == ac.Status.NONFINITE
    for index, result in enumerate(found):
        if index != 3:
            assert_alone(halt, samples[index], result, index)


def test_autocast_and_inference_mode():
    halt, samples = halt_of("act"), samples_of(12)
    with torch.inference_mode():
        found = list(ac.ContinuousBatcher(halt, 4).run(samples))
    for index, result in enumerate(found):
        assert_alone(halt, samples[index], result, index)
    assert torch.is_grad_enabled()
    pulled_with_grad = []

    def stream():
        for sample in samples:
            pulled_with_grad.append(torch.is_grad_enabled())
            yield sample

    for _ in ac.ContinuousBatcher(halt, 4).run(stream()):
        assert torch.is_grad_enabled()
    assert all(pulled_with_grad)


# --- requests -----------------------------------------------------------------------------------------------
@pytest.mark.promise("processes")
def test_threads_that_submit_at_once():
    halt, samples = halt_of("ponder_eval"), samples_of(120)
    with ac.ContinuousBatcher(halt, 8) as batcher, ThreadPoolExecutor(6) as threads:

        def ask(index: int) -> Any:
            return batcher.submit(samples[index], sample_id=index).result(timeout=60)

        for index, result in enumerate(threads.map(ask, range(120))):
            assert_alone(halt, samples[index], result, index)
        statistics = batcher.statistics
    assert (statistics.samples, statistics.results, statistics.failures) == (120, 120, 0)
    assert 0 <= statistics.mean_queue_seconds <= statistics.max_queue_seconds < 60


def test_requests_join_while_others_run():
    """A request that comes while a long one runs is answered first."""
    started, may_go_on = threading.Event(), threading.Event()

    def step(state: Tensor) -> Tensor:
        started.set()
        assert may_go_on.wait(60)
        return state - 1

    class Zero(ac.Policy):
        def decide(self, view):
            return ac.Decision(view.state <= 0)

    halt = ac.AdaptiveHalt(step, Zero(), max_steps=1000, check_rows=False)
    with ac.ContinuousBatcher(halt, 4) as batcher:
        order: list[str] = []
        long = batcher.submit((torch.tensor(50.0),))
        long.add_done_callback(lambda _: order.append("long"))
        assert started.wait(60)
        short = batcher.submit((torch.tensor(2.0),))
        short.add_done_callback(lambda _: order.append("short"))
        may_go_on.set()
        wait([long, short], timeout=60)
        assert (int(long.result().steps), int(short.result().steps)) == (50, 2)
        assert order == ["short", "long"]


def test_a_request_that_waits_can_be_cancelled():
    started, may_go_on = threading.Event(), threading.Event()

    def step(state: Tensor) -> Tensor:
        started.set()
        assert may_go_on.wait(60)
        return state

    halt = ac.AdaptiveHalt(step, ac.FixedSteps(1), check_rows=False)
    with ac.ContinuousBatcher(halt, 1) as batcher:
        first = batcher.submit((torch.zeros(2),))
        assert started.wait(60)
        second = batcher.submit((torch.zeros(2),))
        third = batcher.submit((torch.zeros(2),))
        assert second.cancel() and not first.cancel()
        may_go_on.set()
        assert int(third.result(60).steps) == 1
        with pytest.raises(CancelledError):
            second.result()


def test_a_step_that_raises_leaves_the_server_usable():
    halt = halt_of("fixed_int")
    failing = ac.AdaptiveHalt(Failing(halt.step, {2}), halt.policy, max_steps=9, check_rows=False)
    sample = samples_of(1)[0]
    with ac.ContinuousBatcher(failing, 3) as batcher:
        with pytest.raises(ac.SampleError, match="sample 0: OSError while it was in flight: call 2"):
            batcher.submit(sample).result(60)
        assert_alone(halt, sample, batcher.submit(sample).result(60), 1)


def test_close():
    halt, samples = halt_of("act"), samples_of(30)
    batcher = ac.ContinuousBatcher(halt, 2)
    begun = batcher.run(samples)
    next(begun)
    futures = [batcher.submit(sample) for sample in samples]
    batcher.close()
    assert all(future.done() for future in futures)
    for call in (lambda: batcher.submit(samples[0]), lambda: batcher.run(samples), batcher.__enter__):
        with pytest.raises(RuntimeError, match="expected an open batcher, got one that was closed"):
            call()
    assert len(list(begun)) == 29
    batcher.close()


def test_a_batcher_that_is_dropped_finishes_its_requests_and_its_thread_ends():
    halt, sample = halt_of("act"), samples_of(1)[0]
    batcher = ac.ContinuousBatcher(halt, 2)
    future = batcher.submit(sample)
    thread = batcher._worker._thread
    reference = weakref.ref(batcher)
    del batcher
    gc.collect()
    assert reference() is None
    assert_alone(halt, sample, future.result(60), 0)
    thread.join(60)
    assert not thread.is_alive()


def test_settings_that_change_count_from_the_next_run_on():
    halt, sample = halt_of("fixed_int"), samples_of(1)[0]
    with ac.ContinuousBatcher(halt, 2) as batcher:
        assert int(batcher.submit(sample).result(60).steps) == 3
        halt.policy.n = 5
        assert int(batcher.submit(sample).result(60).steps) == 5
        assert int(next(batcher.run([sample])).steps) == 5


# --- use ----------------------------------------------------------------------------------------------------
def test_slots_stay_full():
    """On a long stream with geometric steps of mean M / 4 nearly all slots hold a row at every step."""
    most = 16
    halt = ac.AdaptiveHalt(lambda s: s + 1, ac.PonderNet(lambda s: s * 0 - 1.0986), max_steps=most).eval()
    batcher = ac.ContinuousBatcher(halt, 64)
    count = sum(1 for _ in batcher.run((torch.tensor(0.0),) for _ in range(20_000)))
    statistics = batcher.statistics
    assert count == 20_000
    assert 3.5 < statistics.row_steps / count < 4.5
    assert statistics.utilization >= 0.97


def test_a_long_stream_with_failures_loses_nothing_and_keeps_nothing():
    halt = halt_of("act")
    failing = ac.AdaptiveHalt(
        Failing(halt.step, set(range(50, 10_000, 50))), halt.policy, max_steps=9, check_rows=False
    )
    good, bad = samples_of(1)[0], (torch.zeros(DIM),)
    batcher = ac.ContinuousBatcher(failing, 32, ordered=False)
    seen = bytearray(8000)
    alive = []
    stream = (bad if i % 97 == 5 else good for i in range(8000))
    for number, (index, result) in enumerate(batcher.run(stream, errors="return")):
        seen[index] += 1
        assert isinstance(result, BadSampleError) == (index % 97 == 5)
        if number % 2000 == 1999:
            del result
            gc.collect()
            alive.append(sum(type(o) is Tensor for o in gc.get_objects()))
    assert bytes(seen) == b"\1" * 8000
    assert max(alive) - min(alive) < 200
    statistics = batcher.statistics
    assert statistics.samples == 8000 == statistics.results + statistics.failures
