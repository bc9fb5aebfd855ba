"""The torch.library namespace ``adaptcomp``: registration of the raw ops.

Define and implement, without ``custom_op`` and without ``register_autograd``: a third of their cost per call. The raw ops
are private and know no gradient; each public function wraps its own in an ``autograd.Function`` where one is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("adaptcomp", "DEF")


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register a kernel for CPU and CUDA with its shape function, and return the callable op."""
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"adaptcomp::{name}", fake, lib=_LIBRARY)
    op: Callable[..., Any] = getattr(torch.ops.adaptcomp, name).default
    return op
