"""Files of results: there whole or not at all, whatever ends the writing (a full disk, Ctrl-C, a kill)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["read_json", "whole", "write_bytes", "write_json", "write_tensors", "write_text"]


@contextmanager
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
