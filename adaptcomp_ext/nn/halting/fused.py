"""The fused halting loop, for policies that the kernel decides: one kernel call for each step.

*In inference* the loop works in place. The kernel decides, adds to the output and writes the results of
the rows that halt. On the CPU it also fills their places with rows from the end of the block: as many
rows move as have halted, and none in a step in which no row halts. A tensor is written to only if nobody
else can hold it: the block's own copies of the inputs, and a state that the step returned and did not
keep. Other tensors are copied. The work between two calls of the user's functions is compiled
(csrc/bindings/halt_run.h). So is the loop itself, for the usual states on the CPU.

*In training* the loop serves small blocks. It does not write to the step's results, because autograd may
have saved them: the active rows are copied into a new, smaller block, in order. Decision, compaction and the
autograd node of both are compiled, too (csrc/bindings/halt_node.h). Large blocks run in
`adaptcomp_ext.nn.halting.loop`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaptcomp_ext import _C
from adaptcomp_ext.nn._active import ActiveCount, bucket
from adaptcomp_ext.nn._tree import OTHER, form
from adaptcomp_ext.nn.halting.block import Problem
from adaptcomp_ext.nn.halting.cost_model import never
from adaptcomp_ext.nn.halting.first_step import search
from adaptcomp_ext.nn.halting.fusing import begin
from adaptcomp_ext.nn.halting.loop import explained_writes
from adaptcomp_ext.nn.halting.policy import check_logits, explain_call
from adaptcomp_ext.nn.result import HaltResult, Status
from adaptcomp_ext.ops import halting
from adaptcomp_ext.ops._backend import compute_dtype, contiguous, on_cuda, place
from adaptcomp_ext.ops._plain import dressed, with_memory
from adaptcomp_ext.ops.compaction import gather_rows_kernel

SMALL = 1 << 18  # bytes of a block of the state up to which training is faster here


def serves(problem: Problem, fused: halting.Fused) -> bool:
    """Whether this is the loop to run."""
    if problem.keep_trace or problem.together is not None:
        return False
    if not problem.as_in_training:
        return True
    if not torch.is_grad_enabled():
        return False  # a forward pass that will be done again with gradients: see `Problem.as_in_training`
    if problem.compact is False or on_cuda(problem.run.device):
        return False
    return sum(t.numel() * t.element_size() for t in problem.state) < SMALL


def _readable(name: str, tensor: Tensor) -> Tensor:
    """The tensor as the compiled loop reads it. TypeError where it has no memory."""
    return with_memory(name, contiguous(name, tensor))


class FusedRun:
    """A run in this loop, which `run` starts."""

    def __init__(self, problem: Problem, fused: halting.Fused) -> None:
        self.problem = problem
        self.fused = fused
        run = problem.run
        self.steps = torch.empty(run.batch, dtype=torch.int64, device=run.device)  # every row writes its own
        self.status = torch.empty(run.batch, dtype=torch.int8, device=run.device)
        self.results = [
            torch.empty_like(t, memory_format=torch.contiguous_format, requires_grad=False)
            for t in problem.state
        ]
        # For each shape of the state, the first step that has it, and the results.
        self.of_shapes: list[tuple[int, list[Tensor]]] = []
        self.since = 1
        self.training = torch.is_grad_enabled()
        self.carry = begin(problem.policy, run, fused.carried)
        self.cost = torch.zeros(run.batch, dtype=run.scalar, device=run.device) if fused.has_cost else None
        self.active: ActiveCount | None = None
        self.row = self.flag = None  # on the CPU the block has its own
        if on_cuda(run.device):
            self.active = ActiveCount(run.batch, run.device, problem.lag)
            self.row = torch.arange(run.batch, device=run.device)
            self.flag = torch.empty(run.batch, dtype=torch.int8, device=run.device)
        self.inputs = problem.inputs
        if not problem.ordinary:
            self.inputs = [contiguous("inputs", t) for t in problem.inputs]
        self.output: Tensor | None = None
        self.output_dtype = torch.float32
        self.first: Tensor | None = None  # without rows, and otherwise like the first readout
        # Whether the loop is compiled, too.
        self.compiled = (
            self.active is None
            and not problem.has_containers
            and problem.input_kinds is None
            and form(problem.structure) != OTHER
        )
        device, _ = place(run.device)
        self.block = _C.halt_run(
            state=problem.like,
            schedule=never() if self.training else problem.schedule(),
            results=self.results,
            inputs=self.inputs,
            rows=run.batch,
            row=self.row,
            flag=self.flag,
            steps=self.steps,
            status=self.status,
            wide=run.scalar == torch.float64,
            min_steps=run.min_steps,
            max_steps=run.max_steps,
            policy=fused.policy,
            has_head=fused.head is not None,
            reads_logits=halting.KERNELS[fused.policy].reads_logits,
            threshold=fused.threshold,
            signal=fused.signal,
            parameter=fused.parameter,
            sample_ids=run.sample_ids,
            carry=self.carry[0] if fused.carried else None,
            cost=self.cost,
            running=None if self.active is None else self.active.running,
            inference_mode=torch.is_inference_mode_enabled(),
            apply=halting.apply_node if self.training else None,
            device=device,
        )

    def run(self) -> HaltResult:
        """Run every row until it has ended."""
        if not self.training:
            return self._run()
        with explained_writes(self.problem):
            return self._run()

    def _run(self) -> HaltResult:
        problem, block, head, read = self.problem, self.block, self.fused.head, self.problem.readout
        rows = problem.run.batch
        previous: Any = problem.tree(list(problem.state))
        arguments = problem.arguments(self.inputs)
        steps = iter(problem.steps)
        if self.compiled:
            block.go_on(steps, rows, previous, arguments, read, head, self)
            return self.result(block.has_broken)
        has_containers = problem.has_containers
        take, stream = problem.like.take, 0
        on_device = self.active is not None
        for n, step in enumerate(steps, 1):
            current = step(previous, *arguments)
            # Before `advance`, which counts references to the inputs: the step may have kept the container.
            if has_containers:
                arguments = problem.arguments(self.inputs)
            leaves = take(current, rows)
            if leaves is None:
                leaves, current, room = self._take(current, rows, n)
                if room is not None:
                    block.change_shapes(*room)
            elif problem.kinds is not None:
                problem.kinds = None
            try:
                readout = None if read is None else read(current)
            except (TypeError, AttributeError) as error:
                self._explain("readout", read, current, error)
                raise
            try:
                logits = None if head is None else head(current)
            except (TypeError, AttributeError) as error:
                self._explain("head", head, current, error)
                raise
            del current  # what is left of the references to the leaves is counted in the call
            if n == 1:
                readout, output = self._first(readout, logits, leaves)
                block.use_first(leaves, readout, output)
            if self.active is not None:
                stream = place(problem.run.device)[1]
            size = block.advance(rows, n, leaves, readout, logits, stream)
            if size < 0:
                readout, logits = self._mend(readout, logits, rows)
                size = block.advance(rows, n, leaves, readout, logits, stream)
                assert size >= 0, "readout and logits were mended"
            if self.active is not None:
                if n == problem.run.max_steps:
                    break
                leaves, size = self._pack_on_device(rows, leaves, self.active)
            if size == 0:
                break
            if size != rows:
                if on_device or block.inputs_replaced:
                    arguments = problem.arguments(self.inputs)
                rows = size
            previous = problem.tree(leaves)
        return self.result(block.has_broken)

    def _take(
        self, current: Any, rows: int, n: int
    ) -> tuple[list[Tensor], Any, tuple[_C.StateLike, list[Tensor]] | None]:
        """Return leaves and state of a step's result that is not in the ordinary form.

        If it has other shapes than before, return their form, too, and tensors for the results.
        """
        problem = self.problem
        leaves = [_readable("step", t) for t in problem.check_state(current, rows)]
        room = problem.change_shapes(leaves, n)
        if room is None:
            return leaves, problem.tree(leaves), None
        if n > 1:
            self.of_shapes.append((self.since, self.results))
        self.results, self.since = room, n
        return leaves, problem.tree(leaves), (problem.like, room)

    def _tree(self, leaves: list[Tensor]) -> Any:
        return self.problem.tree(leaves)

    def _explain(self, role: str, function: Any, state: Any, error: Exception) -> None:
        explain_call(role, function, state, error)

    def _first(self, readout: Any, logits: Any, leaves: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Return the first readout where it is apart from the state, and the output that it decides."""
        problem, run = self.problem, self.problem.run
        weighted, apart = problem.policy.weighted, problem.readout is not None
        problem.first_read = None
        first = problem.check_readout(readout if apart else leaves[0], run.batch)
        first = contiguous("readout", first)
        self.output_dtype = first.dtype
        if self.compiled:
            self.first = first.new_empty((0, *first.shape[1:]), requires_grad=False)
        if weighted or apart:
            allocate = torch.zeros if weighted else torch.empty
            dtype = compute_dtype(first.dtype) if weighted else first.dtype
            self.output = allocate((run.batch, *first.shape[1:]), dtype=dtype, device=run.device)
        if problem.holder is not None:
            search(problem.holder, problem, leaves, first if apart else None, [logits])
        return first if apart else None, self.output

    def _mend(self, readout: Any, logits: Any, rows: int) -> tuple[Tensor | None, Tensor | None]:
        """Raise if readout or logits are wrong; make them contiguous if that is all."""
        if self.problem.readout is not None:
            readout = _readable("readout", self.problem.check_readout(readout, rows))
        if self.fused.head is not None:
            most = halting.KERNELS[self.fused.policy].logits
            logits = _readable("head", check_logits(logits, rows, self.problem.run.device, most))
        return readout, logits

    def _pack_on_device(
        self, rows: int, leaves: list[Tensor], active: ActiveCount
    ) -> tuple[list[Tensor], int]:
        """On CUDA the host has only a bound on the rows that run, and packs when a smaller block will do."""
        bound = active.bound()
        if bound == 0:
            return leaves, 0
        size = min(rows, bucket(bound))
        if self.problem.compact is False or size == rows:
            return leaves, rows
        assert self.row is not None and self.flag is not None
        _C.check_blocks([*leaves, *self.inputs], rows, "step or inputs")
        plan = halting.plan_packing(self.flag[:rows], self.row, size)
        carried = self.carry[: int(self.fused.carried)]
        packed = gather_rows_kernel([*leaves, *self.inputs, *carried], plan.index)
        self.row = plan.row
        if carried:
            self.carry = (packed.pop(),)
        self.block.set_rows(self.row, self.carry[0] if carried else None)
        self.inputs[:] = packed[len(leaves) :]
        return packed[: len(leaves)], size

    def _block_gradient(self) -> None:
        """Detach the rows that are not finite: see `halting.Results.block_gradient`."""
        totals = [] if self.cost is None else [self.cost]
        results = halting.Results(self.steps, self.status, self.results, totals, self.output)
        at = self.status == Status.NONFINITE
        results.block_gradient(at)
        self.results, self.output = results.leaves, results.output
        self.of_shapes = [
            (n, [halting.block_gradient(t, at) for t in leaves]) for n, leaves in self.of_shapes
        ]
        if self.cost is not None:
            self.cost = results.totals[0]

    def result(self, broken: bool) -> HaltResult:
        """Return what the run has found. `broken`: in training a row has ended NONFINITE."""
        if broken:
            self._block_gradient()
        output = self.results[0] if self.output is None else self.output.to(self.output_dtype)
        cost = self.steps.to(self.problem.run.scalar) if self.cost is None else self.cost
        state = self.problem.last_states([*self.of_shapes, (self.since, self.results)], self.steps)
        return HaltResult(
            dressed(output, self.problem.readout_kind), state, self.steps, cost, self.status, None, None
        )
