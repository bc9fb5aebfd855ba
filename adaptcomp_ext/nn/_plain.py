"""Whether a module does what its class says: its own `forward`, nothing hooked onto it, its weights plain parameters."""

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
"""Where ``nn.Module`` keeps what is hooked onto a call of it, and how to call that."""


def hooked(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks of its own."""
    return any(getattr(module, name, None) for name in _CALLED)


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Hook onto calls of one module what is hooked onto calls of another."""
    for name in (*_CALLED, *_ABOUT_HOOKS):
        getattr(target, name).update(getattr(source, name))
    if source._backward_hooks:
        target._is_full_backward_hook = source._is_full_backward_hook


def altered(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a call of the module, hooks apart, may compute something else than `base`, a class of torch's, does."""
    kind = type(module)
    if "forward" in vars(module) or "_conv_forward" in vars(module):
        return True
    names = ("forward", "__call__", "_conv_forward")
    return kind is not base and any(
        getattr(kind, name, None) is not getattr(base, name, None) for name in names
    )


def copied(name: str, module: Module) -> Module:
    """Return a deep copy, or say of which argument there is none."""
    # Weights that hooks compute, as of torch's older weight_norm, are no leaves, which deepcopy refuses: they
    # are computed anew.
    computed = [
        value
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, Tensor) and value.requires_grad and not value.is_leaf
    ]
    try:
        return copy.deepcopy(module, {id(value): value.detach().clone() for value in computed})
    except Exception as error:  # locks, handles, whatever a user's module holds
        raise TypeError(
            f"{name}: expected a module that copy.deepcopy can copy, got {type(module).__name__}: {error}"
        ) from error


def intact(module: nn.Module) -> bool:
    """Whether a module is one of torch's own as it came, so that a call of it does what its class says and nothing else."""
    return (
        type(module).__module__.startswith("torch.nn.modules.")
        and "forward" not in vars(module)
        and not hooked(module)
    )
