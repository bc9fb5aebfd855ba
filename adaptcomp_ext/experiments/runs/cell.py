"""A cell, one setting and one seed of an experiment, and its run in a process, local or remote."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from adaptcomp_ext.experiments.settings import settings

__all__ = ["PAUSE", "Cell", "Later", "Tick", "Worker", "run_one", "spaced", "span"]

PAUSE = 0.2  # seconds between two ticks that a process sends to the one that shows them


class Cell(NamedTuple):
    """One setting and one seed: a name, also of its folder, its options (JSON), and the seed of torch."""

    name: str
    options: dict[str, Any]
    seed: int


Tick = Callable[[str, float], None]
"""``tick(what, done)``: what the cell is doing, and the share of the cell that is done."""
Worker = Callable[[Cell, Path, Tick], dict[str, Any]]
"""``worker(cell, folder, tick)``: a function at the top of a module, so that another process can find it."""


class Later:
    """A worker that needs a module which is imported where a cell runs, and not before.

    With it, an experiment can be listed where what it measures with, such as a simulator, is not installed.

    Parameters
    ----------
    module : str
        The module's full name; a cluster asks its machines whether they have it.
    worker : Worker, optional
        Runs the cell. Default: the function `measure` of the module.
    """

    def __init__(self, module: str, worker: Worker | None = None) -> None:
        self.__module__, self.worker = module, worker

    def __call__(self, cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
        """Import the module and run a cell."""
        module = import_module(self.__module__)
        return dict((self.worker or module.measure)(cell, folder, tick))


def span(tick: Tick, what: str, begin: float, end: float) -> Callable[[float], None]:
    """Return the `tick` of a part of a cell: its 0 to 1 are `begin` to `end` of the cell."""
    return lambda done: tick(what, begin + (end - begin) * done)


def spaced(tick: Tick) -> Tick:
    """Return a `tick` that drops the calls which come within `PAUSE` seconds of the last one it passed on."""
    last = 0.0

    def passed(what: str, done: float) -> None:
        nonlocal last
        if time.monotonic() - last > PAUSE:
            last = time.monotonic()
            tick(what, done)

    return passed


def run_one(worker: Worker, cell: Cell, path: Path, threads: int, tick: Tick) -> dict[str, Any]:
    """Run a cell here with its seed and `threads` threads of torch; the result also has its ``seconds``."""
    begin = time.perf_counter()
    with settings(threads, cell.seed):
        result = worker(cell, path, tick)
    return {**result, "seconds": time.perf_counter() - begin}
