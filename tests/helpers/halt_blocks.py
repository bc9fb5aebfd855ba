"""Blocks of rows for the tests of the halting step: random arguments, and both sides' results."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import adaptcomp_ext as ac
from adaptcomp_ext.ops import halting
from adaptcomp_ext.ops._backend import compute_dtype
from tests.helpers.tensors import (
    Unchanged,
    assert_as_good_as_torch,
    assert_bitwise,
    generator,
    gradients,
    mask,
    on_cuda,
    values,
)

PADDING, RUNNING, HALTED, MAX_STEPS, NONFINITE = -1, 0, 1, 2, 3
UNTOUCHED = 9
STAGES = {
    "before min_steps": (1, 2, 8),
    "running": (3, 1, 8),
    "last": (8, 1, 8),
    "far on": ((7 << 32) + 3, 1, 1 << 40),
}


@dataclass
class Block:
    """One step's arguments. `readout`: None, "leaf" (the first leaf itself) or a tensor of its own."""

    row: Tensor
    halt: Tensor
    leaves: list[Tensor]
    carried: list[Tensor]
    weight: Tensor | None
    readout: Tensor | str | None
    increments: list[Tensor]
    stage: str = "running"
    batch: int = 0

    def tensors(self):
        """Return the floating-point tensors, which `with_tensors` replaces."""
        apart = [t for t in (self.weight, self.readout) if isinstance(t, Tensor)]
        return [t for t in (*self.leaves, *self.carried, *apart, *self.increments) if t.is_floating_point()]

    def with_tensors(self, tensors):
        it = iter(tensors)

        def new(t):
            return next(it) if isinstance(t, Tensor) and t.is_floating_point() else t

        leaves, carried = [new(t) for t in self.leaves], [new(t) for t in self.carried]
        weight, readout = new(self.weight), new(self.readout)
        return replace(
            self,
            leaves=leaves,
            carried=carried,
            weight=weight,
            readout=readout,
            increments=[new(t) for t in self.increments],
        )

    def read(self):
        return self.leaves[0] if isinstance(self.readout, str) else self.readout

    def fresh_results(self):
        """Return results filled with numbers that rows which have not ended must keep."""
        readout, scalars = self.read(), [t for t in (self.weight, *self.increments) if t is not None]
        output = None
        if readout is not None:
            dtype = compute_dtype(readout.dtype) if self.weight is not None else readout.dtype
            output = readout.new_full((self.batch, *readout.shape[1:]), UNTOUCHED, dtype=dtype)
        return halting.Results(
            steps=torch.full((self.batch,), UNTOUCHED, device=self.row.device),
            status=torch.full((self.batch,), UNTOUCHED, dtype=torch.int8, device=self.row.device),
            leaves=[
                t.new_full((self.batch, *t.shape[1:]), UNTOUCHED, requires_grad=False) for t in self.leaves
            ],
            totals=[scalars[0].new_full((self.batch,), UNTOUCHED) for _ in self.increments],
            output=output,
        )

    def end(self):
        n, least, most = STAGES[self.stage]
        results = self.fresh_results()
        flag, running = halting.halt_rows(
            *(results, self.row, self.halt, self.leaves),
            **dict(step=n, min_steps=least, max_steps=most),
            **dict(weight=self.weight, readout=self.read(), increments=self.increments),
        )
        return results, flag, running

    def pack(self, results, flag, plan):
        return halting.pack_rows(
            *(results, self.row, flag, plan, self.leaves, self.carried),
            **dict(weight=self.weight, readout=self.read(), increments=self.increments),
        )

    def plan(self, flag, packing):
        running = int((flag == RUNNING).sum())
        if packing == "stay" or running == 0:
            return None
        return halting.plan_packing(flag, self.row, running if packing == "exact" else self.row.shape[0])

    def outputs(self, packing):
        """Return all floating-point results of the step and, of the new block, the running rows."""
        results, flag, _ = self.end()
        plan = self.plan(flag, packing)
        leaves, carried = self.pack(results, flag, plan)
        running = flag == RUNNING
        packed = [t[running] if plan is None else t[: int(running.sum())] for t in (*leaves, *carried)]
        out = [
            *results.leaves,
            *results.totals,
            *packed,
            *([] if results.output is None else [results.output]),
        ]
        return tuple(t for t in out if t.is_floating_point())


