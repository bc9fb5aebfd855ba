"""`ContinuousBatcher`: slots that are refilled from a stream of samples or requests."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from adaptcomp_ext.nn.batching.choice import NAMES, STREAM_CHUNK, Module, check_module, check_served, make_engine
from adaptcomp_ext.nn.batching.engine import Engine
from adaptcomp_ext.nn.batching.form import Form
from adaptcomp_ext.nn.batching.statistics import BatcherStatistics, Counters
from adaptcomp_ext.nn.batching.stream import StreamRun
from adaptcomp_ext.nn.batching.worker import Worker
from adaptcomp_ext.nn.descent.energy_descent import EnergyDescent
from adaptcomp_ext.nn.halting.adaptive_halt import AdaptiveHalt
from adaptcomp_ext.ops._checks import check_choice, check_int, describe


class ContinuousBatcher:
    """Run a stream of single samples through an `AdaptiveHalt` or `EnergyDescent`, with slots that stay full.

    Parameters
    ----------
    halt : AdaptiveHalt or EnergyDescent
        It is read whenever a run begins.
    slots : int
        Number of rows of a block, at least 1.
    ordered : bool
        Whether `run` gives the results in the order of the samples; False: as they end.
    """

    def __init__(self, halt: Module, slots: int = 256, ordered: bool = True) -> None:
        self._halt = check_module(halt)
        self._slots = check_int("slots", slots, 1)
        if not isinstance(ordered, bool):
            raise TypeError(f"ordered: expected a bool, got {describe(ordered)}")
        self._ordered = ordered
        self._counters = Counters()
        self._closed = False
        self._worker = Worker(_Maker(self._halt, self._slots), self._counters)
        weakref.finalize(self, self._worker.stop).atexit = False

    @property
    def slots(self) -> int:
        """Number of rows of a block."""
        return self._slots

    @property
    def statistics(self) -> BatcherStatistics:
        """What was done so far."""
        return self._counters.read()

    def run(
        self, samples: Iterable[Any], sample_ids: Iterable[int] | None = None, errors: str = "raise"
    ) -> Iterator[Any]:
        """Return an iterator over the results of all samples."""
        self._check_open("run")
        check_choice("errors", errors, ("raise", "return"))
        for name, value in {"samples": samples, **({} if sample_ids is None else {"sample_ids": sample_ids})}.items():
            if not isinstance(value, Iterable):
                raise TypeError(f"{name}: expected an iterable, got {describe(value)}")
        check_served(self._halt)
        make = _Maker(self._halt, self._slots, STREAM_CHUNK * self._slots)
        return StreamRun(make, samples, sample_ids, self._slots, self._ordered, errors == "raise", self._counters)

    def submit(self, sample: Any, sample_id: int | None = None) -> Future[Any]:
        """Return a future of the result of one sample; any thread may call it."""
        if sample_id is not None:
            check_int("sample_id", sample_id, -(2**63))
        check_served(self._halt)
        return self._worker.submit(sample, sample_id)

    def close(self) -> None:
        """Accept no more samples, and wait until those that were submitted are finished."""
        self._closed = True
        self._worker.stop()
        self._worker.join()

    def _check_open(self, name: str) -> None:
        if self._closed:
            raise RuntimeError(f"{name}: expected an open batcher, got one that was closed")

    def __enter__(self) -> ContinuousBatcher:
        self._check_open("ContinuousBatcher")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ContinuousBatcher({type(self._halt).__name__}, slots={self._slots}, ordered={self._ordered})"


class _Maker:
    """Makes engines for samples in the form of the first one."""

    def __init__(self, halt: Module, slots: int, chunk: int | None = None) -> None:
        self._halt, self._slots, self._chunk = halt, slots, slots if chunk is None else chunk
        self._form: Form | None = None
        self._names = NAMES[EnergyDescent if isinstance(halt, EnergyDescent) else AdaptiveHalt]

    def __call__(self, sample: Any) -> Engine:
        if self._form is None:
            self._form = Form(sample, self._names)
        return make_engine(self._halt, self._form, self._slots, self._chunk)
