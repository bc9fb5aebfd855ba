"""An ordinary training loop that goes on after an interruption as if there had been none."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from adaptcomp_ext.experiments.device import seeded
from adaptcomp_ext.experiments.files import write_tensors

__all__ = ["Checkpoint", "fit", "shuffled"]

Loss = Callable[[Tensor, float], tuple[Tensor, Mapping[str, Tensor]]]
Schedule = torch.optim.lr_scheduler.LRScheduler


class Checkpoint:
    """Model, optimizer, schedule, history and torch's random state after an epoch, in one safetensors file.

    A kill at any moment leaves the old file or the new one.

    Parameters
    ----------
    path : Path
        The file; its folder exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule | None,
        history: list[dict[str, float]],
    ) -> None:
        """Write; `history` has an entry for each epoch done."""
        state = optimizer.state_dict()
        tensors: dict[str, Tensor] = {f"model.{k}": v for k, v in model.state_dict().items()}
        tensors["rng"] = torch.get_rng_state()
        device = torch.get_default_device()
        if device.type == "cuda":
            tensors["cuda rng"] = torch.cuda.get_rng_state(device)
        scalars: dict[str, dict[str, Any]] = {}
        for index, slots in state["state"].items():
            for key, value in slots.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{key}"] = value
                else:
                    scalars.setdefault(str(index), {})[key] = value
        about = {
            "history": history,
            "groups": state["param_groups"],
            "scalars": scalars,
            "schedule": None if schedule is None else schedule.state_dict(),
        }
        write_tensors(self.path, tensors, {"about": json.dumps(about)})

    def load(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule | None
    ) -> list[dict[str, float]]:
        """Restore in place and return the history; an empty one where there is no file.

        Raises
        ------
        ValueError
            If the file is damaged or of another model.
        """
        if not self.path.is_file():
            return []
        try:
            with torch.device("cpu"), safe_open(self.path, "pt") as file:
                about = json.loads(file.metadata()["about"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            own = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
            model.load_state_dict(own)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{self.path}: expected a checkpoint of this model, found something else ({error})"
            ) from None
        state: dict[int, dict[str, Any]] = {int(index): slots for index, slots in about["scalars"].items()}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": state, "param_groups": about["groups"]})
        if schedule is not None:
            schedule.load_state_dict(about["schedule"])
        torch.set_rng_state(tensors["rng"])
        if "cuda rng" in tensors:
            torch.cuda.set_rng_state(tensors["cuda rng"], torch.get_default_device())
        return list(about["history"])


def shuffled(rows: int, batch: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """The rows of an epoch in an order that seed and epoch determine, cut into batches of indices."""
    return torch.randperm(rows, generator=seeded(seed * 1_000_003 + epoch)).split(batch)


def fit(
    model: nn.Module,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    *,
    rows: int,
    batch: int,
    epochs: int,
    seed: int,
    schedule: Schedule | None = None,
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
