"""`ContinuousBatcher`: slots that are refilled from a stream of samples or requests."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from adaptcomp_ext.nn.batching.choice import (
    NAMES,
    STREAM_CHUNK,
    Module,
    check_module,
    check_served,
    make_engine,
)
from adaptcomp_ext.nn.batching.engine import Engine
from adaptcomp_ext.nn.batching.form import Form
from adaptcomp_ext.nn.batching.statistics import BatcherStatistics, Counters
from adaptcomp_ext.nn.batching.stream import StreamRun
from adaptcomp_ext.nn.batching.worker import Worker
from adaptcomp_ext.nn.descent.energy_descent import EnergyDescent
from adaptcomp_ext.nn.halting.adaptive_halt import AdaptiveHalt
from adaptcomp_ext.ops._checks import check_choice, check_int, describe


class ContinuousBatcher:
    """Run single samples through an `AdaptiveHalt` or `EnergyDescent`, in slots that are refilled.

    A block has `slots` rows. As soon as a row halts, the next sample takes its slot, so that every call of
    the step gets a full block, however different the numbers of steps are.

    Parameters
    ----------
    halt : AdaptiveHalt or EnergyDescent
        It runs without gradients. Settings that change count from the next `run` on, and for `submit` from
        the next request that finds no row in flight.
    slots : int
        Number of rows of a block, at least 1.
    ordered : bool
        Whether `run` gives results in the order of the samples. False: as they end, each as a pair
        ``(index, result)``.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described; when a run or a request begins, if `halt` has no meaning for
        single samples: PonderNet in training mode, ``keep_trace=True``, a `FixedSteps` or ``step_size`` with
        a number for each row.

    Notes
    -----
    *Samples* are tuples ``(state, *inputs)``, for a descent ``(y0, *context)``, each one row without its
    batch dimension. They are copied when they are accepted by `run`; a sample that was submitted must not
    change until its future is done. All samples have the structure, shapes, dtypes and device of the first.

    *Results* are one `HaltResult` or `EnergyResult` for each sample, without a batch dimension and without
    gradients. Results that ended at the same step share memory: a kept result keeps that of the others.

    *Equal bits.* A sample has the bits that ``halt`` gives for it alone, as far as step, readout and head
    compute a row independently of the block's size; see `AdaptiveHalt`. Its random numbers are keyed by its
    sample id: by default its index in the stream or the number of its submit, counted from 0. A row that has
    halted leaves its slot whatever `AdaptiveHalt`'s `compact` says, so that rows must not see each other.

    *Errors of samples.* One that is not like the first is refused, and the others finish. A step that raises
    fails the samples in flight, and the batcher goes on with the next ones. `SampleError` names the index,
    and has the step's error as its ``__cause__``.

    *Stages.* Where step, readout or head differ by the number of the step (a ModuleList, or a parameter
    ``n``), rows of the same stage run together: at the latest stage where a full block waits, else where most
    rows wait. Up to 16 · `slots` rows are then in flight. Where stages change the shape of the state, a
    result has the state of the row's own last stage.

    *Chunks.* Where ``halt`` runs all steps of a row in one kernel call (`AdaptiveHalt.plan`, energies in
    closed form), the kernel refills slots of its own, and the batcher gives it chunks: 8 · `slots` samples of
    a stream, up to `slots` requests. Chunks are also for what is not stepped row by row: energies that
    autograd differentiates, CUDA, subclasses of tensors, modules with hooks, `reference_kernels`. A request
    then waits for the chunk that is running.

    *Policies in Python* get `View.step` as a tensor, and `View.row` counts slots. ``begin`` is called for the
    rows that begin. A policy that begins with another number of tensors than it carries on, such as
    `Convergence`, decides about first steps in a call of its own.

    *Not promised:* the order of the rows in a block; that a row keeps its place; which requests share one.

    Examples
    --------
    >>> batcher = ac.ContinuousBatcher(halt, slots=256)
    >>> for result in batcher.run((torch.zeros(128), x) for x in stream):
    ...     save(result.output)

    >>> with ac.ContinuousBatcher(halt) as server:
    ...     future = server.submit((torch.zeros(128), x))
    ...     answer = future.result().output
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
        """Return an iterator over the results of all samples.

        A sample is pulled when a slot is free, in the thread that asks for a result, and at most 64 · `slots`
        results wait for a slower sample before them. An iterable that raises ends the stream: what was
        accepted is finished and handed out, and then its error is raised.

        Parameters
        ----------
        samples : iterable of tuple
            It may be endless.
        sample_ids : iterable of int, optional
            The key of each sample's random numbers. Default: its index.
        errors : "raise" or "return"
            What becomes of a `SampleError`. "raise": it is raised in the place of the result, and the next
            ``next`` goes on with the following sample, as of `multiprocessing.pool.Pool.imap`; a ``for`` loop
            ends there. "return": it is handed out in the place of the result.

        Returns
        -------
        iterator
            Of results; of pairs ``(index, result)`` if the batcher is not `ordered`.

        Raises
        ------
        TypeError, ValueError
            If an argument is not as described.
        RuntimeError
            After `close`.
        """
        self._check_open("run")
        check_choice("errors", errors, ("raise", "return"))
        for name, value in {
            "samples": samples,
            **({} if sample_ids is None else {"sample_ids": sample_ids}),
        }.items():
            if not isinstance(value, Iterable):
                raise TypeError(f"{name}: expected an iterable, got {describe(value)}")
        check_served(self._halt)
        make = _Maker(self._halt, self._slots, STREAM_CHUNK * self._slots)
        return StreamRun(
            make, samples, sample_ids, self._slots, self._ordered, errors == "raise", self._counters
        )

    def submit(self, sample: Any, sample_id: int | None = None) -> Future[Any]:
        """Return a future of the result of one sample; any thread may call it.

        A thread of the batcher runs all requests. A request takes a free slot at the next step; where no row
        is in flight, it starts at once. Others wait in a queue, which has no bound. The thread runs without
        gradients and with torch's default modes, so that autocast belongs into the step.

        Parameters
        ----------
        sample : tuple
        sample_id : int, optional
            The key of its random numbers. Default: the number of the request.

        Returns
        -------
        concurrent.futures.Future
            Of the result, or of a `SampleError`. It can be cancelled while it waits in the queue.

        Raises
        ------
        TypeError, ValueError
            If `sample_id` or `halt` is not as described.
        RuntimeError
            After `close`.
        """
        if sample_id is not None:
            check_int("sample_id", sample_id, -(2**63))
        check_served(self._halt)
        return self._worker.submit(sample, sample_id)

    def close(self) -> None:
        """Accept no more samples, and wait until those that were submitted are finished.

        Iterators of `run` that have begun may be used up. Leaving a ``with`` block closes the batcher.
        """
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
