"""Grey digits, split into what is learned from, what is held out, and what is tested on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaptcomp_ext.experiments.data import find_images

__all__ = ["Grey", "load_grey"]

HELD_OUT = 1 / 6
_SPLIT_SEED = 71


@dataclass(frozen=True)
class Grey:
    """Images uint8 [N, 1, H, W] and digits int64 [N]."""

    images: Tensor
    digits: Tensor

    @property
    def side(self) -> int:
        """Height and width of an image."""
        return self.images.shape[-1]


def load_grey(data: str | None) -> tuple[str, Grey, Grey, Grey]:
    """Name of the data, its training, held-out and test images: a sixth of the training images, the same always, is held out."""
    found = find_images(data)
    order = torch.randperm(len(found.train_labels), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    held = round(len(order) * HELD_OUT)

    def part(images: Tensor, labels: Tensor) -> Grey:
        return Grey((images * 255).round().to(torch.uint8)[:, None], labels)

    train, some = order[held:], order[:held]
    return (
        found.name,
        part(found.train_images[train], found.train_labels[train]),
        part(found.train_images[some], found.train_labels[some]),
        part(found.test_images, found.test_labels),
    )
