"""The IDX format of MNIST's files."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

__all__ = ["parse_idx", "read_idx", "read_whole"]

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path | str, dimensions: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes.

    The file starts with a four-byte magic number (0, 0, type of the elements, number of dimensions) and each
    dimension as a big-endian 32-bit integer; the elements follow.

    Parameters
    ----------
    path : Path or str
        The file; a name that ends in ``.gz`` is decompressed.
    dimensions : int
        How many dimensions it has to have.

    Returns
    -------
    numpy.ndarray
        uint8, writable.
    """
    return parse_idx(path, read_whole(path), dimensions)


def read_whole(path: Path | str) -> bytes:
    """Read the content of a file; of one whose name ends in ``.gz``, what is compressed in it."""
    path = Path(path)
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: expected a whole gzip file, found a damaged one ({error})") from None
    return content


def parse_idx(path: Path | str, content: bytes, dimensions: int) -> np.ndarray:
    """`read_idx` of a content that was read; `path` is what errors name."""
    header = 4 + 4 * dimensions
    magic = bytes((0, 0, _UNSIGNED_BYTE, dimensions))
    if content[:4] != magic:
        raise ValueError(
            f"{path}: expected the magic number 0x{magic.hex()}, found 0x{content[:4].hex() or '(empty)'}"
        )
    if len(content) < header:
        raise ValueError(f"{path}: expected a header of {header} bytes, found {len(content)} bytes in all")
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4))
    elements = math.prod(shape)
    if len(content) != header + elements:
        raise ValueError(
            f"{path}: expected {header + elements} bytes for shape {list(shape)}, found {len(content)}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()
