from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")

from adaptcomp_ext.experiments.data import load_digits, load_mnist, read_idx

MNIST = Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist"
NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx(array: np.ndarray) -> bytes:
    return (
        struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        + array.astype(np.uint8).tobytes()
    )


def write_mnist(folder: Path, rows: tuple[int, int] = (6, 3), side: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for half, n in zip((NAMES[:2], NAMES[2:]), rows, strict=True):
        arrays[half[0]] = rng.integers(0, 256, (n, side, side))
        arrays[half[1]] = rng.integers(0, 10, n)
    for name, array in arrays.items():
        (folder / name).write_bytes(idx(array))
    return arrays


def test_idx_plain_and_gzip(tmp_path: Path) -> None:
    array = np.arange(24).reshape(2, 3, 4)
    (tmp_path / "a").write_bytes(idx(array))
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx(array)))
    for name in ("a", "a.gz"):
        read = read_idx(tmp_path / name, 3)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, array)


def test_idx_empty_dimension(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(idx(np.empty((0, 4, 4))))
    assert read_idx(tmp_path / "a", 3).shape == (0, 4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], "expected 40 bytes for shape \\[2, 3, 4\\], found 39"),
        (lambda content: content + b"\0", "expected 40 bytes for shape \\[2, 3, 4\\], found 41"),
        (lambda content: content[:10], "expected a header of 16 bytes, found 10"),
        (lambda content: b"\0\0\x08\x01" + content[4:], "magic number 0x00000803, found 0x00000801"),
        (lambda content: b"\0\0\x0d\x03" + content[4:], "magic number 0x00000803, found 0x00000d03"),
        (lambda content: b"", "found 0x\\(empty\\)"),
    ],
    ids=["truncated", "too long", "header cut off", "dimensions", "element type", "empty file"],
)
@pytest.mark.parametrize("name", ["broken", "broken.gz"])
def test_idx_rejects(tmp_path: Path, name: str, change, message: str) -> None:
    content = change(idx(np.zeros((2, 3, 4))))
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(ValueError, match=message) as raised:
        read_idx(tmp_path / name, 3)
    assert str(raised.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize("keep", [0, 8, 30])
def test_damaged_gzip(tmp_path: Path, keep: int) -> None:
    whole = gzip.compress(idx(np.random.default_rng(0).integers(0, 256, (2, 3, 4))))
    (tmp_path / "a.gz").write_bytes(whole[:keep] or b"not gzip")
    with pytest.raises(ValueError, match="expected a whole gzip file"):
        read_idx(tmp_path / "a.gz", 3)


def test_mnist_folder(tmp_path: Path) -> None:
    arrays = write_mnist(tmp_path)
    packed = tmp_path / NAMES[2]
    (tmp_path / f"{NAMES[2]}.gz").write_bytes(gzip.compress(packed.read_bytes()))
    packed.unlink()
    data = load_mnist(tmp_path)
    assert data.train_images.shape == (6, 5, 5)
    assert data.test_images.shape == (3, 5, 5)
    assert data.side == 5
    torch.testing.assert_close(data.test_images, torch.from_numpy(arrays[NAMES[2]]).float() / 255)
    assert data.train_labels.tolist() == arrays[NAMES[1]].tolist()


def test_mnist_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_mnist(tmp_path / "nowhere")
    write_mnist(tmp_path)
    (tmp_path / NAMES[0]).unlink()
    (tmp_path / NAMES[3]).unlink()
    with pytest.raises(FileNotFoundError, match=f"missing {NAMES[0]}, {NAMES[3]} "):
        load_mnist(tmp_path)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (NAMES[1], np.zeros(5), "expected 6 labels, one per image, found 5"),
        (NAMES[3], np.full(3, 10), "expected labels 0 to 9, found 10"),
        (NAMES[2], np.zeros((3, 4, 4)), "expected images of 5x5, found shape \\[3, 4, 4\\]"),
        (NAMES[0], np.zeros((6, 4, 5)), "found shape \\[6, 4, 5\\]"),
        (NAMES[0], np.zeros((0, 5, 5)), "found shape \\[0, 5, 5\\]"),
    ],
)
def test_mnist_inconsistent(tmp_path: Path, name: str, array: np.ndarray, message: str) -> None:
    write_mnist(tmp_path)
    (tmp_path / name).write_bytes(idx(array))
    with pytest.raises(ValueError, match=message) as raised:
        load_mnist(tmp_path)
    assert name in str(raised.value)


