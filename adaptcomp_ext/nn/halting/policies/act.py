"""The policy of adaptive computation time."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptcomp_ext.nn._naming import named
from adaptcomp_ext.nn.halting.policy import (
    FRACTIONS,
    Decision,
    Policy,
    Run,
    Threshold,
    View,
    check_head,
    head_logits,
    no_lookahead,
)
from adaptcomp_ext.ops import halting
from adaptcomp_ext.ops._checks import check_fraction
from adaptcomp_ext.ops.act import act_step_unchecked


class ACT(Policy):
    """Adaptive computation time (Graves 2016): halt when the halting probabilities add up to `threshold`.

    hₙ = sigmoid(head(sₙ)); N is the first step with h₁ + … + h_N ≥ threshold; R = 1 − Σ_{n<N} hₙ is the
    remainder. The output is Σ_{n<N} hₙ·readoutₙ + R·readout_N, and the ponder cost is ρ = N + R. Both are
    differentiable with N held constant, so that h_N has no gradient. Training and evaluation mode are the
    same.

    Parameters
    ----------
    head : callable
        Maps the state to one logit per row, [n] or [n, 1]; a ModuleList has a head for each step. Start with
        a bias near −3, that is with many steps: from a bias of 0 or more, training rarely leaves one or two
        steps. A logit of −∞ gives h = 0.
    threshold : float
        1 − ε, in (0, 1].

    Notes
    -----
    A row that `max_steps` ends below the threshold has the remainder as its last weight and the status
    ``MAX_STEPS``. Before `min_steps` the halting probability is zero, so that these steps have no weight in
    the output. A setting that is not as described raises TypeError or ValueError, also at a later assignment.
    """

    _decides_by_step = True
    _settings: ClassVar = {
        "lookahead": partial(no_lookahead, "ACT"),
        "head": check_head,
        "threshold": partial(check_fraction, "threshold"),
    }

    calibrated = Threshold("threshold", FRACTIONS)

    def __init__(self, head: Any, threshold: float = 0.99) -> None:
        super().__init__()
        self.head = head
        self.threshold = threshold

    @property
    def weighted(self) -> bool:
        """True: the output is the weighted sum of the readouts."""
        return True

    def begin(self, run: Run) -> tuple[Tensor, ...]:
        """Return the accumulated halting probability: zero."""
        return (torch.zeros(run.batch, device=run.device, dtype=run.scalar),)

    def decide(self, view: View) -> Decision:
        """Take one step of ACT."""
        run = view.run
        logits = head_logits(self.head, view)
        weight, accumulated, cost, halt = act_step_unchecked(
            logits, view.carry[0], view.step, run.min_steps, run.max_steps, self.threshold
        )
        return Decision(halt, weight, cost, carry=(accumulated,), logits=logits)

    def fuse(self) -> halting.Fused:
        """Let the halting kernel take the step."""
        return halting.Fused(
            halting.ACT, threshold=self.threshold, carried=True, has_cost=True, head=self.head
        )

    def extra_repr(self) -> str:
        """Return the head's name, if it is a plain function, and the threshold."""
        return f"{named(head=self.head)}threshold={self.threshold}"
