"""An epoch of training on the kernels, and through plain autograd."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import adaptcomp_ext as ac
from adaptcomp_ext.models import LatentEnergyClassifier

from .training import Batch, Recipe, Updates, batches, every_step_loss, practising

__all__ = ["compare", "plain_loss"]

WARM_UP = 6


def plain_loss(model: LatentEnergyClassifier, batch: Batch) -> Tensor:
    """The loss of `every_step_loss` as one writes it without this package: the whole batch, a differentiable gradient per step.

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


def compare(
    model: LatentEnergyClassifier, images: Tensor, labels: Tensor, recipe: Recipe, updates: int, seed: int
) -> dict[str, Any]:
    """Time single updates, forward, backward and optimiser, in turn on the same batches, and extrapolate to an epoch.

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
        Milliseconds per update and seconds per epoch, both with the batches given, the median ratio of an update, and the
        largest difference of the two losses.
    """
    losses: dict[str, Callable[[LatentEnergyClassifier, Batch], Tensor]] = {
        "kernels": lambda model, batch: every_step_loss(model, batch)[0],
        "plain": plain_loss,
    }
    copies = {name: copy.deepcopy(model).train() for name in losses}
    update = {name: Updates(some, recipe, len(images)) for name, some in copies.items()}
    generator = torch.Generator().manual_seed(seed)
    times: dict[str, list[float]] = {name: [] for name in losses}
    difference, steps = 0.0, cycle(range(1, recipe.steps + 1))
    some_batches = (batch for _ in iter(int, 1) for batch in batches(images, labels, recipe, generator))
    with practising(copies["kernels"].descend):
        for i, batch in zip(range(WARM_UP + updates), some_batches, strict=False):
            batch = batch._replace(steps=next(steps))
            values = {}
            for name, loss_of in losses.items():
                torch.manual_seed(i)  # the same dropout
                begin = time.perf_counter()
                loss = loss_of(copies[name], batch)
                update[name](loss)
                times[name].append((time.perf_counter() - begin) * 1e3)
                values[name] = float(loss.detach())
            if i == 0:
                difference = abs(values["kernels"] - values["plain"])
    per_epoch = -(-len(images) // recipe.batch)
    timed = {name: some[WARM_UP:] for name, some in times.items()}
    means = {name: statistics.fmean(some) for name, some in timed.items()}
    return {
        "updates": updates,
        "updates_per_epoch": per_epoch,
        "ms_per_update": means,
        "seconds_per_epoch": {name: mean * per_epoch / 1e3 for name, mean in means.items()},
        "plain_over_kernels": statistics.median(p / k for p, k in zip(timed["plain"], timed["kernels"], strict=True)),
        "difference_of_losses": difference,
    }
