"""What the samples of a stream have in common: structure, shapes, dtypes and device of the first one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaptcomp_ext.nn._tree import check_leaves, flatten, flatten_like, form, unflatten
from adaptcomp_ext.ops._checks import describe
from adaptcomp_ext.ops._plain import is_dense

_TENSOR, _OTHER = -1, -2  # what the compiled block is told of a tree that is no plain tuple


class Form:
    """The form of samples, which are tuples of trees: a state and inputs, or a point and its context.

    Parameters
    ----------
    sample : tuple
        The first sample. TypeError or ValueError if it cannot be one.
    names : pair of str
        The names of the first tree, and of those that follow it, in error messages.
    """

    def __init__(self, sample: Any, names: tuple[str, str]) -> None:
        self._names = names
        trees = _trees(sample, names)
        self.structures: list[Any] = []
        self.counts: list[int] = []
        """Number of tensors of each tree."""
        self.rows: list[Tensor] = []
        """The first sample's tensors, as a batch of one row."""
        is_plain = True
        for i, tree in enumerate(trees):
            leaves, structure = flatten(tree)
            name, position = self._place(i)
            where = self._where(i)
            for leaf in leaves:
                if not isinstance(leaf, Tensor):
                    raise TypeError(
                        f"{where}: expected a Tensor or a pytree of Tensors, got {describe(leaf)}"
                    )
                if not is_dense(leaf):
                    raise TypeError(f"{where}: expected dense tensors, got {describe(leaf)}")
            rows: list[Any] = [leaf.detach()[None] for leaf in leaves]
            kinds = check_leaves(name, tree, list(rows), structure, position, optional=i > 0)
            is_plain = is_plain and kinds is None
            self.structures.append(structure)
            self.counts.append(len(rows))
            self.rows += rows
        device = self.rows[0].device
        for row in self.rows:
            if row.device != device:
                raise ValueError(f"sample: expected all tensors on {device}, got one on {row.device}")
        self.device = device
        self.is_ordinary = is_plain and device.type == "cpu"
        """Whether all tensors are plain ones on the CPU."""
        codes = [form(structure) for structure in self.structures]
        self.codes = [(_TENSOR, n, _OTHER)[code] for code, n in zip(codes, self.counts, strict=True)]
        """The trees as the compiled block takes them."""

    def _place(self, i: int) -> tuple[str, int | None]:
        return (self._names[0], None) if i == 0 else (self._names[1], i - 1)

    def _where(self, i: int) -> str:
        name, position = self._place(i)
        return name if position is None else f"{name}[{position}]"

    def new_blocks(self, rows: int) -> list[Tensor]:
        """Allocate blocks for `rows` rows."""
        return [t.new_empty((rows, *t.shape[1:]), requires_grad=False) for t in self.rows]

    def trees(self, leaves: list[Tensor]) -> list[Any]:
        """Build the trees of a block."""
        out, start = [], 0
        for structure, count in zip(self.structures, self.counts, strict=True):
            out.append(unflatten(leaves[start : start + count], structure))
            start += count
        return out

    def leaves(self, sample: Any) -> list[Tensor]:
        """Return the tensors of a sample; TypeError or ValueError if it is not like the first one."""
        trees = _trees(sample, self._names)
        if len(trees) != len(self.structures):
            raise ValueError(
                f"sample: expected {len(self.structures)} elements like the first sample, got {len(trees)}"
            )
        out: list[Tensor] = []
        for i, (tree, structure) in enumerate(zip(trees, self.structures, strict=True)):
            leaves, treedef = flatten_like(tree, structure)
            if treedef is not structure and treedef != structure:
                raise TypeError(
                    f"{self._where(i)}: expected the structure of the first sample, {structure}, got "
                    f"{describe(tree) if isinstance(tree, Tensor) else treedef}"
                )
            for leaf in leaves:
                self._check(i, leaf, self.rows[len(out)])
                out.append(leaf)
        return out

    def _check(self, i: int, leaf: Any, like: Tensor) -> None:
        where, shape = self._where(i), like.shape[1:]
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{where}: expected a Tensor, got {describe(leaf)}")
        if not is_dense(leaf):
            raise TypeError(f"{where}: expected a dense tensor, got {describe(leaf)}")
        if leaf.dtype != like.dtype:
            raise TypeError(f"{where}: expected {like.dtype} like the first sample, got {leaf.dtype}")
        if leaf.shape != shape:
            raise ValueError(
                f"{where}: expected shape {list(shape)} like the first sample, got {list(leaf.shape)}"
            )
        if leaf.device != like.device:
            raise ValueError(
                f"{where}: expected a tensor on {like.device} like the first sample, got one on {leaf.device}"
            )


def _trees(sample: Any, names: tuple[str, str]) -> tuple[Any, ...]:
    if not isinstance(sample, (tuple, list)):
        raise TypeError(f"sample: expected a tuple ({names[0]}, *{names[1]}), got {describe(sample)}")
    if not sample:
        raise ValueError(f"sample: expected a tuple ({names[0]}, *{names[1]}), got an empty one")
    return tuple(sample)


def copied(leaf: Tensor) -> Tensor:
    """Copy a tensor of a sample, which its owner may write to again."""
    with torch.no_grad():
        return leaf.detach().clone()
