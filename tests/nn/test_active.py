"""The count of active rows that the host reads late: lags, and the steps that they save."""

from __future__ import annotations

import copy
import pickle
from typing import ClassVar

import pytest
import torch

import adaptcomp_ext as ac
from adaptcomp_ext.nn import _active
from adaptcomp_ext.nn._active import LAG, ActiveCount, bucket

CPU = torch.device("cpu")


def test_buckets_are_few_and_large_enough():
    sizes = [bucket(rows) for rows in range(1, 5000)]
    assert all(size >= rows for rows, size in enumerate(sizes, 1))
    assert all(size <= 1.5 * rows + 32 for rows, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes) and len(set(sizes)) < 20
    assert bucket(0) == bucket(32) == 32 and bucket(33) == 48 and bucket(64) == 64 and bucket(65) == 96


class Machine:
    """A host and a device with a clock each; the device runs the work that the host queues."""

    def __init__(self, monkeypatch, step, enqueue=0.05):
        self.step, self.enqueue = step, enqueue
        self.host = self.device = 0.0
        machine = self

        class Copy(_active._Copy):
            """An event that is complete when the device has reached it."""

            def __init__(self, word, count, device):
                super().__init__(word, count, device)
                self.arrivals = []

            def send(self, count):
                self.arrivals.append((machine.device, int(count)))

            def read(self):
                machine.host = max(machine.host, self.arrivals[-1][0])
                return self.peek()

            def peek(self):
                while self.arrivals and self.arrivals[0][0] <= machine.host:
                    self._word.fill_(self.arrivals.pop(0)[1])
                return int(self._word)

        monkeypatch.setattr(_active, "_Copy", Copy)

    def run(self, steps, max_steps, lag):
        """Return the block sizes of a batch whose rows take `steps`."""
        active, rows, sizes = ActiveCount(len(steps), CPU, lag), len(steps), []
        for n in range(1, max_steps + 1):
            sizes.append(rows)
            self.host += self.enqueue
            self.device = max(self.device, self.host) + self.step * rows / len(steps)
            active.running.fill_(sum(s > n for s in steps))
            bound = active.bound()
            if bound == 0:
                break
            rows = min(rows, bucket(bound))
        self.host = max(self.host, self.device)
        return sizes


def geometric(batch, max_steps, hazard, seed=0):
    draws = torch.rand(batch, generator=torch.Generator().manual_seed(seed))
    return (1 + (draws.log() / torch.tensor(1 - hazard).log()).floor()).clamp(max=max_steps).int().tolist()


def test_a_slow_step_is_spared_what_the_lag_allows_and_a_host_that_never_waits_spares_nothing(monkeypatch):
    """Queueing a step takes a twentieth of its time: without a wait all are queued before a count arrives."""
    steps, max_steps = geometric(1024, 16, 0.2), 16
    share, took = {}, {}
    for lag in (None, 2, 1):
        machine = Machine(monkeypatch, step=1.0)
        sizes = machine.run(steps, max_steps, lag)
        share[lag], took[lag] = sum(sizes) / (1024 * max_steps), machine.host
    going_on = [1024, *(sum(s > n for s in steps) for n in range(1, max_steps))]
    least = [1024, *(bucket(c) for c in going_on[1:])]
    late = [1024, 1024, *(bucket(c) for c in going_on[1:-1])]
    assert share[1] == sum(least) / (1024 * max_steps)
    assert share[2] == sum(late) / (1024 * max_steps)
    assert share[None] > 0.95 and share[2] < 0.45
    assert took[None] > 2 * took[2]
    assert took[2] < 1.1 * took[1]  # what is computed too much is hidden by what the host does meanwhile


def test_sizes_depend_on_the_data_alone(monkeypatch):
    steps = geometric(300, 12, 0.3)
    for lag in (1, 2, 3, 5):
        sizes = [Machine(monkeypatch, step).run(steps, 12, lag) for step in (0.0, 0.01, 1.0, 50.0)]
        assert all(s == sizes[0] for s in sizes)
    never = [Machine(monkeypatch, step).run(steps, 12, None) for step in (0.0, 1.0)]
    assert never[0] != never[1]  # with these, they depend on the clock


