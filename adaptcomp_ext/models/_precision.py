"""Numbers that stay in float32 in a model of half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adaptcomp_ext.ops._backend import compute_dtype

__all__ = ["Precise", "wide"]


def wide(t: Tensor) -> Tensor:
    """Convert to float32 (float64 stays): half precision loses differences that are small beside 1."""
    return t.to(compute_dtype(t.dtype))


class Precise(nn.Module):
    """A module whose buffers in `precise` are not narrowed by ``half()``, ``bfloat16()`` or ``to(dtype)``.

    A rounded threshold would call other rows than it was calibrated to, and a rounded running mean would
    ignore small updates.
    """

    precise: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: getattr(self, name) for name in self.precise}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        for name, buffer in before.items():
            now = getattr(self, name)
            if torch.finfo(now.dtype).bits < torch.finfo(buffer.dtype).bits:
                setattr(self, name, buffer.to(now.device))
        return self
