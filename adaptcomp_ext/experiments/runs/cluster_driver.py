"""What runs with Ray: the process that distributes cells, which Ray may end at any time, and its workers.

What the process sends to the run: ``("ready",)`` once the machines are checked; then ``("alive",)`` every
few seconds, ``("tick", name, what, done)``, ``("done", name, result)``, ``("again", name)`` where a worker
was lost, ``("failed", pickled error, traceback)``; at last ``("end",)``. It stops when the other end of the
pipe is closed.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

import adaptcomp_ext

from ..files import OWNER_NAME, owns, watched
from .cells import PAUSE, Cell, Worker, run_one, spaced
from .processes import end_with_parent

__all__ = ["Job", "drive"]

ALIVE = 2.0  # seconds between two questions whether the cluster is there
DEATHS = 3  # of the workers of one cell
STORE = 80 * 2**20  # bytes of shared memory for a Ray of our own: results are small


def versions() -> dict[str, str]:
    """Return the versions, here, of what must be the same on all machines for the same results."""
    return {"adaptcomp_ext": adaptcomp_ext.__version__, "torch": str(torch.__version__)}


class Job(NamedTuple):
    """What is the same for all cells: their folder and its owner's token, and how a worker runs one."""

    cells: Path
    token: str
    worker: Worker
    threads: int
    directory: str
    versions: dict[str, str]

    @classmethod
    def here(cls, cells: Path, token: str, worker: Worker, threads: int) -> Job:
        """Take working directory and versions from this process."""
        return cls(cells.resolve(), token, worker, threads, os.getcwd(), versions())


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


def drive(pipe: Connection, job: Job, cells: Sequence[Cell], workers: int, address: str) -> None:
    """Run in a process of its own."""
    end_with_parent(grace=5.0)
    # Ray puts this process's directory first on the workers' paths: in a checkout, the sources without a
    # compiled module would hide the installed package. The workers themselves go to the directory of the run.
    os.chdir(job.cells)
    _prepare(address)
    try:
        import ray

        _join(ray, address, workers * job.threads)
        _check_machines(ray, job)
    except Exception as error:
        pipe.send(("failed", *_packed(error)))
        pipe.send(("end",))
        return
    pipe.send(("ready",))
    try:
        _run(ray, pipe, job, list(cells), workers)
        ray.shutdown()
        pipe.send(("end",))
    except (BrokenPipeError, EOFError):  # the run was interrupted or has ended
        ray.shutdown()
    except Exception as error:
        pipe.send(("gone", _line(error)))


