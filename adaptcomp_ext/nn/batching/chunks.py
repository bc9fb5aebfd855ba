"""An engine that runs chunks of a stream to their end, by calls of the module.

It serves what runs all steps of its rows in one kernel call, which refills the slots of its own: recurrences
of `adaptcomp_ext.cells`, and energies in closed form. And it serves all that the other engines do not:
`reference_kernels`, CUDA, subclasses of tensors, autograd energies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adaptcomp_ext import _C
from adaptcomp_ext.nn.batching.engine import Engine
from adaptcomp_ext.nn.batching.form import Form, copied


class ChunkEngine(Engine):
    """Calls ``module(*trees, sample_ids=ids)`` on up to `rows` samples."""

    def __init__(self, module: nn.Module, form: Form, rows: int) -> None:
        self._module, self._form, self._rows = module, form, rows
        self._keys: list[int] = []
        self._ids: list[int] = []
        self._leaves: list[list[Tensor]] = []
        self._block: _C.SlotBlock | None = None
        self._empty()

    def _empty(self) -> None:
        self.held = 0
        self._keys, self._ids, self._leaves = [], [], []
        self._block = None
        if self._form.is_ordinary:
            self._block = _C.slot_block(
                blocks=self._form.new_blocks(self._rows), trees=self._form.codes, leaves=0, slots=self._rows
            )

    @property
    def room(self) -> int:
        """Number of samples that are taken now: the rest of the chunk."""
        return self._rows - self.held

    def put(self, sample: Any, key: int, sample_id: int) -> None:
        """Accept a copy of a sample."""
        block = self._block
        if block is None:
            self._leaves.append([copied(leaf) for leaf in self._form.leaves(sample)])
        elif not block.put(sample, key, sample_id):
            leaves = [leaf.detach().contiguous().resolve_neg() for leaf in self._form.leaves(sample)]
            if not block.put_leaves(leaves, key, sample_id):
                raise TypeError(f"sample: expected plain tensors like the first sample's, got {sample!r}")
        self._keys.append(key)
        self._ids.append(sample_id)
        self.held += 1

    def advance(self) -> list[tuple[int, Any]]:
        """Run all rows to their end."""
        if self._block is None:
            leaves = [torch.stack(column) for column in zip(*self._leaves, strict=True)]
        else:
            leaves = [block.narrow(0, 0, self.held) for block in self._block.blocks()]
        ids = torch.tensor(self._ids, dtype=torch.int64, device=self._form.device)
        result = self._module(*self._form.trees(leaves), sample_ids=ids)
        keys = self._keys
        self._empty()
        self.calls += 1
        self.row_steps += int(result.steps.sum())
        return list(zip(keys, split(result, len(keys)), strict=True))

    def drop(self) -> None:
        """Forget all rows, after an error."""
        self._empty()


def split(result: Any, rows: int) -> list[Any]:
    """Split a result of a batch into one for each row, without the batch dimension."""
    leaves, structure = pytree.tree_flatten(result)
    columns: list[Any] = [[leaf] * rows if leaf is None else leaf.detach().unbind() for leaf in leaves]
    return [pytree.tree_unflatten(row, structure) for row in zip(*columns, strict=True)]
