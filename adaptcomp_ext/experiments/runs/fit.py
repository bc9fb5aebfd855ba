"""An ordinary training loop that goes on after an interruption as if there had been none."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint

__all__ = ["fit", "shuffled"]

Loss = Callable[[Tensor, float], tuple[Tensor, Mapping[str, Tensor]]]


def shuffled(rows: int, batch: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """The rows of an epoch in an order that seed and epoch determine, cut into batches of indices."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(rows, generator=generator).split(batch)


def fit(
    model: nn.Module,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    *,
    rows: int,
    batch: int,
    epochs: int,
    seed: int,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    clip: float | None = None,
    checkpoint: Checkpoint | None = None,
    tick: Callable[[float], None] | None = None,
    after: Callable[[int], Mapping[str, float]] | None = None,
) -> list[dict[str, float]]:
    """Train in place.

    Parameters
    ----------
    model : nn.Module
        In training mode for each epoch, in evaluation mode for `after` and at the end.
    loss : callable
        ``loss(index, done) -> (loss, others)``: of the rows `index`, `done` in [0, 1) being the share of all
        updates made before this one; `others` are scalars to be averaged over the epoch.
    optimizer, schedule
        Stepped after every update.
    clip : float, optional
        The gradient is shortened to this norm where it is longer.
    rows, batch, epochs, seed : int
        Each epoch visits all rows once, in an order of its own: `shuffled`.
    checkpoint : Checkpoint, optional
        Written after each epoch; training goes on from it, with the same bits as without the interruption.
    tick : callable
        Called with the share done, after each update.
    after : callable
        ``after(epoch)``: what is measured after an epoch; becomes part of the history.

    Returns
    -------
    list of dict
        For each epoch ``loss``, ``seconds``, the averages of `others`, and what `after` returned.
    """
    history = checkpoint.load(model, optimizer, schedule) if checkpoint else []
    updates = epochs * -(-rows // batch)
    for epoch in range(len(history), epochs):
        begin = time.perf_counter()
        sums: dict[str, Tensor] = {}
        model.train()
        order = shuffled(rows, batch, seed, epoch)
        for i, index in enumerate(order):
            done = (epoch * len(order) + i) / updates
            value, others = loss(index, done)
            optimizer.zero_grad()
            value.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if schedule is not None:
                schedule.step()
            for name, part in {"loss": value, **others}.items():
                sums[name] = sums.get(name, torch.zeros(())) + part.detach() * len(index)
            if tick:
                tick((epoch * len(order) + i + 1) / updates)
        entry = {name: float(total) / rows for name, total in sums.items()}
        entry["seconds"] = time.perf_counter() - begin
        model.eval()
        if after:
            entry.update(after(epoch))
        history.append(entry)
        if checkpoint:
            checkpoint.save(model, optimizer, schedule, history)
    model.eval()
    return history
