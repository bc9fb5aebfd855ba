"""Compaction, which moves the active rows together, and its adjoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaptcomp_ext import _C, reference
from adaptcomp_ext.ops import _checks
from adaptcomp_ext.ops._backend import current, is_differentiable, needs_grad, on_cuda, on_reference, place
from adaptcomp_ext.ops._library import Function, register
from adaptcomp_ext.ops._plain import dress, kinds_of
from adaptcomp_ext.ops._transforms import EVERYTHING, OP, check_gradients, enter, has_values, on_values


# --- raw ops ------------------------------------------------------------------------------------------------
def _compact_index_kernel(keep: Tensor) -> Tensor:
    if not on_cuda(keep.device):
        index, kept = _compact_index_on_cpu(keep)
        return index.resize_(kept)
    index, count = _compact_index_padded_kernel(keep)
    return index[: int(count)]  # the exact size needs the count on the host


def _compact_index_on_cpu(keep: Tensor) -> tuple[Tensor, int]:
    index = torch.empty_like(keep, dtype=torch.int64)  # contiguous, because it has one dimension
    return index, _C.compact_index([keep, keep.shape[0], index, None, None, 0, *place(keep.device)])


def _compact_index_padded_kernel(keep: Tensor) -> tuple[Tensor, Tensor]:
    if not on_cuda(keep.device):
        index, kept = _compact_index_on_cpu(keep)
        index[kept:] = -1
        return index, torch.tensor(kept, device=keep.device)
    n = keep.shape[0]
    index = keep.new_empty((n,), dtype=torch.int64)
    where = place(keep.device)
    count = keep.new_empty((), dtype=torch.int64)
    with current(keep.device):
        temp = keep.new_empty((_C.compact_temp_bytes(n),), dtype=torch.uint8)
    _C.compact_index([keep, n, index, count, temp, temp.shape[0], *where])
    return index, count


def gather_rows_kernel(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """Gather rows without the dispatcher, also for the halting loop, which has checked its tensors."""
    return _C.gather_rows(tensors, index, *place(index.device))


def _scatter_rows_kernel(tensors: Sequence[Tensor], index: Tensor, size: int) -> list[Tensor]:
    return _C.scatter_rows(tensors, index, size, *place(index.device))


def _compact_index_fake(keep: Tensor) -> Tensor:
    return keep.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)


def _compact_index_padded_fake(keep: Tensor) -> tuple[Tensor, Tensor]:
    return keep.new_empty(keep.shape, dtype=torch.int64), keep.new_empty((), dtype=torch.int64)


def _rows_fake(tensors: Sequence[Tensor], rows: Any) -> list[Tensor]:
    return [t.new_empty((rows, *t.shape[1:])) for t in tensors]


_compact_index = register(
    "compact_index(Tensor keep) -> Tensor", _compact_index_kernel, _compact_index_fake, tensor_at=0
)
_compact_index_padded = register(
    "compact_index_padded(Tensor keep) -> (Tensor, Tensor)",
    _compact_index_padded_kernel,
    _compact_index_padded_fake,
    tensor_at=0,
)
_gather_rows = register(
    "gather_rows(Tensor[] tensors, Tensor index) -> Tensor[]",
    gather_rows_kernel,
    lambda tensors, index: _rows_fake(tensors, index.shape[0]),
    tensor_at=1,
)
_scatter_rows = register(
    "scatter_rows(Tensor[] tensors, Tensor index, SymInt size) -> Tensor[]",
    _scatter_rows_kernel,
    lambda tensors, index, size: _rows_fake(tensors, size),
    tensor_at=1,
)


# --- autograd: gather and scatter are each other's adjoint --------------------------------------------------
class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(index)
        ctx.size = tensors[0].shape[0]
        ctx.set_materialize_grads(False)
        out = tuple(_gather_rows(list(tensors), index))
        ctx.mark_non_differentiable(*[t for t in out if not is_differentiable(t)])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        given = [g for g in grads if g is not None]
        check_gradients("ops.compact", given)
        back = iter(_scatter(given, index, ctx.size))
        return (None, *(None if g is None else next(back) for g in grads))


class _Scatter(Function):
    @staticmethod
    def forward(ctx: Any, index: Tensor, size: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(index)
        ctx.set_materialize_grads(False)
        out = tuple(_scatter_rows(list(tensors), index, size))
        ctx.mark_non_differentiable(*[t for t in out if not is_differentiable(t)])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        given = [g for g in grads if g is not None]
        check_gradients("ops.scatter_rows", given)
        back = iter(gather(given, index))
        return (None, None, *(None if g is None else next(back) for g in grads))


def gather(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """Return the rows at `index`, differentiably and without checks."""
    if on_reference():
        return reference.gather_rows(tensors, index)
    return list(_Gather.apply(index, *tensors)) if needs_grad(tensors) else _gather_rows(list(tensors), index)


def _scatter(tensors: Sequence[Tensor], index: Tensor, size: int) -> list[Tensor]:
    if on_reference():
        return reference.scatter_rows(tensors, index, size)
    return (
        list(_Scatter.apply(index, size, *tensors))
        if needs_grad(tensors)
        else _scatter_rows(list(tensors), index, size)
    )


# --- public -------------------------------------------------------------------------------------------------
def _tensor_list(name: str, tensors: object, rows: int, device: torch.device) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        tensors = [tensors]
    if not isinstance(tensors, Sequence):
        raise TypeError(
            f"{name}: expected a Tensor or a sequence of Tensors, got {_checks.describe(tensors)}"
        )
    return [_checks.check_rows(name, t, rows, device, i) for i, t in enumerate(tensors)]


def _dressed(rows: list[Tensor], tensors: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return `rows` in the classes of `tensors`, from which they come."""
    kinds = kinds_of([tensors] if isinstance(tensors, Tensor) else tensors)
    return tuple(rows if kinds is None else dress(rows, kinds))