def make_block(
    rows,
    device,
    dtype=torch.float32,
    widths=(3, 17),
    weighted=False,
    readout="leaf",
    sums=1,
    pattern="random",
    padding=True,
    integers=True,
    seed=0,
    stage="running",
):
    scalar = torch.float64 if dtype == torch.float64 else torch.float32
    batch = rows + 3
    row = torch.randperm(batch, generator=generator(seed))[:rows]
    if padding and rows > 3:
        row[::5] = -1
    leaves = [values((rows, w), dtype, device, seed + i) for i, w in enumerate(widths)]
    if integers:
        leaves.append(values((rows, 2), torch.int64, device, seed))
    return Block(
        row=row.to(device),
        halt=mask(pattern, rows, device, seed),
        leaves=leaves,
        carried=[
            values((rows, 2), dtype, device, seed + 20),
            *([values((rows,), torch.int64, device)] if integers else []),
        ],
        weight=values((rows,), scalar, device, seed + 30) if weighted else None,
        readout=values((rows, 4), dtype, device, seed + 40) if readout == "apart" else readout,
        increments=[values((rows,), scalar, device, seed + 50 + i) for i in range(sums)],
        stage=stage,
        batch=batch,
    )


KINDS = {
    "state is the output": dict(readout=None),
    "state is the readout": dict(readout="leaf"),
    "readout apart": dict(readout="apart"),
    "weighted state": dict(readout="leaf", weighted=True),
    "weighted readout": dict(readout="apart", weighted=True),
    "two sums": dict(readout="apart", weighted=True, sums=2),
    "no sums": dict(readout=None, sums=0),
}


def check_against_reference(block):
    """Compare flags, steps, status and copies exactly, sums by the tolerance rule; return the flags."""
    with Unchanged(block.row, block.halt, *block.tensors()):
        got, flag, running = block.end()
    wide = block.with_tensors([t.double() for t in block.tensors()])
    with ac.reference_kernels():
        same, same_flag, _ = block.end()
        exact, *_ = wide.end()
    assert_bitwise(flag, same_flag)
    if not on_cuda(flag.device):
        assert running == int((flag == RUNNING).sum())
    for g, s in zip(
        (got.steps, got.status, *got.leaves), (same.steps, same.status, *same.leaves), strict=True
    ):
        assert_bitwise(g, s)
    for g, s, e in zip(got.totals, same.totals, exact.totals, strict=True):
        assert_as_good_as_torch(g, s, e)
    if got.output is not None and block.weight is None:
        assert_bitwise(got.output, same.output)
    elif got.output is not None:
        assert_as_good_as_torch(got.output, same.output, exact.output, scale=UNTOUCHED)
    return flag


def gradients_of_everything(block):
    """If all blocks have the same gradient in a result, it is the row's own, rounded to the batch row."""
    out = block.outputs("stay")
    return gradients(out, block.tensors(), [torch.full_like(t, 0.3) for t in out])


def check_gradients(block, packing, scale=1.0):
    """Compare with autograd through the reference, by the tolerance rule."""
    block = block.with_tensors([t.detach().requires_grad_() for t in block.tensors()])
    wide = block.with_tensors([t.detach().double().requires_grad_() for t in block.tensors()])
    out = block.outputs(packing)
    upstream = [values(t.shape, t.dtype, out[0].device, seed=i) for i, t in enumerate(out)]
    got = gradients(out, block.tensors(), upstream)
    with ac.reference_kernels():
        same = gradients(block.outputs(packing), block.tensors(), upstream)
        exact = gradients(wide.outputs(packing), wide.tensors(), upstream)
    for g, s, e in zip(got, same, exact, strict=True):
        assert_as_good_as_torch(g, s, e, rounding=4.0, scale=scale)
