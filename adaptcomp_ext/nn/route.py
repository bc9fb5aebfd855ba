"""Routing: an expensive branch for the rows that need it, and for no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from adaptcomp_ext.nn._tree import check_alike, check_classed_tree, flatten_like, unflatten
from adaptcomp_ext.ops import compaction
from adaptcomp_ext.ops import route as rows
from adaptcomp_ext.ops._checks import check_tensor, describe
from adaptcomp_ext.ops._plain import check_memory, dress, is_dense, is_released, plain
from adaptcomp_ext.ops._transforms import DIFFERENTIATION, apart, enter


def route(mask: Tensor, branch: Callable[..., Any], *tensors: Any, otherwise: Any = None) -> Any:
    """Run `branch` on the rows where `mask` is true, and merge what it returns with the other rows of `otherwise`.

    The same values as ``torch.where(mask, branch(*tensors), otherwise)``, as far as the branch treats each
    row by itself; but the branch runs on K rows instead of B, forward and backward.

    ::

        mask      = [1 0 0 1 0]
        tensors   = [a b c d e]        the branch gets  [a d]  and returns  [p q]
        otherwise = [v w x y z]        result = [p w x q z]

    - Differentiable, to any order, into the tensors, what the branch holds and `otherwise`. What stands in
      rows that are not chosen, a NaN included, reaches the branch neither forward nor backward; the same goes
      for the chosen rows of `otherwise`.
    - Where the mask is nowhere true, the branch is not called: its parameters get no gradient then (under
      ``DistributedDataParallel`` say ``find_unused_parameters=True``), and the result is a copy of
      `otherwise`.
    - Where it is true everywhere, the branch gets the tensors as they are and its result is returned as it
      is. Nothing is copied, and nothing depends on `otherwise`, which gets no gradient.

    Parameters
    ----------
    mask : Tensor
        Bool, [B].
    branch : callable
        ``branch(*rows)``: gets the rows of each of `tensors` in their order, contiguous, and returns a pytree
        like `otherwise` with K rows.
    *tensors : pytree of Tensor
        At least one; each leaf [B, ...], on the device of the mask, contiguous or not.
    otherwise : pytree of Tensor
        What the other rows are, each leaf [B, ...]. The last positional argument is taken as it if it is not
        given by name: ``route(mask, branch, x, y)`` is ``route(mask, branch, x, otherwise=y)``.

    Returns
    -------
    pytree of Tensor
        Structure, shapes, dtypes and classes of `otherwise`. It shares memory with the inputs only where the
        mask is true everywhere and the branch returns memory of its own inputs.

    Raises
    ------
    TypeError, ValueError
        Before anything runs, if the mask is no bool vector, `branch` cannot be called, or a leaf has another
        number of rows or another device. After the branch, if its result differs from `otherwise` in
        structure, row shape, dtype or device, or has other than K rows.

    Notes
    -----
    Under autocast the branch may return other floating-point dtypes than `otherwise` has: they are converted
    to those. Elsewhere they have to be the same.

    K is a host number, since the branch needs its shape: on CUDA this call waits for the device once, and
    cannot be captured in a CUDA graph. The merge and the backward pass do not wait.
    `adaptcomp_ext.ops.compact_padded` and `adaptcomp_ext.ops.merge_rows` are the parts for a graph, at the
    worst-case size.

    The checks, the index and the two moves cost tens of microseconds on the host, whatever the sizes: where
    the branch takes less than that on all rows, masking is the faster form. ``adaptcomp bench route``
    measures it.

    Not promised: the same bits as with masking where the branch's arithmetic is not row-independent. A matrix
    product may sum in another order for another number of rows, and batch normalisation sees the K rows
    alone.

    Examples
    --------
    >>> fast = small(x)
    >>> doubtful = ac.ops.confidence(fast) < 0.9
    >>> logits = ac.route(doubtful, large, x, otherwise=fast)
    """
    if torch.compiler.is_compiling():
        if (
            torch.compiler.is_exporting()
        ):  # which is refused, by a strict export where the graph would be split
            return _route_apart(mask, branch, tensors, otherwise)
        return _route(mask, branch, tensors, otherwise, _kept_index_apart)
    return _route(mask, branch, tensors, otherwise)


def _route(
    mask: Any,
    branch: Callable[..., Any],
    tensors: tuple[Any, ...],
    otherwise: Any,
    kept_index: Callable[[Tensor], Tensor] = compaction.kept_index,
) -> Any:
    if otherwise is None:
        if not tensors:
            raise TypeError("otherwise: expected a Tensor or a pytree of Tensors, got nothing")
        *tensors, otherwise = tensors  # type: ignore[assignment]
    watch = enter("route", (tensors, otherwise), {"functionalize"}, {"vmap", *DIFFERENTIATION}, mask)
    chosen = _check_mask(mask)
    if not callable(branch):
        raise TypeError(f"branch: expected a callable, got {describe(branch)}")
    if not tensors:
        raise TypeError(
            "tensors: expected at least one Tensor or pytree of Tensors, got none besides otherwise"
        )
    batch, device = chosen.shape[0], chosen.device
    base, structure, kinds = check_classed_tree("otherwise", otherwise)
    check_alike("otherwise", base, batch, device, like="the mask")
    leaves, shapes = [], []
    for i, tree in enumerate(tensors):
        some, shape, classes = check_classed_tree("tensors", tree, i, optional=True)
        check_alike("tensors", some, batch, device, i, like="the mask")
        leaves += some
        shapes.append((shape, classes))

    if watch is not None:
        branch = watch.wrap("branch", branch)
    index = kept_index(chosen)
    count = index.shape[0]
    if count == 0:
        merged = [leaf.clone(memory_format=torch.contiguous_format) for leaf in base]
    elif count == batch:
        merged = _check_result(branch(*tensors), base, structure, count)
    else:
        moved = compaction.gather(leaves, index)
        taken, start = [], 0
        for shape, classes in shapes:
            end = start + shape.num_leaves
            some = moved[start:end]
            taken.append(unflatten(some if classes is None else list(dress(some, classes)), shape))
            start = end
        merged = rows.merge(_check_result(branch(*taken), base, structure, count), base, index)
    return unflatten(merged if kinds is None else list(dress(merged, kinds)), structure)


_route_apart = apart("route", _route)
# The graph is split at the number of rows, so that the branch is still compiled.
_kept_index_apart = apart("route", compaction.kept_index)


def _check_mask(mask: object) -> Tensor:
    chosen = plain("mask", check_tensor("mask", mask))
    if chosen.dtype is not torch.bool:
        raise TypeError(f"mask: expected dtype torch.bool, got {chosen.dtype}")
    if chosen.dim() != 1:
        raise ValueError(f"mask: expected shape [B], got {list(chosen.shape)}")
    if chosen.is_meta:
        raise ValueError("mask: expected a tensor with data, got one on meta")
    check_memory("mask", chosen)
    return chosen


def _check_result(result: Any, base: list[Tensor], structure: Any, count: int) -> list[Tensor]:
    """The leaves of what the branch returned, converted to the dtypes of `base` under autocast."""
    leaves, found = flatten_like(result, structure)
    if (
        found is not structure and found != structure
    ):  # or a tuple with something else than tensors in it, which is told below
        wanted, found = (pytree.tree_structure(tree) for tree in (unflatten(base, structure), result))
        if found != wanted:
            raise TypeError(
                f"branch: expected a result with the structure of otherwise, {wanted}, got {found}"
            )
        pairs = zip(pytree.tree_leaves(result), pytree.tree_leaves(unflatten(base, structure)), strict=True)
        for i, (came, like) in enumerate(
            pairs
        ):  # of which one is None or something else where the other is a tensor
            if isinstance(came, Tensor) != isinstance(like, Tensor):
                expected_one = "None like otherwise" if like is None else "a Tensor as result"
                raise TypeError(
                    f"branch{f' (leaf {i})' if len(base) > 1 else ''}: expected {expected_one}, got {describe(came)}"
                )
    checked = []
    for i, (leaf, like) in enumerate(zip(leaves, base, strict=True)):
        if (  # the usual case first: every test counts where the rows are few
            type(leaf) is Tensor
            and leaf.is_cpu
            and like.is_cpu
            and leaf.dtype is like.dtype
            and is_dense(leaf)
            and leaf.shape == (count, *like.shape[1:])
            and not is_released(leaf)
        ):
            checked.append(leaf)
            continue
        where = "branch" if len(base) == 1 else f"branch (leaf {i})"
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{where}: expected a Tensor as result, got {describe(leaf)}")
        leaf = plain(where, leaf)
        if not is_dense(leaf):
            raise TypeError(f"{where}: expected a dense result, got {describe(leaf)}")
        expected = [count, *like.shape[1:]]
        if list(leaf.shape) != expected:
            raise ValueError(
                f"{where}: expected a result of shape {expected} like otherwise, got {list(leaf.shape)}"
            )
        if leaf.device != like.device:
            raise ValueError(
                f"{where}: expected a result on {like.device} like otherwise, got one on {leaf.device}"
            )
        if leaf.dtype != like.dtype:
            both = leaf.is_floating_point() and like.is_floating_point()
            if not (both and torch.is_autocast_enabled(like.device.type)):
                raise TypeError(
                    f"{where}: expected a result of {like.dtype} like otherwise, got {leaf.dtype}"
                )
            leaf = leaf.to(like.dtype)
        check_memory(where, leaf)
        checked.append(leaf)
    return checked
