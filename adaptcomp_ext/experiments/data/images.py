"""Grey digits: scikit-learn's, which need no download, and MNIST's four files, wherever tools leave them."""

from __future__ import annotations

import gzip
import hashlib
import math
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["ImageData", "fetch_mnist", "find_images", "load_digits", "load_mnist", "read_idx"]

MNIST_FILES = {
    "train_images": ("train-images-idx3-ubyte", 3),
    "train_labels": ("train-labels-idx1-ubyte", 1),
    "test_images": ("t10k-images-idx3-ubyte", 3),
    "test_labels": ("t10k-labels-idx1-ubyte", 1),
}
"""Name and number of dimensions of each part."""
_MD5 = {
    "train_images": "6bbc9ace898e44ae57da46a324031adb",
    "train_labels": "a25bea736e30d166cdddb491f175f624",
    "test_images": "2646ac647ad5339dbf082846283269ea",
    "test_labels": "27ae3e4e09519cfbb04c329615203637",
}
"""Of the published files, unpacked: gzip containers of the same content differ."""
STANDARD = ("", "MNIST/raw", "MNIST", "raw")
"""Below the folder that was given: itself, torchvision's, and those in which other tools make a copy."""
SHOWN = 8  # names in a message
_UNSIGNED_BYTE = 0x08


@dataclass(frozen=True, repr=False)
class ImageData:
    """Grey images and their classes, already split.

    Attributes
    ----------
    name : str
        What the data set is called.
    train_images, test_images : Tensor
        float32 [N, H, W] in 0..1, square.
    train_labels, test_labels : Tensor
        int64 [N].
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def __repr__(self) -> str:
        train, test = len(self.train_labels), len(self.test_labels)
        images = f"{train:,} training and {test:,} test images of {self.side}×{self.side}"
        return f"ImageData({self.name!r}, {images})"

    @property
    def side(self) -> int:
        """Height and width of an image."""
        return self.train_images.shape[-1]


def load_digits(test_rows: int = 500, seed: int = 0) -> ImageData:
    """Return scikit-learn's 1,797 scanned digits, 8x8.

    Parameters
    ----------
    test_rows : int
        How many images are held out.
    seed : int
        Of the split. Seeds of a model are another matter: the split stays.
    """
    from sklearn.datasets import load_digits as bundled

    digits = bundled()
    if not 0 < test_rows < len(digits.target):
        raise ValueError(f"test_rows: expected 1 to {len(digits.target) - 1}, got {test_rows}")
    images = torch.from_numpy(digits.images).float() / 16
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed), device="cpu")
    test, train = order[:test_rows], order[test_rows:]
    return ImageData(
        "scikit-learn digits (embedded, not MNIST)", images[train], labels[train], images[test], labels[test]
    )


def find_images(data: Path | str | None, download: bool = False) -> ImageData:
    """Return an experiment's data: MNIST from a folder, or scikit-learn's digits, whose name says so."""
    if data is None:
        if download:
            raise ValueError("download: expected a data folder to download into (--data DIR), got none")
        return load_digits()
    return load_mnist(data, download=download)


def load_mnist(folder: Path | str, download: bool = False) -> ImageData:
    """Read the four IDX files of MNIST, gzip-compressed or not.

    Parameters
    ----------
    folder : Path or str
        Where ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and their ``t10k`` counterparts are,
        each with or without ``.gz``; also as other tools leave them: ``train-images.idx3-ubyte``, a folder
        for each file, upper case, torchvision's root with ``MNIST/raw`` below it. Data sets in the same files
        and format (Fashion-MNIST) work as well, and are not called MNIST.
    download : bool
        Whether missing files are fetched into the folder first, through torchvision.

    Raises
    ------
    FileNotFoundError
        If the folder does not exist or files are missing; the message lists them, and what is there.
    ValueError
        If a file is not what its name says, if there are several data sets below the folder, or if the
        checksum of one file is not MNIST's although that of another is.
    OSError
        If the download fails.
    """
    folder = Path(folder)
    if download:
        fetch_mnist(folder)
    if not folder.is_dir():
        found_instead = "a file" if folder.exists() else "no such folder"
        raise FileNotFoundError(
            f"{folder}: expected a folder with the four MNIST files, found {found_instead}"
        )
    paths = _find_parts(folder)
    missing = [MNIST_FILES[part][0] for part, path in paths.items() if path is None]
    if missing:
        raise FileNotFoundError(
            f"{folder}: missing {', '.join(missing)} (each may also end in .gz, or lie in MNIST/raw); "
            f"{_what_is_there(folder)}"
        )
    contents = {part: (path, _read_whole(path)) for part, path in paths.items() if path is not None}
    found = {
        part: (path, _parse_idx(path, content, MNIST_FILES[part][1]))
        for part, (path, content) in contents.items()
    }
    name = "MNIST" if _is_mnist(contents) else f"IDX images in {folder.name} (not MNIST)"

    side = found["train_images"][1].shape[-1]
    tensors = {}
    for half in ("train", "test"):
        image_path, images = found[f"{half}_images"]
        label_path, labels = found[f"{half}_labels"]
        if images.shape[1:] != (side, side) or not len(images):
            raise ValueError(
                f"{image_path}: expected images of {side}x{side}, found shape {list(images.shape)}"
            )
        if len(labels) != len(images):
            raise ValueError(
                f"{label_path}: expected {len(images)} labels, one per image, found {len(labels)}"
            )
        if labels.max() > 9:
            raise ValueError(f"{label_path}: expected labels 0 to 9, found {labels.max()}")
        tensors[f"{half}_images"] = torch.from_numpy(images).float() / 255
        tensors[f"{half}_labels"] = torch.from_numpy(labels).long()
    return ImageData(name, **tensors)


def _is_mnist(contents: dict[str, tuple[Path, bytes]]) -> bool:
    sums = {
        part: hashlib.md5(content, usedforsecurity=False).hexdigest()
        for part, (_, content) in contents.items()
    }
    wrong = [part for part in sums if sums[part] != _MD5[part]]
    if wrong and len(wrong) < len(sums):
        path = contents[wrong[0]][0]
        raise ValueError(
            f"{path}: expected MNIST's file, as others beside it are (md5 {_MD5[wrong[0]]} unpacked), "
            f"found md5 {sums[wrong[0]]}"
        )
    return not wrong


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
    if folder.is_dir() and all(_find_parts(folder).values()):
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


def _find_parts(folder: Path) -> dict[str, Path | None]:
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


def _what_is_there(folder: Path) -> str:
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
    return _parse_idx(path, _read_whole(path), dimensions)


def _read_whole(path: Path | str) -> bytes:
    """Read the content of a file; of one whose name ends in ``.gz``, what is compressed in it."""
    path = Path(path)
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: expected a whole gzip file, found a damaged one ({error})") from None
    return content


def _parse_idx(path: Path | str, content: bytes, dimensions: int) -> np.ndarray:
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
