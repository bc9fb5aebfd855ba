"""The cells of an experiment, one setting and one seed each: run one after another or side by side, each only once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from adaptcomp_ext.experiments.settings import settings
from adaptcomp_ext.ops._checks import check_int

from .folder import RunFolder

__all__ = ["Cell", "Tick", "Worker", "run_cells", "span"]

PAUSE = 0.2  # seconds between two ticks of a process


class Cell(NamedTuple):
    """One setting and one seed: a name, which is a folder's too, what is run there (JSON), and the seed of torch."""

    name: str
    options: dict[str, Any]
    seed: int


Tick = Callable[[str, float], None]
"""``tick(what, done)``: what a cell is at, and the share of it that is done."""
Worker = Callable[[Cell, Path, Tick], dict[str, Any]]
"""``worker(cell, folder, tick)``: a function at the top of a module, so that another process can find it."""


def span(tick: Tick, what: str, begin: float, end: float) -> Callable[[float], None]:
    """The `tick` of a part of a cell, which itself goes from 0 to 1 while the cell goes from `begin` to `end`."""
    return lambda done: tick(what, begin + (end - begin) * done)


def run_cells(
    folder: RunFolder, cells: Sequence[Cell], worker: Worker, *, workers: int, threads: int, console: Console
) -> dict[str, dict[str, Any]]:
    """Run the cells that are not finished, record each as it ends, and return the results of all, by name.

    Parameters
    ----------
    folder : RunFolder
        Where cells keep their checkpoints and results.
    cells : sequence of Cell
        In this order.
    worker : Worker
        Runs one.
    workers : int
        How many processes; 1: this one.
    threads : int
        Threads of torch in each.
    console : Console
        Where the progress is shown.

    Raises
    ------
    Exception
        What a cell raised, once those that run beside it have ended; the folder can be resumed.
    """
    check_int("workers", workers, 1)
    check_int("threads", threads, 1)
    found = {cell.name: folder.result(cell.name) for cell in cells}
    waiting = [cell for cell in cells if found[cell.name] is None]
    with _bars(console) as bars:
        if workers == 1:
            for cell in waiting:
                task = bars.add_task(cell.name, total=1.0, what="")
                result = _run(worker, cell, folder.cell(cell.name), threads, partial(_show, bars, task))
                folder.finish(cell.name, result)
                bars.update(task, completed=1.0, what="done")
        elif waiting:
            _run_processes(folder, waiting, worker, workers, threads, bars)
    return {cell.name: folder.result(cell.name) or {} for cell in cells}


def _show(bars: Progress, task: TaskID, what: str, done: float) -> None:
    bars.update(task, completed=done, what=what)


@contextlib.contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}"),
    )
    with Progress(*columns, console=console) as bars:
        yield bars


def _run(worker: Worker, cell: Cell, path: Path, threads: int, tick: Tick) -> dict[str, Any]:
    begin = time.perf_counter()
    with settings(threads, cell.seed):
        result = worker(cell, path, tick)
    return {**result, "seconds": time.perf_counter() - begin}


def _run_elsewhere(worker: Worker, cell: Cell, path: Path, threads: int, ticks: Any) -> dict[str, Any]:
    last = 0.0

    def tick(what: str, done: float) -> None:
        nonlocal last
        if time.monotonic() - last > PAUSE:
            last = time.monotonic()
            ticks.put((cell.name, what, done))

    return _run(worker, cell, path, threads, tick)


def _end_with_parent() -> None:
    """Have this process end when the one that started it does, killed or not.

    Otherwise it would go on with its cell, and write beside whoever takes the folder up again.
    """
    # Ctrl-C reaches all processes of a terminal; the one that started this one says what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _run_processes(
    folder: RunFolder, cells: list[Cell], worker: Worker, workers: int, threads: int, bars: Progress
) -> None:
    # Not forked: a child of a process that has used OpenMP hangs in its first parallel region.
    context = multiprocessing.get_context("spawn")
    manager = SyncManager(ctx=context)
    with _interrupts_later():
        manager.start(_end_with_parent)
    others = set(multiprocessing.active_children())
    with manager, ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        ticks: Any = manager.Queue()
        tasks = {
            cell.name: bars.add_task(cell.name, total=1.0, what="waiting", start=False) for cell in cells
        }
        with _interrupts_later():
            running: dict[Future[dict[str, Any]], Cell] = {
                pool.submit(_run_elsewhere, worker, cell, folder.cell(cell.name), threads, ticks): cell
                for cell in cells
            }
        try:
            while running:
                with contextlib.suppress(queue.Empty):
                    name, what, done = ticks.get(timeout=PAUSE)
                    bars.start_task(tasks[name])
                    _show(bars, tasks[name], what, done)
                for future in [f for f in running if f.done()]:
                    cell = running.pop(future)
                    folder.finish(cell.name, future.result())
                    bars.start_task(tasks[cell.name])
                    _show(bars, tasks[cell.name], "done", 1.0)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if not isinstance(error, Exception):
                # Interrupted: a cell may take long to end, and what it has written is whole at any time.
                for process in set(multiprocessing.active_children()) - others:
                    process.terminate()
            raise


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Hold Ctrl-C back; processes that are started inside never see one, not even before they have begun to run."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
