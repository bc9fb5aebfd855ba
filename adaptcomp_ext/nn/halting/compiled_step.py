"""The step as `torch.compile` runs it within a loop: `AdaptiveHalt`'s ``compile_step``.

Blocks shrink, so that a step sees many numbers of rows. It is compiled once for the first of them, once for
any number, and once for a single row, which torch treats as a case of its own: three graphs at most for each
mode and dtype, whatever the halting pattern.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class CompiledSteps:
    """The compiled step, or the compiled stages of a ModuleList."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[Any, Callable[..., Any]]] = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Become empty in a copy, which has other modules, and in a pickle."""
        return type(self), ()

    def one(self, step: Any) -> Callable[..., Any]:
        """Return a step, compiled."""
        known = self._of.get(id(step))
        if known is None or known[0] is not step:
            known = self._of[id(step)] = (step, torch.compile(step))
        return known[1]

    def all(self, step: Any) -> Any:
        """Return a step, or the stages of a ModuleList, compiled."""
        return [self.one(stage) for stage in step] if isinstance(step, nn.ModuleList) else self.one(step)
