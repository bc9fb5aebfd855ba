"""What a `ContinuousBatcher` counts."""

from __future__ import annotations

import threading
from typing import NamedTuple

from adaptcomp_ext.ops._fields import documented


@documented
class BatcherStatistics(NamedTuple):
    """What a `ContinuousBatcher` has done so far, all runs and requests together.

    Attributes
    ----------
    samples : int
        Number of samples that were accepted.
    results : int
        Number of samples that have a result.
    failures : int
        Number of samples that have none: refused ones, and those that were in flight when a step raised.
    calls : int
        Number of blocks that were run: calls of the step, or of the module where a chunk runs in one call.
    row_steps : int
        Number of steps of all rows.
    utilization : float
        The share of the slots that held a row, over all calls of the step; NaN where there was none, as
        where chunks run in one call.
    mean_queue_seconds : float
        The mean time from `ContinuousBatcher.submit` to the start of the row's first step; NaN if there was
        no request.
    max_queue_seconds : float
        The longest of these times; NaN if there was no request.
    """

    samples: int
    results: int
    failures: int
    calls: int
    row_steps: int
    utilization: float
    mean_queue_seconds: float
    max_queue_seconds: float


class Counters:
    """The counts, which several threads may add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._samples = self._results = self._failures = 0
        self._calls = self._row_steps = self._capacity = self._used = 0
        self._queued, self._requests, self._longest = 0.0, 0, 0.0

    def add(self, samples: int = 0, results: int = 0, failures: int = 0) -> None:
        """Count samples."""
        with self._lock:
            self._samples += samples
            self._results += results
            self._failures += failures

    def add_call(self, row_steps: int, capacity: int) -> None:
        """Count a block that was run; `capacity`: the rows that it has room for, 0 if unknown."""
        with self._lock:
            self._calls += 1
            self._row_steps += row_steps
            if capacity:
                self._capacity += capacity
                self._used += row_steps

    def add_queued(self, seconds: float) -> None:
        """Count the time that a request has waited."""
        with self._lock:
            self._queued += seconds
            self._requests += 1
            self._longest = max(self._longest, seconds)

    def read(self) -> BatcherStatistics:
        """Return the counts of this moment."""
        nan = float("nan")
        with self._lock:
            return BatcherStatistics(
                *(self._samples, self._results, self._failures, self._calls, self._row_steps),
                self._used / self._capacity if self._capacity else nan,
                self._queued / self._requests if self._requests else nan,
                self._longest if self._requests else nan,
            )
