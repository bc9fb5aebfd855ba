"""Cells side by side in processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

from .cells import PAUSE, Bars, Cell, RunFolder, Worker, run_one, spaced

__all__ = ["end_with_parent", "interrupts_later", "run_in_processes"]


def run_in_processes(
    folder: RunFolder, cells: Sequence[Cell], worker: Worker, workers: int, threads: int, bars: Bars
) -> None:
    """Run cells in `workers` processes and record each result as it comes.

    Raises
    ------
    ChildProcessError
        If a process was killed.
    Exception
        What a cell raised, once those that run beside it have ended.
    """
    # Not forked: a child of a process that has used OpenMP hangs in its first parallel region.
    context = multiprocessing.get_context("spawn")
    manager = SyncManager(ctx=context)
    with interrupts_later():
        manager.start(end_with_parent)
    others = set(multiprocessing.active_children())
    with manager, ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        ticks: Any = manager.Queue()
        for cell in cells:
            bars.wait(cell.name)
        with interrupts_later():
            running: dict[Future[dict[str, Any]], Cell] = {
                pool.submit(_run, worker, cell, folder.cell(cell.name), threads, ticks): cell
                for cell in cells
            }
        try:
            while running:
                with contextlib.suppress(queue.Empty):
                    bars.show(*ticks.get(timeout=PAUSE))
                for future in [f for f in running if f.done()]:
                    cell = running.pop(future)
                    folder.finish(cell.name, future.result())
                    bars.done(cell.name)
        except BrokenProcessPool:
            raise ChildProcessError(
                f"{folder.path}: a process that ran a cell was killed from outside; "
                "the same command goes on where this run ended"
            ) from None
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if not isinstance(error, Exception):
                # Interrupted: a cell may take long to end, and what it has written is whole at any time.
                for process in set(multiprocessing.active_children()) - others:
                    process.terminate()
            raise


def _run(worker: Worker, cell: Cell, path: Path, threads: int, ticks: Any) -> dict[str, Any]:
    return run_one(worker, cell, path, threads, spaced(lambda what, done: ticks.put((cell.name, what, done))))


def end_with_parent(grace: float = 0.0) -> None:
    """Have this process end when the one that started it does, killed or not, at most `grace` seconds later.

    Otherwise it would go on with its cell, and write beside the next run in the folder.
    """
    # Ctrl-C reaches all processes of a terminal; the one that started this one says what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            threading.Event().wait(grace)
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def interrupts_later() -> Iterator[None]:
    """Hold Ctrl-C back; processes that are started inside never get one, not even before they run."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
