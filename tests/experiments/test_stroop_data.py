from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch

for extra in ("safetensors", "scipy", "sklearn"):
    pytest.importorskip(extra)
from scipy import stats
from torch.utils.data import DataLoader

from adaptcomp_ext.experiments.data import (
    COLOURS,
    GREY,
    NEUTRAL_INK,
    Condition,
    StroopMNIST,
    colour,
    draw_inks,
    fetch_mnist,
    find_images,
    images,
    load_mnist,
)
from tests.experiments.test_data import NAMES, write_mnist


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "mnist"
    folder.mkdir()
    write_mnist(folder, rows=(600, 300), side=6)
    return folder


def test_the_palette_is_the_thesis() -> None:
    assert list(COLOURS) == [
        "red",
        "green",
        "yellow",
        "blue",
        "orange",
        "purple",
        "cyan",
        "pink",
        "greenyellow",
        "magenta",
    ]
    assert (
        COLOURS["purple"] == (160, 32, 240)
        and COLOURS["greenyellow"] == (173, 255, 47)
        and GREY == (128, 128, 128)
    )


def test_colour_is_the_definition() -> None:
    grey = torch.tensor([[[0, 74], [75, 255]]], dtype=torch.uint8).expand(11, 2, 2)
    inks = torch.arange(11)
    coloured = colour(grey, inks)
    assert coloured.dtype == torch.uint8 and coloured.shape == (11, 3, 2, 2)
    for ink, rgb in enumerate((*COLOURS.values(), GREY)):
        assert coloured[ink, :, 0].eq(0).all()  # below 75: black
        assert coloured[ink, :, 1, 0].tolist() == list(rgb) == coloured[ink, :, 1, 1].tolist()


@pytest.mark.parametrize("split", ["train", "held-out", "test"])
def test_images_follow_from_digits_and_inks(root: Path, split: str) -> None:
    data = StroopMNIST(root, split, proportion_congruent=0.5, neutral=0.2, seed=3)
    source = load_mnist(root)
    assert len(data) == {"train": 500, "held-out": 100, "test": 300}[split]
    again = colour(data._grey, data.inks)
    assert torch.equal(data.images, again)
    if split == "test":
        assert torch.equal(data._grey, (source.test_images * 255).round().byte())
        assert torch.equal(data.digits, source.test_labels)
    same = data.conditions == Condition.CONGRUENT
    assert torch.equal(data.inks[same], data.digits[same])
    other = data.conditions == Condition.INCONGRUENT
    assert bool((data.inks[other] != data.digits[other]).all()) and bool(
        (data.inks[other] < NEUTRAL_INK).all()
    )
    assert bool((data.inks[data.conditions == Condition.NEUTRAL] == NEUTRAL_INK).all())


def test_splits_are_fixed_and_disjoint(root: Path) -> None:
    parts = [StroopMNIST(root, split, seed=seed)._grey for split in ("train", "held-out") for seed in (0, 5)]
    assert torch.equal(parts[0], parts[1]) and torch.equal(parts[2], parts[3])
    rows = {tuple(image.flatten().tolist()) for part in (parts[0], parts[2]) for image in part}
    source = (load_mnist(root).train_images * 255).round().byte()
    assert rows == {tuple(image.flatten().tolist()) for image in source}


@pytest.mark.parametrize("proportion", [0.0, 0.2, 0.8, 0.995, 1.0])
def test_proportions_lie_within_their_interval(proportion: float) -> None:
    digits = torch.arange(20_000) % 10
    inks, conditions = draw_inks(digits, proportion, 0.25, torch.Generator().manual_seed(1))
    neutral = int((conditions == Condition.NEUTRAL).sum())
    congruent = int((conditions == Condition.CONGRUENT).sum())
    assert stats.binomtest(neutral, 20_000, 0.25).pvalue > 1e-4
    if proportion in (0.0, 1.0):
        assert congruent == proportion * (20_000 - neutral)
    else:
        assert stats.binomtest(congruent, 20_000 - neutral, proportion).pvalue > 1e-4
    if proportion < 0.9:  # the nine others uniformly
        other = conditions == Condition.INCONGRUENT
        shift = ((inks - digits) % 10)[other].bincount(minlength=10)
        assert shift[0] == 0
        assert stats.chisquare(shift[1:].numpy()).pvalue > 1e-4


def test_defaults_are_the_published_set() -> None:
    train, test = StroopMNIST(None, "train"), StroopMNIST(None, "test")
    assert train.proportion_congruent == 0.8 and bool((test.conditions == Condition.INCONGRUENT).all())
    assert "not MNIST" in train.name and "scikit-learn" in repr(train)
    assert [len(StroopMNIST(None, s)) for s in ("train", "held-out", "test")] == [1081, 216, 500]


