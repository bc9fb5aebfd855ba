"""Building and training of the networks: the energy model, with a loss after every step, and a classifier.

What was tried for MNIST, on 5,000 held-out training images, six epochs, one seed, all else as in `Recipe`:
accuracy in per cent, and the mean steps of the hardest tenth over those of the easiest. Differences of 0.3 %
and of 0.3 are within what another seed does.

============================================  ====  ===  ==================================================
as it is                                      97.6  2.3
unrolled gradient instead of stepwise         97.8  2.3
loss on the last point only, of 2 to 6 steps  97.6  1.2  nothing asks for speed: α falls to 0.66
no loss on the first point                    97.7  1.6  α falls to 0.69
no latent; 32 latents                         97.6  2.4  digits do not need one
128 hidden units; 256                         97.7  2.0  256: 97.6 % and 1.4
two hidden layers of 64                       97.8  1.4
softplus; tanh                                97.4  2.0  tanh: 97.7 % and 1.1, and it hardly comes to rest
no corruption in training                     97.7  2.5  but 45 instead of 91 % right at the strongest noise
============================================  ====  ===  ==================================================

Losses weighted by their step: the same. In inference, a fixed step without backtracking leaves 5 % of the
images going to and fro until the limit, 29 % at the strongest noise. Pixels instead of features as the
context, with 256 or 512 units, were less accurate (97.0 to 97.5 %), slower, and had ratios of 1.0 to 1.2; but
there the descent is worth something: up to 5 % more occluded images are read right at rest than after one
step. Behind an encoder it is worth nothing on these digits: the first step finds the class, and the others
settle it.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count, cycle, islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptcomp_ext as ac
from adaptcomp_ext.models import LatentEnergyClassifier

from ..bench.timing import clock
from ..device import seeded
from .evaluation import corrupt, setting

WIDE, FEATURES = 256, 128
HIDDEN, LATENT = 64, 16
DROPOUT = 0.1


def _encoder(side: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(side * side, WIDE),
        nn.ReLU(),
        nn.Dropout(DROPOUT),
        nn.Linear(WIDE, FEATURES),
        nn.ReLU(),
    )


def build_model(side: int) -> LatentEnergyClassifier:
    """The energy model of images [B, side, side]."""
    return LatentEnergyClassifier(_encoder(side), FEATURES, dim_latent=LATENT, hidden=HIDDEN)


def build_classifier(side: int) -> nn.Sequential:
    """An ordinary classifier: an encoder of the same shape, and a linear readout in place of the descent."""
    return nn.Sequential(_encoder(side), nn.Linear(FEATURES, 10))


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    epochs: int
    batch: int = 128
    learning_rate: float = 3e-3  # peak of a one-cycle schedule
    steps: int = 6  # the descents of an update take 1 to so many, drawn for each update
    jitter: float = 0.3  # a row's step size is the learned one times 1 ± up to so much
    corrupted: float = 0.3  # share of the images that get noise, and of those that get a patch: see `corrupt`
    noise: float = 0.5
    patch: float = 0.5


class Epoch(NamedTuple):
    """Averages over one epoch, on the training images as they were seen, and the step size at its end."""

    loss: float
    accuracy: float
    step_size: float
    seconds: float


class Batch(NamedTuple):
    """The data of an update, with the number of steps and factors [B] of the step size."""

    images: Tensor
    labels: Tensor
    steps: int
    factors: Tensor


def batches(images: Tensor, labels: Tensor, recipe: Recipe, generator: torch.Generator) -> Iterator[Batch]:
    """One epoch, corrupted and shuffled."""
    for rows in torch.randperm(len(images), generator=generator).split(recipe.batch):
        seen = corrupt(images[rows], recipe.corrupted, recipe.noise, recipe.patch, generator)
        steps = int(torch.randint(1, recipe.steps + 1, (), generator=generator))
        factors = 1 + recipe.jitter * (2 * torch.rand(len(rows), generator=generator) - 1)
        yield Batch(seen, labels[rows], steps, factors)


def practising(descend: ac.EnergyDescent) -> contextlib.AbstractContextManager[None]:
    """Let a descent take all its steps, and keep all points."""
    return setting(
        descend, max_steps=descend.max_steps, tol=0.0, keep_trace=True, accept="always", backtracking=None
    )


def every_step_loss(model: LatentEnergyClassifier, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy over rows and steps, and the last logits, while `practising`."""
    model.descend.max_steps = batch.steps
    result = model(batch.images, model.step_size * batch.factors)
    assert result.trace is not None
    loss = F.cross_entropy(model.logits(result.trace.outputs), batch.labels[result.trace.row])
    return loss, model.logits(result.y.detach())


