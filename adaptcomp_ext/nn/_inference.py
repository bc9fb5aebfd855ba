"""The halting loop in place: inference with a built-in policy, one kernel call per step.

The call decides, adds up the output, writes the results of the rows that end, and, on the CPU, fills their holes with rows from
the tail of the block: as many rows move as have ended, and none in a step where nobody ends. A tensor is written to only where
it is provably nobody else's: the block's own copies of the inputs, and a state that the step returned and kept no hold of.
Everything else is copied.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from adaptcomp_ext import _C
from adaptcomp_ext.nn._active import ActiveCount, bucket
from adaptcomp_ext.nn._block import Problem
from adaptcomp_ext.nn._tree import unflatten
from adaptcomp_ext.nn.cost_model import Schedule
from adaptcomp_ext.nn.policy import View
from adaptcomp_ext.nn.result import HaltResult
from adaptcomp_ext.ops import halting
from adaptcomp_ext.ops._backend import compute_dtype, dtype_code, place, pointer, row_size
from adaptcomp_ext.ops.compaction import gather_rows_kernel

# The slots of the kernel's argument list (csrc/bindings.cpp) that change from step to step.
_ROWS, _STEP, _SIGNAL, _READOUT, _OUTPUT = 0, 6, 10, 16, 17

_storage_use_count = getattr(torch._C, "_storage_Use_Count", None)


def _references(tensor: Tensor) -> int:
    return sys.getrefcount(tensor)


def _references_of_one_holder() -> tuple[int, int]:
    """What is said of a tensor that one list holds, and of its storage; interpreters differ in what they count."""
    held = [torch.empty(0)]
    storage = held[0].untyped_storage()
    return _references(held[0]), sys.getrefcount(storage)


_ONE_HOLDER, _ONE_STORAGE = _references_of_one_holder()


def _sole_owner(tensors: list[Tensor], i: int, references: int, holders: int) -> bool:
    """Whether nothing but `references` Python objects of the caller can see the memory of ``tensors[i]``.

    Python's references are counted, and the `holders` of the storage: every other view and every hold from C++ would be one more.
    Memory that torch did not allocate, such as an array's, is not resizable, and may be seen by anyone.
    """
    if _storage_use_count is None or _references(tensors[i]) > _ONE_HOLDER + references - 1:
        return False
    storage = tensors[i].untyped_storage()  # one holder more, unless somebody has the same object already
    if sys.getrefcount(storage) > _ONE_STORAGE:
        return False
    return storage.resizable() and _storage_use_count(storage._cdata) <= holders + 1


def run_inference(problem: Problem) -> HaltResult:
    """Run every row until it has ended. The policy must fuse."""
    return _Inference(problem).run()


class _Inference:
    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        run = problem.run
        self.steps = torch.empty(run.batch, dtype=torch.int64, device=run.device)  # every row writes its own
        self.status = torch.empty(run.batch, dtype=torch.int8, device=run.device)
        self.results = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in problem.state]
        self.row = torch.arange(run.batch, device=run.device)
        self.block_row = self.row  # its first `rows` entries
        self.flag = torch.empty(run.batch, dtype=torch.int8, device=run.device)
        self.carry = problem.policy.begin(run)
        self.on_cpu = run.device.type == "cpu"
        self.active = None if self.on_cpu else ActiveCount(run.batch, run.max_steps, run.device)
        self.schedule: Schedule | None = None
        # The halted rows that make packing pay. It changes only where rows have halted: most steps do not ask for it anew.
        self.least = run.batch + 1 if problem.compact is False else 1
        if problem.compact == "auto" and self.on_cpu:
            self.schedule = problem.schedule()
            self.least = self.schedule.least(run.batch)
        self.inputs = [t.contiguous() for t in problem.inputs]
        self.input_targets: list[Tensor] | None = None  # waiting for the first packing; None: the inputs are copies already
        self.arguments = problem.arguments(self.inputs)
        # Filled at the first step, when the readout and the policy's signal are known.
        self.fused: halting.Fused | None = None
        self.output: Tensor | None = None
        self.output_dtype = torch.float32
        self.cost: Tensor | None = None
        self.list: list[int] = []
        self.leaf_slot = self.move_slot = self.least_slot = 0

    def run(self) -> HaltResult:
        problem = self.problem
        rows = problem.run.batch
        previous: Any = unflatten(list(problem.state), problem.structure)
        for n in range(1, problem.run.max_steps + 1):
            leaves = problem.check_state(problem.steps[n - 1](previous, *self.arguments), rows)
            leaves, rows = self._step(n, rows, leaves, previous)
            if rows == 0:
                break
            previous = unflatten(leaves, problem.structure)
        return self._result()

    def _step(self, n: int, rows: int, leaves: list[Tensor], previous: Any) -> tuple[list[Tensor], int]:
        """Read, decide, and call the kernel. Returns the state and the size of the next block; size 0 ends the loop."""
        problem = self.problem
        current = unflatten(leaves, problem.structure)
        readout = problem.read(current, leaves, rows)
        if self.fused is None or not self.fused.constant:
            self.fused = problem.policy.fuse(View(problem.run, n, current, previous, readout, self.block_row, self.carry))
            assert self.fused is not None  # AdaptiveHalt asked before
        fused = self.fused
        del current  # what is left of the references to the leaves is counted below
        signal = None if fused.signal is None else fused.signal.contiguous()
        for i in range(len(leaves)):
            if not leaves[i].is_contiguous():
                leaves[i] = leaves[i].contiguous()
        if problem.readout is None:
            readout = leaves[0]
        elif not readout.is_contiguous():
            readout = readout.contiguous()
        if n == 1:
            self._prepare(leaves, readout, fused, signal)

        slots = self.list
        slots[_ROWS] = rows
        slots[_STEP] = n
        if signal is not None:
            slots[_SIGNAL] = signal.data_ptr()
        if slots[_OUTPUT]:
            slots[_READOUT] = readout.data_ptr()
        if problem.readout is None:
            del readout
        for i in range(len(leaves)):
            slots[self.leaf_slot + 4 * i] = leaves[i].data_ptr()
        if self.active is not None:
            return self._step_on_device(rows, leaves, fused, self.active)

        least = slots[self.least_slot] = self.least
        targets: list[Tensor] = leaves
        if least <= rows:
            targets = self._targets(leaves)
        running: int = _C.halt_step(slots, fused.threshold)

        if running == 0 or running == rows:
            return leaves, running
        if rows - running < least:
            if self.schedule is not None:
                self.schedule.kept(rows - running)
                self.least = self.schedule.least(rows)
            return leaves, rows
        if self.schedule is not None:
            self.schedule.packed()
            self.least = self.schedule.least(running)
        self.inputs = [t[:running] for t in self.input_targets or self.inputs]
        self.input_targets = None
        self.arguments = problem.arguments(self.inputs)
        if not fused.constant:  # else nobody looks at it
            self.block_row = self.row[:running]
        self.carry = tuple([t[:running] for t in self.carry])
        return [t[:running] for t in targets], running

    def _prepare(self, leaves: list[Tensor], readout: Tensor, fused: halting.Fused, signal: Tensor | None) -> None:
        """Allocate what the first readout decides, and lay out the argument list; later steps change a few slots of it."""
        problem, run = self.problem, self.problem.run
        weighted = problem.policy.weighted
        self.output_dtype = readout.dtype
        output_slots = (0, 0, 0, 0)
        if weighted or problem.readout is not None:
            allocate = torch.zeros if weighted else torch.empty
            dtype = compute_dtype(readout.dtype) if weighted else readout.dtype
            self.output = allocate((run.batch, *readout.shape[1:]), dtype=dtype, device=run.device)
        if self.output is not None or fused.policy == halting.CONFIDENCE:  # which reads the class logits even from the state
            into = self.results[0] if self.output is None else self.output
            output_slots = halting.leaf_arguments(readout, into)
        if fused.has_cost:
            self.cost = torch.zeros(run.batch, dtype=run.scalar, device=run.device)
        carried = self.carry[:1] if fused.carried else ()
        self.list = [
            *(0, self.row.data_ptr(), self.flag.data_ptr(), self.steps.data_ptr(), self.status.data_ptr()),
            *(run.scalar == torch.float64, 0, run.min_steps, run.max_steps),
            *(fused.policy, 0, 0 if signal is None else dtype_code(signal.dtype), fused.parameter),
            *(pointer(run.sample_ids), pointer(carried[0]) if carried else 0, 0),
            *output_slots,
            *((0,) if self.cost is None else (1, 0, self.cost.data_ptr())),
            len(leaves),
        ]
        self.leaf_slot = len(self.list)
        for leaf, result in zip(leaves, self.results, strict=True):
            self.list += halting.leaf_arguments(leaf, result)
        self.list += (True, 0, 0, 0)
        if not self.on_cpu:
            assert self.active is not None
            self.list += (0, 0, self.active.running.data_ptr())
            return
        moving = [*leaves, *self.inputs, *carried]
        self.list.append(len(moving))
        self.move_slot = len(self.list)
        for t in moving:  # the carry is ours, and filled in place
            self.list += (t.data_ptr(), t.data_ptr(), row_size(t) * t.element_size())
        self.least_slot = len(self.list)
        self.list += (0, 0, *place(run.device))
        if self.inputs:
            self.input_targets = [torch.empty_like(t) for t in self.inputs]
            for i, t in enumerate(self.input_targets, start=len(leaves)):
                self.list[self.move_slot + 3 * i + 1] = t.data_ptr()

    def _targets(self, leaves: list[Tensor]) -> list[Tensor]:
        """Where each tensor's surviving rows go: where it is, if its memory is ours alone, else to a new tensor."""
        slots, slot = self.list, self.move_slot
        targets = []
        for i in range(len(leaves)):
            # `leaves` holds it. A view's base may be the step's, so a view counts as shared.
            own = not leaves[i]._is_view() and _sole_owner(leaves, i, 1, holders=1)
            target = leaves[i] if own else torch.empty_like(leaves[i])
            slots[slot] = leaves[i].data_ptr()
            slots[slot + 1] = target.data_ptr()
            slot += 3
            targets.append(target)
        if self.input_targets is None:
            for i in range(len(self.inputs)):
                # `self.inputs` and the step's arguments hold it; it is a view of a tensor made here.
                if not _sole_owner(self.inputs, i, 2, holders=2):
                    self.inputs[i] = self.inputs[i].clone()
                slots[slot] = slots[slot + 1] = self.inputs[i].data_ptr()
                slot += 3
        return targets

    def _step_on_device(
        self, rows: int, leaves: list[Tensor], fused: halting.Fused, active: ActiveCount
    ) -> tuple[list[Tensor], int]:
        """The same on CUDA, where the host has only a bound on the rows that run, and packs when a smaller block will do."""
        _C.halt_step([*self.list, *place(self.row.device)], fused.threshold)
        active.post()
        bound = active.bound()
        if bound == 0:
            return leaves, 0
        size = min(rows, bucket(bound))
        if self.problem.compact is False or size == rows:
            return leaves, rows
        plan = halting.plan_packing_padded(self.flag[:rows], self.row[:rows], size)
        carried = self.carry[: int(fused.carried)]
        packed = gather_rows_kernel([*leaves, *self.inputs, *carried], plan.index)
        # `row` and the carry keep their memory, whose addresses the kernel has.
        self.row[:size] = plan.row
        if carried:
            carried[0][:size] = packed.pop()
        self.block_row = self.row[:size]
        self.carry = tuple([t[:size] for t in self.carry])
        self.inputs = packed[len(leaves) :]
        self.arguments = self.problem.arguments(self.inputs)
        return packed[: len(leaves)], size

    def _result(self) -> HaltResult:
        return HaltResult(
            output=self.results[0] if self.output is None else self.output.to(self.output_dtype),
            state=unflatten(self.results, self.problem.structure),
            steps=self.steps,
            cost=self.steps.to(self.problem.run.scalar) if self.cost is None else self.cost,
            status=self.status,
            trace=None,
            log_prob=None,
        )
