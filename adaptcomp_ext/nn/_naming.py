"""What the repr of a module says of plain functions, which PyTorch leaves out."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn


def name_of(function: Any) -> str:
    """The name of a callable as it reads in the source."""
    if isinstance(function, functools.partial):
        return f"partial({name_of(function.func)})"
    if inspect.isbuiltin(function):  # of torch, whose classes for them nobody knows
        return function.__name__
    name = getattr(function, "__qualname__", None) or type(function).__name__
    return str(name).rpartition("<locals>.")[2]


def named(**functions: Any) -> str:
    """Each of the `functions` with its name, for ``extra_repr``; modules are shown by PyTorch, and None is not shown."""
    shown = [
        f"{role}={name_of(f)}, "
        for role, f in functions.items()
        if f is not None and not isinstance(f, nn.Module)
    ]
    return "".join(shown)