class Updates:
    """AdamW on a one-cycle schedule, gradients clipped at norm 1."""

    def __init__(self, model: nn.Module, recipe: Recipe, rows: int) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
        total = recipe.epochs * -(-rows // recipe.batch)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, recipe.learning_rate, total_steps=total
        )

    def __call__(self, loss: Tensor) -> None:
        """Make one."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()


def train(
    model: LatentEnergyClassifier,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    seed: int,
    progress: Callable[[float, float], None],
) -> list[Epoch]:
    """Train the energy model in place; its descent ends set as before.

    `seed` is that of order, corruption, jitter and lengths; ``progress(loss, accuracy)`` is called after each
    update.
    """
    generator = seeded(seed)
    update = Updates(model, recipe, len(images))
    history = []
    model.train()
    with practising(model.descend):
        for _ in range(recipe.epochs):
            begin, sums = time.perf_counter(), torch.zeros(2)
            for batch in batches(images, labels, recipe, generator):
                loss, logits = every_step_loss(model, batch)
                update(loss)
                right = (logits.argmax(dim=1) == batch.labels).float().mean()
                seen = torch.stack((loss.detach(), right))
                sums += seen * len(batch.labels)
                progress(*seen.tolist())
            loss_mean, accuracy = (sums / len(images)).tolist()
            history.append(
                Epoch(loss_mean, accuracy, float(model.step_size.detach()), time.perf_counter() - begin)
            )
    model.eval()
    return history


def train_classifier(model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe, seed: int) -> float:
    """Train an ordinary classifier in place on the same images; return the seconds of an epoch."""
    generator = seeded(seed)
    update = Updates(model, recipe, len(images))
    begin = time.perf_counter()
    model.train()
    for _ in range(recipe.epochs):
        for batch in batches(images, labels, recipe, generator):
            update(F.cross_entropy(model(batch.images), batch.labels))
    model.eval()
    return (time.perf_counter() - begin) / recipe.epochs


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
        milliseconds = clock(features.device)
        self.descent_ms.append(milliseconds(lambda: self.loss(self.behind, given).backward()))
        self.behind.zero_grad()
        losses: list[Tensor] = []

        def update() -> None:
            losses.append(self.loss(self.model, batch))
            self.update(losses[0])

        self.update_ms.append(milliseconds(update))
        return float(losses[0].detach())


def compare(
    model: LatentEnergyClassifier, images: Tensor, labels: Tensor, recipe: Recipe, updates: int, seed: int
) -> dict[str, Any]:
    """Time `updates` single updates of copies in turn on the same batches, and extrapolate to an epoch.

    Returns milliseconds per update (forward, backward and optimiser, the batch given) and of the descent in
    it alone (forward and backward, the features given), the median ratios of plain to kernels within one
    update, and the difference of the two first losses. The number of steps goes through 1 to
    ``recipe.steps`` in turn.
    """
    per_epoch = -(-len(images) // recipe.batch)
    lasting = max(recipe.epochs, -(-(WARM_UP + updates) // per_epoch))  # the schedule has to last
    recipe = replace(recipe, epochs=lasting)
    ways = {
        "kernels": _Way(model, lambda model, batch: every_step_loss(model, batch)[0], recipe, len(images)),
        "plain": _Way(model, plain_loss, recipe, len(images)),
    }
    kernels, plain = ways.values()
    generator = seeded(seed)
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
