"""The policy of halting at convergence."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from adaptcomp_ext.nn.halting.policy import Decision, Policy, Threshold, View
from adaptcomp_ext.ops import halting
from adaptcomp_ext.ops._checks import check_choice, check_floating, check_int
from adaptcomp_ext.ops.convergence import convergence_step_unchecked
from adaptcomp_ext.ops.descent import check_number

GRADIENTS = ("unrolled", "implicit", "one_step")
NORMS = ("relative", "absolute", "kl")


class Convergence(Policy):
    """Halt a row when its readout rₙ has stopped changing: for fixed points, equilibrium models, planners.

    ::

        ‖rₙ − rₙ₋₁‖₂ ≤ tol · ‖rₙ‖₂  ("relative")   or   ‖rₙ − rₙ₋₁‖₂ ≤ tol  ("absolute")
        or   KL(pₙ ‖ pₙ₋₁) ≤ tol, with p = softmax(r)  ("kl")
        in `patience` consecutive steps

    Parameters
    ----------
    tol : float
        Tolerance, at least 0; of a divergence in nats.
    norm : str
        "relative" or "absolute": norms over all elements of a row's readout. "kl": the divergence of
        successive predictions, for a readout of class logits, [n, C].
    patience : int
        Number of consecutive steps, at least 1.
    lookahead : int
        0, or 1: a row ends one step after it has stopped changing. See `Policy.lookahead`.
    gradient : str
        How the result is differentiated. "unrolled": through all steps. "implicit": as a fixed point, by the
        implicit function theorem. "one_step": through one application of the step at the result. See
        *Gradients of fixed points* below.

    Notes
    -----
    The first step has no predecessor, so that no row halts before step 1 + `patience`. Norms are accumulated
    in float32, float64 for float64 readouts; a row whose sum of squares overflows does not halt. An element
    that is −inf, such as a masked class, has not changed if it was −inf before, and is left out of ‖rₙ‖; a
    class that is masked no longer makes the divergence infinite. A divergence in float32 is exact to about
    1e-6, which a `tol` below cannot ask for. The
    output is the readout at the last step, and has its gradient; the decision has none. The ponder cost is
    the number of steps. A setting that is not as described raises TypeError or ValueError, also at a later
    assignment.

    *Gradients of fixed points.* With "implicit" and "one_step" a training run keeps no graph of its steps:
    it runs as without gradients, with the same results, and needs the memory of one step. Then the step is
    applied once more, with a graph, to the rows' last states z*. The gradients of output and state reach the
    inputs, and the parameters of step and readout, through that application f and ordinary autograd. The
    initial state gets zero, because a fixed point does not depend on it; a tensor that the step hands on
    unchanged counts as an input. "implicit" multiplies the gradient v of a row's state by (I − Jᵀ)⁻¹ before,
    where J = ∂f/∂z at z*: the sum of (Jᵀ)ᵏv, by one backward pass of the application for each term. A row
    leaves when a term is at most `tol` times the sum (`tol` at least the rounding of the dtype, and relative
    for both norms), the others are compacted, and ``step`` is called again for them in the backward pass (for
    each term, if torch.compile has made it a graph that can be walked only once). Terms after the 16th are
    looked at in fours. A row that has not converged after `max_steps` terms keeps the sum up to its smallest
    term, and the backward pass warns.

    "implicit" is exact to the tolerance where the whole state has converged. It is not for a row that ended
    ``MAX_STEPS``, nor where the readout that `Convergence` reads is still and the rest of the state moves.
    Rows that ended ``NONFINITE`` have no gradient. The step must be one function of state and inputs: a
    ModuleList, a parameter ``n`` and `keep_trace` raise ValueError, random numbers in the step RuntimeError
    for "implicit" ("one_step" draws new ones). "implicit" can be differentiated once, and waits for the
    device on CUDA.
    """

    gradient: str = "unrolled"  # for modules that were pickled by older versions

    _settings: ClassVar = {
        **Policy._settings,
        "tol": partial(check_number, "tol", low=0.0, high=math.inf, ends="[)"),
        "norm": partial(check_choice, "norm", choices=NORMS),
        "patience": partial(check_int, "patience", least=1),
        "gradient": partial(check_choice, "gradient", choices=GRADIENTS),
    }

    calibrated = Threshold("tol", (0.0, *(10 ** (-k / 4) for k in range(28, -5, -1))))

    def __init__(
        self,
        tol: float,
        norm: str = "relative",
        patience: int = 1,
        lookahead: int = 0,
        gradient: str = "unrolled",
    ) -> None:
        super().__init__()
        self.tol = tol
        self.norm = norm
        self.patience = patience
        self.lookahead = lookahead
        self.gradient = gradient

    @property
    def reads_logits(self) -> bool:
        """Whether the readout is class logits, as for norm "kl"."""
        return self.norm == "kl"

    def check_readout(self, readout: Tensor) -> None:
        """Require floating-point numbers; for norm "kl" class logits."""
        readout = check_floating("readout", readout)
        if self.norm == "kl" and (readout.dim() != 2 or readout.shape[1] < 2):
            expected = 'class logits of shape [n, C] with C >= 2 for norm "kl"'
            raise ValueError(f"readout: Convergence expects {expected}, got {list(readout.shape)}")

    def decide(self, view: View) -> Decision:
        """Halt rows that have not changed for `patience` steps."""
        with torch.no_grad():
            readout = view.readout.detach()
            readout = readout[:, None] if readout.dim() == 1 else readout.flatten(1)
            if not view.carry:
                still = torch.zeros_like(view.row)
            else:
                before, still = view.carry
                still = convergence_step_unchecked(readout, before, still, self.norm, self.tol)
            # The carry is a copy, because a step may overwrite its own output.
            return Decision(still >= self.patience, carry=(readout.clone(), still))

    def fuse(self) -> halting.Fused:
        """Let the halting kernel decide."""
        return halting.Fused(halting.CONVERGES[self.norm], threshold=self.tol, parameter=self.patience)

    def extra_repr(self) -> str:
        """Return tolerance, norm, patience and lookahead, and another gradient than "unrolled"."""
        settings = (
            f"tol={self.tol:g}, norm={self.norm!r}, patience={self.patience}, lookahead={self.lookahead}"
        )
        return settings if self.gradient == "unrolled" else f"{settings}, gradient={self.gradient!r}"
