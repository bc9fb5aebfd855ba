"""Exit where nothing moves any more."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from adaptcomp_ext.nn.policy import Decision, Policy, View
from adaptcomp_ext.ops._backend import on_cuda
from adaptcomp_ext.ops._checks import check_choice, check_floating, check_int
from adaptcomp_ext.ops.descent import check_number

NORMS = ("relative", "absolute")


class Convergence(Policy):
    """Halt a row when its readout has stopped changing: for fixed points, equilibrium models, planners. The output is the last.

    ::

        ‖rₙ − rₙ₋₁‖₂ ≤ tol · ‖rₙ‖₂  ("relative")      ‖rₙ − rₙ₋₁‖₂ ≤ tol  ("absolute")      `patience` steps
        running

    Parameters
    ----------
    tol : float
        At least 0.
    norm : str
        "relative" or "absolute"; over all elements of a row's readout.
    patience : int
        At least 1: in how many consecutive steps it must hold.

    Notes
    -----
    The first step has nothing to be compared with, so that no row halts before step 1 + `patience`. Norms are
    accumulated in float32, float64 for float64 readouts; where the sum of squares overflows nothing halts. An
    element that is −inf, as a masked class is, has not changed if it was −inf before, and is left out of
    ‖rₙ‖. The decision has no gradient; the output's is that of the readout at the last step. The ponder cost
    is the number of steps.
    """

    _settings: ClassVar = {
        "tol": partial(check_number, "tol", low=0.0, high=math.inf, ends="[)"),
        "norm": partial(check_choice, "norm", choices=NORMS),
        "patience": partial(check_int, "patience", least=1),
    }

    def __init__(self, tol: float, norm: str = "relative", patience: int = 1) -> None:
        super().__init__()
        self.tol = tol
        self.norm = norm
        self.patience = patience

    def check_readout(self, readout: Tensor) -> None:
        """Require numbers whose distance can be taken."""
        check_floating("readout", readout)

    def decide(self, view: View) -> Decision:
        """Whether each row has been still for long enough."""
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
                # Where −inf less −inf was taken. CUDA is not asked whether it was.
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
            # A copy: a step may overwrite its own output.
            return Decision(still >= self.patience, carry=(readout.clone(), still))

    def extra_repr(self) -> str:
        """Tolerance, norm and patience."""
        return f"tol={self.tol:g}, norm={self.norm!r}, patience={self.patience}"
