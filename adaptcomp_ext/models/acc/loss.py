"""The objective of adaptive computational control, for classification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptcomp_ext.models._precision import wide
from adaptcomp_ext.models.acc.effort import EFFORTS, Effort
from adaptcomp_ext.models.acc.features import kl_divergence
from adaptcomp_ext.ops._checks import describe
from adaptcomp_ext.ops.descent import check_number

__all__ = ["ACCLoss", "Objective", "acc_loss", "need_weights"]


@dataclass(frozen=True)
class Objective:
    """The weights of the training objective, a sum of terms that are each a mean over the rows.

    ::

        w·ℓ₂  +  hard·ℓ₁  +  λ(s)·T²·KL(π₂ᵀ ‖ π₁ᵀ)  +  β·KL(q(w) ‖ p(w)) / N

    ℓ₁ and ℓ₂ are the cross-entropies of habit and control. π^T is softened by the temperature T (Hinton et
    al. 2015; T² keeps the scale of the gradients). The last term is the description length of the habit's
    weights under variational dropout.

    Classes may be masked by logits of −∞, the same ones for habit and control. The cross-entropies are
    infinite where a label is masked, and the KL is infinite where the habit masks a class that control does
    not. All terms are computed in float32 (float64 for float64 logits).

    Attributes
    ----------
    effort : float or str
        λ: a number ≥ 0, or "value" or "literal" for a learned λ, see `Effort`.
    temperature : float
        T > 0.
    hard : float
        Weight ≥ 0 of the habit's cross-entropy; the published code has 1/T².
    need : bool
        Whether control learns in proportion to the habit's loss: w = ℓ₁ / mean(ℓ₁), at most `need_cap`,
        detached. Control then learns most from the rows that it will be called for. (Nam et al. 2020 use
        ℓ₁/(ℓ₁ + ℓ₂) for the same purpose.) False: w = 1.
    need_cap : float
        Upper bound of w, ≥ 1.
    beta : float
        β ≥ 0.
    mutual : bool
        Whether the KL's gradient also reaches control, as in the thesis, so that control pays for deviating
        from habit. False: the KL trains the habit only.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """

    effort: float | str = 1.0
    temperature: float = 4.0
    hard: float = 1.0
    need: bool = True
    need_cap: float = 20.0
    beta: float = 1.0
    mutual: bool = False

    def __post_init__(self) -> None:
        infinity = float("inf")
        if isinstance(self.effort, str):
            if self.effort not in EFFORTS:
                expected = f"a number or one of {', '.join(map(repr, EFFORTS))}"
                raise ValueError(f"effort: expected {expected}, got {self.effort!r}")
        else:
            check_number("effort", self.effort, 0, infinity, ends="[)")
        check_number("temperature", self.temperature, 0, infinity, ends="()")
        check_number("hard", self.hard, 0, infinity, ends="[)")
        check_number("need_cap", self.need_cap, 1, infinity, ends="[)")
        check_number("beta", self.beta, 0, infinity, ends="[)")
        for name in ("need", "mutual"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {describe(getattr(self, name))}")


class ACCLoss(NamedTuple):
    """The loss and its parts, all scalars. Only `total` has a gradient.

    `default`, `control` and `distill` are unweighted means of ℓ₁, ℓ₂ and T²·KL over the rows; `description`
    is KL(q ‖ p) in nats; `effort` is the mean λ.
    """

    total: Tensor
    default: Tensor
    control: Tensor
    distill: Tensor
    description: Tensor
    effort: Tensor


def need_weights(default_loss: Tensor, cap: float) -> Tensor:
    """Compute w = ℓ₁ / mean(ℓ₁), at most `cap`: [n] → [n], detached; 1 if every ℓ₁ is 0.

    w is `cap` where ℓ₁ is infinite, because the habit masks the label.
    """
    loss = default_loss.detach()
    mean = loss.mean()
    weights = torch.where(mean > 0, loss / mean, torch.ones_like(loss)).clamp(max=cap)
    return weights.masked_fill(loss == float("inf"), cap)


def acc_loss(
    objective: Objective,
    effort: Effort | None,
    default: Tensor,
    control: Tensor,
    targets: Tensor,
    description: Tensor,
    beta_per_row: float,
) -> ACCLoss:
    """Compute the objective of a batch.

    Parameters
    ----------
    objective : Objective
        The weights of the terms.
    effort : Effort or None
        The network λ(s) if ``objective.effort`` is learned.
    default, control : Tensor
        Logits [B, C], B ≥ 1.
    targets : Tensor
        int64 [B].
    description : Tensor
        KL(q ‖ p), scalar.
    beta_per_row : float
        Its factor: β / N, times the share of a warm-up.
    """
    # In float32 or wider: half precision hardly tells the losses of nearly right rows apart.
    default, control = wide(default), wide(control)
    default_loss = F.cross_entropy(default, targets, reduction="none")
    control_loss = F.cross_entropy(control, targets, reduction="none")
    weights = (
        need_weights(default_loss, objective.need_cap) if objective.need else torch.ones_like(default_loss)
    )
    teacher = control if objective.mutual else control.detach()
    distill = objective.temperature**2 * kl_divergence(teacher, default, objective.temperature)
    if effort is None:
        assert not isinstance(objective.effort, str)
        # A term of weight 0 is left out: it is infinite where the masks differ, and 0 · ∞ is NaN.
        cost = objective.effort * distill.mean() if objective.effort else distill.new_zeros(())
        price = distill.new_tensor(objective.effort)
    else:
        cost, price = effort(default, distill, default_loss - control_loss)
    total = (weights * control_loss).mean()
    if objective.hard:
        total = total + objective.hard * default_loss.mean()
    total = total + cost + beta_per_row * description
    return ACCLoss(
        total,
        default_loss.mean().detach(),
        control_loss.mean().detach(),
        distill.mean().detach(),
        description.detach(),
        price.mean(),
    )
