"""Buffers that follow from a module's sizes: no state_dict holds them; they are recomputed when lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["WithConstants"]


class WithConstants(nn.Module):
    """Base of modules with such buffers: `constants` computes them, again after ``to_empty`` and meta."""

    def constants(self) -> dict[str, Tensor]:
        """Return the buffers by name, on any device."""
        raise NotImplementedError

    def register_constants(self) -> None:
        """Register the buffers outside of the state_dict; to be called when the sizes are known."""
        for name, value in self.constants().items():
            self.register_buffer(name, value, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WithConstants:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        for name, value in self.constants().items():
            now = self._buffers[name]
            if now is not None and not now.is_meta:
                value = value.to(now)
                if not torch.equal(now, value):  # `to_empty` has left it uninitialised
                    self._buffers[name] = value
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, *rest)
        device = next((v.device for v in state_dict.values() if isinstance(v, Tensor)), None)
        if device is not None:
            self.leave_meta(device)  # with assign=True nothing else moves these

    def leave_meta(self, device: torch.device) -> None:
        """Compute buffers that are still on the meta device on `device`."""
        if any(self._buffers[name].is_meta for name in self.constants()):  # type: ignore[union-attr]
            for name, value in self.constants().items():
                self._buffers[name] = value.to(device)