def _check_keep(keep: object) -> Tensor:
    mask = _checks.check_tensor("keep", keep)
    if mask.dtype != torch.bool:
        raise TypeError(f"keep: expected dtype torch.bool, got {mask.dtype}")
    if mask.dim() != 1:
        raise ValueError(f"keep: expected shape [B], got {list(mask.shape)}")
    return mask


def compact(keep: Tensor, tensors: Tensor | Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Keep the rows where `keep` is true, in all tensors at once.

    - The order is stable: rows keep their order. The inputs are unchanged.
    - Any number of tensors, of any dtypes and shapes, is compacted in one pass over the rows.
    - The rows are differentiable, to any order, in floating-point and complex tensors: the backward pass is
      the matching scatter.

    ::

        keep    = [1 0 0 1 1]
        tensors = [a b c d e]
        rows    = [a d e]        index = [0 3 4]

    Parameters
    ----------
    keep : Tensor
        Bool, [B].
    tensors : Tensor or sequence of Tensor
        Each [B, ...], on the device of `keep`, contiguous or not.

    Returns
    -------
    rows : tuple of Tensor
        Each [K, ...], K the number of true entries; contiguous.
    index : Tensor
        int64 [K]: the input row that each row comes from.

    Raises
    ------
    TypeError, ValueError
        If `keep` is not a bool vector, or a tensor has another number of rows or another device.

    Notes
    -----
    The host needs K, so that on CUDA the call waits for the device once. `compact_padded` does not wait.
    """
    mask = _check_keep(keep)
    rows = _tensor_list("tensors", tensors, mask.shape[0], mask.device)
    enter("ops.compact", rows, OP, EVERYTHING, mask)
    index = kept_index(mask)
    return _dressed(gather(rows, index), tensors), index


def compact_padded(
    keep: Tensor, tensors: Tensor | Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Compact into a block of B rows: the shapes do not depend on `keep`, and the host never waits.

    ::

        keep    = [1 0 0 1 1]
        tensors = [a b c d e]
        rows    = [a d e 0 0]    index = [0 3 4 -1 -1]    count = 3

    The rows are stable and differentiable as those of `compact`. The call can be captured in a CUDA graph and
    in ``torch.compile(fullgraph=True)``.

    Parameters
    ----------
    keep, tensors
        As for `compact`.

    Returns
    -------
    rows : tuple of Tensor
        Each [B, ...]; the rows from `count` on are zero.
    index : Tensor
        int64 [B]; -1 from `count` on.
    count : Tensor
        int64 scalar on the device of `keep`.

    Raises
    ------
    TypeError, ValueError
        As `compact` does.
    """
    mask = _check_keep(keep)
    rows = _tensor_list("tensors", tensors, mask.shape[0], mask.device)
    enter("ops.compact_padded", rows, OP, EVERYTHING, mask)
    index, count = compact_index_padded(mask)
    return _dressed(gather(rows, index), tensors), index, count


def scatter_rows(tensors: Tensor | Sequence[Tensor], index: Tensor, size: int) -> tuple[Tensor, ...]:
    """Put rows back at the places that `compact` took them from; the other rows are zero.

    Parameters
    ----------
    tensors : Tensor or sequence of Tensor
        Each [K, ...], of any dtype, on the device of `index`.
    index : Tensor
        int64 [K], distinct, less than `size`. Rows whose index is negative are left out.
    size : int
        B, the number of rows of the result.

    Returns
    -------
    tuple of Tensor
        Each [B, ...], contiguous.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described; see below for what is not checked.

    Notes
    -----
    The result is differentiable, to any order: the backward pass is the gather. Not checked: that the indices
    are distinct; and, on CUDA or in a compiled graph, that they are less than `size`.
    """
    where = _checks.check_tensor("index", index)
    if where.dtype != torch.int64 or where.dim() != 1:
        raise TypeError(f"index: expected int64 of shape [K], got {_checks.describe(where)}")
    if not torch.compiler.is_compiling():
        _checks.check_int("size", size, 0)
    rows = _tensor_list("tensors", tensors, where.shape[0], where.device)
    enter("ops.scatter_rows", rows, OP, EVERYTHING, where)
    if not (where.is_meta or on_cuda(where.device)) and where.numel() and has_values():
        largest = on_values(lambda: int(where.max()))
        if largest >= size:
            raise ValueError(f"index: expected entries less than size = {size}, got {largest}")
    return _dressed(_scatter(rows, where, size), tensors)


def compact_index_padded(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return index and count of `compact_padded`, for the halting loop."""
    return reference.compact_index_padded(keep) if on_reference() else _compact_index_padded(keep)


def kept_index(keep: Tensor) -> Tensor:
    """Return the index of `compact`, for `route`."""
    return reference.compact_index(keep) if on_reference() else _compact_index(keep)
