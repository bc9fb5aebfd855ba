"""Pytrees of tensors whose first dimension is the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adaptcomp_ext import _C
from adaptcomp_ext.ops._checks import check_device, describe
from adaptcomp_ext.ops._plain import Kinds, check_memory, is_dense, plain

_LEAF = pytree.tree_flatten(0)[1]  # the structure of a bare tensor
_NOTHING: list[Tensor] = []


@dataclass(frozen=True)
class _Tuple:
    """The structure of a tuple of tensors."""

    num_leaves: int

    def __str__(self) -> str:
        return f"a tuple of {self.num_leaves} Tensors"


@dataclass(frozen=True)
class _WithNone:
    """A structure in which some places hold None: it stays there and is no leaf."""

    structure: Any
    is_none: tuple[bool, ...]  # for each place of `structure`

    @property
    def num_leaves(self) -> int:
        """Number of tensors."""
        return self.is_none.count(False)

    def __str__(self) -> str:
        places = ", ".join(str(i) for i, none in enumerate(self.is_none) if none)
        return f"{self.structure} with None for leaf {places}"


_TUPLES = [_Tuple(n) for n in range(17)]  # one object each, so that `is` compares them


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Return leaves and structure; None is not a leaf, but part of the structure.

    A bare tensor and a plain tuple of tensors, the usual states, bypass torch's registry, which takes longer
    than a small step.
    """
    if isinstance(tree, Tensor):
        return [tree], _LEAF
    if type(tree) is tuple and 0 < len(tree) < len(_TUPLES):
        for leaf in tree:
            if not isinstance(leaf, Tensor):
                break
        else:
            return list(tree), _TUPLES[len(tree)]
    leaves, structure = pytree.tree_flatten(tree)
    is_none = tuple([leaf is None for leaf in leaves])
    if True in is_none:
        return [leaf for leaf in leaves if leaf is not None], _WithNone(structure, is_none)
    return leaves, structure


def flatten_like(tree: Any, structure: Any) -> tuple[list[Any], Any]:
    """Flatten a tree into the leaf order of `structure`; its dictionaries may have another order of keys."""
    leaves, treedef = flatten(tree)
    if treedef is structure or treedef == structure:
        return leaves, structure
    spec, is_none = structure, None
    if type(structure) is _WithNone:
        spec, is_none = structure.structure, structure.is_none
    try:
        leaves = spec.flatten_up_to(tree)
    except (AttributeError, ValueError):  # a bare tensor or a tuple; another structure
        return leaves, treedef
    if is_none is None:
        fits = all(isinstance(leaf, Tensor) for leaf in leaves)
    else:
        fits = all((leaf is None) == none for leaf, none in zip(leaves, is_none, strict=True))
        leaves = [leaf for leaf in leaves if leaf is not None]
    return leaves, structure if fits else treedef


def is_container(structure: Any) -> bool:
    """Whether a tree of this structure is a container, not a bare tensor."""
    return structure is not _LEAF


def unflatten(leaves: list[Any], structure: Any) -> Any:
    """Invert `flatten`."""
    if structure is _LEAF:
        return leaves[0]
    if type(structure) is _Tuple:
        return tuple(leaves)
    if type(structure) is _WithNone:
        present = iter(leaves)
        return pytree.tree_unflatten(
            [None if none else next(present) for none in structure.is_none], structure.structure
        )
    return pytree.tree_unflatten(leaves, structure)


OTHER = 2


def form(structure: Any) -> int:
    """Return the structure's code in the compiled loop: 0 a bare tensor, 1 a plain tuple, 2 another one."""
    return 0 if structure is _LEAF else 1 if type(structure) is _Tuple else OTHER


def check_tree(name: str, tree: Any, position: int | None = None) -> tuple[list[Tensor], Any]:
    """Flatten `tree`; require dense leaves with a batch dimension, and return them as plain tensors."""
    leaves, structure, _ = check_classed_tree(name, tree, position)
    return leaves, structure


