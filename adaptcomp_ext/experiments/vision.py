"""What the experiments on images share: data, networks, training, reading, and timing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptcomp_ext as ac

from .bench.machine import keep_freed_memory
from .bench.timing import clock, interleave, ratio
from .data import find_images
from .device import here
from .runs import Checkpoint, fit

__all__ = [
    "CLASSES",
    "LARGE",
    "Grey",
    "Labelled",
    "Recipe",
    "Scale",
    "accuracy",
    "build_cnn",
    "compare_gated",
    "load_grey",
    "logits",
    "multiply_adds",
    "recipe_for",
    "time_calls",
    "train",
    "train_acc",
    "train_classifier",
    "weights",
]

CLASSES = 10
LARGE = 20
"""Pixels of a side from which on images are taken for MNIST's."""
HELD_OUT = 1 / 6
_SPLIT_SEED = 71
NOISE_RATE = 10.0
"""Learning rate of log σ² over that of the weights."""


class Labelled(Protocol):
    """Images uint8 [N, C, H, W] and their digits int64 [N]."""

    @property
    def images(self) -> Tensor:
        """The images."""

    @property
    def digits(self) -> Tensor:
        """The digits."""


@dataclass(frozen=True)
class Grey:
    """Grey images uint8 [N, 1, H, W] and their digits int64 [N]."""

    images: Tensor
    digits: Tensor

    @property
    def side(self) -> int:
        """Height and width of an image."""
        return self.images.shape[-1]


def load_grey(data: str | None) -> tuple[str, Grey, Grey, Grey]:
    """Return the name of the data, and its training, held-out and test images, on the default device.

    Held out is a sixth of the training images, always the same.
    """
    images = find_images(data)
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    order = torch.randperm(len(images.train_labels), generator=generator, device="cpu")
    held = round(len(order) * HELD_OUT)

    def part(values: Tensor, labels: Tensor) -> Grey:
        return here(Grey((values * 255).round().to(torch.uint8)[:, None], labels))

    train, rest = order[held:], order[:held]
    return (
        images.name,
        part(images.train_images[train], images.train_labels[train]),
        part(images.train_images[rest], images.train_labels[rest]),
        part(images.test_images, images.test_labels),
    )


