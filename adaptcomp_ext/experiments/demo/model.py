"""A reader of digits that looks at an image through a small window until it halts, and its training."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptcomp_ext as ac

from ..data import ImageData
from ..device import seeded


class GlimpseStep(nn.Module):
    """One look: choose a place from what is known so far, read the window there, update what is known.

    The window is a soft one (a normalised Gaussian around each of its points, after DRAW), so that the choice
    of the place has a gradient. `side` and `window` are the heights and widths of image and window in pixels,
    `dim` and `features` the widths of the state and of an encoded glimpse.
    """

    pixels: Tensor
    offsets: Tensor

    def __init__(self, side: int, window: int, dim: int, features: int = 128) -> None:
        super().__init__()
        pixel = 2 / (side - 1)
        self.place = nn.Linear(dim, 2)
        self.encode = nn.Linear(window * window + 2, features)
        self.cell = nn.GRUCell(features, dim)
        self.sharpness = 1 / pixel**2
        self.register_buffer("pixels", torch.linspace(-1, 1, side))
        self.register_buffer("offsets", (torch.arange(window) - (window - 1) / 2) * pixel)

    def where(self, state: Tensor) -> Tensor:
        """Centre of the next glimpse, [n, 2]: row and column, the image's corners being at -1 and 1."""
        return torch.tanh(self.place(state))

    def forward(self, state: Tensor, images: Tensor) -> Tensor:
        """State [n, dim] and images [n, H, W] to the next state."""
        centre = self.where(state)
        distance = (centre[:, :, None] + self.offsets)[..., None] - self.pixels
        kernel = torch.softmax(-self.sharpness * distance.square(), dim=-1)
        glimpse = kernel[:, 0] @ images @ kernel[:, 1].transpose(1, 2)
        seen = torch.relu(self.encode(torch.cat((glimpse.flatten(1), centre), dim=1)))
        return self.cell(seen, state)


class GlimpseReader(nn.Module):
    """`GlimpseStep` under ACT: how many looks an image gets, of at most `max_steps`, depends on the image."""

    def __init__(
        self, side: int, window: int, dim: int = 256, max_steps: int = 16, classes: int = 10
    ) -> None:
        super().__init__()
        self.max_steps = max_steps
        self.threshold = 0.99
        self.first = nn.Parameter(torch.zeros(dim))
        self.step = GlimpseStep(side, window, dim)
        self.head = nn.Linear(dim, 1)
        self.readout = nn.Linear(dim, classes)
        # Long thinking first; a start bias of 0 or more traps most runs at one or two steps.
        nn.init.constant_(self.head.bias, -3.0)
        policy = ac.ACT(self.head, threshold=self.threshold)
        self.halt = ac.AdaptiveHalt(self.step, policy, max_steps=max_steps, readout=self.readout)

    def start(self, rows: int) -> Tensor:
        """What is known before the first look, [rows, dim]."""
        return self.first.expand(rows, -1)

    def forward(self, images: Tensor) -> ac.HaltResult:
        """Read images [B, H, W]; ``output`` holds the class logits [B, classes]."""
        return self.halt(self.start(len(images)), images)

    @torch.no_grad()
    def path(self, image: Tensor, steps: int) -> Tensor:
        """Where the first `steps` looks at one image [H, W] go: [steps, 2], as in `GlimpseStep.where`."""
        state, places = self.start(1), []
        for _ in range(steps):
            places.append(self.step.where(state)[0])
            state = self.step(state, image[None])
        return torch.stack(places)


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
