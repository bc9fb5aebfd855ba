"""Cells on a Ray cluster, seen from the run: a process of its own talks to Ray, and this one looks after it.

Ray ends the process that uses it, or never answers again, when its cluster goes away. So the run, which has a
folder to leave in order and a sentence to say, does not use Ray itself: see `cluster_driver`.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import pickle
import re
import socket
from collections.abc import Sequence
from typing import Any

from .cells import Bars, Cell, RunFolder, Worker
from .cluster_driver import Job, drive
from .processes import interrupts_later

__all__ = ["check_cluster", "run_on_cluster"]

REACH = 5.0  # seconds in which the machine of an address accepts a connection
START = 90.0  # seconds in which Ray starts or is joined, on a busy machine too
SILENCE = 20.0  # seconds without a sign of life after which the cluster is gone
GRACE = 8.0  # seconds in which cells are cancelled and a Ray of our own ends
INSTALL = 'pip install "adaptcomp_ext[cluster]"'
AGAIN = "the same command goes on where this run ended, on the cluster or without it"


def check_cluster(cluster: str | None) -> None:
    """Check the address of a cluster, and that what its use needs is installed.

    Parameters
    ----------
    cluster : str, optional
        See `run_cells`.

    Raises
    ------
    TypeError, ValueError
        If it is not an address.
    ModuleNotFoundError
        If Ray is not installed, or not the part of it that an address ``ray://`` needs.
    """
    if cluster is None:
        return
    if not isinstance(cluster, str):
        raise TypeError(f"cluster: expected a str or None, got {type(cluster).__name__} {cluster!r}")
    if cluster not in ("local", "auto") and _host_and_port(cluster) is None:
        raise ValueError(f"cluster: expected local, auto, ray://HOST:PORT or HOST:PORT, got {cluster!r}")
    for module in ("ray", "grpc") if cluster.startswith("ray://") else ("ray",):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(
                f"cluster: expected {module}, which is not installed; install the extra with: {INSTALL}",
                name=module,
            )


def run_on_cluster(
    folder: RunFolder,
    cells: Sequence[Cell],
    worker: Worker,
    workers: int,
    threads: int,
    address: str,
    token: str,
    bars: Bars,
) -> None:
    """Run cells on a cluster, at most `workers` at a time, and record each result as it comes.

    Parameters
    ----------
    token : str
        That of the owner of ``folder.cells``: a machine that does not find it there sees another folder.

    Raises
    ------
    ConnectionError
        If the cluster does not answer, or goes away. Its workers end by themselves then.
    ValueError
        If a machine of the cluster sees another folder, lacks a module, has another version of this package
        or of torch, or if no machine has `threads` cores.
    ChildProcessError
        If the worker of one cell was killed again and again.
    Exception
        What a cell raised, once those that run beside it have ended.
    """
    _reach(address)
    for cell in cells:
        bars.wait(cell.name)
        folder.cell(cell.name)
    job = Job.here(folder.cells, token, worker, threads)
    # Not forked: Ray's threads and ours would not survive it.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    driver = context.Process(target=drive, args=(theirs, job, list(cells), workers, address))
    try:
        with interrupts_later():
            driver.start()
        theirs.close()
        patience, gone = START, f"{_name(address)} did not answer within {START:.0f} seconds; {AGAIN}"
        failed: Exception | None = None
        while True:
            try:
                kind, *about = ours.recv() if ours.poll(patience) else ("silent",)
            except (EOFError, OSError):
                kind, about = "silent", []
            if kind in ("silent", "gone"):
                raise ConnectionError(f"{gone} ({about[0]})" if about else gone)
            if kind == "end":
                break
            if kind == "ready":
                patience = SILENCE
                gone = f"{_name(address)} went away; what is done is kept in {folder.path}, and {AGAIN}"
            elif kind == "tick":
                bars.show(*about)
            elif kind == "done":
                name, result = about
                folder.finish(name, result)
                bars.done(name)
            elif kind == "again":
                bars.console.print(
                    f"{about[0]}: its worker was lost; the cell runs again from its checkpoint"
                )
            elif kind == "failed" and failed is None:
                failed = _unpacked(*about)
        if failed is not None:
            raise failed
    finally:
        ours.close()  # which tells the driver to cancel what runs
        if driver.pid is not None:
            driver.join(GRACE)
            if driver.is_alive():
                driver.kill()
                driver.join()


class _Trace(Exception):
    """The traceback of an error on another machine, shown as the cause of that error here."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


def _unpacked(content: bytes, trace: str) -> Exception:
    try:
        error: Any = pickle.loads(content)
    except Exception:  # of a class that cannot be made from its own arguments
        error = RuntimeError(trace.strip().splitlines()[-1])
    error.__cause__ = _Trace(trace) if trace else None
    return error


def _name(address: str) -> str:
    return "the Ray of this machine" if address in ("local", "auto") else f"the Ray cluster at {address}"


def _host_and_port(address: str) -> tuple[str, int] | None:
    match = re.fullmatch(r"(?:ray://)?(?:([^\s:/\[\]]+)|\[([0-9a-fA-F:.]+)\]):(\d{1,5})", address)
    if match is None or not 0 < int(match[3]) < 2**16:
        return None
    return match[1] or match[2], int(match[3])


def _reach(address: str) -> None:
    """Connect and hang up: Ray itself tries for half a minute, and says what went wrong in a page."""
    place = _host_and_port(address)
    if place is None:
        return
    try:
        socket.create_connection(place, timeout=REACH).close()
    except OSError as error:
        raise ConnectionError(f"cluster: nothing answers at {address} ({error}); {AGAIN}") from None
