"""What the rows of a descent remember between two evaluations of their energy, and the kernel call that works on it.

What a row remembers stays at its place in the batch (csrc/descent/descent.h); the block has the points of the
rows that go on, and their context. On the CPU the kernel packs the points, and context is packed when a row
has left. On CUDA the host has only a bound on how many rows go on, and packs when a smaller block will do
(`adaptcomp_ext.nn._active`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from adaptcomp_ext import _C
from adaptcomp_ext.nn._active import ActiveCount, bucket
from adaptcomp_ext.nn.descent.problem import Problem
from adaptcomp_ext.nn.result import Status
from adaptcomp_ext.ops import halting
from adaptcomp_ext.ops._backend import compute_dtype, on_cuda, place
from adaptcomp_ext.ops.compaction import gather_rows_kernel
from adaptcomp_ext.ops.descent import rule_arguments


class State:
    """What the rows of a batch remember, and the kernel that works on it.

    With `exact` the block never has padding, for which the host waits at every step on CUDA.
    """

    def __init__(self, problem: Problem, exact: bool = False) -> None:
        rule, y0 = problem.rule, problem.y0
        batch, device, wide = problem.batch, y0.device, compute_dtype(y0.dtype)
        self.problem = problem
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
        """The batch row of each block row, None: all, in order. On CUDA the kernel writes -1 where a row
        ends."""
        self.index: Tensor | None = None
        """Of each block row, its place in the block before; None: the same."""
        self.packs_exactly = exact or not on_cuda(device)
        self._rows = self._flag = None
        self._active: ActiveCount | None = None
        self._broken = self._accepted = -1
        if on_cuda(device):
            self._active = ActiveCount(batch, device)
            self.row = self._rows = torch.arange(batch, device=device)
            self._flag = torch.empty(batch, dtype=torch.int8, device=device)
        integers, numbers = rule_arguments(rule)
        self._kernel = _C.DescentRun(
            (
                *(self.y, self.energy, self.steps, self.status, self.kept, self.velocity, moving, self.scale),
                *(
                    problem.sample_ids,
                    self._rows,
                    self._flag,
                    None if self._active is None else self._active.running,
                ),
            ),
            *(_number(problem.step_size, self.energy), _number(problem.sigma, self.energy)),
            *([*integers, place(device)[0]], numbers),
        )

    def advance(
        self, point: Tensor, value: Tensor, gradient: Tensor | None, accepted: Tensor | None, step: int
    ) -> Tensor | None:
        """Judge the points of a step, and pack the block. The next points, None where no row goes on.

        `gradient` may be None after the last step; `accepted`, uint8 [n], is written to.
        """
        stream = 0 if self._active is None else place(point.device)[1]
        following = self._kernel.advance(point, value, gradient, accepted, step, stream)
        self.index = None
        if self._active is not None:
            return self._pack_on_device(self._active, following, point.shape[0], accepted)
        if following is not None and following.shape[0] < point.shape[0]:
            self.index = index = self._kernel.index()
            self.row = index if self.row is None else self.row.index_select(0, index)
            self.context = [c.index_select(0, index) for c in self.context]
        return following

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
        """The rows `row` of a tensor of the batch, None: all; zero for padding. A copy."""
        if row is None:
            return tensor.clone()
        return tensor.index_select(0, row) if self._active is None else gather_rows_kernel([tensor], row)[0]

    def rows(self) -> Tensor | None:
        """The batch rows of the block as they are now, None: all; -1 for padding."""
        return self.row if self._active is None or self.row is None else self.row.clone()


def plain(tensor: Tensor) -> Tensor:
    """Without graph, contiguous, and fit to be saved for a backward pass."""
    tensor = tensor.detach().contiguous()
    return tensor.clone() if tensor.is_inference() else tensor


def _number(number: float | Tensor, like: Tensor) -> float | Tensor:
    """A number as the kernel takes it: in the dtype and on the device of `like`, or a float."""
    if not isinstance(number, Tensor):
        return number
    if number.device != like.device:  # without dimensions and on the CPU: nobody has to wait for it
        return number.item()
    return number.detach().to(like.dtype).contiguous()
