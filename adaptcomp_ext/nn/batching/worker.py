"""The thread that runs the requests of a batcher."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from adaptcomp_ext.nn.batching.engine import Engine
from adaptcomp_ext.nn.batching.errors import failed, refused
from adaptcomp_ext.nn.batching.statistics import Counters


@dataclass(slots=True)
class _Request:
    number: int
    sample: Any
    sample_id: int
    future: Future[Any]
    since: float


class Worker:
    """A thread that starts with the first request, and runs each at the next step at which a slot is free.

    Parameters
    ----------
    make : callable
        Makes the engine, given a sample; called whenever no row is in flight, so that changes of the module
        and of its settings count from the next request on.
    counters : Counters
    """

    def __init__(self, make: Callable[[Any], Engine], counters: Counters) -> None:
        self._make, self._counters = make, counters
        self._changed = threading.Condition()
        self._queue: deque[_Request] = deque()
        self._number = 0
        self._stopping = False
        self._thread: threading.Thread | None = None

    def submit(self, sample: Any, sample_id: int | None) -> Future[Any]:
        """Queue a sample. RuntimeError after `stop`."""
        future: Future[Any] = Future()
        with self._changed:
            if self._stopping:
                raise RuntimeError("submit: expected an open batcher, got one that was closed")
            number = self._number
            self._number += 1
            key = number if sample_id is None else sample_id
            self._queue.append(_Request(number, sample, key, future, time.perf_counter()))
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._loop, name="ContinuousBatcher", daemon=True)
                _workers.add(self)
                self._thread.start()
            self._changed.notify()
        return future

    def stop(self) -> None:
        """Accept no more requests; those that were accepted are finished."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def join(self) -> None:
        """Wait until all requests are finished, unless this is the thread that does it."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _loop(self) -> None:
        engine: Engine | None = None
        flying: dict[int, Future[Any]] = {}
        while True:
            with self._changed:
                while not self._queue and not flying and not self._stopping:
                    engine = None  # it holds memory
                    self._changed.wait()
                if not self._queue and not flying:
                    return
                room = len(self._queue) if engine is None or not flying else engine.room
                taken = [self._queue.popleft() for _ in range(min(room, len(self._queue)))]
            if not flying:
                engine = None
            engine = self._accept(engine, taken, flying)
            if flying and engine is not None:
                self._advance(engine, flying)

    def _accept(
        self, engine: Engine | None, requests: list[_Request], flying: dict[int, Future[Any]]
    ) -> Engine | None:
        """Put requests into free slots; those that find none wait at the head of the queue."""
        for i, request in enumerate(requests):
            if engine is not None and engine.room == 0:
                with self._changed:
                    self._queue.extendleft(reversed(requests[i:]))
                break
            if not request.future.set_running_or_notify_cancel():
                continue
            try:
                if engine is None:
                    engine = self._make(request.sample)
                engine.put(request.sample, request.number, request.sample_id)
            except Exception as error:
                self._counters.add(samples=1, failures=1)
                if isinstance(error, (TypeError, ValueError)):
                    error = refused(request.number, error)
                request.future.set_exception(error)
            else:
                flying[request.number] = request.future
                self._counters.add_queued(time.perf_counter() - request.since)
        return engine

    def _advance(self, engine: Engine, flying: dict[int, Future[Any]]) -> None:
        steps, capacity = engine.row_steps, engine.capacity
        try:
            with torch.no_grad():
                ended = engine.advance()
        except BaseException as error:  # whatever it is, those who wait have to be told
            engine.drop()
            self._counters.add(samples=len(flying), failures=len(flying))
            for number, future in flying.items():
                future.set_exception(failed(number, error))
            flying.clear()
            return
        self._counters.add_call(engine.row_steps - steps, engine.capacity - capacity)
        self._counters.add(samples=len(ended), results=len(ended))
        for number, result in ended:
            flying.pop(number).set_result(result)


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def _finish_all() -> None:
    """Finish all requests before the interpreter ends, which would stop threads within a step."""
    for worker in list(_workers):
        worker.stop()
    for worker in list(_workers):
        worker.join()