class Scale(nn.Module):
    """uint8 images to floats in 0..1."""

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W], uint8, to float32."""
        return images.float() / 255


def build_cnn(side: int, channels: int, hidden: int = 128) -> nn.Sequential:
    """The thesis' reference CNN: two 3×3 convolutions, each with a maximum pool, and two linear layers.

    Small images are padded, so that something is left of them after the second pool.
    """
    padding = 0 if side >= LARGE else 1
    left = side
    for _ in range(2):
        left = (left + 2 * padding - 2) // 2
    convolutions: list[nn.Module] = []
    for inputs, outputs in ((channels, 32), (32, 64)):
        convolutions += [nn.Conv2d(inputs, outputs, 3, padding=padding), nn.ReLU(), nn.MaxPool2d(2)]
    head = nn.Linear(64 * left * left, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)
    return nn.Sequential(*convolutions, nn.Flatten(), *head)


def _is_noise(name: str) -> bool:
    """Whether a parameter is the noise of variational dropout, which inference does not have."""
    return name.endswith(("log_variance", "log_noise"))


def weights(module: nn.Module) -> int:
    """Number of weights and biases, without the noise of variational dropout."""
    return sum(p.numel() for name, p in module.named_parameters() if not _is_noise(name))


def multiply_adds(module: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply–adds of one row through linear and convolution layers, without its dead units."""
    total = 0

    def count(layer: Any, inputs: Any, output: Tensor) -> None:
        nonlocal total
        total += layer.weight.numel() * (output.numel() // (output.shape[0] * output.shape[1]))

    dense = ac.shrink(module)
    layers = [m for m in dense.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    handles = [m.register_forward_hook(count) for m in layers]
    with torch.no_grad():
        dense(torch.zeros(1, *shape))
    for handle in handles:
        handle.remove()
    return total


@dataclass(frozen=True)
class Recipe:
    """How networks are trained: AdamW, one-cycle schedule, weight decay 0.01; β grows over the first half."""

    epochs: int
    batch: int = 128
    learning_rate: float = 3e-3


def recipe_for(rows: int, quick: bool) -> Recipe:
    """The recipe that suits the number of training images."""
    if rows > 10_000:
        return Recipe(epochs=1 if quick else 3)
    return Recipe(epochs=10 if quick else 30, batch=32)


def train(
    model: nn.Module,
    loss: Callable[[Tensor, float], tuple[Tensor, Mapping[str, Tensor]]],
    rows: int,
    recipe: Recipe,
    seed: int,
    checkpoint: Path,
    tick: Callable[[float], None],
    clip: float | None = None,
    after: Callable[[int], Mapping[str, float]] | None = None,
) -> list[dict[str, float]]:
    """Train a network by a recipe; from the file `checkpoint` training goes on. The rest is as for `fit`."""
    noise = [p for name, p in model.named_parameters() if _is_noise(name)]
    known = set(map(id, noise))
    groups = [{"params": [p for p in model.parameters() if id(p) not in known], "weight_decay": 1e-2}]
    if noise:
        groups.append({"params": noise, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups)
    peaks = [recipe.learning_rate, NOISE_RATE * recipe.learning_rate][: len(groups)]
    total = recipe.epochs * -(-rows // recipe.batch)
    return fit(
        model,
        loss,
        optimizer,
        rows=rows,
        batch=recipe.batch,
        epochs=recipe.epochs,
        seed=seed,
        schedule=torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=total),
        clip=clip,
        checkpoint=Checkpoint(checkpoint),
        tick=tick,
        after=after,
    )


def train_classifier(
    model: nn.Module,
    data: Labelled,
    recipe: Recipe,
    seed: int,
    checkpoint: Path,
    tick: Callable[[float], None],
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> list[dict[str, float]]:
    """Train a network from images to logits on cross-entropy or ``loss(index, logits)``; see `train`."""

    def update(index: Tensor, done: float) -> tuple[Tensor, dict[str, Tensor]]:
        output, digits = model(data.images[index]), data.digits[index]
        value = F.cross_entropy(output, digits) if loss is None else loss(index, output)
        return value, {"accuracy": (output.argmax(1) == digits).float().mean()}

    return train(model, update, len(data.digits), recipe, seed, checkpoint, tick)


def train_acc(
    model: ac.models.ACC,
    data: Labelled,
    recipe: Recipe,
    seed: int,
    checkpoint: Path,
    tick: Callable[[float], None],
) -> list[dict[str, float]]:
    """Train habit and control together on `ACC.loss`; see `train`."""

    def loss(index: Tensor, done: float) -> tuple[Tensor, dict[str, Tensor]]:
        beta = min(1.0, 2 * done)
        parts = model.loss(data.images[index], data.digits[index], rows=len(data.digits), beta_factor=beta)
        return parts.total, {name: getattr(parts, name) for name in parts._fields[1:]}

    return train(model, loss, len(data.digits), recipe, seed, checkpoint, tick)


@torch.no_grad()
def logits(model: Callable[[Tensor], Tensor], images: Tensor, batch: int = 500) -> Tensor:
    """The logits of many images, from a network in evaluation mode."""
    return torch.cat([model(part) for part in images.split(batch)])


def accuracy(answers: Tensor, digits: Tensor) -> float:
    """Share of the rows whose largest element is the digit's."""
    return float((answers.argmax(dim=1) == digits).double().mean())


@torch.no_grad()
def time_calls(calls: Mapping[str, Callable[[], Any]], seconds: float) -> tuple[dict[str, float], Any]:
    """Time calls in interleaved rounds for `seconds` in all.

    Returns
    -------
    dict
        The median of each call in milliseconds.
    callable
        ``over(a, b)``: the median over the rounds of a's time over b's.
    """
    keep_freed_memory()
    times = interleave(calls, clock(torch.get_default_device()), seconds)
    return {name: statistics.median(values) for name, values in times.items()}, lambda a, b: ratio(
        times, a, b
    )


@torch.no_grad()
def compare_gated(model: ac.models.ACC, images: Tensor, seconds: float) -> dict[str, Any]:
    """Time one batch in inference, for `seconds`: both policies, gated, habit alone, control alone.

    The model is in evaluation mode, and its gate calibrated. The result has the call rate on this batch,
    medians in milliseconds (``ms``), and medians of ratios within interleaved rounds: ``saved``, the share of
    the time of "both" that "gated" saves, and ``control_over_default``.
    """

    def both() -> Tensor:
        default, control = model.both(images)
        return torch.where(model.gate(default)[:, None], control, default).log_softmax(dim=1)

    calls = {
        "both": both,
        "gated": lambda: model(images).output,
        "default": lambda: model.default(model.encoder(images)),
        "control": lambda: model.control(model.encoder(images)),
    }
    difference = float((calls["both"]() - calls["gated"]()).abs().max())
    milliseconds, over = time_calls(calls, seconds)
    return {
        "rows": len(images),
        "rate": float(model.gate(model.both(images)[0]).double().mean()),
        "ms": milliseconds,
        "saved": 1 - over("gated", "both"),
        "control_over_default": over("control", "default"),
        "largest_difference": difference,
    }
