"""The torch.library namespace ``adaptcomp``: registration of the raw ops.

Define and implement, without ``custom_op`` and without ``register_autograd``: a third of their cost per call.
The raw ops are private and know no gradient; each public function wraps its own in an ``autograd.Function``
where one is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from adaptcomp_ext.ops._transforms import is_direct

_LIBRARY = torch.library.Library("adaptcomp", "DEF")


def register(
    schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], tensor_at: int | None = None
) -> Callable[..., Any]:
    """Register a kernel for CPU and CUDA with its shape function, and return the callable op.

    The dispatcher takes as long as a kernel on few rows. With `tensor_at`, the position of a tensor among the
    arguments, it is left out where it would do nothing but call the kernel, which must then write to none of
    its arguments.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"adaptcomp::{name}", fake, lib=_LIBRARY)
    op: Callable[..., Any] = getattr(torch.ops.adaptcomp, name).default
    if tensor_at is None:
        return op

    def call(*arguments: Any) -> Any:
        if is_direct(arguments[tensor_at]):
            try:
                return kernel(*arguments)
            except (
                TypeError
            ):  # a tensor without an address, such as a wrapper that its transform has left behind
                pass
        return op(*arguments)

    return call
