"""`route`: an expensive branch for the rows that need it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adaptcomp_ext.nn._tree import check_tree, flatten, unflatten
from adaptcomp_ext.ops import compact, merge_rows
from adaptcomp_ext.ops._checks import check_tensor, describe

__all__ = ["route"]

_LAST = object()


def route(mask: Tensor, branch: Callable[..., Any], *tensors: Any, otherwise: Any = _LAST) -> Any:
    """Run `branch` on the rows where `mask` is true; the others keep what `otherwise` says, and never pass through it.

    ::

        mask      = [1 0 0 1 1]
        tensors   = [a b c d e]       branch is called once, with [a d e], and returns [p q r]
        otherwise = [v w x y z]       result: [p w x q r]

    Parameters
    ----------
    mask : Tensor
        Bool, [B].
    branch : callable
        ``branch(*rows) -> pytree of Tensors``, each with as many rows as it was given, in their order. A module or any function.
    *tensors : Tensor or pytree of Tensors
        Each [B, ...]: what the branch takes. Contiguous or not.
    otherwise : Tensor or pytree of Tensors
        Each [B, ...]; the branch returns its structure, dtypes and row shapes. May also be the last positional argument.

    Returns
    -------
    Tensor or pytree of Tensors
        With the structure of `otherwise`, each [B, ...], new.

    Raises
    ------
    TypeError, ValueError
        Before the branch runs, if `mask` is no bool vector, or tensors have another number of rows or another device; after it,
        if it returns something else than described.

    Notes
    -----
    Differentiable, to any order, in the tensors, in `otherwise` (where the mask is false) and in whatever `branch` holds. A row's
    gradient never meets another path: a NaN or an infinity in the path that a row did not take harms nothing.

    Where no row is true the branch is not called: its parameters then have no gradient from this call, which
    ``DistributedDataParallel`` has to be told (``find_unused_parameters=True``).

    Under autocast the branch may return another floating-point dtype than `otherwise`; it is cast to that.

    On CUDA the host waits once, for the number of rows, without which the branch's input has no shape.

    *Row independence* is the branch's: a matrix product may round a row differently in batches of different sizes, and batch
    statistics are those of the rows routed.

    Examples
    --------
    >>> logits = small(x)
    >>> unsure = logits.softmax(dim=1).amax(dim=1) < 0.9
    >>> logits = ac.route(unsure, large, x, otherwise=logits)
    """
    if otherwise is _LAST:
        if len(tensors) < 1:
            raise TypeError("otherwise: expected what the rows keep where the mask is false, got nothing")
        *most, otherwise = tensors
        tensors = tuple(most)
    if not callable(branch):
        raise TypeError(f"branch: expected a callable, got {describe(branch)}")
    mask = check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected dtype torch.bool, got {mask.dtype}")
    if mask.dim() != 1:
        raise ValueError(f"mask: expected shape [B], got {list(mask.shape)}")
    leaves: list[Tensor] = []
    structures = []
    for i, tree in enumerate(tensors):
        some, structure = check_tree("tensors", tree, i)
        _check_rows(f"tensors[{i}]", some, mask)
        leaves += some
        structures.append(structure)
    base, form = check_tree("otherwise", otherwise)
    _check_rows("otherwise", base, mask)

    rows, index = compact(mask, leaves)
    if not len(index):
        return unflatten([t.clone() for t in base], form)
    at = 0
    arguments = []
    for structure in structures:
        count = structure.num_leaves
        arguments.append(unflatten(list(rows[at : at + count]), structure))
        at += count
    out, out_form = flatten(branch(*arguments))
    _check_branch(out, out_form, base, form, len(index))
    out = [some.to(other.dtype) if some.dtype != other.dtype else some for some, other in zip(out, base, strict=True)]
    return unflatten(list(merge_rows(out, index, base)), form)


def _check_rows(name: str, leaves: list[Tensor], mask: Tensor) -> None:
    for i, leaf in enumerate(leaves):
        where = name if len(leaves) == 1 else f"{name} (leaf {i})"
        if leaf.shape[0] != len(mask):
            raise ValueError(f"{where}: expected {len(mask)} rows like the mask, got shape {list(leaf.shape)}")
        if leaf.device != mask.device:
            raise ValueError(f"{where}: expected a tensor on {mask.device} like the mask, got one on {leaf.device}")


def _check_branch(out: list[Any], out_form: Any, base: list[Tensor], form: Any, rows: int) -> None:
    if out_form != form:
        raise TypeError(f"branch: expected the structure of otherwise, {form}, got {out_form}")
    for i, (some, other) in enumerate(zip(out, base, strict=True)):
        where = "branch" if len(base) == 1 else f"branch (leaf {i})"
        if not isinstance(some, Tensor):
            raise TypeError(f"{where}: expected it to return a Tensor, got {describe(some)}")
        if some.shape != (rows, *other.shape[1:]):
            raise ValueError(f"{where}: expected it to return shape {[rows, *other.shape[1:]]}, got {list(some.shape)}")
        if some.device != other.device:
            raise ValueError(f"{where}: expected it to return a tensor on {other.device}, got one on {some.device}")
        castable = torch.is_autocast_enabled(other.device.type) and some.is_floating_point() and other.is_floating_point()
        if some.dtype != other.dtype and not castable:
            raise TypeError(f"{where}: expected it to return {other.dtype} as in otherwise, got {some.dtype}")