def _prepare(address: str) -> None:
    """Set what Ray reads when it is imported, and keep its messages off the terminal.

    They are a page for each event, and stand in its own logs too.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address == "local":  # its workers find the modules that this process finds, as local processes do
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    elif "RAY_AUTH_TOKEN" in os.environ or os.path.isfile(
        os.environ.get("RAY_AUTH_TOKEN_PATH", os.path.expanduser("~/.ray/auth_token"))
    ):  # a token is there, but Ray shows it only if it is told to; a cluster without tokens ignores it
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)


def _packed(error: Exception) -> tuple[bytes, str]:
    if isinstance(error, (ValueError, OSError)):  # a sentence for the user
        return pickle.dumps(error), ""
    return pickle.dumps(RuntimeError(_line(error))), traceback.format_exc()


def _line(error: Exception) -> str:
    """Return what an error says, which for Ray is a page, in one line."""
    return f"{' '.join(str(error).split()):.300}"


def _join(ray: Any, address: str, cores: int) -> None:
    new = {"num_cpus": cores, "object_store_memory": STORE, "include_dashboard": False}
    try:
        ray.init(
            address=address, log_to_driver=False, logging_level="ERROR", **(new if address == "local" else {})
        )
    except Exception as error:
        raise ConnectionError(
            f"cluster: Ray could not be joined at {address} ({_line(error)}); a cluster that asks for a "
            "token finds it in the environment variable RAY_AUTH_TOKEN"
        ) from None


def _check_machines(ray: Any, job: Job) -> None:
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    cores = [node["Resources"].get("CPU", 0) for node in nodes.values()]
    if any(cores) and max(cores) < job.threads:
        raise ValueError(
            f"threads: expected at most {max(cores):.0f}, the cores of the largest machine of the cluster, "
            f"got {job.threads}"
        )
    probe = _probe()
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    asked = {
        name: ray.remote(probe)
        .options(num_cpus=0, max_retries=0, scheduling_strategy=strategy(name, soft=False))
        .remote(str(job.cells / OWNER_NAME), job.token, job.worker.__module__, list(job.versions))
        for name, node in nodes.items()
        if node["Resources"].get("CPU", 0)
    }
    for name, answer in asked.items():
        machine = nodes[name]["NodeManagerHostname"]
        try:
            sees, missing, found = ray.get(answer)
        except ray.exceptions.RayError as error:
            raise ConnectionError(
                f"cluster: {machine} could not be asked for its folder and versions ({_line(error)})"
            ) from None
        if not sees:
            raise ValueError(
                f"{job.cells}: expected a folder on a file system that all machines of the cluster share, "
                f"found none that {machine} can read and write there"
            )
        if missing:
            raise ValueError(f"cluster: expected the packages of this machine on {machine}, got: {missing}")
        if found != job.versions:
            raise ValueError(
                f"cluster: expected {_listed(job.versions)} on {machine} as here, got {_listed(found)}"
            )


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _probe() -> Any:
    # Defined in a function, so that Ray sends the code itself: the machine may have no adaptcomp_ext to find
    # it in.
    def probe(owner: str, token: str, module: str, packages: list[str]) -> tuple[bool, str, dict[str, str]]:
        import importlib
        import json
        import os
        import tempfile

        try:
            with open(owner, encoding="utf-8") as file:
                sees = json.load(file)["token"] == token
            tempfile.TemporaryFile(dir=os.path.dirname(owner)).close()
        except OSError:
            sees = False
        try:
            if module not in ("__main__", "__mp_main__"):
                importlib.import_module(module)
            found = {name: str(importlib.import_module(name).__version__) for name in packages}
        except ImportError as error:
            return sees, str(error), {}
        return sees, "", found

    return probe


def _ticks() -> Any:
    # Sent as code, like the probe: a process that imported torch for this would take ten times the memory.
    class Ticks:
        """The last tick of each cell since they were taken."""

        def __init__(self) -> None:
            self.latest: dict[str, tuple[str, float]] = {}

        def put(self, name: str, what: str, done: float) -> None:
            self.latest[name] = (what, done)

        def take(self) -> dict[str, tuple[str, float]]:
            latest, self.latest = self.latest, {}
            return latest

    return Ticks


def _run(ray: Any, pipe: Connection, job: Job, waiting: list[Cell], workers: int) -> None:
    errors = ray.exceptions
    lost = (
        errors.WorkerCrashedError,
        errors.NodeDiedError,
        errors.OutOfMemoryError,
        errors.ObjectLostError,
    )
    ticks = ray.remote(_ticks()).options(num_cpus=0, max_restarts=-1).remote()
    task = ray.remote(run_there).options(num_cpus=job.threads, max_retries=0)
    running: dict[Any, Cell] = {}
    deaths = dict.fromkeys((cell.name for cell in waiting), 0)
    asked = 0.0
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                cell = waiting.pop(0)
                running[task.remote(job, cell, ticks)] = cell
            for answer in ray.wait(list(running), timeout=PAUSE)[0]:
                cell = running.pop(answer)
                try:
                    kind, *about = ray.get(answer)
                except errors.LocalRayletDiedError:
                    raise
                except lost as error:
                    deaths[cell.name] += 1
                    if deaths[cell.name] < DEATHS:
                        waiting.insert(0, cell)
                        pipe.send(("again", cell.name))
                        continue
                    reason = f"{cell.name}: its worker was lost {DEATHS} times ({type(error).__name__})"
                    kind, about = "failed", list(_packed(ChildProcessError(reason)))
                except errors.RayError as error:
                    kind, about = "failed", list(_packed(error))
                if kind == "failed":
                    waiting.clear()
                    pipe.send((kind, *about))
                else:
                    pipe.send((kind, cell.name, *about))
            if pipe.poll():  # closed
                raise EOFError
            with contextlib.suppress(errors.RayActorError, errors.GetTimeoutError):
                for name, (what, done) in ray.get(ticks.take.remote(), timeout=ALIVE).items():
                    pipe.send(("tick", name, what, done))
            if time.monotonic() - asked > ALIVE:
                _ask(ray)
                asked = time.monotonic()
                pipe.send(("alive",))
    except (BrokenPipeError, EOFError):
        for answer in running:
            ray.cancel(answer, force=True)
        raise


def _ask(ray: Any) -> None:
    """Return if the head of the cluster answers, and knows the machine that connects us as alive.

    Where there is no head any more, Ray waits for one, and our silence tells.
    """
    here = ray.get_runtime_context().get_node_id()
    if not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == here):
        raise ConnectionError("the machine that connects this one to the cluster is dead")
