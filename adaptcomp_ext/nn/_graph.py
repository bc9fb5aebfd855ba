"""Walks through a graph of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def reached(
    values: Sequence[Tensor], but: Sequence[Tensor], computed: dict[Any, Tensor] | None = None
) -> list[Tensor]:
    """Return the leaves that the graph of `values` reaches, in the order of the walk.

    The walk stops at the tensors `but`, which are not returned, and at those of `computed` (tensors by their
    edges), which are returned in place of the leaves behind them.
    """
    own = {id(t) for t in but if t.is_leaf}
    seen = {t.grad_fn for t in but if t.grad_fn is not None}
    leaves: dict[int, Tensor] = {}
    stack = [value.grad_fn for value in values]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        edges = node.next_functions
        if not edges:  # a leaf's node, or that of a function without inputs
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in own:
                leaves.setdefault(id(leaf), leaf)
        if not computed:
            stack.extend([behind for behind, _ in edges])
            continue
        for following in edges:
            tensor = computed.get(following)
            if tensor is None:
                stack.append(following[0])
            else:
                leaves.setdefault(id(tensor), tensor)
    return list(leaves.values())


def edge(tensor: Tensor) -> tuple[Any, int]:
    """Return where gradients of a tensor arrive: a node of the graph, and the number of its output."""
    if tensor.grad_fn is not None:
        return tensor.grad_fn, tensor.output_nr
    with torch.enable_grad():
        view = tensor.view_as(tensor)
    assert view.grad_fn is not None
    arrival: tuple[Any, int] = view.grad_fn.next_functions[0]
    return arrival
