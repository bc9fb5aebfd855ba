"""The torch.library namespace ``adaptcomp``: registration of the raw ops.

They are registered by ``define`` and ``impl``, because ``custom_op`` and ``register_autograd`` cost three
times as much per call. The raw ops are private and have no gradient; a public function wraps its raw op in an
``autograd.Function`` where a gradient is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from adaptcomp_ext.ops._transforms import is_direct


class Function(torch.autograd.Function):
    """Base of the autograd functions: torch's own, whose `apply` has no types."""

    if TYPE_CHECKING:

        @classmethod
        def apply(cls, *arguments: Any) -> Any: ...


_LIBRARY = torch.library.Library("adaptcomp", "DEF")


def register(
    schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], tensor_at: int | None = None
) -> Callable[..., Any]:
    """Register a kernel for CPU and CUDA with its shape function, and return the callable op.

    torch's dispatcher costs as much as a kernel on few rows. With `tensor_at`, the position of a tensor among
    the arguments, it is bypassed where it would do nothing but call the kernel. Such a kernel must not write
    to its arguments.
    """
    op = _define(schema, kernel, fake)
    if tensor_at is None:
        return op

    def call(*arguments: Any) -> Any:
        if is_direct(arguments[tensor_at]):
            try:
                return kernel(*arguments)
            except TypeError:  # a tensor without an address, such as a wrapper of a transform that has ended
                pass
        return op(*arguments)

    return call


def define_differentiable(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register an operator with a gradient for graphs of torch.compile, and return it.

    Two calls with the same arguments are two runs: they may draw random numbers.
    """
    op = _define(schema, kernel, fake, (torch.Tag.nondeterministic_seeded,))
    name = schema.split("(", 1)[0]
    torch.library.register_autograd(f"adaptcomp::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    return op


def _define(
    schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], tags: tuple[torch.Tag, ...] = ()
) -> Callable[..., Any]:
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=tags)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"adaptcomp::{name}", fake, lib=_LIBRARY)
    op: Callable[..., Any] = getattr(torch.ops.adaptcomp, name).default
    return op
