"""Routing: an expensive branch runs on the rows that need it, and on no others."""

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
from adaptcomp_ext.ops._plain import check_memory, dress, exporting, is_dense, is_released, plain
from adaptcomp_ext.ops._transforms import DIFFERENTIATION, apart, enter
from adaptcomp_ext.reference._broadcast import over


def route(mask: Tensor, branch: Callable[..., Any], *tensors: Any, otherwise: Any = None) -> Any:
    """Run `branch` on the rows where `mask` is true, and take the other rows from `otherwise`.

    The result has the values of ``torch.where(mask, branch(*tensors), otherwise)``, provided that the branch
    is row-independent; but the branch runs on K rows instead of B, forward and backward.

    ::

        mask      = [1 0 0 1 0]
        tensors   = [a b c d e]        the branch gets  [a d]  and returns  [p q]
        otherwise = [v w x y z]        result = [p w x q z]

    - The result is differentiable, to any order, in the tensors, in `otherwise` and in the branch's own
      parameters. Values in rows that are not chosen, NaN included, do not reach the branch, forward or
      backward; nor do the chosen rows of `otherwise` reach the result.
    - If the mask is false everywhere, the branch is not called: its parameters get no gradient (use
      ``find_unused_parameters=True`` with ``DistributedDataParallel``), and the result is a copy of
      `otherwise`.
    - If the mask is true everywhere, the branch gets the tensors themselves, and its result is returned.
      Nothing is copied, and `otherwise` gets no gradient.

    Parameters
    ----------
    mask : Tensor
        Bool, [B].
    branch : callable
        ``branch(*rows)``: gets the chosen rows of each of `tensors`, in order, contiguous, and returns a
        pytree like `otherwise` with K rows.
    *tensors : pytree of Tensor
        At least one; each leaf [B, ...], on the device of the mask, contiguous or not.
    otherwise : pytree of Tensor
        The values of the other rows, each leaf [B, ...]. By default the last positional argument:
        ``route(mask, branch, x, y)`` is ``route(mask, branch, x, otherwise=y)``.

    Returns
    -------
    pytree of Tensor
        A pytree with the structure, shapes, dtypes and classes of `otherwise`. It shares memory with the
        inputs only if the mask is true everywhere and the branch returns memory of its inputs.

    Raises
    ------
    TypeError, ValueError
        Before the branch runs, if the mask is not a bool vector, `branch` is not callable, or a leaf has
        another number of rows or another device. After the branch, if its result differs from `otherwise` in
        structure, row shape, dtype or device, or does not have K rows.
    RuntimeError
        If a transform of torch is active that the call cannot serve; the message names the way out.

    Notes
    -----
    Under autocast the branch may return other floating-point dtypes than those of `otherwise`, to which they
    are converted. Without autocast the dtypes have to be the same.

    The host needs K for the branch's shapes: on CUDA the call waits for the device once, and cannot be
    captured in a CUDA graph. An exported program has no sizes that data decide: there all rows go through the
    branch, and are masked. The merge and the backward pass do not wait. In a graph use
    `adaptcomp_ext.ops.compact_padded` and `adaptcomp_ext.ops.merge_rows`, which work on B rows.

    Checks, index and the two copies cost tens of microseconds on the host, whatever the sizes: masking is
    faster if the branch takes less than that on all rows. ``adaptcomp bench route`` measures it.

    Not promised: the same bits as with masking if the branch's arithmetic is not row-independent. A matrix
    product may sum in another order for another number of rows, and batch normalisation averages over the K
    rows alone.

    Examples
    --------
    >>> fast = small(x)
    >>> doubtful = ac.ops.confidence(fast) < 0.9
    >>> logits = ac.route(doubtful, large, x, otherwise=fast)
    """
    if torch.compiler.is_compiling():
        if exporting():
            if torch.compiler.is_dynamo_compiling():  # it raises, because the graph would be split
                return _route_apart(mask, branch, tensors, otherwise)
            return _route(mask, branch, tensors, otherwise)
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
    watch = None
    if not exporting():
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
    leaves, trees = [], []
    for i, tree in enumerate(tensors):
        tree_leaves, treedef, classes = check_classed_tree("tensors", tree, i, optional=True)
        check_alike("tensors", tree_leaves, batch, device, i, like="the mask")
        leaves += tree_leaves
        trees.append((treedef, classes))

    if watch is not None:
        branch = watch.wrap("branch", branch)
    if exporting():
        # The number of chosen rows is no size that a program can have: all rows go through the branch.
        everywhere = _check_result(branch(*tensors), base, structure, batch)
        merged = [torch.where(over(chosen, b), e, b) for e, b in zip(everywhere, base, strict=True)]
        return unflatten(merged if kinds is None else list(dress(merged, kinds)), structure)
    index = kept_index(chosen)
    count = index.shape[0]
    if count == 0:
        merged = [leaf.clone(memory_format=torch.contiguous_format) for leaf in base]
    elif count == batch:
        merged = _check_result(branch(*tensors), base, structure, count)
    else:
        compacted = compaction.gather(leaves, index)
        arguments, start = [], 0
        for treedef, classes in trees:
            end = start + treedef.num_leaves
            tree_leaves = compacted[start:end]
            tree_leaves = tree_leaves if classes is None else list(dress(tree_leaves, classes))
            arguments.append(unflatten(tree_leaves, treedef))
            start = end
        merged = rows.merge(_check_result(branch(*arguments), base, structure, count), base, index)
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
    """Return the leaves of the branch's result, converted to the dtypes of `base` under autocast."""
    leaves, treedef = flatten_like(result, structure)
    # They also differ where a tuple holds something other than tensors: the leaves are compared below.
    if treedef is not structure and treedef != structure:
        wanted, treedef = (pytree.tree_structure(tree) for tree in (unflatten(base, structure), result))
        if treedef != wanted:
            raise TypeError(
                f"branch: expected a result with the structure of otherwise, {wanted}, got {treedef}"
            )
        pairs = zip(pytree.tree_leaves(result), pytree.tree_leaves(unflatten(base, structure)), strict=True)
        for i, (leaf, like) in enumerate(pairs):
            if isinstance(leaf, Tensor) != isinstance(like, Tensor):
                where = f"branch (leaf {i})" if len(base) > 1 else "branch"
                wanted_leaf = "None like otherwise" if like is None else "a Tensor as result"
                raise TypeError(f"{where}: expected {wanted_leaf}, got {describe(leaf)}")
    checked = []
    for i, (leaf, like) in enumerate(zip(leaves, base, strict=True)):
        if (  # the usual case first: with few rows every test costs
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
