"""Training state in one safetensors file, written so that a kill at any moment leaves the old one or the new one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from adaptcomp_ext.experiments.files import write_tensors

__all__ = ["Checkpoint"]


class Checkpoint:
    """Model, optimizer, schedule, history and torch's random state after an epoch.

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
        schedule: torch.optim.lr_scheduler.LRScheduler | None,
        history: list[dict[str, float]],
    ) -> None:
        """Write; `history` has an entry for each epoch done."""
        state = optimizer.state_dict()
        tensors: dict[str, Tensor] = {f"model.{k}": v for k, v in model.state_dict().items()}
        tensors["rng"] = torch.get_rng_state()
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
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler | None,
    ) -> list[dict[str, float]]:
        """Restore in place and return the history; an empty one if there is no file.

        Raises
        ------
        ValueError
            If the file is damaged or of another model.
        """
        if not self.path.is_file():
            return []
        try:
            with safe_open(self.path, "pt") as file:
                about = json.loads(file.metadata()["about"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            model.load_state_dict(
                {k[len("model.") :]: v for k, v in tensors.items() if k.startswith("model.")}
            )
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{self.path}: expected a checkpoint of this model, found something else ({error})"
            ) from None
        state: dict[int, dict[str, Any]] = {
            int(index): dict(slots) for index, slots in about["scalars"].items()
        }
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": state, "param_groups": about["groups"]})
        if schedule is not None:
            schedule.load_state_dict(about["schedule"])
        torch.set_rng_state(tensors["rng"])
        return list(about["history"])
