"""The cells of an experiment: run here, in processes of this machine or on a cluster, each only once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from rich.console import Console

from adaptcomp_ext.ops._checks import check_int

from .bars import Bars
from .cell import Cell, Later, Tick, Worker, run_one, span
from .cluster import check_cluster, run_on_cluster
from .folder import RunFolder
from .owner import owned
from .processes import run_in_processes

__all__ = ["Cell", "Later", "Tick", "Worker", "run_cells", "span"]


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
    check_cluster(cluster)
    waiting = [cell for cell in cells if folder.result(cell.name) is None]
    if waiting:
        with owned(folder.cells) as token, Bars(console) as bars:
            waiting = [cell for cell in waiting if folder.result(cell.name) is None]
            if cluster is not None:
                run_on_cluster(
                    folder,
                    waiting,
                    worker,
                    workers=workers,
                    threads=threads,
                    address=cluster,
                    token=token,
                    bars=bars,
                )
            elif workers > 1:
                run_in_processes(folder, waiting, worker, workers=workers, threads=threads, bars=bars)
            else:
                for cell in waiting:
                    bars.show(cell.name, "", 0.0)
                    result = run_one(
                        worker, cell, folder.cell(cell.name), threads, partial(bars.show, cell.name)
                    )
                    folder.finish(cell.name, result)
                    bars.done(cell.name)
    return {cell.name: folder.result(cell.name) or {} for cell in cells}
