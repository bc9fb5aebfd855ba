"""The policy of halting when the prediction does not change any more."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from adaptcomp_ext.nn.halting.policy import Decision, Policy, View
from adaptcomp_ext.ops import halting
from adaptcomp_ext.ops._checks import check_floating, check_int


class StablePrediction(Policy):
    """Halt a row when its most likely class has been the same for some steps (PABEE, Zhou et al. 2020).

    ::

        argmax rₙ = argmax rₙ₋₁   in `patience` consecutive steps

    Parameters
    ----------
    patience : int
        Number of consecutive steps without a change, at least 1.
    lookahead : int
        0, or 1: a row ends one step after its prediction has been stable for long enough. See
        `Policy.lookahead`.

    Notes
    -----
    The readout has to be class logits, [n, ..., C]. With more than two dimensions, as of an answer of many
    symbols, a row's predictions at all places have to stay the same. Of equal logits the first counts. −∞
    masks a class. The first step has no predecessor, so that no row halts before step 1 + `patience`. The
    output is the readout at the last step, and has its gradient; the decision has none. The ponder cost
    is the number of steps. A setting that is not as described raises TypeError or ValueError, also at a later
    assignment.
    """

    _settings: ClassVar = {**Policy._settings, "patience": partial(check_int, "patience", least=1)}

    def __init__(self, patience: int = 2, lookahead: int = 0) -> None:
        super().__init__()
        self.patience = patience
        self.lookahead = lookahead

    @property
    def reads_logits(self) -> bool:
        """True: a class whose logit is −inf has probability 0."""
        return True

    def check_readout(self, readout: Tensor) -> None:
        """Require class logits."""
        logits = check_floating("readout", readout)
        if logits.dim() < 2 or 0 in logits.shape[1:] or logits.shape[-1] >= 2**31:
            expected = "class logits of shape [n, ..., C]"
            raise ValueError(f"readout: StablePrediction expects {expected}, got {list(logits.shape)}")

    def decide(self, view: View) -> Decision:
        """Halt rows whose prediction has not changed for `patience` steps."""
        with torch.no_grad():
            predicted = view.readout.argmax(dim=-1, keepdim=True).flatten(1)
            if not view.carry:
                still = torch.zeros_like(view.row)
            else:
                before, still = view.carry
                still = torch.where((predicted == before).all(dim=1), still + 1, 0)
            return Decision(still >= self.patience, carry=(predicted, still))

    def fuse(self) -> halting.Fused:
        """Let the halting kernel decide."""
        return halting.Fused(halting.ARGMAX, parameter=self.patience)

    def extra_repr(self) -> str:
        """Return patience and lookahead."""
        return f"patience={self.patience}, lookahead={self.lookahead}"
