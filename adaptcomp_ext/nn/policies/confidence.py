"""Exit on confidence."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from torch import Tensor

from adaptcomp_ext.nn.policy import Decision, Policy, View
from adaptcomp_ext.ops import halting
from adaptcomp_ext.ops._checks import check_choice, check_floating, check_fraction
from adaptcomp_ext.ops.confidence import MEASURES, confidence


class Confidence(Policy):
    """Halt a row as soon as its readout, taken as class logits, is sure enough. The output is the readout at that step.

    Parameters
    ----------
    threshold : float
        In (0, 1]. A row halts where its confidence is at least this.
    measure : str
        ``"max_prob"``: the largest probability; ``"margin"``: the margin between the two largest;
        ``"entropy"``: 1 − H / log C.

    Notes
    -----
    Needs a readout [n, C] with C ≥ 2. A logit of −∞ masks its class, which counts in C all the same. The
    decision has no gradient; the output's is that of the readout at the last step. The ponder cost is the
    number of steps.
    """

    _settings: ClassVar = {
        "threshold": partial(check_fraction, "threshold"),
        "measure": partial(check_choice, "measure", choices=tuple(MEASURES)),
    }

    def __init__(self, threshold: float, measure: str = "max_prob") -> None:
        super().__init__()
        self.threshold = threshold
        self.measure = measure

    @property
    def reads_logits(self) -> bool:
        """True: a class whose logit is −inf has the probability 0."""
        return True

    def check_readout(self, readout: Tensor) -> None:
        """Require class logits."""
        logits = check_floating("readout", readout)
        if logits.dim() != 2 or logits.shape[1] < 2:
            raise ValueError(
                f"readout: Confidence expects class logits of shape [n, C] with C >= 2, got {list(logits.shape)}"
            )

    def decide(self, view: View) -> Decision:
        """Whether each row is sure enough."""
        return Decision(confidence(view.readout, self.measure) >= self.threshold)

    def fuse(self) -> halting.Fused:
        """The same, in the halting kernel."""
        return halting.Fused(halting.CONFIDENCE, threshold=self.threshold, parameter=MEASURES[self.measure])

    def extra_repr(self) -> str:
        """Threshold and measure."""
        return f"threshold={self.threshold}, measure={self.measure!r}"
