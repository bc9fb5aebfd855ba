"""Stroop MNIST: digits in coloured ink, each colour belonging to a digit."""

from __future__ import annotations

import enum
import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from adaptcomp_ext.ops._checks import check_choice, check_fraction, check_int, describe

from .images import find_images

__all__ = ["COLOURS", "GREY", "NEUTRAL_INK", "Condition", "StroopMNIST", "colour", "draw_inks"]

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "yellow": (255, 255, 0),
    "blue": (0, 0, 255),
    "orange": (255, 165, 0),
    "purple": (160, 32, 240),
    "cyan": (0, 255, 255),
    "pink": (255, 192, 203),
    "greenyellow": (173, 255, 47),
    "magenta": (255, 0, 255),
}
"""RGB of the ten inks; the ink of digit d is the d-th."""
GREY = (128, 128, 128)
"""RGB of the neutral ink, which belongs to no digit."""
NEUTRAL_INK = len(COLOURS)
"""The label of the neutral ink."""
THRESHOLD = 75
"""Pixels of at least this, of 255, take the ink; the rest is black."""
SPLITS = ("train", "held-out", "test")
HELD_OUT = 1 / 6
_FORMAT = 1
_SPLIT_SEED = 20231


class Condition(enum.IntEnum):
    """How ink and digit relate."""

    CONGRUENT = 0
    NEUTRAL = 1
    INCONGRUENT = 2


def colour(images: Tensor, inks: Tensor, threshold: int = THRESHOLD) -> Tensor:
    """Colour grey images.

    Parameters
    ----------
    images : Tensor
        uint8 [N, H, W].
    inks : Tensor
        int64 [N], 0 to 10; 10 is neutral.
    threshold : int
        Pixels of at least this take the ink; the others become black.

    Returns
    -------
    Tensor
        uint8 [N, 3, H, W].
    """
    if images.dtype != torch.uint8 or images.dim() != 3:
        raise TypeError(f"images: expected uint8 of shape [N, H, W], got {describe(images)}")
    if inks.dtype != torch.int64 or inks.shape != images.shape[:1]:
        raise TypeError(f"inks: expected int64 of shape [{len(images)}], got {describe(inks)}")
    if len(inks) and not 0 <= int(inks.min()) <= int(inks.max()) <= NEUTRAL_INK:
        raise ValueError(f"inks: expected 0 to {NEUTRAL_INK}, got {int(inks.min())} to {int(inks.max())}")
    palette = torch.tensor([*COLOURS.values(), GREY], dtype=torch.uint8, device=inks.device)
    return (images >= threshold).to(torch.uint8)[:, None] * palette[inks][:, :, None, None]


