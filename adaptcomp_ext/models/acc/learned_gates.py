"""Gates that learn to predict the value of control from the habit's confidence, on held-out rows.

The value of calling control is the loss that it saves, ℓ₁ − ℓ₂ in nats (Shenhav, Botvinick & Cohen 2013: the
expected value of control, minus its price). A gate that is trained jointly with the networks, or on rows that
they were trained on, calls all rows or none. On held-out rows, in evaluation mode, it learns from the habit's
confidence.

There are two noisy estimates of that value. Labels give ℓ₁ − ℓ₂ itself, but it is nearly 0 on most rows.
Control's own expectation of it is Σ_c π₂(c)·(log π₂(c) − log π₁(c)) = KL(π₂ ‖ π₁), which has far less
variance, and the bias of control.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptcomp_ext.models._precision import wide
from adaptcomp_ext.models.acc.features import check_logits, confidence_features, feature_count, kl_divergence
from adaptcomp_ext.models.acc.gates import Gate
from adaptcomp_ext.ops._checks import check_int

__all__ = ["KLGate", "LearnedGate", "ValueGate"]

LARGEST_VALUE = 5.0
"""Bound on the absolute value of a target, in nats: a row where habit is certain and wrong would outweigh the
others."""
LEAST_DEVIATION = 1e-6
LEAST_ROWS = 2
LEAST_UPDATES = 800


class LearnedGate(Gate):
    """Base of the gates whose score is a prediction.

    ::

        score = exp(w₂ᵀ silu(W₁ (f − mean) / deviation + b₁) + b₂)
        f     = confidence_features(logits of the habit)

    The exponent o is fitted to targets t by the Poisson deviance Σ exp(o) − t·o, whose minimum is at the mean
    of t. Its scale is logarithmic, so that small values count, and t may be negative.

    Parameters
    ----------
    classes : int
        C ≥ 2.
    hidden : int
        Number of units of the hidden layer.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """

    mean: Tensor
    deviation: Tensor
    precise: tuple[str, ...] = ("threshold", "mean", "deviation")

    def __init__(self, classes: int, hidden: int = 16) -> None:
        super().__init__()
        self.classes = check_int("classes", classes, 2)
        features = feature_count(classes)
        self.net = nn.Sequential(
            nn.Linear(features, check_int("hidden", hidden, 1)), nn.SiLU(), nn.Linear(hidden, 1)
        )
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("deviation", torch.ones(features))

    def value(self, default: Tensor, control: Tensor, targets: Tensor) -> Tensor:
        """Return the regression targets, in nats.

        Parameters
        ----------
        default, control : Tensor
            Logits of habit and control, [n, C].
        targets : Tensor
            int64 [n]: the labels.

        Returns
        -------
        Tensor
            [n].
        """
        raise NotImplementedError

    def log_score(self, logits: Tensor) -> Tensor:
        """Return the logarithm of the score, [n], float32 (float64 for float64); differentiable."""
        features = confidence_features(check_logits("logits", logits, self.classes)).to(self.mean.dtype)
        standardised = (features - self.mean) / self.deviation
        return wide(self.net(standardised.to(next(self.net.parameters()).dtype))[:, 0])

    def score(self, logits: Tensor) -> Tensor:
        """Return the predicted value of control in nats, ≥ 0."""
        return self.log_score(logits).exp()

    def fit(
        self,
        default: Tensor,
        control: Tensor,
        targets: Tensor,
        *,
        epochs: int | None = None,
        batch: int = 256,
        learning_rate: float = 1e-2,
        seed: int = 0,
    ) -> list[float]:
        """Train the network from new weights to predict the value of control.

        Parameters
        ----------
        default, control : Tensor
            Logits of habit and control on held-out rows, in evaluation mode, [n, C], n ≥ 2.
        targets : Tensor
            int64 [n]: the labels.
        epochs : int, optional
            Number of passes over the rows. Default: 20, or more to make at least 800 updates.
        batch : int
            Number of rows of an update.
        learning_rate : float
            Peak of AdamW's one-cycle schedule; the weight decay is 0.01.
        seed : int
            Seed of weights and row order; the global random state is not changed.

        Returns
        -------
        list of float
            Mean deviance of each epoch.

        Raises
        ------
        TypeError, ValueError
            If an argument is not as described; if a row has no class left, or a label that habit and control
            both mask.

        Notes
        -----
        Classes may be masked by logits of −∞. A gate in half precision is fitted in float32, then rounded.
        """
        default = check_logits("default", default, self.classes).detach()
        control = check_logits("control", control, self.classes).detach()
        check_int("batch", batch, 1)
        rows = len(default)
        if rows < LEAST_ROWS:
            raise ValueError(f"default: expected at least {LEAST_ROWS} rows to fit on, got {rows}")
        epochs = (
            max(20, -(-LEAST_UPDATES // -(-rows // batch)))
            if epochs is None
            else check_int("epochs", epochs, 1)
        )
        if len(control) != rows:
            raise ValueError(f"control: expected {rows} rows like default, got {len(control)}")
        if targets.dtype != torch.int64 or targets.shape != (rows,):
            came = f"{targets.dtype} of shape {list(targets.shape)}"
            raise ValueError(f"targets: expected int64 of shape [{rows}], got {came}")
        value = self.value(default, control, targets).to(self.mean.dtype).clamp(-LARGEST_VALUE, LARGEST_VALUE)
        features = confidence_features(default).to(self.mean.dtype)
        for name, logits in (("default", default), ("control", control)):
            bad = logits.log_softmax(dim=1).isnan().any(dim=1)
            if bool(bad.any()):
                row = int(bad.nonzero()[0])
                expected = "logits, of which -inf masks a class but not all"
                raise ValueError(f"{name}: expected {expected}, got {logits[row].tolist()} in row {row}")
        if bool(value.isnan().any()):  # the difference of two infinite losses
            row = int(value.isnan().nonzero()[0])
            raise ValueError(
                f"targets: expected classes that are not masked, got {int(targets[row])} in row {row}"
            )
        # In float64, so that the mean of equal numbers is that number.
        self.mean.copy_(features.double().mean(dim=0))
        self.deviation.copy_(features.double().std(dim=0).clamp(min=LEAST_DEVIATION))
        features = (features - self.mean) / self.deviation
        dtype = next(self.net.parameters()).dtype
        self.net.to(self.mean.dtype)  # half precision would round the optimiser's epsilon to 0
        try:
            return self._fit_net(features, value, epochs, batch, learning_rate, seed)
        finally:
            self.net.to(dtype)

    def _fit_net(
        self, features: Tensor, value: Tensor, epochs: int, batch: int, learning_rate: float, seed: int
    ) -> list[float]:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            for layer in self.net:
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()
            return self._fit(features, value, epochs, batch, learning_rate)

    def _fit(
        self, features: Tensor, value: Tensor, epochs: int, batch: int, learning_rate: float
    ) -> list[float]:
        optimizer = torch.optim.AdamW(self.net.parameters(), weight_decay=0.01)
        updates = epochs * -(-len(features) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=updates)
        history = []
        for _ in range(epochs):
            total = 0.0
            for index in torch.randperm(len(features), device="cpu").split(batch):
                rows = index.to(features.device)
                loss = F.poisson_nll_loss(self.net(features[rows])[:, 0], value[rows], log_input=True)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += float(loss.detach()) * len(rows)
            history.append(total / len(features))
        return history


class ValueGate(LearnedGate):
    """Call rows whose predicted value of control exceeds its price: ``threshold`` is the price κ, in nats.

    The target is the mean of the two estimates of the value, (ℓ₁ − ℓ₂ + KL(π₂ ‖ π₁)) / 2: the labels reduce
    the bias, control's own expectation the variance. The parameters are those of `LearnedGate`.
    """

    @property
    def price(self) -> float:
        """The price κ, in nats."""
        return float(self.threshold)

    def value(self, default: Tensor, control: Tensor, targets: Tensor) -> Tensor:
        """Return the mean of the loss that control saves and of the loss that it expects to save."""
        default, control = wide(default), wide(control)
        saved = F.cross_entropy(default, targets, reduction="none") - F.cross_entropy(
            control, targets, reduction="none"
        )
        return (
            saved.clamp(-LARGEST_VALUE, LARGEST_VALUE)
            + kl_divergence(control, default).clamp(max=LARGEST_VALUE)
        ) / 2


class KLGate(LearnedGate):
    """Call rows where a large KL(π₂ ‖ π₁) is predicted, the thesis' criterion.

    The divergence is predicted, because computing it would take the call that the gate may save. Labels are
    not used. The parameters are those of `LearnedGate`.
    """

    def value(self, default: Tensor, control: Tensor, targets: Tensor) -> Tensor:
        """Return KL(π₂ ‖ π₁), [n], in nats."""
        return kl_divergence(control, default)
