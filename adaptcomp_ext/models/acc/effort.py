"""λ(s), the price of deviating from habit: a network whose only input is the habit's confidence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptcomp_ext.models._precision import wide
from adaptcomp_ext.models.acc.features import check_logits, confidence_features, feature_count
from adaptcomp_ext.ops._checks import check_choice, check_int

__all__ = ["EFFORTS", "Effort"]

EFFORTS = ("value", "literal")


class Effort(nn.Module):
    """A network that computes λ(s) ≥ 0 for each row, with its training objective.

    The objective "literal" is the thesis' own: λ(s) = softplus(o(s)) is trained on the term λ(s)·KL. That
    term's derivative in λ is KL ≥ 0, so that λ falls to 0 in every run. It is kept to show this.

    With "value", o(s) has an objective of its own: v(s) = exp(o(s)) predicts, by Poisson regression, the loss
    ℓ₁ − ℓ₂ in nats that control saves, and

        λ(s) = 1 / (1 + v(s))

    so that deviating is cheap where control is expected to save much, and costs the full price elsewhere.

    Parameters
    ----------
    classes : int
        C ≥ 2.
    objective : str
        "value" or "literal".
    hidden : int
        Number of units of the hidden layer.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """

    def __init__(self, classes: int, objective: str = "value", hidden: int = 16) -> None:
        super().__init__()
        check_choice("objective", objective, EFFORTS)
        self.objective = objective
        self.net = nn.Sequential(
            nn.Linear(feature_count(check_int("classes", classes, 2)), check_int("hidden", hidden, 1)),
            nn.SiLU(),
            nn.Linear(hidden, 1),
        )

    def _log_value(self, default: Tensor) -> Tensor:
        features = confidence_features(check_logits("default", default)).detach()
        # Logits have no fixed scale: without the norm a single large one would dominate.
        return wide(
            self.net(F.layer_norm(features, features.shape[1:]).to(next(self.net.parameters()).dtype))[:, 0]
        )

    def forward(self, default: Tensor, deviation: Tensor, saved: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply the deviation of each row by its price.

        Parameters
        ----------
        default : Tensor
            The habit's logits [n, C]; no gradient flows back.
        deviation : Tensor
            The term to be priced, [n]; its gradient is scaled by λ.
        saved : Tensor
            ℓ₁ − ℓ₂, [n]; no gradient flows back. A row where it is not finite, because its label is masked,
            is left out of the regression.

        Returns
        -------
        cost : Tensor
            Scalar: the mean priced deviation. Its gradient includes that of the network's own objective.
        price : Tensor
            λ(s), [n], detached; float32 (float64 for float64).
        """
        out = self._log_value(default)
        if self.objective == "literal":
            price = F.softplus(out)
            return (price * deviation).mean(), price.detach()
        price = torch.sigmoid(-out).detach()
        known = saved.detach().isfinite()
        own = F.poisson_nll_loss(
            out.masked_fill(~known, 0), saved.detach().masked_fill(~known, 0), log_input=True
        )
        # own − own adds the gradient of the regression and leaves the reported loss unchanged.
        return (price * deviation).mean() + own - own.detach(), price
