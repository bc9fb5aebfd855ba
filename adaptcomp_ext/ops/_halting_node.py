"""The autograd node of a step of the compiled halting loop: csrc/bindings/halt_node.h."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adaptcomp_ext import _C, reference
from adaptcomp_ext.ops._library import Function
from adaptcomp_ext.ops._transforms import check_gradients


class HaltNode(Function):
    """The halting step and its compaction as one node, so that the backward pass writes each gradient once.

    The kernels have already run, and ``_C.HaltNode``, the first argument, holds what the node keeps of them.
    """

    forward = staticmethod(_C.halt_node_forward)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        check_gradients("AdaptiveHalt", grads)
        if torch.is_grad_enabled():  # under create_graph: the reference can be differentiated in its turn
            return _differentiable(ctx.node, ctx.saved_tensors, grads)
        gradients: tuple[Any, ...] = _C.halt_node_backward(ctx.node, ctx.saved_tensors, grads)
        return gradients


# Bypasses the part of torch.autograd.Function.apply for functorch, whose wrappers never get here.
apply: Callable[..., Any] = super(torch.autograd.Function, HaltNode).apply


def _differentiable(
    node: _C.HaltNode, saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]
) -> tuple[Any, ...]:
    it = iter(grads)
    g_output = next(it) if node.has_readout else None
    g_totals = [next(it) for _ in range(node.totals)]
    g_results = [next(it) if node.has_results else None for _ in range(node.leaves)]
    g_next = [next(it) if node.has_next else None for _ in range(node.leaves + node.inputs)]
    row = torch.tensor(node.row, dtype=torch.int64)
    flag = torch.tensor(node.flag, dtype=torch.int8)
    place = torch.tensor(node.place, dtype=torch.int64) if node.place else None
    results = [*g_results, *[None] * node.inputs]
    first: list[Tensor | None] = []
    if node.act:
        logits, before, readout = saved
        weight = torch.empty_like(before)  # the reference computes it again
        g_readout, g_logits, g_before, g_moved = reference.act_halt_backward(
            *(row, flag, place, logits.reshape(-1), before, weight, readout, g_output, results, g_next),
            *(g_totals[0], next(it) if node.has_next else None, node.readout_dtype, node.shared),
            *(node.bounds, node.threshold),
        )
        first = [g_logits.to(logits.dtype).reshape(logits.shape), g_before]
    else:
        g_readout, _, _, g_moved = reference.halt_rows_backward(
            *(row, flag, place, None, None, g_output, results, g_next, [], node.readout_dtype, node.shared)
        )
    return (
        *(None, *first),
        *([g_readout] if node.has_readout and not node.shared else []),
        *([g_output] if node.has_readout else []),
        *(*g_totals, *g_moved[: node.leaves]),
        *(g_results if node.has_results else []),
        *g_moved[node.leaves :],
    )
