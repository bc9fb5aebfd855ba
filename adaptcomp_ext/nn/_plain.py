"""Tests whether a module computes what its class defines: without hooks and with the class's `forward`."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

__all__ = ["altered", "copied", "hooked", "intact", "move_hooks"]

Module = TypeVar("Module", bound=nn.Module)

_CALLED = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_ABOUT_HOOKS = (
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
"""The attributes in which ``nn.Module`` keeps hooks, and how to call them."""


def hooked(module: nn.Module) -> bool:
    """Whether a call of the module runs its own hooks."""
    return any(getattr(module, name, None) for name in _CALLED)


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Add the hooks of one module to another."""
    for name in (*_CALLED, *_ABOUT_HOOKS):
        getattr(target, name).update(getattr(source, name))
    if source._backward_hooks:
        target._is_full_backward_hook = source._is_full_backward_hook


def altered(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a call of the module, without hooks, may differ from that of `base`, a class of torch."""
    kind = type(module)
    if "forward" in vars(module) or "_conv_forward" in vars(module):
        return True
    names = ("forward", "__call__", "_conv_forward")
    return kind is not base and any(
        getattr(kind, name, None) is not getattr(base, name, None) for name in names
    )


def copied(name: str, module: Module) -> Module:
    """Return a deep copy, or raise TypeError for the argument `name`."""
    # deepcopy refuses weights that hooks compute, as of torch's older weight_norm, because they are not
    # leaves. The next call computes them again.
    computed = [
        value
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, Tensor) and value.requires_grad and not value.is_leaf
    ]
    try:
        return copy.deepcopy(module, {id(value): value.detach().clone() for value in computed})
    except Exception as error:  # a user's module may hold locks or handles
        raise TypeError(
            f"{name}: expected a module that copy.deepcopy can copy, got {type(module).__name__}: {error}"
        ) from error


def intact(module: nn.Module) -> bool:
    """Whether a module is an unchanged torch module, so that a call computes what its class defines."""
    return (
        type(module).__module__.startswith("torch.nn.modules.")
        and "forward" not in vars(module)
        and not hooked(module)
    )
