"""Gradients of a function that is run again for them, and which may be differentiated once more.

A custom autograd node that recomputes its graph has to do so on copies of its inputs: on the inputs
themselves, one that was computed from another, or from the leaves that the function reaches on its own, would
pass their gradient on twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Inputs = Sequence[Tensor | None]


class Work(Protocol):
    """How the outputs of a node are differentiated."""

    @property
    def own(self) -> int:
        """How many inputs, the first ones, `function` takes copies of; the others it reaches on its own."""
        ...

    def function(self, inputs: Inputs) -> Sequence[Tensor]:
        """The outputs again, with a graph."""
        ...

    def gradients(
        self, inputs: Inputs, upstream: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients of the inputs that need one, from those of the outputs."""
        ...


def copies(inputs: Inputs, own: int, needed: Sequence[bool]) -> list[Tensor | None]:
    """The first `own` inputs without their past, as leaves where they need a gradient; and the others as they are."""
    first = [
        None if t is None else t.detach().requires_grad_() if wanted else t.detach()
        for t, wanted in zip(inputs[:own], needed, strict=False)
    ]
    return [*first, *inputs[own:]]


def backward(
    work: Work, inputs: Inputs, upstream: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of the inputs; differentiable where gradients are recorded, which runs `work.function` again."""
    if not torch.is_grad_enabled():
        return work.gradients(inputs, upstream, needed)
    return list(_Adjoint.apply(work, len(upstream), needed, *upstream, *inputs))


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Where a backward pass computes in the dtypes of the forward pass, as recorded, wherever it was called."""
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        work: Work,
        outputs: int,
        needed: Sequence[bool],
        *tensors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        ctx.work, ctx.own, ctx.outputs, ctx.needed = work, work.own, outputs, needed
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple(work.gradients(tensors[outputs:], tensors[:outputs], needed))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *second: Tensor | None) -> tuple[Any, ...]:
        tensors, outputs = ctx.saved_tensors, ctx.outputs
        needs = ctx.needs_input_grad[3:]
        with torch.enable_grad(), without_autocast():
            # Second derivatives mix all that was differentiated the first time, whether or not its own
            # gradient is needed now.
            inputs = copies(
                tensors[outputs:], ctx.own, [a or b for a, b in zip(ctx.needed, needs[outputs:], strict=True)]
            )
            upstream = copies(tensors[:outputs], outputs, needs[:outputs])
            results = ctx.work.function(inputs)
            pairs = [
                (r, g) for r, g in zip(results, upstream, strict=True) if g is not None and r.requires_grad
            ]
            wanted = [t for t, need in zip(inputs, ctx.needed, strict=True) if need and t is not None]
            first = torch.autograd.grad(
                [r for r, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True
            )
            at = iter(first)
            whole = [next(at) if need else None for need in ctx.needed]
            terms = [
                (f, g)
                for f, g in zip(whole, second, strict=True)
                if f is not None and g is not None and f.requires_grad
            ]
            targets = [
                t for t, need in zip([*upstream, *inputs], needs, strict=True) if need and t is not None
            ]
            third: Sequence[Tensor | None] = [None] * len(targets)
            if terms:
                third = torch.autograd.grad(
                    [f for f, _ in terms], targets, [g for _, g in terms], allow_unused=True
                )
        found = iter(third)
        return (None, None, None, *(next(found) if need else None for need in needs))
