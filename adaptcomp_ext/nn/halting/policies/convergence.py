"""The policy of halting at convergence."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from adaptcomp_ext.nn.halting.policy import Decision, Policy, Threshold, View
from adaptcomp_ext.ops._backend import on_cuda
from adaptcomp_ext.ops._checks import check_choice, check_floating, check_int
from adaptcomp_ext.ops.descent import check_number

NORMS = ("relative", "absolute")


class Convergence(Policy):
    """Halt a row when its readout rₙ has stopped changing: for fixed points, equilibrium models, planners.

    ::

        ‖rₙ − rₙ₋₁‖₂ ≤ tol · ‖rₙ‖₂  ("relative")   or   ‖rₙ − rₙ₋₁‖₂ ≤ tol  ("absolute")
        in `patience` consecutive steps

    Parameters
    ----------
    tol : float
        Tolerance, at least 0.
    norm : str
        "relative" or "absolute". The norms are over all elements of a row's readout.
    patience : int
        Number of consecutive steps, at least 1.
    lookahead : int
        0, or 1: a row ends one step after it has stopped changing. See `Policy.lookahead`.

    Notes
    -----
    The first step has no predecessor, so that no row halts before step 1 + `patience`. Norms are accumulated
    in float32, float64 for float64 readouts; a row whose sum of squares overflows does not halt. An element
    that is −inf, such as a masked class, has not changed if it was −inf before, and is left out of ‖rₙ‖. The
    output is the readout at the last step, and has its gradient; the decision has none. The ponder cost is
    the number of steps. A setting that is not as described raises TypeError or ValueError, also at a later
    assignment.
    """

    _settings: ClassVar = {
        **Policy._settings,
        "tol": partial(check_number, "tol", low=0.0, high=math.inf, ends="[)"),
        "norm": partial(check_choice, "norm", choices=NORMS),
        "patience": partial(check_int, "patience", least=1),
    }

    calibrated = Threshold("tol", (0.0, *(10 ** (-k / 4) for k in range(28, -5, -1))))

    def __init__(self, tol: float, norm: str = "relative", patience: int = 1, lookahead: int = 0) -> None:
        super().__init__()
        self.tol = tol
        self.norm = norm
        self.patience = patience
        self.lookahead = lookahead

    def check_readout(self, readout: Tensor) -> None:
        """Require floating-point numbers."""
        check_floating("readout", readout)

    def decide(self, view: View) -> Decision:
        """Halt rows that have not changed for `patience` steps."""
        wide = torch.float64 if view.readout.dtype == torch.float64 else torch.float32
        with torch.no_grad():
            readout = view.readout.detach()
            readout = readout[:, None] if readout.dim() == 1 else readout.flatten(1)
            if not view.carry:
                still = torch.zeros_like(view.row)
            else:
                before, still = view.carry
                now = readout.to(wide)
                difference = now - before.to(wide)
                change = torch.linalg.vector_norm(difference, dim=1)
                # −inf − −inf is NaN. On CUDA reading the values would wait, so that NaN is assumed.
                masked = on_cuda(change.device) or bool(change.isnan().any())
                if masked:
                    change = torch.linalg.vector_norm(difference.nan_to_num_(0.0, math.inf, -math.inf), dim=1)
                if self.norm == "relative":
                    size = torch.linalg.vector_norm(
                        now.nan_to_num(math.nan, math.inf, 0.0) if masked else now, dim=1
                    )
                    is_still = (change <= self.tol * size) & (size < math.inf)
                else:
                    is_still = change <= self.tol
                still = torch.where(is_still, still + 1, torch.zeros_like(still))
            # The carry is a copy, because a step may overwrite its own output.
            return Decision(still >= self.patience, carry=(readout.clone(), still))

    def extra_repr(self) -> str:
        """Return tolerance, norm, patience and lookahead."""
        return f"tol={self.tol:g}, norm={self.norm!r}, patience={self.patience}, lookahead={self.lookahead}"