def draw_inks(
    digits: Tensor,
    proportion_congruent: float,
    neutral: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw an ink for each digit.

    Parameters
    ----------
    digits : Tensor
        int64 [N], 0 to 9.
    proportion_congruent : float
        In [0, 1]: the probability that an item that is not neutral has its digit's ink; else one of the nine
        others, uniformly.
    neutral : float
        In [0, 1]: the probability that an item is neutral.
    generator : torch.Generator, optional
        Of the draws, on the device of `digits`.

    Returns
    -------
    inks : Tensor
        int64 [N], 0 to 10.
    conditions : Tensor
        int64 [N], of `Condition`.
    """
    congruent = check_fraction("proportion_congruent", proportion_congruent, zero=True)
    share = check_fraction("neutral", neutral, zero=True)
    count, device = len(digits), digits.device
    which, kind = torch.rand(2, count, generator=generator, dtype=torch.float64, device=device)
    other = torch.randint(1, NEUTRAL_INK, (count,), generator=generator, device=device)
    other = (digits + other) % NEUTRAL_INK
    conditions = torch.where(which < congruent, Condition.CONGRUENT, Condition.INCONGRUENT)
    conditions = torch.where(kind < share, Condition.NEUTRAL, conditions)
    return _inks(digits, conditions, other), conditions


def _inks(digits: Tensor, conditions: Tensor, other: Tensor) -> Tensor:
    inks = torch.where(conditions == Condition.CONGRUENT, digits, other)
    return torch.where(conditions == Condition.NEUTRAL, NEUTRAL_INK, inks)


class StroopMNIST(Dataset[Any]):
    """MNIST in coloured ink, like torchvision's data sets. The task is the digit; the ink distracts.

    Parameters
    ----------
    root : Path or str, optional
        Folder with MNIST's four IDX files. None: scikit-learn's 8×8 digits, an embedded stand-in; `name` says
        so.
    split : str
        "train": 50,000 of MNIST's 60,000 training images, the same ones always; "held-out": the other 10,000;
        "test": its 10,000 test images. (Of scikit-learn's digits 1,081, 216 and 500.)
    proportion_congruent : float, optional
        In [0, 1]: the probability that an item is congruent. Default: 0.8; for the test split 0, all
        incongruent.
    neutral : float
        In [0, 1]: the probability that an item is neutral: grey, an ink that belongs to no digit. The rest is
        divided by `proportion_congruent`.
    seed : int
        Of the inks. The split does not depend on it.
    download : bool
        Whether missing files are fetched into `root`, through torchvision.
    transform, target_transform : callable, optional
        On the image, uint8 [3, H, W], and on the target, the pair (digit, ink).
    cache : Path or str, optional
        Folder in which the coloured images are kept, as safetensors.

    Attributes
    ----------
    name : str
        What the images are.
    images : Tensor
        uint8 [N, 3, H, W].
    digits, inks, conditions : Tensor
        int64 [N]: 0 to 9; 0 to 10, 10 being neutral; of `Condition`.

    Notes
    -----
    Definition: A. Kamanda's thesis (2023). Pixels of at least 75 of 255 take the ink, the others are black.

    Examples
    --------
    >>> train = StroopMNIST("data/mnist", "train", proportion_congruent=0.95, seed=1)
    >>> image, (digit, ink) = train[0]
    """

    def __init__(
        self,
        root: Path | str | None,
        split: str = "train",
        proportion_congruent: float | None = None,
        neutral: float = 0.0,
        seed: int = 0,
        download: bool = False,
        transform: Callable[[Tensor], Any] | None = None,
        target_transform: Callable[[tuple[int, int]], Any] | None = None,
        cache: Path | str | None = None,
    ) -> None:
        check_choice("split", split, SPLITS)
        if proportion_congruent is None:
            proportion_congruent = 0.0 if split == "test" else 0.8
        self.proportion_congruent = check_fraction("proportion_congruent", proportion_congruent, zero=True)
        self.neutral = check_fraction("neutral", neutral, zero=True)
        self.seed = check_int("seed", seed, 0)
        self.split, self.transform, self.target_transform = split, transform, target_transform
        self.name, grey, self.digits = _grey(root, split, download)
        self._grey = grey
        generator = torch.Generator().manual_seed(3 * self.seed + SPLITS.index(split))
        self.inks, self.conditions = draw_inks(
            self.digits, self.proportion_congruent, self.neutral, generator
        )
        about = {
            "format": _FORMAT,
            "split": split,
            "proportion_congruent": self.proportion_congruent,
            "neutral": self.neutral,
            "seed": self.seed,
            "palette": [list(rgb) for rgb in (*COLOURS.values(), GREY)],
            "threshold": THRESHOLD,
            "source": hashlib.sha256(grey.numpy().tobytes()).hexdigest(),
        }
        path = None
        if cache is not None:
            path = (
                Path(cache)
                / f"stroop-{split}-{self.proportion_congruent!r}-{self.neutral!r}-{self.seed}.safetensors"
            )
        self.images = _coloured(path, about, grey, self.inks)

    def recoloured(self, condition: Condition | int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """The same digits, all under one condition: images uint8 [N, 3, H, W] and inks int64 [N]."""
        condition = Condition(condition)
        generator = torch.Generator().manual_seed(check_int("seed", seed, 0))
        share = 1.0 if condition == Condition.NEUTRAL else 0.0
        inks, _ = draw_inks(self.digits, float(condition == Condition.CONGRUENT), share, generator)
        return colour(self._grey, inks), inks

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, item: int) -> tuple[Any, Any]:
        image: Any = self.images[item]
        target: Any = (int(self.digits[item]), int(self.inks[item]))
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target

    def __repr__(self) -> str:
        lines = [
            f"Dataset {type(self).__name__}",
            f"Number of datapoints: {len(self)}",
            f"Images: {self.name}",
            f"Split: {self.split}",
            f"Proportion congruent: {self.proportion_congruent:g}",
            f"Neutral: {self.neutral:g}",
            f"Seed: {self.seed}",
        ]
        return "\n    ".join(lines)


def _grey(root: Path | str | None, split: str, download: bool) -> tuple[str, Tensor, Tensor]:
    data = find_images(root, download)
    if split == "test":
        images, labels = data.test_images, data.test_labels
    else:
        rows = len(data.train_labels)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(_SPLIT_SEED), device="cpu")
        held = round(rows * HELD_OUT)
        chosen = order[held:] if split == "train" else order[:held]
        images, labels = data.train_images[chosen], data.train_labels[chosen]
    return data.name, (images * 255).round().to(torch.uint8), labels


def _coloured(path: Path | None, about: dict[str, Any], grey: Tensor, inks: Tensor) -> Tensor:
    """Read coloured images from a file if it says that it was made from just this, else write it anew."""
    if path is None:
        return colour(grey, inks)
    from safetensors import SafetensorError, safe_open

    from ..files import write_tensors

    key = json.dumps(about, sort_keys=True)
    if path.is_file():
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("about") == key:
                    return file.get_tensor("images")
        except (SafetensorError, OSError) as error:
            warnings.warn(f"{path}: a damaged cache is built anew ({error})", stacklevel=3)
    images = colour(grey, inks)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {"images": images}, {"about": key})
    return images
