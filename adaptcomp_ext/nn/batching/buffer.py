"""Copies of samples that wait to be run together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaptcomp_ext import _C
from adaptcomp_ext.nn.batching.form import Form, copied


class RowBuffer:
    """Room for `rows` samples of a form."""

    def __init__(self, form: Form, rows: int) -> None:
        self._form, self._rows = form, rows
        self._keys: list[int] = []
        self._ids: list[int] = []
        self._leaves: list[list[Tensor]] = []
        self._block: _C.SlotBlock | None = None
        self.clear()

    def clear(self) -> None:
        """Forget all samples."""
        self._keys, self._ids, self._leaves = [], [], []
        self._block = None
        if self._form.is_ordinary:
            blocks = self._form.new_blocks(self._rows)
            self._block = _C.slot_block(blocks=blocks, trees=self._form.codes, leaves=0, slots=self._rows)

    def __len__(self) -> int:
        return len(self._keys)

    def put(self, sample: Any, key: int, sample_id: int) -> None:
        """Accept a copy of a sample; TypeError or ValueError if it is not like the others."""
        if self._block is None:
            self._leaves.append([copied(leaf) for leaf in self._form.leaves(sample)])
        else:
            put(self._block, self._form, sample, key, sample_id)
        self._keys.append(key)
        self._ids.append(sample_id)

    def take(self) -> tuple[list[Tensor], list[int], Tensor]:
        """Empty the buffer; return its tensors, the samples' keys and their ids."""
        if self._block is None:
            leaves = [torch.stack(column) for column in zip(*self._leaves, strict=True)]
        else:
            leaves = [block.narrow(0, 0, len(self)) for block in self._block.blocks()]
        keys, ids = self._keys, torch.tensor(self._ids, dtype=torch.int64, device=self._form.device)
        self.clear()
        return leaves, keys, ids


def put(block: _C.SlotBlock, form: Form, sample: Any, key: int, sample_id: int) -> None:
    """Copy a sample to a block, also one that the compiled code has to be told of."""
    if block.put(sample, key, sample_id):
        return
    leaves = [leaf.detach().contiguous().resolve_neg() for leaf in form.leaves(sample)]
    if not block.put_leaves(leaves, key, sample_id):
        raise TypeError(f"sample: expected plain tensors like the first sample's, got {sample!r}")
