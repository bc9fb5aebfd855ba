"""Training of a classifier, and of habit and control together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptcomp_ext as ac
from adaptcomp_ext.experiments.runs import Checkpoint, fit

__all__ = ["Labelled", "Recipe", "recipe_for", "train_acc", "train_classifier"]

NOISE_RATE = 10.0
"""Learning rate of log σ² over that of the weights."""


class Labelled(Protocol):
    """Images uint8 [N, C, H, W] and digits int64 [N]."""

    @property
    def images(self) -> Tensor:
        """The images."""

    @property
    def digits(self) -> Tensor:
        """What they show."""


@dataclass(frozen=True)
class Recipe:
    """How networks are trained: AdamW on a one-cycle schedule, weight decay 0.01; β grows linearly over the first half."""

    epochs: int
    batch: int = 128
    learning_rate: float = 3e-3


def recipe_for(rows: int, quick: bool) -> Recipe:
    """The recipe that suits the number of training images."""
    if rows > 10_000:
        return Recipe(epochs=1 if quick else 3)
    return Recipe(epochs=10 if quick else 30, batch=32)


def _updates(
    model: nn.Module, recipe: Recipe, rows: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    noise = [p for name, p in model.named_parameters() if name.endswith(("log_variance", "log_noise"))]
    known = {id(p) for p in noise}
    weights = [p for p in model.parameters() if id(p) not in known]
    groups = [{"params": weights, "weight_decay": 1e-2}] + (
        [{"params": noise, "weight_decay": 0.0}] if noise else []
    )
    optimizer = torch.optim.AdamW(groups)
    peaks = [recipe.learning_rate, NOISE_RATE * recipe.learning_rate][: len(groups)]
    total = recipe.epochs * -(-rows // recipe.batch)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=total)


def _train(
    model: nn.Module,
    loss: Callable[[Tensor, float], tuple[Tensor, Mapping[str, Tensor]]],
    data: Labelled,
    recipe: Recipe,
    seed: int,
    checkpoint: Path,
    tick: Callable[[float], None],
) -> list[dict[str, float]]:
    optimizer, schedule = _updates(model, recipe, len(data.digits))
    return fit(
        model,
        loss,
        optimizer,
        rows=len(data.digits),
        batch=recipe.batch,
        epochs=recipe.epochs,
        seed=seed,
        schedule=schedule,
        checkpoint=Checkpoint(checkpoint),
        tick=tick,
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
    """Train on the cross-entropy of the digit, from logits: taken once, not of a softmax.

    Parameters
    ----------
    model : nn.Module
        Images uint8 to logits.
    data : Labelled
        The training set.
    recipe : Recipe
        How.
    seed : int
        Of the order.
    checkpoint : Path
        The file of the state after each epoch, from which training goes on.
    tick : callable
        Called with the share done.
    loss : callable, optional
        ``loss(index, logits) -> scalar`` instead of the cross-entropy, for the rows `index`.
    """

    def update(index: Tensor, done: float) -> tuple[Tensor, dict[str, Tensor]]:
        logits, digits = model(data.images[index]), data.digits[index]
        value = F.cross_entropy(logits, digits) if loss is None else loss(index, logits)
        return value, {"accuracy": (logits.argmax(1) == digits).float().mean()}

    return _train(model, update, data, recipe, seed, checkpoint, tick)


def train_acc(
    model: ac.models.ACC,
    data: Labelled,
    recipe: Recipe,
    seed: int,
    checkpoint: Path,
    tick: Callable[[float], None],
) -> list[dict[str, float]]:
    """`ACC.loss`."""

    def loss(index: Tensor, done: float) -> tuple[Tensor, dict[str, Tensor]]:
        parts = model.loss(
            data.images[index], data.digits[index], rows=len(data.digits), beta_factor=min(1.0, 2 * done)
        )
        return parts.total, {name: getattr(parts, name) for name in parts._fields[1:]}

    return _train(model, loss, data, recipe, seed, checkpoint, tick)
