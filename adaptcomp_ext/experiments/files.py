"""Files of results: there whole or not at all, whatever ends the writing, in a folder that one run owns.

A full disk, Ctrl-C or a kill leaves no file in parts, and two runs never write side by side.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "OWNER_NAME",
    "owned",
    "owns",
    "read_json",
    "watched",
    "whole",
    "write_bytes",
    "write_json",
    "write_tensors",
    "write_text",
]

LOCK_NAME, OWNER_NAME = ".lock", ".owner.json"
WATCH = 1.0  # seconds between two looks at the token


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which takes the place of `path` when the block ends.

    Where the block raises, what it wrote is removed and `path` is left as it was. An OSError without a file
    name gets that of `path`, so that the user reads which file did not fit.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.filename is None or str(error.filename) == str(temporary):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole; it is on the disk when this returns."""
    with whole(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """Write a complete safetensors file; tensors are copied, because the format refuses shared memory."""
    from safetensors.torch import save

    copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(copies, None if about is None else dict(about)))


def read_json(path: Path) -> Any:
    """What `write_json` wrote."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, found something else ({error})") from None


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
