"""When to plan: a gate that predicts what planning would gain, and calls the planner where that exceeds its price."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptcomp_ext.models._precision import Precise, wide
from adaptcomp_ext.ops._checks import check_choice, check_fraction, check_int

__all__ = ["GATES", "PlanGate"]

GATES = ("value", "kl", "entropy", "random", "always", "never")
"""What calls the planner: the predicted gain; the predicted divergence of plan and habit; the habit's own
doubt; chance."""

NOVICE = 2.3  # a gain of a hundredth is predicted at first: an agent that knows nothing plans everywhere
UNIT = 0.001  # of gains, so that the regression's targets are near 1
CLIP = 50.0
SCALE_RATE = 0.01
FAINT = 0.1  # of UNIT: glances below it are as good as none


class PlanGate(Precise):
    """Call the planner where score > price.

    ::

        "value":    exp(w₁ᵀh(f)) predicts the gain: what the model expects of the plan's first action less of
        the habit's "kl":       exp(w₂ᵀh(f)) predicts KL(π₂ ‖ π₁) of the first action "entropy":  the habit's
        mean log standard deviation "random":   uniform in [0, 1)
    f = latent state, the habit's log standard deviation, logarithm of what a glance at a few actions promises
    (`Planner.glance`)

    Both predictions are fitted, by the Poisson deviance as in `adaptcomp_ext.models.acc.ValueGate`, on states
    where the planner ran. What a plan gains over the habit changes faster than it can be learned from the
    state alone; a glance costs little beside a plan, and is of today. Gains and glances are in units of the
    spread of values (`WorldModel.spread`): before there is anything to win a small gain counts, afterwards it
    does not, so that the agent deliberates at first and less with practice. A gain is that of one decision,
    habit following: a thousandth of the spread is much, for there are many decisions.

    Parameters
    ----------
    latent, actions : int
        Sizes.
    hidden : int
        Units of the hidden layer.
    price : float
        κ: the threshold of the value gate; of the others, see `calibrate`.
    explore : float
        Share of the states that are planned whatever the score, so that what is not called is not forgotten;
        where asked for.

    Attributes
    ----------
    kind : str
        Which of `GATES` decides.
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
        # A latent state's units differ little from state to state: unscaled, the gate tells few gains apart.
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
        """Whether its kind needs glances."""
        return self.kind in ("value", "kl")

    def features(self, latent: Tensor, log_std: Tensor, glance: Tensor) -> Tensor:
        """What is known of a state before it is planned: [B, latent + actions + 1], float32 at least."""
        promise = (wide(glance).clamp(min=0.0) / UNIT + FAINT).log()
        return torch.cat([wide(latent), wide(log_std), promise[:, None]], -1)

    def predictions(self, latent: Tensor, log_std: Tensor, glance: Tensor) -> Tensor:
        """Logarithms of the predicted gain (over 0.001) and of the predicted divergence: [B, 2].

        Parameters
        ----------
        latent, log_std : Tensor
            [B, L], [B, A].
        glance : Tensor
            [B], in units of the spread of values.
        """
        features = self.features(latent, log_std, glance)
        scaled = F.batch_norm(features, self.middle.to(features.dtype), self.variance.to(features.dtype))
        return wide(self.net(scaled.to(next(self.net.parameters()).dtype)))

    def score(self, latent: Tensor, log_std: Tensor, glance: Tensor, kind: str | None = None) -> Tensor:
        """How much reason there is to plan: [B]; 0 for "always" and "never"."""
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
        """Which rows plan: bool [B]; `explore`: some are called whatever their score."""
        return self.decide(self.score(latent, log_std, glance), explore)

    @torch.no_grad()
    def decide(self, score: Tensor, explore: bool = False) -> Tensor:
        """Which rows plan, from their scores. A score that is not a number calls."""
        if self.kind in ("always", "never"):
            return torch.full(score.shape, self.kind == "always", device=score.device)
        called = ~(score <= self.thresholds[GATES.index(self.kind)])
        if explore and self.explore:
            called = called | (torch.rand(score.shape, device=score.device) < self.explore)
        return called

    def loss(
        self, latent: Tensor, log_std: Tensor, glance: Tensor, gain: Tensor, divergence: Tensor
    ) -> Tensor:
        """Deviance of both predictions on rows that were planned; scalar. The running scale of the inputs follows these rows."""
        with torch.no_grad():
            variance, middle = torch.var_mean(self.features(latent, log_std, glance), 0, correction=0)
            self.variance.lerp_(variance.to(self.variance.dtype), SCALE_RATE)
            self.middle.lerp_(middle.to(self.middle.dtype), SCALE_RATE)
        predicted = self.predictions(latent, log_std, glance)
        targets = torch.stack([(wide(gain) / UNIT).clamp(-CLIP, CLIP), wide(divergence).clamp(max=CLIP)], 1)
        return F.poisson_nll_loss(predicted, targets, log_input=True)

    @torch.no_grad()
    def calibrate(self, kind: str, scores: Tensor, rate: float) -> None:
        """Set a gate's threshold so that a share `rate` of these scores exceeds it."""
        check_choice("kind", kind, GATES[:4])
        rate = check_fraction("rate", rate, zero=True)
        if kind == "random":
            threshold = 1.0 - rate if rate < 1 else -math.inf
        else:
            if bool(scores.isnan().any()):
                raise ValueError(f"scores: expected numbers, got NaN at {int(scores.isnan().nonzero()[0])}")
            threshold = float(torch.quantile(scores.double(), 1.0 - rate))
        self.thresholds[GATES.index(kind)] = threshold
