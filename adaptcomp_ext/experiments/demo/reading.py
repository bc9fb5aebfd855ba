"""What the trained reader makes of the test images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaptcomp_ext.experiments.data import ImageData

from .model import GlimpseReader

__all__ = ["Reading"]


class Reading:
    """The test images, read in batches of `batch` rows.

    Attributes
    ----------
    images, labels, predicted, steps, cost, status : Tensor
        One row per test image; ``cost`` is the ponder cost N + R.
    right : Tensor
        bool [N].
    """

    def __init__(self, reader: GlimpseReader, data: ImageData, batch: int) -> None:
        with torch.inference_mode():
            results = [reader(images) for images in data.test_images.split(batch)]
        self.images, self.labels = data.test_images, data.test_labels
        self.predicted = torch.cat([result.output.argmax(dim=1) for result in results])
        self.steps = torch.cat([result.steps for result in results])
        self.cost = torch.cat([result.cost for result in results])
        self.status = torch.cat([result.status for result in results])
        self.right = self.predicted == self.labels

    @property
    def accuracy(self) -> float:
        """Share of images read right."""
        return float(self.right.float().mean())

    def groups(self, of: Tensor) -> list[dict[str, Any]]:
        """Images, mean steps and accuracy for each value of `of` that occurs."""
        rows = []
        for value in of.unique().tolist():
            here = of == value
            rows.append(
                {
                    "value": value,
                    "images": int(here.sum()),
                    "mean_steps": float(self.steps[here].double().mean()),
                    "accuracy": float(self.right[here].double().mean()),
                }
            )
        return rows
