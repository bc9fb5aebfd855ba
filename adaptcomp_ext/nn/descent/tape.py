"""What a descent leaves behind for its backward pass and its trace: of each step the rows that took it, and where from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaptcomp_ext.nn.descent.state import State
from adaptcomp_ext.nn.result import Trace
from adaptcomp_ext.ops.compaction import compact_index_padded


@dataclass(slots=True)
class Record:
    """One step of a block, as its backward pass needs it. On CUDA the block may be padded."""

    step: int
    row: Tensor | None
    """int64 [n]: the batch rows, None: all, in order; -1 for padding."""
    start: Tensor
    """[n, ...]: the points that the step starts from."""
    velocity: Tensor | None
    """[n, ...]: the velocity of the step, its own gradient included."""
    scale: Tensor | None
    """[n]: what backtracking has left of the step size."""
    evaluated: int
    """How many points were evaluated together, these among them."""
    energy: Tensor | None
    """[n]: the energies there, of some steps, by which the backward pass finds out whether the energy is
    still the same."""
    accepted: Tensor | None = None
    """uint8 [n]; None: every one."""

    def select(self, index: Tensor) -> None:
        """Forget all rows but those at the places `index`."""
        self.row = index if self.row is None else self.row.index_select(0, index)
        self.start = self.start.index_select(0, index)
        self.velocity = None if self.velocity is None else self.velocity.index_select(0, index)
        self.scale = None if self.scale is None else self.scale.index_select(0, index)
        self.accepted = None if self.accepted is None else self.accepted.index_select(0, index)
        self.energy = None if self.energy is None else self.energy.index_select(0, index)


class Tape:
    """Records the steps of a descent while it runs.

    Parameters
    ----------
    points : bool
        Keep where each step started, for the backward pass.
    trace : bool
        Keep where each step ended.
    last : int, optional
        Of each row, keep where its last steps started, so many.
    """

    def __init__(self, points: bool, trace: bool, last: int | None = None) -> None:
        self.records: list[Record] = []
        self.ends: list[tuple[Tensor, Tensor | None]] = []
        """For the trace: the points after each step, and their rows."""
        self.steps: Tensor | None = None
        """int64 [B]: how many steps each row took, once the descent has ended."""
        self.exact = True
        """Whether no block was padded."""
        self.first: Tensor | None = None
        """[B]: the energies at the start."""
        self._row: Tensor | None = None
        self._points = points
        self._trace = trace
        self._last = last

    def allocate(self, step: int, value: Tensor) -> Tensor | None:
        """Memory for which points of a step are accepted."""
        return (
            torch.empty_like(value, dtype=torch.uint8, requires_grad=False)
            if self._points and step > 0
            else None
        )

    def record(
        self,
        state: State,
        step: int,
        point: Tensor,
        value: Tensor,
        accepted: Tensor | None,
        following: Tensor | None,
    ) -> None:
        """The points of `step`, with energies `value`, have been judged, and the next ones are made."""
        self.steps, self.exact = state.steps, state.packs_exactly
        all_taken = state.took_all(point.shape[0])
        point = point.detach()
        if step > 0 and self._points:
            self.records[-1].accepted = None if all_taken else accepted
        if step > 0 and self._trace:
            self.ends.append((point if all_taken else state.of_block(state.y, self._row), self._row))
        if self._points and self._last is not None and step > self._last and self.exact:
            self._prune(self.records[step - 1 - self._last], state)
        if following is None:
            return
        self._row = row = state.rows()
        if self._points:
            start = point if all_taken and state.index is None else state.of_block(state.y, row)
            velocity = None if state.velocity is None else state.of_block(state.velocity, row)
            scale = None if state.scale is None else state.of_block(state.scale, row)
            energy = None
            if step % 16 == 0:
                energy = value.detach().clone() if start is point else state.of_block(state.energy, row)
            if step == 0:
                self.first = energy
            self.records.append(Record(step + 1, row, start, velocity, scale, point.shape[0], energy))

    @staticmethod
    def _prune(record: Record, state: State) -> None:
        """The rows that are still running will not come back to this step."""
        ended = state.status if record.row is None else state.status.index_select(0, record.row)
        record.select(ended.nonzero()[:, 0])

    def trace(self, y: Tensor) -> Trace:
        """Every step of every row, of a batch like `y`."""
        assert self.steps is not None
        everyone = torch.arange(y.shape[0], device=y.device)
        rows = [everyone if row is None else row for _, row in self.ends]
        row = torch.cat([everyone[:0], *rows])
        outputs = torch.cat([y[:0], *(end for end, _ in self.ends)])
        step = torch.cat([everyone[:0], *(torch.full_like(r, k) for k, r in enumerate(rows, 1))])
        if not self.exact:
            outputs, row, step = (t[row >= 0] for t in (outputs, row, step))
        weights = (self.steps[row] == step).to(torch.float32)
        return Trace(outputs, weights, row, step)


@dataclass(slots=True)
class Taken:
    """The rows of one step that took it and are differentiated through it."""

    step: int
    row: Tensor | None
    """int64 [n]: the batch rows; None: all, in order."""
    start: Tensor
    velocity: Tensor | None
    scale: Tensor | None
    partial: bool
    """Whether more points than these were evaluated together."""
    energy: Tensor | None
    rejected: Tensor | None
    """int64: the batch rows that stayed where they were; None: none."""
    first: Tensor | None
    """bool [n]: where the differentiated part of a row that is not differentiated from y0 on begins; None:
    nowhere."""


def taken(tape: Tape, last: int | None) -> list[Taken]:
    """The steps in order. On CUDA the host waits for the device once, for all their sizes."""
    assert tape.steps is not None
    whole = tape.exact and last is None
    some = [record for record in tape.records if not (whole and record.accepted is None)]
    rows, took, stayed = [], [], []
    for record in some:
        row = (
            torch.arange(record.start.shape[0], device=record.start.device)
            if record.row is None
            else record.row
        )
        inside = row >= 0
        if last is not None:
            inside &= record.step > tape.steps[row.clamp(min=0)] - last
        accepted = inside if record.accepted is None else inside & record.accepted.bool()
        rows.append(row)
        took.append(accepted)
        stayed.append(inside & ~accepted)
    places = _places(took + stayed)
    fresh = None if last is None else tape.steps >= last
    selected = {id(record): i for i, record in enumerate(some)}
    steps = []
    for record in tape.records:
        i, rejected, first = selected.get(id(record)), None, None
        if i is not None:
            others = places[len(some) + i]
            rejected = rows[i][others] if others.shape[0] else None
            record.row = rows[i]
            record.select(places[i])
        if fresh is not None and record.row is not None:
            first = fresh[record.row]
            fresh[record.row] = False
        partial = record.start.shape[0] != record.evaluated
        found = (record.step, record.row, record.start, record.velocity, record.scale, partial, record.energy)
        steps.append(Taken(*found, rejected, first))
    return steps


def _places(masks: list[Tensor]) -> list[Tensor]:
    """Where each mask is true."""
    if not masks:
        return []
    counts = torch.stack([m.sum() for m in masks]).tolist()
    return [compact_index_padded(m)[0][:n] for m, n in zip(masks, counts, strict=True)]
