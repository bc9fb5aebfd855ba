"""MNIST's files, and fetching them where there is a network, through torchvision."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

__all__ = ["MNIST_FILES", "fetch_mnist"]

MNIST_FILES = {
    "train_images": ("train-images-idx3-ubyte", 3),
    "train_labels": ("train-labels-idx1-ubyte", 1),
    "test_images": ("t10k-images-idx3-ubyte", 3),
    "test_labels": ("t10k-labels-idx1-ubyte", 1),
}
"""Name and number of dimensions of each part."""


def fetch_mnist(folder: Path | str) -> None:
    """Put MNIST's four IDX files into a folder, unless they are there already, in any of the ways in which they are read.

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
    from .folder import find_parts

    names = [name for name, _ in MNIST_FILES.values()]
    if folder.is_dir() and all(find_parts(folder).values()):
        return
    try:
        from torchvision.datasets import MNIST
    except ImportError:
        raise ModuleNotFoundError(
            'downloading MNIST needs torchvision: pip install "adaptcomp_ext[mnist]", or put its four IDX files into '
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
