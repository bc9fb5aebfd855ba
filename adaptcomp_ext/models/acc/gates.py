"""Gates: a row calls control if its score, computed from the habit's logits, exceeds a threshold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adaptcomp_ext.models._precision import Precise
from adaptcomp_ext.models.acc.features import check_logits, margin, normalised_entropy
from adaptcomp_ext.ops._checks import check_fraction, check_int, describe

__all__ = ["AlwaysGate", "BatchMeanGate", "EntropyGate", "Gate", "MarginGate", "NeverGate", "RandomGate"]


class Gate(Precise):
    """Base of all gates: a row calls control if its ``score`` exceeds ``threshold``.

    A custom gate overrides `score`.

    Attributes
    ----------
    threshold : Tensor
        Scalar buffer, float64 even in a model of half precision, 0 at first. A row is called if its score is
        *larger*. Set it by `calibrate`: thresholds set by hand tend to call nearly all rows or nearly none.

    Notes
    -----
    The decision is not differentiable.
    """

    threshold: Tensor
    precise: tuple[str, ...] = ("threshold",)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float64))

    def score(self, logits: Tensor) -> Tensor:
        """Return a score, larger where control is needed more: the habit's logits [n, C] → [n]."""
        raise NotImplementedError

    def decide(self, score: Tensor) -> Tensor:
        """Return which rows are called: scores [n] → bool [n]. A NaN score calls."""
        return ~(score <= self.threshold.to(score.device))

    def forward(self, logits: Tensor) -> Tensor:
        """Return which rows are called: the habit's logits [n, C] → bool [n]."""
        with torch.no_grad():
            return self.decide(self.score(logits))

    @torch.no_grad()
    def calibrate(self, logits: Tensor, rate: float) -> float:
        """Set the threshold so that a share `rate` of these rows is called.

        Parameters
        ----------
        logits : Tensor
            The habit's logits, [n, C], n ≥ 1, of held-out rows: rows like those that the gate will see, which
            neither network was trained on.
        rate : float
            Share of rows to be called, in [0, 1].

        Returns
        -------
        float
            The share called on `logits` with the new threshold: at most `rate` rounded to whole rows, less
            where scores are tied.

        Raises
        ------
        TypeError, ValueError
            If an argument is not as described, or a score is NaN.
        """
        rate = check_fraction("rate", rate, zero=True)
        score = scores_to_calibrate_on(self, logits)
        self.threshold.fill_(quantile_threshold(score, rate))
        return float(self.decide(score).double().mean())

    def extra_repr(self) -> str:
        """Return the threshold."""
        return f"threshold={float(self.threshold):.4g}"


def scores_to_calibrate_on(gate: Gate, logits: Tensor) -> Tensor:
    """Return the gate's scores of held-out rows, float64 [n]; there has to be one, and none may be NaN."""
    score = gate.score(check_logits("logits", logits)).double()
    if not len(score):
        raise ValueError("logits: expected at least one row to calibrate on, got none")
    if bool(score.isnan().any()):
        row = int(score.isnan().nonzero()[0])
        raise ValueError(
            f"logits: expected rows with a score, got NaN in row {row}: "
            "is a logit NaN, or every class masked?"
        )
    return score


def quantile_threshold(score: Tensor, rate: float) -> float:
    """Return the smallest of n scores that at most round(rate·n) scores exceed; −∞ if that is all of them."""
    called = round(rate * len(score))
    if called == len(score):
        return -math.inf
    return float(score.sort().values[len(score) - called - 1])


class EntropyGate(Gate):
    """Call rows of large normalised entropy H / log C: the baseline that a learned gate has to beat."""

    def score(self, logits: Tensor) -> Tensor:
        """Return the normalised entropy, in [0, 1]."""
        return normalised_entropy(logits)


class MarginGate(Gate):
    """Call rows whose two largest probabilities are close: the score is 1 − (p₁ − p₂)."""

    def score(self, logits: Tensor) -> Tensor:
        """Return one minus the margin, in [0, 1]."""
        return 1 - margin(logits)


class RandomGate(Gate):
    """Call rows at random: the baseline that any gate has to beat at the same rate.

    The scores come from torch's global generator of the device, so that each call decides anew.
    """

    def score(self, logits: Tensor) -> Tensor:
        """Return uniform numbers in [0, 1)."""
        logits = check_logits("logits", logits)
        return torch.rand(len(logits), device=logits.device, dtype=torch.float64)

    @torch.no_grad()
    def calibrate(self, logits: Tensor, rate: float) -> float:
        """Set the threshold to 1 − rate, whatever the logits."""
        rate = check_fraction("rate", rate, zero=True)
        # A draw can be 0, and rate 1 has to call every row.
        self.threshold.fill_(-math.inf if rate == 1.0 else 1.0 - rate)
        return rate


class _FixedGate(Gate):
    rate: float

    def __init__(self) -> None:
        super().__init__()
        self.threshold.fill_(-math.inf if self.rate else math.inf)

    def score(self, logits: Tensor) -> Tensor:
        """Return zeros."""
        logits = check_logits("logits", logits)
        return logits.new_zeros(len(logits))

    def calibrate(self, logits: Tensor, rate: float) -> float:
        """Require the gate's own rate; there is nothing to calibrate."""
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
    """Decide once for a batch, by the mean of another gate's scores: the thesis' gate, kept as a baseline.

    It is the only gate whose decision for a row depends on the other rows of the batch.

    Parameters
    ----------
    gate : Gate
        The gate whose scores are averaged; its threshold is not used.
    batch : int
        Number of rows of a batch, for `calibrate`.
    """

    def __init__(self, gate: Gate, batch: int) -> None:
        super().__init__()
        if not isinstance(gate, Gate):
            raise TypeError(f"gate: expected a Gate, got {describe(gate)}")
        self.gate = gate
        self.batch = check_int("batch", batch, 1)

    def score(self, logits: Tensor) -> Tensor:
        """Return the mean score of the batch, for every row."""
        score = self.gate.score(logits)
        return score.mean().expand(len(score)) if len(score) else score

    @torch.no_grad()
    def calibrate(self, logits: Tensor, rate: float) -> float:
        """Cut `logits` into batches, in order, and set the threshold to call a share `rate` of them."""
        rate = check_fraction("rate", rate, zero=True)
        score = scores_to_calibrate_on(self.gate, logits)
        parts = score.split(self.batch)
        means = torch.stack([part.mean() for part in parts])
        self.threshold.fill_(quantile_threshold(means, rate))
        called = self.decide(means).double()
        rows = torch.tensor([len(part) for part in parts], dtype=torch.float64, device=called.device)
        return float((called * rows).sum() / rows.sum())
