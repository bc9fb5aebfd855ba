"""Routing: rows that took a branch, merged with those that did not, and its adjoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaptcomp_ext import _C, reference
from adaptcomp_ext.ops import _checks
from adaptcomp_ext.ops._backend import is_differentiable, on_reference, place
from adaptcomp_ext.ops._library import register
from adaptcomp_ext.ops.compaction import gather_rows


# --- raw ops ----------------------------------------------------------------------------------------------------------------
def _merge_rows_kernel(rows: Sequence[Tensor], index: Tensor, otherwise: Sequence[Tensor]) -> list[Tensor]:
    return _C.merge_rows(rows, index, otherwise, otherwise[0].shape[0] if otherwise else 0, *place(index.device))


def _split_rows_kernel(grads: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    return _C.split_rows(grads, index, grads[0].shape[0] if grads else 0, *place(index.device))


def _split_rows_fake(grads: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    taken = [g.new_empty((index.shape[0], *g.shape[1:])) for g in grads]
    return taken + [g.new_empty(g.shape) for g in grads]


_merge_rows = register(
    "merge_rows(Tensor[] rows, Tensor index, Tensor[] otherwise) -> Tensor[]",
    _merge_rows_kernel,
    lambda rows, index, otherwise: [t.new_empty(t.shape) for t in otherwise],
)
_split_rows = register("split_rows(Tensor[] grads, Tensor index) -> Tensor[]", _split_rows_kernel, _split_rows_fake)


# --- autograd: merging and splitting are each other's adjoint -----------------------------------------------------------------
class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        n = len(tensors) // 2
        ctx.save_for_backward(index)
        ctx.set_materialize_grads(False)
        out = tuple(_merge_rows(list(tensors[:n]), index, list(tensors[n:])))
        ctx.mark_non_differentiable(*(t for t in out if not is_differentiable(t)))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        n = len(grads)
        given = [i for i in range(n) if grads[i] is not None]
        some = [g for g in grads if g is not None]
        back: list[Tensor | None] = [None] * (2 * n)
        if any(ctx.needs_input_grad[1 + n :]):
            both = _split(some, index)
            for k, i in enumerate(given):
                back[i], back[n + i] = both[k], both[len(given) + k]
        else:  # nobody asks for the other half
            for k, rows in zip(given, gather_rows(some, index), strict=True):
                back[k] = rows
        return (None, *back)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, index: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(index)
        return tuple(_split_rows(list(grads), index))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        n = len(grads) // 2
        return (None, *_merge(grads[:n], index, grads[n:]))


def _needs_grad(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _merge(rows: Sequence[Tensor], index: Tensor, otherwise: Sequence[Tensor]) -> list[Tensor]:
    if on_reference():
        return reference.merge_rows(rows, index, otherwise)
    if _needs_grad([*rows, *otherwise]):
        return list(_Merge.apply(index, *rows, *otherwise))
    return _merge_rows(list(rows), index, list(otherwise))


def _split(grads: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    if on_reference():
        return reference.split_rows(grads, index)
    return list(_Split.apply(index, *grads)) if _needs_grad(grads) else _split_rows(list(grads), index)


# --- public -------------------------------------------------------------------------------------------------------------------
def merge_rows(rows: Tensor | Sequence[Tensor], index: Tensor, otherwise: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Put rows where `compact` took them from, and keep the others as they are, in all tensors at once.

    - The inputs are unchanged; rows of `otherwise` that are replaced are not even read.
    - Any number of tensors, of any dtypes and shapes, in one pass over the rows.
    - Differentiable, to any order, in the floating-point and complex tensors: the backward pass splits the gradient.

    ::

        rows      = [p q r]      index = [0 3 4]
        otherwise = [a b c d e]
        merged    = [p b c q r]

    Parameters
    ----------
    rows : Tensor or sequence of Tensor
        Each [K, ...].
    index : Tensor
        int64 [K], ascending, less than B, as `compact` returns it; from `compact_padded`, the -1 at its end are left out.
    otherwise : Tensor or sequence of Tensor
        As many, each [B, ...], of the dtypes and row shapes of `rows`.

    Returns
    -------
    tuple of Tensor
        Each [B, ...]; contiguous.

    Raises
    ------
    TypeError, ValueError
        If dtypes, shapes, devices or numbers of tensors do not agree.

    Notes
    -----
    Not checked: that the index ascends; and, on CUDA or in a compiled graph, that its entries are less than B.
    On CUDA the host never waits.
    """
    where = _checks.check_tensor("index", index)
    if where.dtype != torch.int64 or where.dim() != 1:
        raise TypeError(f"index: expected int64 of shape [K], got {_checks.describe(where)}")
    some = _tensors("rows", rows)
    base = _tensors("otherwise", otherwise)
    if len(some) != len(base):
        raise ValueError(f"rows: expected {len(base)} tensors as in otherwise, got {len(some)}")
    if not base:
        return ()
    batch = base[0].shape[0] if base[0].dim() else 0
    for i, (row, other) in enumerate(zip(some, base, strict=True)):
        _checks.check_rows(f"rows[{i}]", row, where.shape[0], where.device)
        _checks.check_rows(f"otherwise[{i}]", other, batch, where.device)
        if row.dtype != other.dtype:
            raise TypeError(f"rows[{i}]: expected {other.dtype} as in otherwise, got {row.dtype}")
        if row.shape[1:] != other.shape[1:]:
            raise ValueError(f"rows[{i}]: expected rows of shape {list(other.shape[1:])}, got {list(row.shape[1:])}")
    if not torch.compiler.is_compiling() and where.device.type == "cpu" and where.numel() and int(where.max()) >= batch:
        raise ValueError(f"index: expected entries less than the batch of {batch}, got {int(where.max())}")
    return tuple(_merge(some, where, base))


def _tensors(name: str, tensors: object) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        return [tensors]
    if not isinstance(tensors, Sequence):
        raise TypeError(f"{name}: expected a Tensor or a sequence of Tensors, got {_checks.describe(tensors)}")
    return [_checks.check_tensor(f"{name}[{i}]", t) for i, t in enumerate(tensors)]
