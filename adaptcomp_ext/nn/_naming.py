"""Names of plain functions for the repr of a module, where PyTorch shows modules only."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn


def name_of(function: Any) -> str:
    """Return the name of a callable as it stands in the source."""
    if isinstance(function, functools.partial):
        return f"partial({name_of(function.func)})"
    if inspect.isbuiltin(function):  # a function of torch: its qualified name has an internal class
        return function.__name__
    name = getattr(function, "__qualname__", None) or type(function).__name__
    return str(name).rpartition("<locals>.")[2]


def named(**functions: Any) -> str:
    """Return the names of plain functions for ``extra_repr``; PyTorch shows modules, and None is left out."""
    shown = [
        f"{role}={name_of(f)}, "
        for role, f in functions.items()
        if f is not None and not isinstance(f, nn.Module)
    ]
    return "".join(shown)
