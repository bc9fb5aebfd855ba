"""The device of torch on which the models and the data of a run live.

A cell runs with its device as torch's default device (see `settings`), so that whatever is made in it is made
there. What comes from elsewhere, such as images from files, is moved by `here`; random numbers that have a
seed of their own come from `seeded`.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from adaptcomp_ext.ops._backend import HAS_CUDA
from adaptcomp_ext.ops._checks import describe

__all__ = ["device_named", "gpus", "here", "seeded"]

T = TypeVar("T")


def device_named(name: str) -> torch.device:
    """Return the device of this name, after a check that it can be used.

    Parameters
    ----------
    name : str
        "cpu", "cuda" or "cuda:N".

    Raises
    ------
    TypeError
        If it is not a str.
    ValueError
        If it names no such device, or a GPU that this machine or this build of the package does not have.
    """
    if not isinstance(name, str):
        raise TypeError(f"device: expected a str, got {describe(name)}")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: expected cpu, since torch finds no GPU here, got {name!r}")
        if not HAS_CUDA:
            raise ValueError(
                f"device: expected cpu, since adaptcomp_ext was built without CUDA, got {name!r}; reinstall "
                "it on a machine with nvcc"
            )
        last = torch.cuda.device_count() - 1
        if device.index is not None and device.index > last:
            known = "cuda:0" if last == 0 else f"cuda:0 to cuda:{last}"
            raise ValueError(f"device: expected cpu or one of {known}, got {name!r}")
    return device


def here(value: T) -> T:
    """Move a tensor, or the tensors of a dataclass, to torch's default device."""
    device = torch.get_default_device()
    moved: Any = value
    if isinstance(value, Tensor):
        moved = value.to(device)
    elif is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: getattr(value, f.name) for f in fields(value)}
        moved = replace(value, **{k: v.to(device) for k, v in parts.items() if isinstance(v, Tensor)})
    return moved


def seeded(seed: int) -> torch.Generator:
    """Make a generator with a seed on torch's default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def gpus() -> list[int]:
    """Return the GPU that is torch's default device, if it is one, for `torch.random.fork_rng`."""
    device = torch.get_default_device()
    if device.type != "cuda":
        return []
    return [torch.cuda.current_device() if device.index is None else device.index]