@pytest.mark.parametrize("lag", [1, 2, 3, 7])
def test_the_bound_is_the_count_that_many_steps_before_the_next_block(lag):
    active, counts = ActiveCount(100, CPU, lag), [100, 90, 70, 70, 30, 5, 1, 0, 0, 0, 0]
    bounds = []
    for count in counts[1:]:
        active.running.fill_(count)
        bounds.append(active.bound())
    assert bounds == [counts[max(0, n + 1 - lag)] for n in range(1, len(counts))]
    assert active.none_ran() == (lag > 1 and bounds[-1] == 0)


def test_without_a_lag_the_newest_count_that_has_arrived_is_the_bound():
    active = ActiveCount(10, CPU, None)
    for count in (9, 5, 0):
        active.running.fill_(count)
        assert active.bound() == count
    assert not active.none_ran()  # it may be the count of the last step, in which rows may have ended


@pytest.mark.parametrize("lag", [None, 1, 2, 10**9])
def test_memory_does_not_grow_with_the_number_of_steps(lag):
    active = ActiveCount(10, CPU, lag)
    for _ in range(100):
        active.bound()
    words = len(active._sent) + len(active._free)
    assert words <= (104 if lag == 10**9 else 2)  # of an absurd lag, what has been sent


@pytest.mark.parametrize("lag", [None, 1, 2])
def test_the_copies_are_on_the_host_whatever_the_default_device_is(lag):
    with torch.device("meta"):
        active = ActiveCount(5, CPU, lag)
        active.running.fill_(3)
        assert [active.bound() for _ in range(3)] == [5 if lag == 2 else 3, 3, 3]


class Stream:
    def __init__(self, device):
        self.device = device


class Event:
    """An event that remembers the stream on which it was recorded."""

    log: ClassVar[list] = []

    def record(self, stream=None):
        self.log.append(stream)

    def synchronize(self):
        pass


def test_the_event_is_recorded_on_the_stream_of_the_tensors_device(monkeypatch):
    """On another device's stream the copy would be read before it was written."""
    other = torch.device("cuda", 1)
    monkeypatch.setattr(Event, "log", [])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    sent = _active._Copy(torch.empty((), dtype=torch.int64), 3, other)
    sent.send(torch.tensor(2))
    assert sent.read() == 2
    assert [stream.device for stream in Event.log] == [other]


# --- the argument of AdaptiveHalt ---------------------------------------------------------------------------
def double(h):
    return h * 2


@pytest.mark.parametrize("lag", [1, 2, 5, None])
def test_every_lag_is_taken_shown_copied_and_pickled(lag):
    halt = ac.AdaptiveHalt(double, ac.FixedSteps(2), 3, lag=lag)
    assert halt.lag == lag and f"lag={lag}" in repr(halt)
    for twin in (copy.deepcopy(halt), pickle.loads(pickle.dumps(halt))):
        assert twin.lag == lag
    assert halt(torch.ones(2, 3)).steps.tolist() == [2, 2]


def test_the_default_is_the_step_before_last_also_for_modules_that_were_pickled_without_a_lag():
    halt = ac.AdaptiveHalt(double, ac.FixedSteps(2), 3)
    assert halt.lag == LAG == 2
    state = halt.__getstate__() if hasattr(halt, "__getstate__") else halt.__dict__
    old = ac.AdaptiveHalt.__new__(ac.AdaptiveHalt)
    old.__setstate__({k: v for k, v in state.items() if k != "lag"})
    assert old.lag == 2 and "lag=2" in repr(old)
    assert old(torch.ones(2, 3)).steps.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("lag", "error"),
    [(0, ValueError), (-1, ValueError), (True, TypeError), (2.0, TypeError), ("2", TypeError)],
)
def test_no_other_lag_is_taken(lag, error):
    with pytest.raises(error, match=r"lag: expected an int >= 1 or None, got"):
        ac.AdaptiveHalt(double, ac.FixedSteps(2), 3, lag=lag)
