"""Which rows call control. A gate reads the habit's logits, gives each row a score, and calls where it exceeds a threshold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adaptcomp_ext.models._precision import Precise
from adaptcomp_ext.models.acc.features import check_logits, margin, normalised_entropy
from adaptcomp_ext.ops._checks import check_fraction, check_int, describe

__all__ = ["AlwaysGate", "BatchMeanGate", "EntropyGate", "Gate", "MarginGate", "NeverGate", "RandomGate"]


class Gate(Precise):
    """Base of all gates: ``score`` says how much reason there is to call control, ``threshold`` how much it takes.

    A gate of your own overrides `score`.

    Attributes
    ----------
    threshold : Tensor
        Scalar buffer, float64, also in a model of half precision. A row is called where its score is
        *larger*. Starts at 0; set by `calibrate`, because a price set by hand is bang-bang: it calls nearly
        everything or nearly nothing.

    Notes
    -----
    The decision has no gradient.
    """

    threshold: Tensor
    precise: tuple[str, ...] = ("threshold",)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float64))

    def score(self, logits: Tensor) -> Tensor:
        """How much reason there is to call control for each row: habit's logits [n, C] → [n]."""
        raise NotImplementedError

    def decide(self, score: Tensor) -> Tensor:
        """Which rows are called: scores [n] → bool [n]. A score that is not a number calls."""
        return ~(score <= self.threshold.to(score.device))

    def forward(self, logits: Tensor) -> Tensor:
        """Which rows are called: habit's logits [n, C] → bool [n]."""
        with torch.no_grad():
            return self.decide(self.score(logits))

    @torch.no_grad()
    def calibrate(self, logits: Tensor, rate: float) -> float:
        """Set the threshold so that a share `rate` of these rows is called.

        Parameters
        ----------
        logits : Tensor
            The habit's, [n, C], n ≥ 1, on held-out rows: rows like those the gate will see, which neither
            network was trained on.
        rate : float
            In [0, 1].

        Returns
        -------
        float
            The share called on `logits` with the new threshold: at most `rate` rounded to whole rows, less
            where scores are tied.
        """
        rate = check_fraction("rate", rate, zero=True)
        score = scores_to_calibrate_on(self, logits)
        self.threshold.fill_(quantile_threshold(score, rate))
        return float(self.decide(score).double().mean())

    def extra_repr(self) -> str:
        """The threshold."""
        return f"threshold={float(self.threshold):.4g}"


def scores_to_calibrate_on(gate: Gate, logits: Tensor) -> Tensor:
    """The gate's scores of held-out rows, float64 [n]: at least one, and numbers."""
    score = gate.score(check_logits("logits", logits)).double()
    if not len(score):
        raise ValueError("logits: expected at least one row to calibrate on, got none")
    if bool(score.isnan().any()):
        row = int(score.isnan().nonzero()[0])
        raise ValueError(
            f"logits: expected rows with a score, got NaN in row {row}: is a logit NaN, or every class masked?"
        )
    return score


def quantile_threshold(score: Tensor, rate: float) -> float:
    """Return the smallest of these scores that at most round(rate·n) of them exceed; −∞ where all are to."""
    called = round(rate * len(score))
    if called == len(score):
        return -math.inf
    return float(score.sort().values[len(score) - called - 1])


class EntropyGate(Gate):
    """Call where the habit's normalised entropy H / log C is large: the baseline that a learned gate has to beat."""

    def score(self, logits: Tensor) -> Tensor:
        """Normalised entropy, in [0, 1]."""
        return normalised_entropy(logits)


class MarginGate(Gate):
    """Call where the habit's two best classes are close: the score is 1 − (p₁ − p₂)."""

    def score(self, logits: Tensor) -> Tensor:
        """One minus the margin, in [0, 1]."""
        return 1 - margin(logits)


class RandomGate(Gate):
    """Call at random: the control that any gate has to beat at the same rate.

    Draws from torch's global generator of the device, so that a row's fate is another at every call.
    """

    def score(self, logits: Tensor) -> Tensor:
        """Uniform in [0, 1)."""
        logits = check_logits("logits", logits)
        return torch.rand(len(logits), device=logits.device, dtype=torch.float64)

    @torch.no_grad()
    def calibrate(self, logits: Tensor, rate: float) -> float:
        """Set the threshold to 1 − rate; the rows do not matter."""
        rate = check_fraction("rate", rate, zero=True)
        # 0 itself can be drawn, and "always" has to mean always
        self.threshold.fill_(-math.inf if rate == 1.0 else 1.0 - rate)
        return rate


class _FixedGate(Gate):
    rate: float

    def __init__(self) -> None:
        super().__init__()
        self.threshold.fill_(-math.inf if self.rate else math.inf)

    def score(self, logits: Tensor) -> Tensor:
        """Zero."""
        logits = check_logits("logits", logits)
        return logits.new_zeros(len(logits))

    def calibrate(self, logits: Tensor, rate: float) -> float:
        """Refuse any other rate than the gate's own."""
        if check_fraction("rate", rate, zero=True) != self.rate:
            raise ValueError(
                f"rate: expected {self.rate:g}, the only rate of {type(self).__name__}, got {rate}"
            )
        return self.rate


class AlwaysGate(_FixedGate):
    """Call every row."""

    rate = 1.0


class NeverGate(_FixedGate):
    """Call no row."""

    rate = 0.0


class BatchMeanGate(Gate):
    """One decision for a whole batch, from the mean of another gate's scores: the thesis' own gate, kept as a baseline.

    A row's fate depends on the rows beside it: this gate alone breaks the promise that it does not.

    Parameters
    ----------
    gate : Gate
        Gives the scores; its threshold is not used.
    batch : int
        Rows of a batch, for `calibrate`.
    """

    def __init__(self, gate: Gate, batch: int) -> None:
        super().__init__()
        if not isinstance(gate, Gate):
            raise TypeError(f"gate: expected a Gate, got {describe(gate)}")
        self.gate = gate
        self.batch = check_int("batch", batch, 1)

    def score(self, logits: Tensor) -> Tensor:
        """The batch's mean score, for every row."""
        score = self.gate.score(logits)
        return score.mean().expand(len(score)) if len(score) else score

    @torch.no_grad()
    def calibrate(self, logits: Tensor, rate: float) -> float:
        """Set the threshold so that a share `rate` of the batches is called, `logits` being cut into batches in their order."""
        rate = check_fraction("rate", rate, zero=True)
        score = scores_to_calibrate_on(self.gate, logits)
        parts = score.split(self.batch)
        means = torch.stack([part.mean() for part in parts])
        self.threshold.fill_(quantile_threshold(means, rate))
        called = self.decide(means).double()
        rows = torch.tensor([len(part) for part in parts], dtype=torch.float64, device=called.device)
        return float((called * rows).sum() / rows.sum())
