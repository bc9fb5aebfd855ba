"""The run of a batcher over an iterable of samples."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from adaptcomp_ext.nn.batching.engine import Engine
from adaptcomp_ext.nn.batching.errors import SampleError, failed, refused
from adaptcomp_ext.nn.batching.statistics import Counters
from adaptcomp_ext.ops._checks import check_int

_MISSING = object()
AHEAD = 64
"""Results that may wait for a slower sample before them, for each slot, when they are wanted in order."""


class StreamRun(Iterator[Any]):
    """An iterator over the results of a stream; see `ContinuousBatcher.run`.

    Parameters
    ----------
    make : callable
        Makes the engine, given the first sample.
    samples : iterable
    sample_ids : iterable or None
        The key of each sample's random numbers.
    slots : int
        Number of slots.
    ordered, raises : bool
        Whether results come in the order of the samples, and whether errors of samples are raised.
    counters : Counters
    """

    def __init__(
        self,
        make: Callable[[Any], Engine],
        samples: Iterable[Any],
        sample_ids: Iterable[int] | None,
        slots: int,
        ordered: bool,
        raises: bool,
        counters: Counters,
    ) -> None:
        self._make = make
        self._source: Iterator[Any] | None = iter(samples)
        self._source_ids = None if sample_ids is None else iter(sample_ids)
        self._ordered, self._raises, self._counters = ordered, raises, counters
        self._limit = AHEAD * slots
        self._engine: Engine | None = None
        self._error: Exception | None = None  # of the source, raised after all results
        self._pulled = self._yielded = 0
        self._flying: set[int] = set()
        self._done: dict[int, Any] = {}  # results that wait for those before them
        self._ready: deque[tuple[int, Any]] = deque()

    def __iter__(self) -> StreamRun:
        return self

    def __next__(self) -> Any:
        while True:
            if self._ordered:
                result = self._done.pop(self._yielded, _MISSING)
                if result is not _MISSING:
                    self._yielded += 1
                    if self._raises and isinstance(result, SampleError):
                        raise result
                    return result
            elif self._ready:
                pair = self._ready.popleft()
                self._yielded += 1
                if self._raises and isinstance(pair[1], SampleError):
                    raise pair[1]
                return pair
            self._pull()
            if self._flying:
                self._advance()
            elif self._source is None and not self._done and not self._ready:
                error, self._error = self._error, None
                if error is not None:
                    raise error
                raise StopIteration

    def _pull(self) -> None:
        """Take samples for the slots that are free."""
        source = self._source
        if source is None:
            return
        engine, flying = self._engine, self._flying
        room = 1 if engine is None else engine.room
        while room > 0 and self._pulled - self._yielded < self._limit:
            try:
                sample = next(source)
                sample_id = self._pulled if self._source_ids is None else self._next_id(self._source_ids)
            except StopIteration:
                self._source = None
                return
            except Exception as error:
                self._error, self._source = error, None
                return
            index = self._pulled
            self._pulled += 1
            try:
                if engine is None:
                    engine = self._engine = self._make(sample)
                    room = engine.room
                engine.put(sample, index, sample_id)
            except (TypeError, ValueError) as error:
                self._counters.add(samples=1, failures=1)
                self._keep(index, refused(index, error))
                if not self._ordered:
                    return  # a stream of nothing else has to be told
            else:
                flying.add(index)
                room -= 1

    @staticmethod
    def _next_id(ids: Iterator[int]) -> int:
        try:
            return check_int("sample_ids", next(ids), -(2**63))
        except StopIteration:
            raise ValueError("sample_ids: expected one for each sample, got fewer") from None

    def _advance(self) -> None:
        """Run a block."""
        engine = self._engine
        assert engine is not None, "rows are in flight"
        steps, capacity = engine.row_steps, engine.capacity
        try:
            with torch.no_grad():
                ended = engine.advance()
        except BaseException as error:
            flying = sorted(self._flying)
            self._flying.clear()
            engine.drop()
            self._counters.add(samples=len(flying), failures=len(flying))
            for index in flying:
                self._keep(index, failed(index, error))
            if not isinstance(error, Exception):
                raise
            return
        self._counters.add_call(engine.row_steps - steps, engine.capacity - capacity)
        if ended:
            self._counters.add(samples=len(ended), results=len(ended))
            if self._ordered:
                self._done.update(ended)
            else:
                self._ready.extend(ended)
            self._flying.difference_update([index for index, _ in ended])

    def _keep(self, index: int, result: Any) -> None:
        if self._ordered:
            self._done[index] = result
        else:
            self._ready.append((index, result))
