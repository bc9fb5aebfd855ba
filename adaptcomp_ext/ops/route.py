"""Merging the rows of a branch with the rows that did not take it, and the adjoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptcomp_ext import _C, reference
from adaptcomp_ext.ops import _checks
from adaptcomp_ext.ops._backend import is_differentiable, needs_grad, on_cuda, on_reference, place
from adaptcomp_ext.ops._library import Function, register
from adaptcomp_ext.ops._plain import dress, kinds_of
from adaptcomp_ext.ops._transforms import EVERYTHING, OP, check_gradients, enter, has_values


# --- raw ops ------------------------------------------------------------------------------------------------
def _merge_rows_kernel(rows: Sequence[Tensor], otherwise: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    size = otherwise[0].shape[0] if otherwise else 0
    return _C.merge_rows(rows, otherwise, index, size, *place(index.device))


def _split_rows_kernel(grads: Sequence[Tensor], index: Tensor, with_rows: bool) -> list[Tensor]:
    size = grads[0].shape[0] if grads else 0
    return _C.split_rows(grads, index, size, with_rows, *place(index.device))


def _merge_rows_fake(rows: Sequence[Tensor], otherwise: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    return [o.new_empty(o.shape) for o in otherwise]


def _split_rows_fake(grads: Sequence[Tensor], index: Tensor, with_rows: bool) -> list[Tensor]:
    rows = [g.new_empty((index.shape[0], *g.shape[1:])) for g in grads] if with_rows else []
    return rows + [g.new_empty(g.shape) for g in grads]


_merge_rows: Callable[..., list[Tensor]] = register(
    "merge_rows(Tensor[] rows, Tensor[] otherwise, Tensor index) -> Tensor[]",
    _merge_rows_kernel,
    _merge_rows_fake,
    tensor_at=2,
)
# Returns the gradients of the rows, if `with_rows`, followed by those of the other rows.
_split_rows: Callable[..., list[Tensor]] = register(
    "split_rows(Tensor[] grads, Tensor index, bool with_rows) -> Tensor[]",
    _split_rows_kernel,
    _split_rows_fake,
    tensor_at=1,
)


# --- autograd: merge and split are each other's adjoint -----------------------------------------------------
class _Merge(Function):
    @staticmethod
    def forward(ctx: Any, index: Tensor, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(index)
        ctx.count = count
        ctx.set_materialize_grads(False)
        out = tuple(_merge_rows(list(tensors[:count]), list(tensors[count:]), index))
        ctx.mark_non_differentiable(*[t for t in out if not is_differentiable(t)])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        with_rows = any(ctx.needs_input_grad[2 : 2 + ctx.count])
        given = [g for g in grads if g is not None]
        check_gradients("ops.merge_rows", given)
        split = _split(given, index, with_rows)
        rows, others = iter(split[: len(split) - len(given)]), iter(split[len(split) - len(given) :])
        g_rows = [next(rows) if g is not None and with_rows else None for g in grads]
        g_otherwise = [None if g is None else next(others) for g in grads]
        return (None, None, *g_rows, *g_otherwise)


class _Split(Function):
    @staticmethod
    def forward(ctx: Any, index: Tensor, with_rows: bool, *grads: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(index)
        ctx.with_rows = with_rows
        return tuple(_split_rows(list(grads), index, with_rows))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        if not ctx.with_rows:  # without the rows the split is a projection, its own adjoint
            return (None, None, *_split(grads, index, False))
        count = len(grads) // 2
        return (None, None, *merge(grads[:count], grads[count:], index))


def merge(rows: Sequence[Tensor], otherwise: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """Run `merge_rows` without its checks."""
    if on_reference():
        return reference.merge_rows(rows, otherwise, index)
    if needs_grad(rows) or needs_grad(otherwise):
        return list(_Merge.apply(index, len(rows), *rows, *otherwise))
    return _merge_rows(list(rows), list(otherwise), index)


def _split(grads: Sequence[Tensor], index: Tensor, with_rows: bool) -> list[Tensor]:
    if on_reference():
        rows, otherwise = reference.split_rows(grads, index)
        return rows + otherwise if with_rows else otherwise
    if needs_grad(grads):
        return list(_Split.apply(index, with_rows, *grads))
    return _split_rows(list(grads), index, with_rows)


# --- public -------------------------------------------------------------------------------------------------
def _check_index(index: object) -> Tensor:
    where = _checks.check_tensor("index", index)
    if where.dtype != torch.int64 or where.dim() != 1:
        raise TypeError(f"index: expected int64 of shape [K], got {_checks.describe(where)}")
    return where


def _check_order(index: Tensor, size: int) -> None:
    """Require, on the CPU, strictly ascending entries below `size`, with negative ones only at the end."""
    if index.is_meta or on_cuda(index.device) or not has_values():
        return
    if not _C.in_order([index, index.shape[0], size]):
        raise ValueError(
            f"index: expected distinct entries in ascending order, less than {size} (the rows of otherwise), "
            f"negative ones only at the end, got {index}"
        )


def _check_pair(i: int, rows: Tensor, otherwise: Tensor) -> None:
    if rows.dtype != otherwise.dtype:
        raise TypeError(f"rows[{i}]: expected {otherwise.dtype} like otherwise[{i}], got {rows.dtype}")
    if rows.shape[1:] != otherwise.shape[1:]:
        expected = ", ".join(map(str, ["K", *otherwise.shape[1:]]))
        raise ValueError(
            f"rows[{i}]: expected shape [{expected}] like otherwise[{i}], got {list(rows.shape)}"
        )


def _sequence(name: str, tensors: object) -> Sequence[object]:
    if isinstance(tensors, Tensor):
        return [tensors]
    if not isinstance(tensors, Sequence):
        raise TypeError(
            f"{name}: expected a Tensor or a sequence of Tensors, got {_checks.describe(tensors)}"
        )
    return tensors


def merge_rows(
    rows: Tensor | Sequence[Tensor], index: Tensor, otherwise: Tensor | Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Put rows in the places that `compact` took them from, and take the other rows from `otherwise`.

    - Any number of tensors, of any dtypes and shapes, is merged in one pass over the rows: each row of the
      result is read once and written once. The inputs are unchanged.
    - The result is differentiable, to any order, in floating-point and complex tensors: the backward pass is
      the matching split, also in one pass. Values of `otherwise` in replaced rows, NaN included, reach
      neither result nor gradient.

    ::

        index  = [0 3]
        rows   = [p q]        otherwise = [a b c d e]
        result = [p b c q e]

    Parameters
    ----------
    rows : Tensor or sequence of Tensor
        Each [K, ...], contiguous or not.
    index : Tensor
        int64 [K], strictly ascending, less than B, as `compact` returns it. It may end in negative entries,
        as from `compact_padded`; their rows are left out.
    otherwise : Tensor or sequence of Tensor
        One tensor for each of `rows`, [B, ...], with its dtype and row shape, on the device of `index`.

    Returns
    -------
    tuple of Tensor
        Each [B, ...], contiguous; it shares no memory with the inputs.

    Raises
    ------
    TypeError, ValueError
        If a tensor of `rows` does not fit `index` or its tensor of `otherwise`; on the CPU, also if the index
        is not in order.

    Notes
    -----
    The host never waits for a CUDA device, and the call can be captured in a CUDA graph and in
    ``torch.compile(fullgraph=True)``. Not checked: on CUDA or in a compiled graph, that the index ascends and
    is less than B; the result of any other index is undefined.
    """
    where = _check_index(index)
    given, others = _sequence("rows", rows), _sequence("otherwise", otherwise)
    if len(given) != len(others):
        raise ValueError(f"rows: expected {len(others)} tensors like otherwise, got {len(given)}")
    if not others:
        return ()
    first = _checks.check_tensor("otherwise[0]", others[0])
    size = first.shape[0] if first.dim() else 0
    count, device = where.shape[0], where.device
    put, base = [], []
    for i, (r, o) in enumerate(zip(given, others, strict=True)):
        base.append(_checks.check_rows("otherwise", o if i else first, size, device, i))
        put.append(_checks.check_rows("rows", r, count, device, i))
        _check_pair(i, put[i], base[i])
    if count > size:
        raise ValueError(f"index: expected at most {size} entries, the rows of otherwise, got {count}")
    enter("ops.merge_rows", [*put, *base], OP, EVERYTHING, where)
    _check_order(where, size)
    return tuple(dress(merge(put, base, where), kinds_of(others)))
