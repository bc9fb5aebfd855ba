"""The modes of torch in which a backward pass evaluates the user's function again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

Autocast = list[tuple[str, torch.dtype, bool]]
"""Device type, dtype and switch."""


def autocast_of(device: torch.device) -> Autocast:
    """Return autocast as it is now, for the CPU and the device."""
    kinds = {"cpu", device.type}
    return [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]


@contextlib.contextmanager
def recording(autocast: Sequence[tuple[str, torch.dtype, bool]]) -> Iterator[None]:
    """Record gradients, leave inference mode, and switch autocast as given."""
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for kind, dtype, enabled in autocast:
            stack.enter_context(torch.autocast(kind, dtype, enabled))
        stack.enter_context(torch.enable_grad())
        yield


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Switch autocast off: a backward pass computes in the recorded dtypes, wherever it was called."""
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
