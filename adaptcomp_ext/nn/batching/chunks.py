"""An engine that runs chunks of a stream to their end, by calls of the module.

It serves what runs all steps of its rows in one kernel call, which refills the slots of its own: recurrences
of `adaptcomp_ext.cells`, and energies in closed form. And it serves all that the other engines do not:
`reference_kernels`, CUDA, subclasses of tensors, autograd energies.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from adaptcomp_ext.nn.batching.buffer import RowBuffer
from adaptcomp_ext.nn.batching.engine import Engine
from adaptcomp_ext.nn.batching.form import Form


class ChunkEngine(Engine):
    """Calls ``module(*trees, sample_ids=ids)`` on up to `rows` samples."""

    def __init__(self, module: nn.Module, form: Form, rows: int) -> None:
        self._module, self._form, self._rows = module, form, rows
        self._buffer = RowBuffer(form, rows)

    @property
    def room(self) -> int:
        """Number of samples that are taken now: the rest of the chunk."""
        return self._rows - self.held

    def put(self, sample: Any, key: int, sample_id: int) -> None:
        """Accept a copy of a sample."""
        self._buffer.put(sample, key, sample_id)
        self.held += 1

    def advance(self) -> list[tuple[int, Any]]:
        """Run all rows to their end."""
        leaves, keys, ids = self._buffer.take()
        result = self._module(*self._form.trees(leaves), sample_ids=ids)
        self.held = 0
        self.calls += 1
        self.row_steps += int(result.steps.sum())
        return list(zip(keys, split(result, len(keys)), strict=True))

    def drop(self) -> None:
        """Forget all rows, after an error."""
        self._buffer.clear()
        self.held = 0


def split(result: Any, rows: int) -> list[Any]:
    """Split a result of a batch into one for each row, without the batch dimension."""
    leaves, structure = pytree.tree_flatten(result)
    columns: list[Any] = [[leaf] * rows if leaf is None else leaf.detach().unbind() for leaf in leaves]
    return [pytree.tree_unflatten(row, structure) for row in zip(*columns, strict=True)]
