"""Grey digits: scikit-learn's, which need no download, and MNIST from a folder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .mnist import MNIST_FILES, fetch_mnist, find_parts, parse_idx, read_whole, what_is_there

__all__ = ["ImageData", "find_images", "load_digits", "load_mnist"]

_MD5 = {
    "train_images": "6bbc9ace898e44ae57da46a324031adb",
    "train_labels": "a25bea736e30d166cdddb491f175f624",
    "test_images": "2646ac647ad5339dbf082846283269ea",
    "test_labels": "27ae3e4e09519cfbb04c329615203637",
}
"""Of the published files, unpacked: gzip containers of the same content differ."""


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
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
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
    paths = find_parts(folder)
    missing = [MNIST_FILES[part][0] for part, path in paths.items() if path is None]
    if missing:
        raise FileNotFoundError(
            f"{folder}: missing {', '.join(missing)} (each may also end in .gz, or lie in MNIST/raw); "
            f"{what_is_there(folder)}"
        )
    contents = {part: (path, read_whole(path)) for part, path in paths.items() if path is not None}
    found = {
        part: (path, parse_idx(path, content, MNIST_FILES[part][1]))
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
