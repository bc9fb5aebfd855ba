"""The evaluation of the trained model on images: accuracy, steps, and what makes an image hard."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import adaptcomp_ext as ac
from adaptcomp_ext.models import LatentEnergyClassifier

from ..device import seeded

STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Deviations of the noise, and shares of the side that a patch hides."""
BATCH = 2000


@contextlib.contextmanager
def setting(descend: ac.EnergyDescent, **options: Any) -> Iterator[None]:
    """Set attributes of a descent, and put them back."""
    before = {name: getattr(descend, name) for name in options}
    try:
        for name, value in options.items():
            setattr(descend, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(descend, name, value)


def add_noise(images: Tensor, scale: float | Tensor, generator: torch.Generator) -> Tensor:
    """Add normal noise of deviation `scale`, a number or [N, 1, 1], to images [N, H, W] in 0..1; clip."""
    return (images + scale * torch.randn(images.shape, generator=generator)).clamp_(0, 1)


def occlude(images: Tensor, share: float | Tensor, generator: torch.Generator) -> Tensor:
    """Black out a square at a random place, its side `share` of the image's side: a number or [N]."""
    n, side = images.shape[0], images.shape[-1]
    patch = torch.as_tensor(share).expand(n)[:, None] * side
    low = torch.rand(n, 2, generator=generator) * (side - patch)
    pixel = torch.arange(side) + 0.5
    hidden = [(pixel > low[:, i : i + 1]) & (pixel < low[:, i : i + 1] + patch) for i in (0, 1)]
    return images.masked_fill(hidden[0][:, :, None] & hidden[1][:, None, :], 0)


def corrupt(images: Tensor, share: float, noise: float, patch: float, generator: torch.Generator) -> Tensor:
    """Add noise to a share of the images and a patch to another, of strengths up to `noise` and `patch`."""
    n = images.shape[0]
    strength, chosen = torch.rand(2, n, generator=generator), torch.rand(2, n, generator=generator) < share
    scales = strength * chosen
    images = add_noise(images, noise * scales[0][:, None, None], generator)
    return occlude(images, patch * scales[1], generator)


@dataclass(frozen=True)
class Reading:
    """What became of N images: each [N], as in `ac.EnergyResult`, and whether the prediction is right."""

    predicted: Tensor
    steps: Tensor
    status: Tensor
    energy: Tensor
    right: Tensor

    @property
    def accuracy(self) -> float:
        """Share of images read right."""
        return float(self.right.double().mean())

    @property
    def mean_steps(self) -> float:
        """Steps per image."""
        return float(self.steps.double().mean())

    def summary(self) -> dict[str, Any]:
        """Accuracy, mean steps, and how many images the limit stopped."""
        stopped = int((self.status == ac.Status.MAX_STEPS).sum())
        return {"accuracy": self.accuracy, "mean_steps": self.mean_steps, "ended_by_the_limit": stopped}


@torch.no_grad()
def read(model: LatentEnergyClassifier, images: Tensor, labels: Tensor) -> Reading:
    """Read images [N, H, W] as the model's descent is set."""
    results = [model(some) for some in images.split(BATCH)]
    predicted = torch.cat([model.logits(result.y).argmax(dim=1) for result in results])
    steps, status, energy = (
        torch.cat([getattr(result, name) for result in results]) for name in ("steps", "status", "energy")
    )
    return Reading(predicted, steps, status, energy, predicted == labels)


@torch.no_grad()
def hardness(classifier: nn.Module, images: Tensor) -> Tensor:
    """1 − (p₁ − p₂) of a classifier's two largest probabilities, float64 [N]: 0 is easy, 1 undecided.

    Summed as 2 p₂ + p₃ + …, so that it still tells two images apart of which the classifier is all but
    certain.
    """
    logits = torch.cat([classifier(some) for some in images.split(BATCH)])
    p = logits.double().softmax(dim=1).sort(dim=1, descending=True).values
    return 2 * p[:, 1] + p[:, 2:].sum(dim=1)


def parts(reading: Reading, hard: Tensor, count: int = 10) -> list[dict[str, Any]]:
    """Images, mean steps and accuracy for each of `count` equal parts of the images, the easiest first."""
    order = hard.argsort(stable=True)
    return [
        {
            "images": len(rows),
            "hardness": float(hard[rows].mean()),
            "mean_steps": float(reading.steps[rows].double().mean()),
            "accuracy": float(reading.right[rows].double().mean()),
        }
        for rows in order.tensor_split(count)
    ]


def spread(groups: list[dict[str, Any]]) -> float:
    """Mean steps of the hardest part over those of the easiest."""
    return groups[-1]["mean_steps"] / groups[0]["mean_steps"]


def changes(first: Reading, last: Reading) -> dict[str, int]:
    """How many images one reading gets right and another does not."""
    return {
        "mended": int((last.right & ~first.right).sum()),
        "spoilt": int((first.right & ~last.right).sum()),
        "other": int((first.predicted != last.predicted).sum()) - int((first.right != last.right).sum()),
    }


def _readings(
    model: LatentEnergyClassifier, images: Tensor, labels: Tensor, name: str, values: Iterable[Any]
) -> Iterator[tuple[Any, Reading]]:
    """Each value of an attribute of the descent, and the reading with it."""
    for value in values:
        with setting(model.descend, **{name: value}):
            yield value, read(model, images, labels)


def by_budget(
    model: LatentEnergyClassifier, images: Tensor, labels: Tensor, hard: Tensor, budgets: Iterable[int]
) -> list[dict[str, Any]]:
    """Accuracy, on all images and on the hardest tenth, where so many steps are allowed."""
    return [
        {"max_steps": n, **reading.summary(), "accuracy_hardest": parts(reading, hard)[-1]["accuracy"]}
        for n, reading in _readings(model, images, labels, "max_steps", budgets)
    ]


def by_tolerance(
    model: LatentEnergyClassifier, images: Tensor, labels: Tensor, hard: Tensor, tolerances: Iterable[float]
) -> list[dict[str, Any]]:
    """Accuracy, mean steps and their `spread` for each tolerance."""
    return [
        {"tol": tol, **reading.summary(), "hardest_over_easiest": spread(parts(reading, hard))}
        for tol, reading in _readings(model, images, labels, "tol", tolerances)
    ]


def under_corruption(
    model: LatentEnergyClassifier, images: Tensor, labels: Tensor, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Accuracy and mean steps with noise of each scale, and with a patch of each size."""

    def changed(change: Callable[..., Tensor], strength: float) -> dict[str, Any]:
        harder = change(images, strength, seeded(seed))
        return {"strength": strength, **read(model, harder, labels).summary()}

    ways = {"noise": add_noise, "patch": occlude}
    return {name: [changed(change, strength) for strength in STRENGTHS] for name, change in ways.items()}