@pytest.mark.skipif(not MNIST.is_dir(), reason="needs the MNIST files")
def test_mnist_itself() -> None:
    data = load_mnist(MNIST)
    assert data.train_images.shape == (60_000, 28, 28)
    assert data.test_images.shape == (10_000, 28, 28)
    assert data.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert data.train_labels.bincount().tolist() == [
        5923,
        6742,
        5958,
        6131,
        5842,
        5421,
        5918,
        6265,
        5851,
        5949,
    ]
    assert 0 <= float(data.train_images.min()) < float(data.train_images.max()) <= 1


def test_digits() -> None:
    pytest.importorskip("sklearn")
    data = load_digits()
    assert data.train_images.shape == (1297, 8, 8)
    assert data.test_images.shape == (500, 8, 8)
    assert data.train_images.dtype == torch.float32
    assert data.train_labels.dtype == torch.int64
    assert float(data.train_images.max()) == 1.0
    torch.manual_seed(1)  # the split is its own
    torch.testing.assert_close(load_digits().test_images, data.test_images)
    assert load_digits(test_rows=100, seed=1).test_labels.shape == (100,)
    with pytest.raises(ValueError, match="test_rows: expected 1 to 1796, got 0"):
        load_digits(test_rows=0)


LAYOUTS = {
    "7-Zip, Kaggle": lambda name: name.replace("-idx", ".idx"),
    "torchvision's root": lambda name: f"MNIST/raw/{name}",
    "torchvision's MNIST": lambda name: f"raw/{name}",
    "below another folder": lambda name: f"downloads/digits/{name}",
    "a folder each": lambda name: f"{name}/{name}",
    "a folder each, 7-Zip inside": lambda name: f"{name}/{name.replace('-idx', '.idx')}",
    "upper case": str.upper,
    "mixed case": lambda name: f"Mnist/RAW/{name.title()}",
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mnist_as_other_tools_leave_it(tmp_path: Path, layout: str, packed: bool) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    arrays = write_mnist(plain)
    root = tmp_path / "root"
    for name in NAMES:
        path = root / (LAYOUTS[layout](name) + (".gz" if packed else ""))
        path.parent.mkdir(parents=True, exist_ok=True)
        content = (plain / name).read_bytes()
        path.write_bytes(gzip.compress(content) if packed else content)
    data = load_mnist(root)
    assert data.train_labels.tolist() == arrays[NAMES[1]].tolist()
    torch.testing.assert_close(data.test_images, torch.from_numpy(arrays[NAMES[2]]).float() / 255)


def test_the_message_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing train-images-idx3-ubyte, .*; the folder is empty"):
        load_mnist(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "mnist.npz").write_text("")
    with pytest.raises(
        FileNotFoundError, match=r"missing train-images-idx3-ubyte, .*; found there: mnist.npz, notes/$"
    ):
        load_mnist(tmp_path)
    for i in range(20):
        (tmp_path / f"{i:02}").write_text("")
    with pytest.raises(FileNotFoundError, match=r"found there: 00, 01, .* and 14 more$"):
        load_mnist(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a folder with the four MNIST files, found a file"):
        load_mnist(tmp_path / "mnist.npz")


def test_one_data_set_does_not_fill_the_gaps_of_another(tmp_path: Path) -> None:
    for name in ("MNIST", "FashionMNIST"):
        (tmp_path / name / "raw").mkdir(parents=True)
        write_mnist(tmp_path / name / "raw", rows=(6, 3) if name == "MNIST" else (8, 4))
    assert len(load_mnist(tmp_path).train_labels) == 6  # torchvision's root: MNIST, whatever lies beside it
    assert len(load_mnist(tmp_path / "FashionMNIST").train_labels) == 8
    (tmp_path / "MNIST" / "raw" / NAMES[2]).unlink()
    with pytest.raises(FileNotFoundError, match=f"missing {NAMES[2]} "):
        load_mnist(tmp_path)
    (tmp_path / "MNIST").rename(tmp_path / "KMNIST")
    write_mnist(tmp_path / "KMNIST" / "raw")
    with pytest.raises(
        ValueError, match="expected one data set, found several: FashionMNIST/raw, KMNIST/raw"
    ):
        load_mnist(tmp_path)
