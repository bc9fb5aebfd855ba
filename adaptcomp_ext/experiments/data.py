"""Data sets of the experiments: scikit-learn's digits, which need no download, and MNIST from a folder."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["ImageData", "load_digits", "load_mnist", "read_idx"]

_UNSIGNED_BYTE = 0x08
_MNIST = {
    "train_images": ("train-images-idx3-ubyte", 3),
    "train_labels": ("train-labels-idx1-ubyte", 1),
    "test_images": ("t10k-images-idx3-ubyte", 3),
    "test_labels": ("t10k-labels-idx1-ubyte", 1),
}


@dataclass(frozen=True)
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
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order[:test_rows], order[test_rows:]
    return ImageData("scikit-learn digits", images[train], labels[train], images[test], labels[test])


def load_mnist(folder: Path | str) -> ImageData:
    """Read the four IDX files of MNIST, gzip-compressed or not.

    Parameters
    ----------
    folder : Path or str
        Where ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and their ``t10k`` counterparts are, each with or
        without ``.gz``. Data sets in the same files and format (Fashion-MNIST) work as well.

    Raises
    ------
    FileNotFoundError
        If the folder does not exist or files are missing; the message lists them.
    ValueError
        If a file is not what its name says.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a folder with the four MNIST files, found no such folder")
    paths = {part: _find(folder, name) for part, (name, _) in _MNIST.items()}
    missing = [_MNIST[part][0] for part, path in paths.items() if path is None]
    if missing:
        raise FileNotFoundError(f"{folder}: missing {', '.join(missing)} (each may also end in .gz)")
    found = {part: (path, read_idx(path, _MNIST[part][1])) for part, path in paths.items() if path is not None}

    side = found["train_images"][1].shape[-1]
    tensors = {}
    for half in ("train", "test"):
        image_path, images = found[f"{half}_images"]
        label_path, labels = found[f"{half}_labels"]
        if images.shape[1:] != (side, side) or not len(images):
            raise ValueError(f"{image_path}: expected images of {side}x{side}, found shape {list(images.shape)}")
        if len(labels) != len(images):
            raise ValueError(f"{label_path}: expected {len(images)} labels, one per image, found {len(labels)}")
        if labels.max() > 9:
            raise ValueError(f"{label_path}: expected labels 0 to 9, found {labels.max()}")
        tensors[f"{half}_images"] = torch.from_numpy(images).float() / 255
        tensors[f"{half}_labels"] = torch.from_numpy(labels).long()
    return ImageData("MNIST", **tensors)


def read_idx(path: Path | str, dimensions: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes.

    The file starts with a four-byte magic number (0, 0, type of the elements, number of dimensions) and each dimension
    as a big-endian 32-bit integer; the elements follow.

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
    path = Path(path)
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: expected a whole gzip file, found a damaged one ({error})") from None
    header = 4 + 4 * dimensions
    magic = bytes((0, 0, _UNSIGNED_BYTE, dimensions))
    if content[:4] != magic:
        raise ValueError(f"{path}: expected the magic number 0x{magic.hex()}, found 0x{content[:4].hex() or '(empty)'}")
    if len(content) < header:
        raise ValueError(f"{path}: expected a header of {header} bytes, found {len(content)} bytes in all")
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4))
    elements = math.prod(shape)
    if len(content) != header + elements:
        raise ValueError(f"{path}: expected {header + elements} bytes for shape {list(shape)}, found {len(content)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def _find(folder: Path, name: str) -> Path | None:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    return None
