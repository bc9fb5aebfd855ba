"""An epoch of training on the kernels, and through plain autograd."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count, cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptcomp_ext as ac
from adaptcomp_ext.models import LatentEnergyClassifier

from .training import Batch, Recipe, Updates, batches, every_step_loss, practising

__all__ = ["compare", "plain_loss"]

WARM_UP = 6

Loss = Callable[[LatentEnergyClassifier, Batch], Tensor]


def plain_loss(model: LatentEnergyClassifier, batch: Batch) -> Tensor:
    """Compute the loss of `every_step_loss` without this package, with a differentiable gradient per step.

    What does not depend on the point is computed once, which makes it faster than calling the energy anew.
    """
    context = model.encoder(batch.images)
    v = model.start(context)
    energy = model.energy
    assert energy.weight_x is not None
    first = F.linear(context, energy.weight_x, energy.bias1)
    rest = (energy.weight2, energy.bias2, energy.out, energy.out_bias, energy.activation, energy.ridge)
    size = (model.step_size * batch.factors)[:, None]
    losses = []
    for _ in range(batch.steps):
        v = v.detach().requires_grad_()
        value = ac.reference.mlp_energy(v, energy.weight_y, first, *rest)
        (slope,) = torch.autograd.grad(value.sum(), v, create_graph=True)
        v = v - size * slope
        losses.append(F.cross_entropy(model.logits(v), batch.labels))
    return torch.stack(losses).mean()


class _Way:
    """One way of computing the loss, with a model of its own."""

    def __init__(self, model: LatentEnergyClassifier, loss: Loss, recipe: Recipe, rows: int) -> None:
        self.model, self.loss = copy.deepcopy(model).train(), loss
        self.update = Updates(self.model, recipe, rows)
        self.behind = copy.deepcopy(self.model)
        self.behind.encoder = nn.Identity()
        self.update_ms: list[float] = []
        self.descent_ms: list[float] = []

    def take(self, batch: Batch) -> float:
        """Time an update, and before it the descent alone, forward and backward, for given features."""
        with torch.no_grad():
            features = self.model.encoder(batch.images)
        given = batch._replace(images=features.requires_grad_())
        self.descent_ms.append(_milliseconds(lambda: self.loss(self.behind, given).backward()))
        self.behind.zero_grad()
        losses: list[Tensor] = []

        def update() -> None:
            losses.append(self.loss(self.model, batch))
            self.update(losses[0])

        self.update_ms.append(_milliseconds(update))
        return float(losses[0].detach())


def _milliseconds(call: Callable[[], None]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def compare(
    model: LatentEnergyClassifier, images: Tensor, labels: Tensor, recipe: Recipe, updates: int, seed: int
) -> dict[str, Any]:
    """Time single updates in turn on the same batches, and extrapolate to an epoch.

    Parameters
    ----------
    model : LatentEnergyClassifier
        Copies of it are trained.
    images, labels : Tensor
        The training images.
    recipe : Recipe
        Of the batches; the number of steps goes through 1 to ``recipe.steps`` in turn.
    updates : int
        How many are timed.
    seed : int
        Of the batches.

    Returns
    -------
    dict
        Milliseconds per update (forward, backward and optimiser, the batch given) and of the descent in it
        alone (forward and backward, the features given); seconds per epoch of updates; the median ratios of
        plain to kernels within one update; the difference of the two first losses.
    """
    per_epoch = -(-len(images) // recipe.batch)
    recipe = replace(
        recipe, epochs=max(recipe.epochs, -(-(WARM_UP + updates) // per_epoch))
    )  # the schedule has to last
    ways = {
        "kernels": _Way(model, lambda model, batch: every_step_loss(model, batch)[0], recipe, len(images)),
        "plain": _Way(model, plain_loss, recipe, len(images)),
    }
    kernels, plain = ways.values()
    generator = torch.Generator().manual_seed(seed)
    steps = cycle(range(1, recipe.steps + 1))
    endless = (batch for _ in count() for batch in batches(images, labels, recipe, generator))
    difference = 0.0
    with practising(kernels.model.descend), practising(kernels.behind.descend):
        for i, batch in enumerate(islice(endless, WARM_UP + updates)):
            batch = batch._replace(steps=next(steps))
            losses = []
            for way in ways.values():
                torch.manual_seed(i)  # the same dropout
                losses.append(way.take(batch))
            if i == 0:
                difference = abs(losses[0] - losses[1])
    found: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "updates": updates,
        "updates_per_epoch": per_epoch,
        "difference_of_losses": difference,
    }
    for what in ("update_ms", "descent_ms"):
        times = [getattr(way, what)[WARM_UP:] for way in (kernels, plain)]
        found[what] = {name: statistics.fmean(some) for name, some in zip(ways, times, strict=True)}
        found[what]["ratio"] = statistics.median(p / k for k, p in zip(*times, strict=True))
    found["seconds_per_epoch"] = {name: found["update_ms"][name] * per_epoch / 1e3 for name in ways}
    return found
