"""What a worker on a machine of the cluster does: one cell, as a local process would."""

from __future__ import annotations

import os
import pickle
import socket
import traceback
from typing import TYPE_CHECKING, Any

import torch

import adaptcomp_ext

from .cell import Cell, run_one, spaced
from .owner import owns, watched

if TYPE_CHECKING:
    from .cluster_driver import Job

__all__ = ["run_there", "versions"]


def versions() -> dict[str, str]:
    """Return the versions, here, of what must be the same on all machines for the same results."""
    return {"adaptcomp_ext": adaptcomp_ext.__version__, "torch": str(torch.__version__)}


def run_there(job: Job, cell: Cell, ticks: Any) -> tuple[Any, ...]:
    """Run a cell; return ``("done", result)``, or ``("failed", pickled error, traceback)``.

    The process ends with the run that it belongs to, even where the cluster does not see to that: when its
    folder has another owner or none, what it would still write belongs to nobody.
    """
    if os.path.isdir(job.directory):  # for files that were named relative to it
        os.chdir(job.directory)
    try:
        # The machines were asked before the first cell; this one may have joined the cluster since.
        if versions() != job.versions:
            raise ValueError(
                f"cluster: expected {job.versions} on {socket.gethostname()} too, got {versions()}"
            )
        if not owns(job.cells, job.token):
            raise FileNotFoundError(
                f"{job.cells}: expected the folder of this run on {socket.gethostname()} too, found another"
            )
        with watched(job.cells, job.token, lambda: os._exit(1)):
            tick = spaced(lambda what, done: ticks.put.remote(cell.name, what, done))
            return "done", run_one(job.worker, cell, job.cells / cell.name, job.threads, tick)
    except Exception as error:
        trace = traceback.format_exc()
        try:
            return "failed", pickle.dumps(error), trace
        except Exception:  # an error that holds what cannot be sent
            return "failed", pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}")), trace
