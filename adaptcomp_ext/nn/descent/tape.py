"""The steps of a descent, recorded for its backward pass and its trace.

The loop hands over values, step by step; the tape knows neither the loop nor its kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaptcomp_ext.nn.result import Trace
from adaptcomp_ext.ops.compaction import compact_index_padded


@dataclass(slots=True)
class Record:
    """One step of a block, as its backward pass needs it. On CUDA the block may be padded."""

    step: int
    row: Tensor | None
    """int64 [n]: the batch rows, -1 for padding; None: all rows in order."""
    start: Tensor
    """[n, ...]: the points from which the step starts."""
    velocity: Tensor | None
    """[n, ...]: the velocity of the step, which includes the gradient at the start."""
    scale: Tensor | None
    """[n]: the factor that backtracking has left on the step size."""
    evaluated: int
    """Number of points that were evaluated together, these among them."""
    energy: Tensor | None
    """[n]: the energies at the start. Only some steps have them; the backward pass compares its own energies
    with them."""
    accepted: Tensor | None = None
    """uint8 [n]: the rows that took the step; None: all rows."""

    def select(self, index: Tensor) -> None:
        """Forget all rows but those at the places `index`."""
        self.row = index if self.row is None else self.row.index_select(0, index)
        self.start = self.start.index_select(0, index)
        self.velocity = None if self.velocity is None else self.velocity.index_select(0, index)
        self.scale = None if self.scale is None else self.scale.index_select(0, index)
        self.accepted = None if self.accepted is None else self.accepted.index_select(0, index)
        self.energy = None if self.energy is None else self.energy.index_select(0, index)


class Tape:
    """The steps of a descent in order.

    Parameters
    ----------
    points : bool
        Whether to keep the points from which each step starts, for the backward pass.
    trace : bool
        Whether to keep the points to which each step leads.
    steps, status : Tensor
        [B]: the number of steps and the status of each row, which the loop updates in place.
    exact : bool
        Whether no block is padded.
    last : int, optional
        Keep, for each row, the points at which its last `last` steps start. Default: all points.
    """

    def __init__(
        self, points: bool, trace: bool, steps: Tensor, status: Tensor, exact: bool, last: int | None = None
    ) -> None:
        self.records: list[Record] = []
        self.ends: list[tuple[Tensor, Tensor | None]] = []
        """For the trace: the points after each step, and their batch rows."""
        self.first: Tensor | None = None
        """The energies at the start, where the backward pass needs the points."""
        self.points = points
        self.trace = trace
        self.steps = steps
        self.exact = exact
        self._status = status
        self._last = last

    def add(
        self,
        accepted: Tensor | None,
        end: Tensor | None,
        row: Tensor | None,
        following: Record | None,
    ) -> None:
        """Add what became of the step that was open, and open the next one.

        Parameters
        ----------
        accepted : Tensor, optional
            uint8 [n]: the rows that took the open step. Default: all rows.
        end, row : Tensor, optional
            The points after the open step, and their batch rows. No `end`: the trace gets nothing.
        following : Record, optional
            The next step. Default: none, the descent has ended or keeps no points.
        """
        if end is not None:
            self.ends.append((end, row))
        if self.records:
            self.records[-1].accepted = accepted
            if self._last is not None and self.exact and len(self.records) > self._last:
                self._prune(self.records[-1 - self._last])
        if following is not None:
            if not self.records:
                self.first = following.energy
            self.records.append(following)

    def _prune(self, record: Record) -> None:
        """Forget the rows that are still running: their last steps are later ones."""
        ended = self._status if record.row is None else self._status.index_select(0, record.row)
        record.select(ended.nonzero()[:, 0])

    def make_trace(self, y: Tensor) -> Trace:
        """Make the trace of a batch like `y`: every step of every row."""
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
    """One step of the rows that took it and that are differentiated through it."""

    step: int
    row: Tensor | None
    """int64 [n]: the batch rows; None: all, in order."""
    start: Tensor
    velocity: Tensor | None
    scale: Tensor | None
    partial: bool
    """Whether these points were evaluated together with others."""
    energy: Tensor | None
    rejected: Tensor | None
    """int64: the batch rows that rejected the step; None: no row."""
    first: Tensor | None
    """bool [n]: whether this is the first differentiated step of a row that is not differentiated from y0 on;
    None: it is so for no row."""


def taken(tape: Tape, last: int | None) -> list[Taken]:
    """Return the steps in order. On CUDA the host waits for the device once, for the sizes of all steps."""
    whole = tape.exact and last is None
    records = [record for record in tape.records if not (whole and record.accepted is None)]
    rows, took, stayed = [], [], []
    for record in records:
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
    selected = {id(record): i for i, record in enumerate(records)}
    steps = []
    for record in tape.records:
        i, rejected, first = selected.get(id(record)), None, None
        if i is not None:
            others = places[len(records) + i]
            rejected = rows[i][others] if others.shape[0] else None
            record.row = rows[i]
            record.select(places[i])
        if fresh is not None and record.row is not None:
            first = fresh[record.row]
            fresh[record.row] = False
        partial = record.start.shape[0] != record.evaluated
        fields = (
            record.step,
            record.row,
            record.start,
            record.velocity,
            record.scale,
            partial,
            record.energy,
        )
        steps.append(Taken(*fields, rejected, first))
    return steps


def _places(masks: list[Tensor]) -> list[Tensor]:
    """Return the places at which each mask is true."""
    if not masks:
        return []
    counts = torch.stack([m.sum() for m in masks]).tolist()
    return [compact_index_padded(m)[0][:n] for m, n in zip(masks, counts, strict=True)]
