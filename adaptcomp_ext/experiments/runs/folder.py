"""An output folder: its configuration, without which it is not resumed, its results, and its lock."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from adaptcomp_ext.experiments.files import read_json, write_json

__all__ = ["CONFIG_NAME", "OWNER_NAME", "RunFolder", "owned", "owns", "watched"]

CONFIG_NAME, LOCK_NAME, OWNER_NAME = "config.json", ".lock", ".owner.json"
WATCH = 1.0  # seconds between two looks at the token of an owner


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
        """Make the folder, or open it again.

        Parameters
        ----------
        path : Path or str
            Where.
        experiment : str
            What runs there.
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


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[str]:
    """Own a folder while the block runs.

    The lock is the operating system's: it ends with the process, killed or not, so that no lock is ever
    stale. On a network file system it holds among machines as far as that system has locks.

    Parameters
    ----------
    folder : Path
        Made where it is not there. It gets a file that is locked, and one that names the owner.

    Yields
    ------
    str
        The token of this owner, which `owns` and `watched` look for.

    Raises
    ------
    BlockingIOError
        If another run owns the folder; the message says on which machine and in which process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(
            f"{folder}: expected a folder in which nothing is running, found {_holder(folder)}; "
            "wait until that run ends or choose another output folder"
        ) from None
    token = secrets.token_hex(16)
    try:
        about = {
            "token": token,
            "machine": socket.gethostname(),
            "process": os.getpid(),
            "since": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        write_json(folder / OWNER_NAME, about)
        yield token
    finally:
        with contextlib.suppress(OSError):
            (folder / OWNER_NAME).unlink()
        lock.release()


def owns(folder: Path, token: str) -> bool:
    """Whether the folder is there, and the run with this token owns it."""
    try:
        return bool(read_json(folder / OWNER_NAME)["token"] == token)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def watched(folder: Path, token: str, end: Callable[[], object]) -> Iterator[None]:
    """Call `end`, from a thread, if the run with this token stops owning the folder while the block runs.

    A file system that does not answer for a while changes nothing.
    """
    left = threading.Event()

    def look() -> None:
        while not left.wait(WATCH):
            with contextlib.suppress(OSError):
                if not owns(folder, token):
                    end()
                    return

    threading.Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        left.set()


def _holder(folder: Path) -> str:
    try:
        about = read_json(folder / OWNER_NAME)
        return f"process {about['process']} on {about['machine']} at work since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run at work"
