"""λ(s), the price of deviating from habit, as a network that sees nothing but the habit's confidence."""

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
    """λ(s) ≥ 0 of each row, and what it learns from.

    "literal" is the thesis' own: λ(s) = softplus(o(s)) descends on its own term λ(s)·KL. That term's
    derivative in λ is KL ≥ 0, so λ falls to 0 in every run: the price disappears. It is here to show that.

    "value" gives it an objective of its own: o(s) predicts, by Poisson regression, v(s) = exp(o(s)), the loss
    ℓ₁ − ℓ₂ that control saves, and

        λ(s) = 1 / (1 + v(s))

    so that deviating is cheap where control is expected to be worth it (v in nats), and costs the full price
    where it is not.

    Parameters
    ----------
    classes : int
        C ≥ 2.
    objective : str
        "value" or "literal".
    hidden : int
        Units of the hidden layer.
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
        # Logits have no scale: without this one of them, far out, would decide alone.
        return wide(
            self.net(F.layer_norm(features, features.shape[1:]).to(next(self.net.parameters()).dtype))[:, 0]
        )

    def forward(self, default: Tensor, deviation: Tensor, saved: Tensor) -> tuple[Tensor, Tensor]:
        """Price the deviation of each row.

        Parameters
        ----------
        default : Tensor
            The habit's logits [n, C]; no gradient flows back.
        deviation : Tensor
            The term that is priced, [n]; its gradient is scaled by λ.
        saved : Tensor
            ℓ₁ − ℓ₂, [n]; no gradient flows back. A row where it is not finite, because a label is masked,
            teaches nothing.

        Returns
        -------
        cost : Tensor
            Scalar, with the network's own objective in it: its gradient is what trains λ.
        price : Tensor
            λ(s), [n], detached.
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
        # Added less its own value: the loss that is reported is the deviation's, the gradient has both.
        return (price * deviation).mean() + own - own.detach(), price
