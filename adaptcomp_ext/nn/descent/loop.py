"""The loop of `EnergyDescent` for an energy that PyTorch evaluates: one kernel call between two evaluations.

What a row remembers from step to step stays at its place in the batch (csrc/descent/descent.h). The block
holds the points of the rows that go on, with their context. On the CPU the kernel compacts the points, and
the context is compacted when a row has left. On CUDA the host knows only an upper bound on the number of rows
that go on, and compacts when a smaller block will do (`adaptcomp_ext.nn._active`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adaptcomp_ext import _C
from adaptcomp_ext.nn._active import ActiveCount, bucket
from adaptcomp_ext.nn.descent.problem import Problem
from adaptcomp_ext.nn.descent.tape import Record, Tape
from adaptcomp_ext.nn.result import Status
from adaptcomp_ext.ops import halting
from adaptcomp_ext.ops._backend import compute_dtype, on_cuda, place
from adaptcomp_ext.ops.compaction import gather_rows_kernel
from adaptcomp_ext.ops.descent import rule_arguments


def descend(
    problem: Problem, needs_points: Callable[[Tensor, list[Tensor]], bool]
) -> tuple[State, Tape | None]:
    """Run every row until it has ended.

    Parameters
    ----------
    problem : Problem
    needs_points : callable
        Called once with the first energies and the tensors that the energy was given. Returns whether a
        backward pass will need the points of the steps.

    Returns
    -------
    State
        The last point, energy, number of steps and status of each row.
    Tape or None
        The steps, where a backward pass or the trace needs them.
    """
    rule, snapshot = problem.rule, problem.snapshot
    tape = None
    with problem.evaluating():
        state = State(problem)
        point = plain(problem.y0)
        ones = torch.ones(0, device=problem.y0.device)
        row: Tensor | None = None  # of the points, before the kernel marks those that leave
        for step in range(rule.max_steps + 1):
            rows = point.shape[0]
            if snapshot is not None and snapshot.changing:
                snapshot.mark()
            value = problem.evaluate(point.requires_grad_(), state.context)
            if step == 0:
                problem.check_first(value, point, state.context)
                points = needs_points(value, [point, *state.context])
                if points or problem.keep_trace:
                    tape = state.tape(points, problem.keep_trace, problem.last)
            if ones.shape[0] != rows or ones.dtype != value.dtype:
                ones = torch.ones_like(value)
            last = step == rule.max_steps and not rule.on_gradient
            slope = None if last else problem.slope(value, point, ones)
            accepted = None
            if tape is not None and tape.points and step > 0:
                accepted = torch.empty_like(value, dtype=torch.uint8, requires_grad=False)
            following = state.advance(point, value, slope, accepted, step)
            if following is not None and problem.starts > 1 and not on_cuda(point.device):
                following = state.leave(following, problem.starts)
            if tape is not None:
                point = point.detach()
                all_taken = state.took_all(rows)
                end = None
                if tape.trace and step > 0:
                    end = point if all_taken else state.of_block(state.y, row)
                before, row = row, None if following is None else state.rows()
                record = None
                if tape.points and following is not None:
                    unmoved = point if all_taken and state.index is None else None
                    record = state.record(step + 1, row, unmoved, value)
                tape.add(None if all_taken else accepted, end, before, record)
            if following is None:
                break
            point = following
    return state, tape


class State:
    """What the rows of a batch remember, and the kernel that works on it.

    Parameters
    ----------
    problem : Problem
    exact : bool
        Whether the block never has padding, for which the host waits at every step on CUDA.
    """

    def __init__(self, problem: Problem, exact: bool = False) -> None:
        rule, y0 = problem.rule, problem.y0
        batch, device, wide = y0.shape[0], y0.device, compute_dtype(y0.dtype)
        self.y = torch.empty_like(y0, memory_format=torch.contiguous_format, requires_grad=False)
        self.energy = torch.empty(batch, dtype=wide, device=device)
        self.steps = torch.empty(batch, dtype=torch.int64, device=device)
        self.status = torch.zeros(batch, dtype=torch.int8, device=device)  # 0 while the row goes on
        self.kept = torch.empty_like(self.y) if rule.if_lower else None
        self.velocity = torch.empty_like(self.y, dtype=wide) if rule.momentum > 0 else None
        moving = None if self.velocity is None else torch.empty(batch, dtype=torch.uint8, device=device)
        self.scale = torch.ones(batch, dtype=wide, device=device) if rule.backtracking > 0 else None
        self.context = [plain(c) for c in problem.context]
        self.row: Tensor | None = None
        """The batch row of each block row; None: all rows in order. On CUDA the kernel writes -1 where a row
        ends."""
        self.index: Tensor | None = None
        """The place that each block row had in the block before; None: the same place."""
        self.packs_exactly = exact or not on_cuda(device)
        self._rows = self._flag = None
        self._active: ActiveCount | None = None
        self._broken = self._accepted = -1
        if on_cuda(device):
            self._active = ActiveCount(batch, device)
            self.row = self._rows = torch.arange(batch, device=device)
            self._flag = torch.empty(batch, dtype=torch.int8, device=device)
        self._kernel = _C.descent_run(
            y=self.y,
            energy=self.energy,
            steps=self.steps,
            status=self.status,
            kept=self.kept,
            velocity=self.velocity,
            moving=moving,
            scale=self.scale,
            sample_ids=problem.sample_ids,
            row=self._rows,
            flag=self._flag,
            running=None if self._active is None else self._active.running,
            step_size=_number(problem.step_size, self.energy),
            sigma=_number(problem.sigma, self.energy),
            rule=rule_arguments(rule),
            device=place(device)[0],
        )

    def advance(
        self, point: Tensor, value: Tensor, slope: Tensor | None, accepted: Tensor | None, step: int
    ) -> Tensor | None:
        """Judge the points of a step, and compact the block.

        Parameters
        ----------
        point, value, slope : Tensor
            The points [n, ...], their energies and the gradients there. The gradients may be None after the
            last step.
        accepted : Tensor, optional
            uint8 [n]: the kernel writes here which points were accepted.
        step : int
            The step that led to the points; 0: the start.

        Returns
        -------
        Tensor or None
            The points of the next step; None where no row goes on.
        """
        stream = 0 if self._active is None else place(point.device)[1]
        following: Tensor | None = self._kernel.advance(point, value, slope, accepted, step, stream)
        self.index = None
        if self._active is not None:
            return self._pack_on_device(self._active, following, point.shape[0], accepted)
        if following is not None and following.shape[0] < point.shape[0]:
            self.index = index = self._kernel.index()
            self.row = index if self.row is None else self.row.index_select(0, index)
            self.context = [c.index_select(0, index) for c in self.context]
        return following

    def leave(self, following: Tensor, starts: int) -> Tensor | None:
        """Take the rows of decided races out of the block, on the CPU; their status stays 0.

        Parameters
        ----------
        following : Tensor
            The points of the next step.
        starts : int
            The number of rows of a race.
        """
        halted = (self.status == Status.HALTED) | (self.status == Status.REJECTED)
        decided = halted.view(-1, starts).any(1)
        row = torch.arange(following.shape[0]) if self.row is None else self.row
        index = (~decided[row // starts]).nonzero()[:, 0]
        if len(index) == len(row):
            return following
        self.row = row[index]
        self._rows = self.row.clone()  # the kernel's own, which it compacts in place
        self._kernel.set_rows(self._rows)
        self.index = index if self.index is None else self.index[index]
        self.context = [c.index_select(0, index) for c in self.context]
        return following.index_select(0, index) if len(index) else None

    def _pack_on_device(
        self, active: ActiveCount, following: Tensor | None, rows: int, accepted: Tensor | None
    ) -> Tensor | None:
        assert self._flag is not None and self._rows is not None
        if self.packs_exactly and accepted is not None:
            flag = self._flag[:rows]
            counts = torch.stack([(flag == Status.NONFINITE).sum(), accepted.sum(), active.running])
            self._broken, self._accepted, size = counts.tolist()
        else:
            bound = active.bound()
            size = min(rows, bucket(bound)) if bound > 0 else 0
        if following is None or size == 0:
            return None
        if size == rows:
            return following
        plan = halting.plan_packing(self._flag[:rows], self._rows, size)
        self.row = self._rows = plan.row
        self._kernel.set_rows(plan.row)
        self.index = plan.index
        following, *self.context = gather_rows_kernel([following, *self.context], plan.index)
        return following

    def took_all(self, rows: int) -> bool:
        """Whether every point of a block of `rows` was accepted, as far as the host knows."""
        return (self._kernel.accepted if self._active is None else self._accepted) == rows

    def broken(self) -> bool:
        """Whether a point or an energy of the last block was not finite, as far as the host knows."""
        return (self._kernel.broken if self._active is None else self._broken) > 0

    def of_block(self, tensor: Tensor, row: Tensor | None) -> Tensor:
        """Copy the rows `row` of a tensor of the batch, all rows for None; padding becomes zero."""
        if row is None:
            return tensor.clone()
        return tensor.index_select(0, row) if self._active is None else gather_rows_kernel([tensor], row)[0]

    def rows(self) -> Tensor | None:
        """Return the batch rows of the block as they are now, -1 for padding; None: all rows in order."""
        return self.row if self._active is None or self.row is None else self.row.clone()

    def tape(self, points: bool, trace: bool, last: int | None = None) -> Tape:
        """Make the tape of this descent."""
        return Tape(points, trace, self.steps, self.status, self.packs_exactly, last)

    def record(self, step: int, row: Tensor | None, start: Tensor | None, value: Tensor) -> Record:
        """Make the record of the step that the block is about to take.

        Parameters
        ----------
        step : int
        row : Tensor, optional
            The batch rows of the block.
        start : Tensor, optional
            Where the rows are, if those are the points that have just been evaluated.
        value : Tensor
            The energies of these points.
        """
        velocity = None if self.velocity is None else self.of_block(self.velocity, row)
        scale = None if self.scale is None else self.of_block(self.scale, row)
        energy = None
        if step % 16 == 1:
            energy = self.of_block(self.energy, row) if start is None else value.detach().clone()
        start = self.of_block(self.y, row) if start is None else start
        return Record(step, row, start, velocity, scale, value.shape[0], energy)


def plain(tensor: Tensor) -> Tensor:
    """Return the tensor without graph, contiguous, and fit to be saved for a backward pass."""
    tensor = tensor.detach().contiguous()
    return tensor.clone() if tensor.is_inference() else tensor


def _number(number: float | Tensor, like: Tensor) -> float | Tensor:
    """Return a number as the kernel takes it: a float, or a tensor with the dtype and device of `like`."""
    if not isinstance(number, Tensor):
        return number
    if number.device != like.device:  # without dimensions and on the CPU: no device has to be waited for
        return number.item()
    return number.detach().to(like.dtype).contiguous()
