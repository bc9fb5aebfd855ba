"""The cells of an experiment, each one setting and one seed, and their folder: each cell is run once.

They run in this process, in several (`processes`) or on a cluster (`cluster`); the two modules are imported
when they are asked for.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from adaptcomp_ext.experiments.device import gpus
from adaptcomp_ext.ops._checks import check_int

from ..files import owned, read_json, write_json

__all__ = [
    "CONFIG_NAME",
    "PAUSE",
    "Bars",
    "Cell",
    "Later",
    "RunFolder",
    "Tick",
    "Worker",
    "run_cells",
    "run_one",
    "spaced",
    "span",
]

CONFIG_NAME = "config.json"
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


@dataclass(frozen=True)
class RunFolder:
    """The folder of one experiment and one configuration, and in it a folder for each of its cells.

    Attributes
    ----------
    path : Path
        The folder.
    """

    path: Path

    @classmethod
    def open(cls, path: Path | str, experiment: str, config: Mapping[str, Any]) -> RunFolder:
        """Make the folder of an experiment, or open it again.

        Parameters
        ----------
        path, experiment : Path or str, str
            The folder, and the name of the experiment.
        config : mapping
            Everything that the results depend on, as JSON; recorded in ``config.json``.

        Raises
        ------
        ValueError
            If the folder holds another experiment, or this one in another configuration. Nothing is touched
            then.
        """
        path = Path(path)
        wanted = json.loads(json.dumps({"experiment": experiment, "config": dict(config)}))
        if (path / CONFIG_NAME).is_file():
            found = read_json(path / CONFIG_NAME)
            if found != wanted:
                raise ValueError(
                    f"{path}: {_difference(found, wanted)}; nothing was overwritten: choose another "
                    "output folder"
                )
        else:
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / CONFIG_NAME, wanted)
        return cls(path)

    @property
    def cells(self) -> Path:
        """The folder of all cells' folders."""
        return self.path / "cells"

    def cell(self, name: str) -> Path:
        """The folder of a cell, made where it is not there."""
        folder = self.cells / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def result(self, name: str) -> dict[str, Any] | None:
        """What a cell that is finished found; None if it is not."""
        path = self.cells / name / "result.json"
        return dict(read_json(path)) if path.is_file() else None

    def finish(self, name: str, result: Mapping[str, Any]) -> None:
        """Record what a cell found."""
        write_json(self.cell(name) / "result.json", dict(result))


def _difference(found: Any, wanted: Any) -> str:
    if not isinstance(found, dict) or found.get("experiment") != wanted["experiment"]:
        other = found.get("experiment") if isinstance(found, dict) else found
        return f"expected a folder of {wanted['experiment']!r}, found one of {other!r}"
    ours, theirs = wanted["config"], found.get("config") or {}
    keys = sorted({*ours, *theirs}, key=str)
    parts = [
        f"{k} = {theirs.get(k)!r} there, {ours.get(k)!r} asked for"
        for k in keys
        if theirs.get(k) != ours.get(k)
    ]
    return f"it holds another configuration of {wanted['experiment']!r}: {'; '.join(parts)}"


class Bars(Progress):
    """The progress of cells on a terminal, a bar for each."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[what]}"),
            console=console,
        )
        self._running: dict[str, TaskID] = {}

    def wait(self, name: str) -> None:
        """Add the bar of a cell that has not begun; its clock stands until `show`."""
        self._running[name] = self.add_task(name, total=1.0, what="waiting", start=False)

    def show(self, name: str, what: str, done: float) -> None:
        """Show what a cell is doing and the share of it that is done."""
        if name in self._running:  # what another process sent before its result may come after it
            self.start_task(self._running[name])
            self.update(self._running[name], completed=done, what=what)

    def done(self, name: str) -> None:
        """Show that a cell is done."""
        self.show(name, "done", 1.0)
        del self._running[name]


def run_one(worker: Worker, cell: Cell, path: Path, threads: int, tick: Tick) -> dict[str, Any]:
    """Run a cell here with its seed, its device and `threads` threads of torch.

    The result also has its ``seconds``. Threads, default device and random state are put back afterwards.
    """
    begin, before = time.perf_counter(), torch.get_num_threads()
    device = cell.options.get("device", "cpu")
    # A default device costs a microsecond in every call of torch: the CPU, which is the default, is not set.
    default: Any = contextlib.nullcontext() if device == "cpu" else torch.device(device)
    torch.set_num_threads(threads)
    try:
        with default, torch.random.fork_rng(devices=gpus()):
            torch.manual_seed(cell.seed)
            result = worker(cell, path, tick)
    finally:
        torch.set_num_threads(before)
    return {**result, "seconds": time.perf_counter() - begin}


def run_cells(
    folder: RunFolder,
    cells: Sequence[Cell],
    worker: Worker,
    *,
    workers: int,
    threads: int,
    console: Console,
    cluster: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Run the cells that are not finished, record each as it ends, and return the results of all, by name.

    The results are the same bits wherever the cells run, as long as the machines compute alike (the same
    release of torch on the same kind of CPU).

    Parameters
    ----------
    folder : RunFolder
        Folder of the checkpoints and results of the cells. No other run may be at work in it.
    cells : sequence of Cell
        The cells, in the order in which they start.
    worker : Worker
        The function that runs one cell.
    workers : int
        Number of cells that run at the same time. Without a cluster, 1 means: in this process.
    threads : int
        Threads of torch for each cell; on a cluster also the number of cores that it reserves.
    console : Console
        Where the progress is shown.
    cluster : str, optional
        None: processes of this machine. ``"local"``: a Ray that is started on this machine for this run.
        ``"auto"``, ``"ray://HOST:PORT"`` or ``"HOST:PORT"``: the Ray cluster at that address, whose machines
        must see `folder` under the same path. What a cell prints there stands in Ray's logs.

    Raises
    ------
    BlockingIOError
        If another run is at work in the folder.
    ModuleNotFoundError
        If there is a `cluster` but no Ray.
    ConnectionError
        If the cluster does not answer, or goes away; the folder can be resumed.
    Exception
        What a cell raised, once those that run beside it have ended; the folder can be resumed.
    """
    check_int("workers", workers, 1)
    check_int("threads", threads, 1)
    if cluster is not None:
        from .cluster import check_cluster, run_on_cluster

        check_cluster(cluster)
    if any(folder.result(cell.name) is None for cell in cells):
        with owned(folder.cells) as token, Bars(console) as bars:
            waiting = [cell for cell in cells if folder.result(cell.name) is None]
            if cluster is not None:
                run_on_cluster(folder, waiting, worker, workers, threads, cluster, token, bars)
            elif workers > 1:
                from .processes import run_in_processes

                run_in_processes(folder, waiting, worker, workers, threads, bars)
            else:
                for cell in waiting:
                    bars.wait(cell.name)
                    tick = partial(bars.show, cell.name)
                    tick("", 0.0)
                    folder.finish(cell.name, run_one(worker, cell, folder.cell(cell.name), threads, tick))
                    bars.done(cell.name)
    return {cell.name: folder.result(cell.name) or {} for cell in cells}