def check_classed_tree(
    name: str, tree: Any, position: int | None = None, optional: bool = False
) -> tuple[list[Tensor], Any, Kinds]:
    """Run `check_tree`, and also return the leaves' classes; `optional`: the tree may hold only None."""
    leaves, structure = flatten(tree)
    return leaves, structure, check_leaves(name, tree, leaves, structure, position, optional)


def check_leaves(
    name: str, tree: Any, leaves: list[Any], structure: Any, position: int | None, optional: bool
) -> Kinds:
    """Check the leaves of a flattened tree as `check_classed_tree`; make them plain ones, in place."""
    if not torch.compiler.is_dynamo_compiling() and _C.are_ordinary_rows(leaves, _NOTHING):
        return None  # nearly always
    kinds: Kinds = None
    if not leaves and not (optional and type(structure) is _WithNone):
        where = _place(name, position)
        raise TypeError(
            f"{where}: expected a Tensor or a pytree of Tensors, got no tensor in {describe(tree)}"
        )
    for i, leaf in enumerate(leaves):
        where = _place(name, position, leaves, i)
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{where}: expected a Tensor, got {describe(leaf)}")
        if type(leaf) is not Tensor and type(leaf) is not nn.Parameter:
            kinds = kinds or [Tensor] * len(leaves)
            kinds[i] = type(leaf)
            leaves[i] = leaf = plain(where, leaf)
        if not is_dense(leaf):
            raise TypeError(f"{where}: expected a dense tensor, got {describe(leaf)}")
        if leaf.is_complex():
            raise TypeError(f"{where}: expected a real dtype, got {leaf.dtype}")
        if leaf.dim() == 0:
            raise ValueError(f"{where}: expected a batch dimension first, got a tensor without dimensions")
        if not leaf.is_cpu:
            check_device(where, leaf.device)
            if leaf.is_meta:
                raise ValueError(f"{where}: expected a tensor with data, got one on meta")
        check_memory(where, leaf)  # here, because the user's own functions would read it first
    return kinds


def check_batch(
    state: Any,
    leaves: list[Any],
    structure: Any,
    inputs: tuple[Any, ...],
    input_leaves: list[Any],
    structures: list[Any],
) -> tuple[Kinds, Kinds]:
    """Check the flattened state and inputs of a run, tree by tree; return their leaves' classes."""
    kinds = check_leaves("state", state, leaves, structure, None, False)
    batch, device = leaves[0].shape[0], leaves[0].device
    check_alike("state", leaves, batch, device)
    input_kinds: list[type[Tensor]] = []
    for i, (value, treedef) in enumerate(zip(inputs, structures, strict=True)):
        start, end = len(input_kinds), len(input_kinds) + treedef.num_leaves
        own = input_leaves[start:end]
        input_kinds += check_leaves("inputs", value, own, treedef, i, True) or [Tensor] * len(own)
        check_alike("inputs", own, batch, device, i)
        input_leaves[start:end] = own
    plain_inputs = all(kind is Tensor for kind in input_kinds)
    return kinds, None if plain_inputs else input_kinds


def check_alike(
    name: str,
    leaves: list[Tensor],
    batch: int,
    device: torch.device,
    position: int | None = None,
    like: str = "the state",
) -> None:
    """Require that every leaf has `batch` rows on `device`, as `like` has."""
    for i, leaf in enumerate(leaves):
        if leaf.shape[0] != batch:
            where = _place(name, position, leaves, i)
            raise ValueError(f"{where}: expected {batch} rows like {like}, got shape {list(leaf.shape)}")
        if leaf.device != device:
            where = _place(name, position, leaves, i)
            raise ValueError(f"{where}: expected a tensor on {device} like {like}, got one on {leaf.device}")


def _place(name: str, position: int | None, leaves: list[Any] | None = None, i: int = 0) -> str:
    where = name if position is None else f"{name}[{position}]"
    return where if leaves is None or len(leaves) == 1 else f"{where} (leaf {i})"
