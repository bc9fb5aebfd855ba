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
    is_none: tuple[bool, ...]  # of each place of `structure`

    @property
    def num_leaves(self) -> int:
        """Of the tensors."""
        return self.is_none.count(False)

    def __str__(self) -> str:
        places = ", ".join(str(i) for i, none in enumerate(self.is_none) if none)
        return f"{self.structure} with None for leaf {places}"


_TUPLES = [_Tuple(n) for n in range(17)]  # one object each, so that comparing two is comparing identities


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Leaves and structure; None is no leaf, but part of the structure.

    A bare tensor and a plain tuple of tensors, the usual states, skip torch's registry, which takes longer
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
    """`flatten`, where dictionaries may have their keys in another order than in `structure`: the leaves come in its order."""
    leaves, found = flatten(tree)
    if found is structure or found == structure:
        return leaves, structure
    spec, is_none = structure, None
    if type(structure) is _WithNone:
        spec, is_none = structure.structure, structure.is_none
    try:
        leaves = spec.flatten_up_to(tree)
    except (AttributeError, ValueError):  # a bare tensor or a tuple; another structure
        return leaves, found
    if is_none is None:
        fits = all(isinstance(leaf, Tensor) for leaf in leaves)
    else:
        fits = all((leaf is None) == none for leaf, none in zip(leaves, is_none, strict=True))
        leaves = [leaf for leaf in leaves if leaf is not None]
    return leaves, structure if fits else found


def is_container(structure: Any) -> bool:
    """Whether a tree of this structure is an object of its own beside its tensors."""
    return structure is not _LEAF


def unflatten(leaves: list[Any], structure: Any) -> Any:
    """The inverse of `flatten`."""
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


def form(structure: Any) -> int:
    """The structure as the compiled loop knows it: a bare tensor, a plain tuple of them, or something else."""
    return 0 if structure is _LEAF else 1 if type(structure) is _Tuple else 2


def check_tree(name: str, tree: Any, position: int | None = None) -> tuple[list[Tensor], Any]:
    """Flatten `tree`, require that every leaf is a dense tensor with a batch dimension, and make it a plain one."""
    leaves, structure, _ = check_classed_tree(name, tree, position)
    return leaves, structure


def check_classed_tree(
    name: str, tree: Any, position: int | None = None, optional: bool = False
) -> tuple[list[Tensor], Any, Kinds]:
    """`check_tree`, and the classes that the leaves had; `optional`: None may be all there is."""
    leaves, structure = flatten(tree)
    return leaves, structure, check_leaves(name, tree, leaves, structure, position, optional)


def check_leaves(
    name: str, tree: Any, leaves: list[Any], structure: Any, position: int | None, optional: bool
) -> Kinds:
    """What `check_classed_tree` requires of the leaves of a flattened tree. They become plain ones, in place."""
    if not torch.compiler.is_dynamo_compiling() and _C.are_ordinary_rows(leaves, _NOTHING):
        return None  # nearly always, and found in one call
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
    """Check the flattened state and inputs of a run, tree by tree. Returns the classes that their leaves had."""
    kinds = check_leaves("state", state, leaves, structure, None, False)
    batch, device = leaves[0].shape[0], leaves[0].device
    check_alike("state", leaves, batch, device)
    input_kinds: list[type[Tensor]] = []
    for i, (value, how) in enumerate(zip(inputs, structures, strict=True)):
        start, end = len(input_kinds), len(input_kinds) + how.num_leaves
        some = input_leaves[start:end]
        input_kinds += check_leaves("inputs", value, some, how, i, True) or [Tensor] * len(some)
        check_alike("inputs", some, batch, device, i)
        input_leaves[start:end] = some
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
    """Require `batch` rows on `device` of every leaf, as `like` has them."""
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
