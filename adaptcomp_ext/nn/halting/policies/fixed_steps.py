"""The policy of a number of steps that is given beforehand."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptcomp_ext import _C
from adaptcomp_ext.nn.halting.policy import Decision, Policy, Run, View
from adaptcomp_ext.ops import halting
from adaptcomp_ext.ops._backend import contiguous, on_reference
from adaptcomp_ext.ops._checks import check_int, describe
from adaptcomp_ext.ops._plain import check_initialized, exporting, is_dense, plain
from adaptcomp_ext.ops._transforms import DIFFERENTIATION, enter


class FixedSteps(Policy):
    """Halt each row after a given number of steps: for tests, benchmarks and fixed budgets.

    Parameters
    ----------
    n : int or Tensor
        The number of steps, at least 1: one number for all rows, or int64 [B] with a number for each. A
        tensor is a buffer of the module: it moves with the module and is part of its state_dict.
    lookahead : int
        0, or 1: each row takes one step more than its number. See `Policy.lookahead`.

    Notes
    -----
    A number below 1 that is assigned later raises ValueError on the CPU; on CUDA, where reading it would
    wait, it counts as 1. A row with a number above `max_steps` ends there with the status ``MAX_STEPS``. The
    output is the readout at the last step, and has its gradient. The ponder cost is the number of steps. A
    setting that is not as described raises TypeError or ValueError.
    """

    n: Tensor | int

    def __init__(self, n: int | Tensor, lookahead: int = 0) -> None:
        super().__init__()
        self.lookahead = lookahead
        if not isinstance(n, Tensor):
            self.n = check_int("n", n, 1)
            return
        check_initialized("n", n)
        if n.dtype != torch.int64 or n.dim() != 1 or not is_dense(n):
            raise TypeError(f"n: expected an int, or an int64 tensor of shape [B], got {describe(n)}")
        enter("FixedSteps", [n], DIFFERENTIATION)
        if n.numel() and int(n.min()) < 1:
            raise ValueError(f"n: expected at least 1 step for every row, got {int(n.min())}")
        self.register_buffer("n", n.contiguous())

    def begin(self, run: Run) -> tuple[Tensor, ...]:
        """Check that `n`, which may have been replaced, has a number for each row; there is no carry."""
        n = self.n
        if not isinstance(n, Tensor):
            check_int("FixedSteps n", n, 1)
            return ()
        n = plain("FixedSteps n", n)
        if n.dtype != torch.int64 or n.dim() != 1 or not is_dense(n):
            raise TypeError(
                f"FixedSteps n: expected an int, or an int64 tensor of shape [B], got {describe(n)}"
            )
        if n.shape[0] != run.batch:
            raise ValueError(
                f"FixedSteps n: expected shape [{run.batch}] for this batch, got {list(n.shape)}"
            )
        if n.device != run.device:
            raise ValueError(f"FixedSteps n: expected a tensor on {run.device}, got one on {n.device}")
        if (
            n.is_cpu
            and not exporting()
            and not (bool((n > 0).all()) if on_reference() else _C.all_positive([n, run.batch]))
        ):
            raise ValueError(f"FixedSteps n: expected at least 1 step for every row, got {int(n.min())}")
        return ()

    def decide(self, view: View) -> Decision:
        """Halt rows that have taken their number of steps."""
        if isinstance(self.n, Tensor):
            return Decision(self.n[view.row.clamp(min=0)] <= view.step)
        return Decision(torch.full_like(view.row, self.n) <= view.step)

    def fuse(self) -> halting.Fused:
        """Let the halting kernel decide."""
        n = self.n
        if not isinstance(n, Tensor):
            return halting.Fused(halting.FIXED_STEPS, parameter=n)
        if not is_dense(n):
            raise TypeError(f"FixedSteps n: expected a dense tensor, got {describe(n)}")
        return halting.Fused(halting.FIXED_STEPS, contiguous("FixedSteps n", n))

    def extra_repr(self) -> str:
        """Return the number of steps."""
        return f"n={self.n if not isinstance(self.n, Tensor) else tuple(self.n.shape)}"
