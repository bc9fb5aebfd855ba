"""Float32 arithmetic: in float16 a floor of 1e-16 and small squares are 0, and a slope of 1e8 is infinite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from adaptcomp_ext.ops import _library

__all__ = ["outside_autocast", "wide"]

Function = Callable[..., Tensor]
_functorch = getattr(torch._C, "_functorch", None)
_interpreter = getattr(_functorch, "peek_interpreter_stack", lambda: None)


def wide(x: Tensor) -> Tensor:
    """Convert half precision to float32; leave other dtypes unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def outside_autocast(function: Function, *tensors: Tensor) -> Tensor:
    """Return ``function(*tensors)`` with autocast off, also in a backward pass inside the autocast block."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return function(*tensors)
    if torch.compiler.is_compiling() or _interpreter() is not None or forward_ad._current_level >= 0:
        # They cannot differentiate through the autograd.Function below.
        with torch.autocast(device, enabled=False):
            return function(*tensors)
    out: Tensor = _Outside.apply(function, *tensors)
    return out


class _Outside(_library.Function):
    """Recompute in the backward pass: a graph of the forward pass would run its products under autocast."""

    @staticmethod
    def forward(ctx: Any, function: Function, *tensors: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        with torch.autocast(tensors[0].device.type, enabled=False):
            return function(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        again = torch.is_grad_enabled()  # create_graph
        tensors = [t if again else t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        needed = [t for t in tensors if t.requires_grad]
        with torch.enable_grad(), torch.autocast(tensors[0].device.type, enabled=False):
            out = ctx.function(*tensors)
            gradients = iter(torch.autograd.grad(out, needed, grads, create_graph=again))
        return None, *(next(gradients) if t.requires_grad else None for t in tensors)
