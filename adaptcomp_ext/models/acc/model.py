"""`ACC`: habit for every row, control for the rows that are worth it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adaptcomp_ext.models.acc.effort import Effort
from adaptcomp_ext.models.acc.features import check_logits
from adaptcomp_ext.models.acc.gates import EntropyGate, Gate
from adaptcomp_ext.models.acc.loss import ACCLoss, Objective, acc_loss
from adaptcomp_ext.nn import description_length, route, variational
from adaptcomp_ext.ops._checks import check_choice, check_fraction, check_int, describe
from adaptcomp_ext.ops.descent import check_number

__all__ = ["ACC", "ANSWERS", "ACCResult"]

ANSWERS = ("control", "mixture")


class ACCResult(NamedTuple):
    """What `ACC` answers.

    Attributes
    ----------
    output : Tensor
        [B, C]: log-probabilities of the answer.
    called : Tensor
        Bool [B]: which rows went through control.
    score : Tensor
        [B]: the gate's.
    default : Tensor
        [B, C]: the habit's logits.
    control : Tensor
        [B, C]: control's logits where it ran, the habit's elsewhere.
    """

    output: Tensor
    called: Tensor
    score: Tensor
    default: Tensor
    control: Tensor


class ACC(nn.Module):
    """A habit π₁ that always runs and control π₂ that runs only for the rows its gate calls; the others never pass through it.

    ::

        s = encoder(x),   π₁ = softmax(default(s)),   called = gate(π₁),   π₂ = softmax(control(s[called]))
        answer: π₁ where not called; where called π₂, or the mixture (1 − w)·π₁ + w·π₂

    Parameters
    ----------
    encoder : nn.Module
        ``encoder(x) -> s``: a Tensor or a pytree of Tensors, rows first. ``nn.Identity()`` where habit and
        control read the input each for itself.
    default : nn.Module
        π₁: ``default(s) -> logits`` [B, C]. See `variational`.
    control : nn.Module
        π₂: ``control(s) -> logits`` [B, C].
    classes : int
        C ≥ 2.
    gate : Gate, optional
        Default: an `EntropyGate`. May be replaced between calls; calibrate it on held-out rows.
    answer : str
        "control": π₂ alone where it ran; "mixture": the thesis' linear combination, which can be worse than
        π₂ alone where habit is wrong with confidence.
    mixture : float
        w in [0, 1], π₂'s share of the mixture.
    variational : bool or mapping
        True: the linear and convolution layers of a copy of `default` are wrapped in `VariationalDropout`; a
        mapping: its options; False: `default` is used as it is.
    objective : Objective, optional
        The weights of `loss`.

    Attributes
    ----------
    effort : Effort or None
        λ(s), where the objective learns it.

    Notes
    -----
    After the thesis of A. Kamanda (2023), whose formal ground is MDL-C (Moskovitz et al. 2022). There the
    gate was one decision for a whole batch; here it is one for each row (`BatchMeanGate` is the old one).
    Gradients flow through `forward` into habit, control and encoder, but training is meant to go through
    `loss`, where everything runs.

    *Masked classes:* logits of −∞ exclude a class, with the probability 0, in the answer, in the gates and in
    the loss.

    *Not promised:* that a gate calls the rate it was calibrated to on rows of another kind.

    Examples
    --------
    >>> acc = ac.models.ACC(nn.Identity(), small_cnn, large_cnn, classes=10)
    >>> acc.loss(x, y, rows=len(train_set)).total.backward()
    >>> acc.eval()
    >>> acc.gate.calibrate(acc.both(held_out)[0], rate=0.3)
    >>> result = acc(x)
    """

    def __init__(
        self,
        encoder: nn.Module,
        default: nn.Module,
        control: nn.Module,
        classes: int = 10,
        gate: Gate | None = None,
        answer: str = "control",
        mixture: float = 0.5,
        variational: bool | Mapping[str, Any] = True,
        objective: Objective | None = None,
    ) -> None:
        super().__init__()
        for name, module in (("encoder", encoder), ("default", default), ("control", control)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name}: expected an nn.Module, got {describe(module)}")
        if gate is not None and not isinstance(gate, Gate):
            raise TypeError(f"gate: expected a Gate or None, got {describe(gate)}")
        if not isinstance(variational, (bool, Mapping)):
            raise TypeError(
                f"variational: expected a bool or a mapping of options, got {describe(variational)}"
            )
        if objective is not None and not isinstance(objective, Objective):
            raise TypeError(f"objective: expected an Objective or None, got {describe(objective)}")
        check_choice("answer", answer, ANSWERS)
        self.classes = check_int("classes", classes, 2)
        self.answer = answer
        self.mixture = check_fraction("mixture", mixture, zero=True)
        self.objective = objective or Objective()
        self.encoder = encoder
        self.default = _with_dropout(default, variational)
        self.control = control
        self.gate: Gate = gate or EntropyGate()
        learned = self.objective.effort
        self.effort = Effort(classes, learned) if isinstance(learned, str) else None

    def forward(self, x: Any) -> ACCResult:
        """Answer; only the rows that the gate calls go through control.

        Parameters
        ----------
        x : Any
            What the encoder takes, B rows.

        Returns
        -------
        ACCResult

        Notes
        -----
        On CUDA the host waits once, for the number of rows called: see `route`.
        """
        s = self.encoder(x)
        default = check_logits("default", self.default(s), self.classes)
        with torch.no_grad():
            score = self.gate.score(default)
            called = self.gate.decide(score)
        control = route(called, self.control, s, otherwise=default)
        return ACCResult(self._combine(default, control, called), called, score, default, control)

    def _combine(self, default: Tensor, control: Tensor, called: Tensor) -> Tensor:
        log_control = control.log_softmax(dim=1)  # the habit's own where control did not run
        if self.answer == "control" or self.mixture == 1.0:
            return log_control
        log_default = default.log_softmax(dim=1)
        if self.mixture == 0.0:
            return log_default
        shares = default.new_tensor([1 - self.mixture, self.mixture]).log()
        # Where both exclude a class, the gradient of log(0 + 0) would be NaN.
        masked = (log_default == -math.inf) & (log_control == -math.inf)
        parts = (
            (share + t).masked_fill(masked, 0)
            for share, t in zip(shares, (log_default, log_control), strict=True)
        )
        mixed = torch.logaddexp(*parts).masked_fill(masked, -math.inf)
        return torch.where(called[:, None], mixed, log_default)

    def both(self, x: Any) -> tuple[Tensor, Tensor]:
        """Run everything: logits of habit and control, [B, C] each, for training, fitting and calibrating."""
        s = self.encoder(x)
        default = check_logits("default", self.default(s), self.classes)
        return default, check_logits("control", self.control(s), self.classes)

    def loss(self, x: Any, targets: Tensor, *, rows: int, beta_factor: float = 1.0) -> ACCLoss:
        """The objective on a batch; everything runs.

        Parameters
        ----------
        x : Any
            What the encoder takes, B ≥ 1 rows.
        targets : Tensor
            int64 [B].
        rows : int
            N, rows of the training set, over which the description length is spread.
        beta_factor : float
            In [0, 1]: the share of β in force, for a warm-up, without which variational dropout prunes before
            it has learned.

        Returns
        -------
        ACCLoss
        """
        check_int("rows", rows, 1)
        share = check_number("beta_factor", beta_factor, 0, 1, ends="[]")
        default, control = self.both(x)
        if targets.dtype != torch.int64 or targets.shape != default.shape[:1]:
            expected = f"int64 of shape [{len(default)}]"
            raise ValueError(
                f"targets: expected {expected}, got {targets.dtype} of shape {list(targets.shape)}"
            )
        description = description_length(self.default)
        return acc_loss(
            self.objective,
            self.effort,
            default,
            control,
            targets,
            description,
            share * self.objective.beta / rows,
        )

    def extra_repr(self) -> str:
        """The answer and the objective."""
        return f"classes={self.classes}, answer={self.answer!r}, objective={self.objective}"


def _with_dropout(module: nn.Module, how: bool | Mapping[str, Any]) -> nn.Module:
    if how is False:
        return module
    return variational(module, **({} if how is True else dict(how)))  # a copy
