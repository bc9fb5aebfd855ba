"""The lock of a folder, which one run at a time holds until its process ends, and a token to check it."""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ..files import read_json, write_json

__all__ = ["OWNER_NAME", "owned", "owns", "watched"]

LOCK_NAME, OWNER_NAME = ".lock", ".owner.json"
WATCH = 1.0  # seconds between two looks at the token


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
