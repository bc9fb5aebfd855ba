"""`CarryLoader`: blocks for training whose rows keep their state from one optimiser step to the next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from adaptcomp_ext.nn._tree import flatten_like
from adaptcomp_ext.nn.batching.errors import refused
from adaptcomp_ext.nn.batching.form import Form, copied
from adaptcomp_ext.ops._checks import check_int, describe
from adaptcomp_ext.ops._plain import is_dense


class CarryBlock:
    """A block of n rows of a `CarryLoader`, n at most its number of slots.

    Attributes
    ----------
    state : pytree of Tensor
        [n, ...] each: the state that was handed back for the row, or its sample's. It has no gradient.
    inputs : tuple of pytrees of Tensor
        [n, ...] each: the other elements of the row's sample.
    index : Tensor
        int64 [n], on the CPU: the index of the row's sample in the stream, counted from 0.
    step : Tensor
        int64 [n], on the CPU: how often the row has been in a block before; 0: its state is its sample's.
    """

    def __init__(
        self, state: Any, inputs: tuple[Any, ...], index: Tensor, step: Tensor, run: _CarryRun
    ) -> None:
        self.state = state
        self.inputs = inputs
        self.index = index
        self.step = step
        self._run = run

    def update(self, state: Any, halted: Tensor) -> None:
        """Hand back the rows: their new state, and which of them have halted.

        Parameters
        ----------
        state : pytree of Tensor
            In the form of ``state``. It is detached; a row goes on from it, unless it has halted.
        halted : Tensor
            bool [n]: the next samples take the slots of these rows.

        Raises
        ------
        TypeError, ValueError
            If an argument is not as described.
        RuntimeError
            If this is not the last block, or its rows were handed back before.
        """
        self._run.take_back(self, state, halted)


class CarryLoader:
    """Feed training in which a row's state is carried across optimiser steps until the row halts.

    Hierarchical and tiny recursive reasoners train so: each optimiser step runs one segment of all rows of a
    block, and a row that has halted gives its slot to the next sample. Every sample of the iterable is in as
    many blocks as it takes, and none is dropped.

    Parameters
    ----------
    samples : iterable of tuple
        Tuples ``(state, *inputs)``, each one row without its batch dimension, as of a `ContinuousBatcher`.
    slots : int
        The largest number of rows of a block, at least 1.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described; in an iteration a `SampleError`, if a sample is not like the first
        one. The next ``next`` then goes on with the following sample.
    RuntimeError
        If a block is asked for before the one before it was handed back.

    Notes
    -----
    A row keeps its place in the block. Blocks have `slots` rows until the iterable has ended; then rows that
    halt leave the block, and it becomes smaller. An iterable that never ends, such as
    ``itertools.cycle(samples)``, keeps all blocks full. If it raises, its error is raised once the rows that
    were accepted have halted. Tensors stay on the samples' device.

    The loader knows no policy: the training decides who has halted, and may bound the number of steps by
    ``block.step``.

    Examples
    --------
    >>> for block in ac.CarryLoader(samples, slots=256):
    ...     state, answer, q = model(block.state, *block.inputs)
    ...     loss(answer, q, targets[block.index]).backward()
    ...     optimiser.step()
    ...     optimiser.zero_grad()
    ...     block.update(state, halted=(q > 0) | (block.step + 1 >= 16))
    """

    def __init__(self, samples: Iterable[Any], slots: int = 256) -> None:
        if not isinstance(samples, Iterable):
            raise TypeError(f"samples: expected an iterable, got {describe(samples)}")
        self._samples = samples
        self._slots = check_int("slots", slots, 1)

    def __iter__(self) -> Iterator[CarryBlock]:
        return _CarryRun(self._samples, self._slots)


class _CarryRun(Iterator[CarryBlock]):
    """One iteration over the samples."""

    def __init__(self, samples: Iterable[Any], slots: int) -> None:
        self._source: Iterator[Any] | None = iter(samples)
        self._slots = slots
        self._error: Exception | None = None  # of the source, raised when all rows have halted
        self._form: Form | None = None
        self._pulled = 0
        self._leaves: list[Tensor] = []  # of state and inputs
        self._index = torch.zeros(0, dtype=torch.int64)
        self._step = torch.zeros(0, dtype=torch.int64)
        self._free: list[int] = list(range(slots))  # places whose rows have halted, in order
        self._new: list[tuple[int, list[Tensor]]] = []  # accepted, and not yet in a block
        self._block: CarryBlock | None = None  # handed out, and not yet back

    def __iter__(self) -> _CarryRun:
        return self

    def __next__(self) -> CarryBlock:
        if self._block is not None:
            raise RuntimeError("CarryLoader: expected block.update(state, halted) before the next block")
        self._pull()
        with torch.no_grad():
            self._refill()
        if self._index.shape[0] == 0:
            error, self._error = self._error, None
            if error is not None:
                raise error
            raise StopIteration
        assert self._form is not None
        state, *inputs = self._form.trees(self._leaves)
        self._block = CarryBlock(state, tuple(inputs), self._index.clone(), self._step.clone(), self)
        return self._block

    def _pull(self) -> None:
        """Accept samples for the free places."""
        while self._source is not None and len(self._new) < len(self._free):
            try:
                sample = next(self._source)
            except StopIteration:
                self._source = None
                return
            except Exception as error:
                self._error, self._source = error, None
                return
            index = self._pulled
            self._pulled += 1
            try:
                if self._form is None:
                    self._form = Form(sample, ("state", "inputs"))
                leaves = self._form.leaves(sample)
            except (TypeError, ValueError) as error:
                raise refused(index, error) from error
            self._new.append((index, [copied(leaf) for leaf in leaves]))

    def _refill(self) -> None:
        """Put the accepted samples in the free places; places that stay free leave the block."""
        new, self._new = self._new, []
        taken = self._free[: len(new)]
        rows = self._index.shape[0]
        if new:
            indexes = torch.tensor([index for index, _ in new])
            columns = [torch.stack(column) for column in zip(*[leaves for _, leaves in new], strict=True)]
            if rows == 0:
                self._leaves, self._index, self._step = columns, indexes, torch.zeros_like(indexes)
                self._free = []
                return
            places = torch.tensor(taken)
            self._leaves = [
                leaf.index_copy(0, places.to(leaf.device), column)
                for leaf, column in zip(self._leaves, columns, strict=True)
            ]
            self._index[places] = indexes
            self._step[places] = 0
        left = self._free[len(new) :]
        self._free = []
        if left and rows:
            stays = torch.ones(rows, dtype=torch.bool)
            stays[left] = False
            at = stays.nonzero()[:, 0]
            self._leaves = [leaf.index_select(0, at.to(leaf.device)) for leaf in self._leaves]
            self._index, self._step = self._index[at], self._step[at]

    def take_back(self, block: CarryBlock, state: Any, halted: Any) -> None:
        """Check what comes back of a block, and keep it."""
        if block is not self._block:
            raise RuntimeError(
                "CarryBlock.update: expected the last block, once, got one that was handed back before"
            )
        assert self._form is not None
        rows, count = self._index.shape[0], self._form.counts[0]
        structure = self._form.structures[0]
        leaves, treedef = flatten_like(state, structure)
        if treedef is not structure and treedef != structure:
            raise TypeError(
                f"state: expected the structure {structure}, got "
                f"{describe(state) if isinstance(state, Tensor) else treedef}"
            )
        for leaf, before in zip(leaves, self._leaves[:count], strict=True):
            if not isinstance(leaf, Tensor) or leaf.dtype != before.dtype or not is_dense(leaf):
                raise TypeError(f"state: expected a tensor of {before.dtype}, got {describe(leaf)}")
            if leaf.shape != before.shape or leaf.device != before.device:
                raise ValueError(
                    f"state: expected shape {list(before.shape)} on {before.device}, got {describe(leaf)}"
                )
        if not isinstance(halted, Tensor) or halted.dtype != torch.bool:
            raise TypeError(f"halted: expected a bool tensor of shape [{rows}], got {describe(halted)}")
        if halted.shape != (rows,):
            raise ValueError(f"halted: expected shape [{rows}], got {list(halted.shape)}")
        self._leaves[:count] = [leaf.detach() for leaf in leaves]
        self._step += 1
        self._free = halted.nonzero()[:, 0].tolist()
        self._block = None
