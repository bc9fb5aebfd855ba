"""Training of the reader: cross-entropy plus the price of thinking."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import ImageData
from ..device import seeded
from .model import GlimpseReader


@dataclass(frozen=True)
class Recipe:
    """How the reader is built (see `GlimpseReader`) and trained."""

    window: int
    epochs: int
    dim: int = 256
    max_steps: int = 16
    batch: int = 128
    learning_rate: float = 4e-3  # peak of a one-cycle schedule
    # The price of one step, in units of the cross-entropy, rises from 0 to `ponder` over the first part of
    # the training, whose share of it is `free`: first read, then read fast.
    ponder: float = 0.014
    free: float = 0.3


class Epoch(NamedTuple):
    """Averages over one epoch, on the training images as they were seen."""

    loss: float
    accuracy: float
    steps: float
    seconds: float


def _jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, scale and shift each image a little: other writing, same digit."""
    n = len(images)
    angle, scale, shift_y, shift_x = ((torch.rand(4, n, generator=generator) * 2 - 1) * 0.1).unbind()
    cosine, sine = angle.cos() * (1 + scale), angle.sin() * (1 + scale)
    rows = torch.stack((cosine, -sine, shift_x, sine, cosine, shift_y), dim=1).view(n, 2, 3)
    grid = F.affine_grid(rows, [n, 1, *images.shape[1:]], align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def train(
    reader: GlimpseReader,
    data: ImageData,
    recipe: Recipe,
    seed: int,
    progress: Callable[[float, float, float], None],
) -> list[Epoch]:
    """Train the reader in place; `seed` is that of the order of the images and their jitter.

    ``progress(loss, accuracy, steps)`` is called after every update with the means over its batch.
    """
    generator = seeded(seed)
    images, labels = data.train_images, data.train_labels
    updates = -(-len(images) // recipe.batch)
    total = recipe.epochs * updates
    optimizer = torch.optim.AdamW(reader.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=total)
    history, done = [], 0
    reader.train()
    for _ in range(recipe.epochs):
        begin, sums = time.perf_counter(), torch.zeros(3)
        for rows in torch.randperm(len(images), generator=generator).split(recipe.batch):
            price = recipe.ponder * min(1.0, done / (recipe.free * total))
            target = labels[rows]
            result = reader(_jitter(images[rows], generator))
            loss = F.cross_entropy(result.output, target) + price * result.cost.mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            right = (result.output.detach().argmax(dim=1) == target).float().mean()
            batch = torch.stack((loss.detach(), right, result.steps.float().mean()))
            sums += batch * len(rows)
            progress(*batch.tolist())
        loss_mean, accuracy, steps = (sums / len(images)).tolist()
        history.append(Epoch(loss_mean, accuracy, steps, time.perf_counter() - begin))
    reader.eval()
    return history
