"""The autograd node of a descent, whose outputs have been computed already.

Its backward pass runs a function again, with a graph. A node that does so has to take copies of its inputs.
On the inputs themselves, an input that was computed from another one, or from a source of the energy, would
pass their gradient on twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adaptcomp_ext.nn._modes import without_autocast
from adaptcomp_ext.nn.descent.compiled import is_second_derivative_error, second_derivative_error
from adaptcomp_ext.ops._library import Function
from adaptcomp_ext.ops._transforms import check_gradients

Inputs = Sequence[Tensor | None]


class Work(Protocol):
    """The derivatives of a node's outputs."""

    @property
    def own(self) -> int:
        """Return how many inputs, the first ones, `function` copies. It reaches the others itself."""
        ...

    def function(self, inputs: Inputs) -> Sequence[Tensor]:
        """Compute the outputs again, with a graph."""
        ...

    def gradients(
        self, inputs: Inputs, upstream: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Return the gradients of the inputs that need one, given the gradients of the outputs."""
        ...


def copies(inputs: Inputs, own: int, needed: Sequence[bool]) -> list[Tensor | None]:
    """Replace the first `own` inputs by copies without a graph, as leaves where they need a gradient."""
    first = [
        None if t is None else t.detach().requires_grad_() if wanted else t.detach()
        for t, wanted in zip(inputs[:own], needed, strict=False)
    ]
    return [*first, *inputs[own:]]


def attach(work: Work, outputs: list[Tensor], inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the outputs with the gradient that `work` computes, as functions of the inputs."""
    return list(_Node.apply(work, outputs, *inputs))


class _Node(Function):
    """The node of outputs that have already been computed; `work` computes their gradient."""

    @staticmethod
    def forward(ctx: Any, work: Work, outputs: list[Tensor], *inputs: Tensor | None) -> Any:
        ctx.work = work
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return tuple(t.detach() for t in outputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        check_gradients("EnergyDescent", upstream)
        work = ctx.work
        needed = ctx.needs_input_grad[2:]
        with without_autocast():
            try:
                grads = _gradients(work, ctx.saved_tensors, upstream, needed)
            except RuntimeError as error:
                if is_second_derivative_error(error):
                    raise second_derivative_error() from error
                raise
        return (None, None, *grads)


def _gradients(
    work: Work, inputs: Inputs, upstream: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of the inputs; they are differentiable where gradients are recorded."""
    if not torch.is_grad_enabled():
        return work.gradients(inputs, upstream, needed)
    return list(_Adjoint.apply(work, len(upstream), needed, *upstream, *inputs))


class _Adjoint(Function):
    """The gradients of the inputs as outputs of a node, for second derivatives."""

    @staticmethod
    def forward(
        ctx: Any, work: Work, outputs: int, needed: Sequence[bool], *tensors: Tensor | None
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
        gradients = iter(third)
        return (None, None, None, *(next(gradients) if need else None for need in needs))
