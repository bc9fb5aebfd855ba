"""A gate that predicts the gain of planning and calls the planner where the gain exceeds its price."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptcomp_ext.models._precision import Precise, wide
from adaptcomp_ext.ops._checks import check_choice, check_fraction, check_int

__all__ = ["GATES", "PlanGate"]

GATES = ("value", "kl", "entropy", "random", "always", "never")
"""Kinds of scores: predicted gain; predicted divergence of plan and habit; the habit's standard deviation;
a random number; and two that do not look at the state."""

NOVICE = 2.3  # initial bias: an untrained gate predicts a gain of 0.01 and so plans in every state
UNIT = 0.001  # unit of gains, in which the regression's targets are near 1
CLIP = 50.0
SCALE_RATE = 0.01
FAINT = 0.1  # in UNIT: differences between glances below it hardly change the feature


class PlanGate(Precise):
    """Call the planner in the states whose score exceeds a price.

    ::

        "value":    exp(w₁ᵀh(f)), the predicted gain of the plan's first action over the habit's
        "kl":       exp(w₂ᵀh(f)), the predicted KL(π₂ ‖ π₁) of the first action
        "entropy":  the mean of the habit's log standard deviation
        "random":   a uniform number in [0, 1)

    The features f are the latent state, the habit's log standard deviation, and the logarithm of the gain
    that a glance at a few actions estimates (`Planner.glance`).

    Both predictions are fitted, by the Poisson deviance as in `adaptcomp_ext.models.acc.ValueGate`, on states
    where the planner ran. The gain of a plan changes faster than it can be learned from the state alone; a
    glance costs little beside a plan, and is computed with the current model. Gains and glances are in units
    of the spread of values (`WorldModel.spread`). The spread is small before the agent has learned, so that
    it plans often at first, and less with practice. A gain is that of one decision followed by the habit:
    with many decisions, a thousandth of the spread is much.

    Parameters
    ----------
    latent, actions : int
        Sizes of the latent state and of an action.
    hidden : int
        Number of units of the hidden layer.
    price : float
        κ: the threshold of the value gate, in units of the spread. For the other gates, see `calibrate`.
    explore : float
        Share of the states that are planned whatever the score, if ``explore=True`` in the call, so that the
        gate keeps learning about states that it does not call.

    Attributes
    ----------
    kind : str
        The one of `GATES` that decides; "value" at first.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described. `price` is not checked.
    """

    middle: Tensor
    thresholds: Tensor
    variance: Tensor
    precise: tuple[str, ...] = ("middle", "thresholds", "variance")

    def __init__(
        self, latent: int, actions: int, hidden: int = 64, price: float = 0.003, explore: float = 0.02
    ) -> None:
        super().__init__()
        inputs = check_int("latent", latent, 1) + check_int("actions", actions, 1) + 1
        # Unscaled, the latent units vary too little between states for the gate to tell them apart.
        self.register_buffer("middle", torch.zeros(inputs))
        self.register_buffer("variance", torch.ones(inputs))
        self.net = nn.Sequential(
            nn.Linear(inputs, check_int("hidden", hidden, 1)), nn.SiLU(), nn.Linear(hidden, 2)
        )
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.constant_(last.bias, NOVICE)
        self.explore = check_fraction("explore", explore, zero=True)
        self.kind = "value"
        self.register_buffer("thresholds", torch.tensor([price, 1.0, 0.0, 0.5], dtype=torch.float64))

    @property
    def looks(self) -> bool:
        """Whether the gate's kind needs glances."""
        return self.kind in ("value", "kl")

    def features(self, latent: Tensor, log_std: Tensor, glance: Tensor) -> Tensor:
        """Return the gate's inputs, [B, latent + actions + 1], in float32 or wider."""
        promise = (wide(glance).clamp(min=0.0) / UNIT + FAINT).log()
        return torch.cat([wide(latent), wide(log_std), promise[:, None]], -1)

    def predictions(self, latent: Tensor, log_std: Tensor, glance: Tensor) -> Tensor:
        """Return the logarithms of the predicted gain / 0.001 and of the predicted divergence: [B, 2].

        Parameters
        ----------
        latent, log_std : Tensor
            Latent state [B, L] and the habit's log standard deviation [B, A].
        glance : Tensor
            Gain that a glance estimates, [B], in units of the spread of values.
        """
        features = self.features(latent, log_std, glance)
        scaled = F.batch_norm(features, self.middle.to(features.dtype), self.variance.to(features.dtype))
        return wide(self.net(scaled.to(next(self.net.parameters()).dtype)))

    def score(self, latent: Tensor, log_std: Tensor, glance: Tensor, kind: str | None = None) -> Tensor:
        """Return the score of each state, [B]; 0 for "always" and "never". `kind` defaults to the gate's."""
        kind = kind or self.kind
        check_choice("kind", kind, GATES)
        if kind == "entropy":
            return wide(log_std).mean(-1)
        if kind in ("value", "kl"):
            predicted = self.predictions(latent, log_std, glance)
            return predicted[:, 0].exp() * UNIT if kind == "value" else predicted[:, 1].exp()
        if kind == "random":
            return torch.rand(len(latent), device=latent.device)
        return latent.new_zeros(len(latent))

    @torch.no_grad()
    def forward(self, latent: Tensor, log_std: Tensor, glance: Tensor, explore: bool = False) -> Tensor:
        """Return which rows plan, bool [B]; with `explore`, a random share plans whatever the score."""
        return self.decide(self.score(latent, log_std, glance), explore)

    @torch.no_grad()
    def decide(self, score: Tensor, explore: bool = False) -> Tensor:
        """Return which rows plan, bool [B], from their scores [B]. A NaN score calls."""
        if self.kind in ("always", "never"):
            return torch.full(score.shape, self.kind == "always", device=score.device)
        called = ~(score <= self.thresholds[GATES.index(self.kind)])
        if explore and self.explore:
            called = called | (torch.rand(score.shape, device=score.device) < self.explore)
        return called

    def loss(
        self, latent: Tensor, log_std: Tensor, glance: Tensor, gain: Tensor, divergence: Tensor
    ) -> Tensor:
        """Return the deviance of both predictions on planned rows, and update the input statistics.

        Parameters
        ----------
        latent, log_std, glance : Tensor
            Inputs of the gate, as for `predictions`.
        gain : Tensor
            [B]: the gain of each plan, in units of the spread of values; clipped to ±0.05.
        divergence : Tensor
            [B]: KL(π₂ ‖ π₁) of its first action, in nats; clipped to 50.

        Returns
        -------
        Tensor
            Scalar; differentiable in the gate's weights.
        """
        with torch.no_grad():
            variance, middle = torch.var_mean(self.features(latent, log_std, glance), 0, correction=0)
            self.variance.lerp_(variance.to(self.variance.dtype), SCALE_RATE)
            self.middle.lerp_(middle.to(self.middle.dtype), SCALE_RATE)
        predicted = self.predictions(latent, log_std, glance)
        targets = torch.stack([(wide(gain) / UNIT).clamp(-CLIP, CLIP), wide(divergence).clamp(max=CLIP)], 1)
        return F.poisson_nll_loss(predicted, targets, log_input=True)

    @torch.no_grad()
    def calibrate(self, kind: str, scores: Tensor, rate: float) -> None:
        """Set the threshold of `kind` so that a share `rate`, in [0, 1], of `scores` [n] exceeds it."""
        check_choice("kind", kind, GATES[:4])
        rate = check_fraction("rate", rate, zero=True)
        if kind == "random":
            threshold = 1.0 - rate if rate < 1 else -math.inf
        else:
            if bool(scores.isnan().any()):
                raise ValueError(f"scores: expected numbers, got NaN at {int(scores.isnan().nonzero()[0])}")
            threshold = float(torch.quantile(scores.double(), 1.0 - rate))
        self.thresholds[GATES.index(kind)] = threshold
