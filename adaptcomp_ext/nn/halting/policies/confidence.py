"""The policy of early exit by confidence."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from torch import Tensor

from adaptcomp_ext.nn.halting.policy import FRACTIONS, Decision, Policy, Threshold, View
from adaptcomp_ext.ops import halting
from adaptcomp_ext.ops._checks import check_choice, check_floating, check_fraction
from adaptcomp_ext.ops.confidence import MEASURES, confidence


class Confidence(Policy):
    """Halt a row when the confidence of its readout, class logits, reaches a threshold.

    Parameters
    ----------
    threshold : float
        In (0, 1]. A row halts when its confidence is at least this.
    measure : str
        ``"max_prob"``: the largest probability; ``"margin"``: the margin between the two largest;
        ``"entropy"``: 1 − H / log C.
    lookahead : int
        0, or 1: the confidence at step n decides whether the row ends after step n + 1. See
        `Policy.lookahead`.

    Notes
    -----
    The readout has to be [n, C] with C ≥ 2. A logit of −∞ masks its class, which still counts in C. The
    output is the readout at the last step, and has its gradient; the decision has none. The ponder cost is
    the number of steps. A setting that is not as described raises TypeError or ValueError, also at a later
    assignment.
    """

    _settings: ClassVar = {
        **Policy._settings,
        "threshold": partial(check_fraction, "threshold"),
        "measure": partial(check_choice, "measure", choices=tuple(MEASURES)),
    }

    calibrated = Threshold("threshold", FRACTIONS)

    def __init__(self, threshold: float, measure: str = "max_prob", lookahead: int = 0) -> None:
        super().__init__()
        self.threshold = threshold
        self.measure = measure
        self.lookahead = lookahead

    @property
    def reads_logits(self) -> bool:
        """True: a class whose logit is −inf has probability 0."""
        return True

    def check_readout(self, readout: Tensor) -> None:
        """Require class logits."""
        logits = check_floating("readout", readout)
        if logits.dim() != 2 or logits.shape[1] < 2:
            expected = "class logits of shape [n, C] with C >= 2"
            raise ValueError(f"readout: Confidence expects {expected}, got {list(logits.shape)}")

    def decide(self, view: View) -> Decision:
        """Halt rows whose confidence reaches the threshold."""
        return Decision(confidence(view.readout, self.measure) >= self.threshold)

    def fuse(self) -> halting.Fused:
        """Let the halting kernel decide."""
        return halting.Fused(halting.CONFIDENCE, threshold=self.threshold, parameter=MEASURES[self.measure])

    def extra_repr(self) -> str:
        """Return threshold, measure and lookahead."""
        return f"threshold={self.threshold}, measure={self.measure!r}, lookahead={self.lookahead}"