def test_seeds_and_recolouring(root: Path) -> None:
    a, b, c = (StroopMNIST(root, "train", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.inks, b.inks) and not torch.equal(a.inks, c.inks)
    for condition in Condition:
        coloured, inks = a.recoloured(condition)
        assert torch.equal(coloured, colour(a._grey, inks))
        if condition == Condition.CONGRUENT:
            assert torch.equal(inks, a.digits)
        elif condition == Condition.NEUTRAL:
            assert bool((inks == NEUTRAL_INK).all())
        else:
            assert bool((inks != a.digits).all())
            assert not torch.equal(a.recoloured(condition, seed=1)[1], inks)


def test_is_a_torchvision_data_set(root: Path) -> None:
    data = StroopMNIST(root, "test", transform=lambda x: x.float() / 255, target_transform=lambda t: t[0])
    image, digit = data[4]
    assert image.dtype == torch.float32 and image.shape == (3, 6, 6) and digit == int(data.digits[4])
    plain = StroopMNIST(root, "test")
    assert plain[4][1] == (int(plain.digits[4]), int(plain.inks[4]))
    pixels, (digits, inks) = next(iter(DataLoader(plain, batch_size=7)))
    assert (
        pixels.shape == (7, 3, 6, 6)
        and torch.equal(digits, plain.digits[:7])
        and torch.equal(inks, plain.inks[:7])
    )


def test_cache(root: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    fresh = StroopMNIST(root, "train", seed=1)
    first, second = (StroopMNIST(root, "train", seed=1, cache=cache) for _ in range(2))
    assert torch.equal(first.images, fresh.images) and torch.equal(second.images, fresh.images)
    (file,) = cache.iterdir()
    assert file.suffix == ".safetensors"
    stamp = file.stat().st_mtime_ns
    StroopMNIST(root, "train", seed=1, cache=cache)
    assert file.stat().st_mtime_ns == stamp  # read, not built
    StroopMNIST(root, "train", seed=2, cache=cache)
    assert len(list(cache.iterdir())) == 2
    # Other source images under the same name: what the file says of itself decides.
    other = tmp_path / "other"
    other.mkdir()
    write_mnist(other, rows=(600, 300), side=7)
    assert StroopMNIST(other, "train", seed=1, cache=cache).images.shape[-1] == 7
    file.write_bytes(file.read_bytes()[:100])
    with pytest.warns(UserWarning, match="a damaged cache is built anew"):
        mended = StroopMNIST(root, "train", seed=1, cache=cache)
    assert torch.equal(mended.images, fresh.images)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: StroopMNIST(None, "valid"), ValueError, "split: expected one of"),
        (
            lambda: StroopMNIST(None, proportion_congruent=1.2),
            ValueError,
            "proportion_congruent: expected a number",
        ),
        (lambda: StroopMNIST(None, neutral="some"), TypeError, "neutral: expected a number"),
        (lambda: StroopMNIST(None, seed=-1), ValueError, "seed: expected an int >= 0"),
        (lambda: StroopMNIST(None, download=True), ValueError, "download: expected a data folder"),
        (lambda: StroopMNIST("/nowhere/at/all"), FileNotFoundError, "/nowhere/at/all: expected a folder"),
        (lambda: colour(torch.zeros(2, 3, 3), torch.zeros(2).long()), TypeError, "images: expected uint8"),
        (
            lambda: colour(torch.zeros(2, 3, 3).byte(), torch.zeros(3).long()),
            TypeError,
            "inks: expected int64",
        ),
        (
            lambda: colour(torch.zeros(1, 3, 3).byte(), torch.tensor([11])),
            ValueError,
            "inks: expected 0 to 10, got 11",
        ),
        (lambda: StroopMNIST(None).recoloured(7), ValueError, "7 is not a valid Condition"),
    ],
)
def test_bad_input(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# --- MNIST's own files --------------------------------------------------------------------------------------
def test_a_wrong_checksum_is_refused_by_name(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    parts = dict(zip(("train_images", "train_labels", "test_images", "test_labels"), NAMES, strict=True))
    sums = {part: hashlib.md5((root / name).read_bytes()).hexdigest() for part, name in parts.items()}
    assert "not MNIST" in load_mnist(root).name
    monkeypatch.setattr(images, "_MD5", sums)
    assert load_mnist(root).name == "MNIST"
    content = bytearray((root / NAMES[2]).read_bytes())
    content[-1] ^= 1
    (root / NAMES[2]).write_bytes(bytes(content))
    with pytest.raises(ValueError, match=rf"{NAMES[2]}: expected MNIST's file") as raised:
        load_mnist(root)
    assert sums["test_images"] in str(raised.value) and hashlib.md5(bytes(content)).hexdigest() in str(
        raised.value
    )


def test_what_is_there_is_not_fetched(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)  # an import would fail
    fetch_mnist(root)
    assert find_images(root, download=True).side == 6


def test_fetching_needs_torchvision_and_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "adaptcomp_ext\[mnist\]"'):
        fetch_mnist(tmp_path / "new")

    def no_network(root: str, download: bool) -> None:
        raise RuntimeError("no route to host")

    monkeypatch.setitem(sys.modules, "torchvision.datasets", types.SimpleNamespace(MNIST=no_network))
    with pytest.raises(OSError, match=r"new: MNIST could not be downloaded \(no route to host\)"):
        fetch_mnist(tmp_path / "new")
    assert not (tmp_path / "new").exists()

    def downloads(root: str, download: bool) -> None:
        raw = Path(root) / "MNIST" / "raw"
        raw.mkdir(parents=True)
        write_mnist(raw)

    monkeypatch.setitem(sys.modules, "torchvision.datasets", types.SimpleNamespace(MNIST=downloads))
    assert find_images(tmp_path / "new", download=True).side == 5
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(NAMES)
