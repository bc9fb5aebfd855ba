"""MNIST's four IDX files: where tools leave them, how they are read, and how they are downloaded."""

from __future__ import annotations

import gzip
import math
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

__all__ = ["MNIST_FILES", "fetch_mnist", "find_parts", "parse_idx", "read_idx", "read_whole", "what_is_there"]

MNIST_FILES = {
    "train_images": ("train-images-idx3-ubyte", 3),
    "train_labels": ("train-labels-idx1-ubyte", 1),
    "test_images": ("t10k-images-idx3-ubyte", 3),
    "test_labels": ("t10k-labels-idx1-ubyte", 1),
}
"""Name and number of dimensions of each part."""


def fetch_mnist(folder: Path | str) -> None:
    """Put MNIST's four IDX files into a folder, unless they are there in a form that can be read.

    Parameters
    ----------
    folder : Path or str
        Made if it does not exist.

    Raises
    ------
    ModuleNotFoundError
        Without torchvision; the message has the install line.
    OSError
        If it cannot be downloaded.
    """
    folder = Path(folder)
    names = [name for name, _ in MNIST_FILES.values()]
    if folder.is_dir() and all(find_parts(folder).values()):
        return
    try:
        from torchvision.datasets import MNIST
    except ImportError:
        raise ModuleNotFoundError(
            'downloading MNIST needs torchvision: pip install "adaptcomp_ext[mnist]", '
            "or put its four IDX files into "
            f"{folder} yourself"
        ) from None
    with tempfile.TemporaryDirectory() as temporary:
        try:
            MNIST(temporary, download=True)
        except Exception as error:  # torchvision raises RuntimeError, URLError and others
            raise OSError(f"{folder}: MNIST could not be downloaded ({error})") from error
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            found = next(Path(temporary).rglob(name), None)
            if found is None:
                raise OSError(f"{folder}: the download of MNIST lacks {name}")
            shutil.move(found, folder / name)


SHOWN = 8  # names in a message
STANDARD = ("", "MNIST/raw", "MNIST", "raw")
"""Below the folder that was given: itself, torchvision's, and those in which other tools make a copy."""


def find_parts(folder: Path) -> dict[str, Path | None]:
    """Find the four files in a folder or in the folders below it in which tools put them.

    Names are those of `MNIST_FILES` in upper or lower case, with ``.idx`` for ``-idx`` or not, with ``.gz``
    or not; each file may lie in a folder of its own name. All come from one place: no other data set fills
    the gaps of this one.

    Parameters
    ----------
    folder : Path
        It exists.

    Returns
    -------
    dict
        The file of each part, None where it is missing. Of a place that lacks some, what the fullest one has.

    Raises
    ------
    ValueError
        If there are several data sets below the folder, and none in a place that says which is MNIST.
    """
    standard = [_parts(place) for name in STANDARD if (place := _below(folder, name)) is not None]
    fullest = max(standard, key=lambda found: sum(path is not None for path in found.values()))
    if any(fullest.values()):
        return fullest
    others = {place: found for place in _folders(folder, 2) if any((found := _parts(place)).values())}
    whole = [place for place, found in others.items() if all(found.values())]
    if len(whole) > 1:
        names = ", ".join(str(place.relative_to(folder)) for place in whole[:SHOWN])
        raise ValueError(
            f"{folder}: expected one data set, found several: {names}; name one of these folders"
        )
    return others[whole[0]] if whole else fullest


def what_is_there(folder: Path) -> str:
    """What a folder holds, as part of a sentence."""
    names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir())
    if not names:
        return "the folder is empty"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"found there: {', '.join(names[:SHOWN])}{more}"


def _parts(place: Path) -> dict[str, Path | None]:
    entries = {_plain(entry.name): entry for entry in _entries(place) if entry.is_dir()}
    files = _files(place)
    found: dict[str, Path | None] = {}
    for part, (name, _) in MNIST_FILES.items():
        own = entries.get(name)
        found[part] = files.get(name) or (None if own is None else _files(own).get(name))
    return found


def _files(place: Path) -> dict[str, Path]:
    """The files of a folder by their plain names; the one that is not compressed where there are two."""
    files = sorted(
        (entry for entry in _entries(place) if entry.is_file()),
        key=lambda entry: entry.suffix.lower() != ".gz",
    )
    return {_plain(entry.name): entry for entry in files}


def _plain(name: str) -> str:
    """A file's name as MNIST's authors would have written it."""
    return name.lower().removesuffix(".gz").replace(".idx", "-idx")


def _below(folder: Path, name: str) -> Path | None:
    """The folder of this name, in upper or lower case."""
    for step in filter(None, name.split("/")):
        same = [entry for entry in _entries(folder) if entry.is_dir() and entry.name.lower() == step.lower()]
        if not same:
            return None
        folder = same[0]
    return folder


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, by name; nothing where that may not be read."""
    try:
        return sorted(folder.iterdir())
    except PermissionError:
        return []


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    for entry in _entries(folder):
        if entry.is_dir() and not entry.name.startswith("."):
            yield entry
            if depth > 1:
                yield from _folders(entry, depth - 1)


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
