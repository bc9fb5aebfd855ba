"""Buffers that follow from a module's sizes: no state_dict holds them, so they have to survive what empties a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["WithConstants"]


class WithConstants(nn.Module):
    """Base of modules with such buffers: `constants` makes them; they are made again after ``to_empty`` and on leaving meta."""

    def constants(self) -> dict[str, Tensor]:
        """Buffers by name, on any device."""
        raise NotImplementedError

    def register_constants(self) -> None:
        """Register them, out of the state_dict; once the sizes are known."""
        for name, value in self.constants().items():
            self.register_buffer(name, value, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WithConstants:
        super()._apply(fn, recurse)
        for name, value in self.constants().items():
            now = self._buffers[name]
            if now is not None and not now.is_meta:
                value = value.to(now)
                if not torch.equal(now, value):  # `to_empty` left garbage
                    self._buffers[name] = value
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, *rest)
        device = next((v.device for v in state_dict.values() if isinstance(v, Tensor)), None)
        if device is not None:
            self.leave_meta(device)  # with assign=True nothing else takes these along

    def leave_meta(self, device: torch.device) -> None:
        """Make on `device` what is still on the meta device."""
        if any(self._buffers[name].is_meta for name in self.constants()):  # type: ignore[union-attr]
            for name, value in self.constants().items():
                self._buffers[name] = value.to(device)
