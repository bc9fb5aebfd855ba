"""`ACC`: habit for every row, control for the rows that its gate calls."""

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
    """The result of `ACC`.

    Attributes
    ----------
    output : Tensor
        [B, C]: log-probabilities of the answer.
    called : Tensor
        Bool [B]: which rows went through control.
    score : Tensor
        [B]: the gate's score.
    default : Tensor
        [B, C]: the habit's logits.
    control : Tensor
        [B, C]: control's logits where it ran, the habit's logits elsewhere.
    """

    output: Tensor
    called: Tensor
    score: Tensor
    default: Tensor
    control: Tensor


class ACC(nn.Module):
    """A classifier whose habit π₁ runs for every row, and control π₂ only for the rows that its gate calls.

    ::

        s = encoder(x),   π₁ = softmax(default(s)),   called = gate(π₁),   π₂ = softmax(control(s[called]))
        answer: π₁ where not called; where called π₂, or the mixture (1 − w)·π₁ + w·π₂

    Parameters
    ----------
    encoder : nn.Module
        ``encoder(x) -> s``: a Tensor or a pytree of Tensors whose first dimension is B. Use
        ``nn.Identity()`` if habit and control share no encoder.
    default : nn.Module
        π₁: ``default(s) -> logits`` [B, C]. See `variational`.
    control : nn.Module
        π₂: ``control(s) -> logits`` [B, C].
    classes : int
        C ≥ 2.
    gate : Gate, optional
        Default: an `EntropyGate`. It may be replaced between calls; calibrate it on held-out rows.
    answer : str
        "control": π₂ alone where it ran; "mixture": the thesis' linear combination, which can be worse than
        π₂ alone where habit is wrong with confidence.
    mixture : float
        w in [0, 1], π₂'s share of the mixture.
    variational : bool or mapping
        True: the linear and convolution layers of a copy of `default` are wrapped in `VariationalDropout`; a
        mapping: the same with these options; False: `default` is used as it is.
    objective : Objective, optional
        The weights of `loss`. Default: ``Objective()``.

    Attributes
    ----------
    effort : Effort or None
        The network λ(s) if the objective learns it.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Notes
    -----
    The model follows the thesis of A. Kamanda (2023), which builds on MDL-C (Moskovitz et al. 2022). There
    the gate decided once for a batch; here it decides for each row (`BatchMeanGate` is the thesis' gate).
    `forward` is differentiable in habit, control and encoder; training is meant to use `loss`, which runs
    control for every row.

    *Masked classes:* a logit of −∞ gives its class probability 0 in the answer, the gates and the loss.

    *Not promised:* that a gate calls its calibrated rate on rows of another distribution.

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
        """Classify rows; only the rows that the gate calls go through control.

        Parameters
        ----------
        x : Any
            The encoder's input, B rows.

        Returns
        -------
        ACCResult

        Notes
        -----
        On CUDA the host waits once, for the number of rows that are called: see `route`.
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
        """Run habit and control for every row, and return their logits [B, C], to fit or calibrate a gate."""
        s = self.encoder(x)
        default = check_logits("default", self.default(s), self.classes)
        return default, check_logits("control", self.control(s), self.classes)

    def loss(self, x: Any, targets: Tensor, *, rows: int, beta_factor: float = 1.0) -> ACCLoss:
        """Compute the objective on a batch; habit and control run for every row.

        Parameters
        ----------
        x : Any
            The encoder's input, B ≥ 1 rows.
        targets : Tensor
            Class labels, int64 [B].
        rows : int
            N, the number of rows of the training set, by which the description length is divided.
        beta_factor : float
            Factor of β in [0, 1], for a warm-up: without one, variational dropout prunes weights before they
            have learned.

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
        """Return the options as text."""
        return f"classes={self.classes}, answer={self.answer!r}, objective={self.objective}"


def _with_dropout(module: nn.Module, how: bool | Mapping[str, Any]) -> nn.Module:
    if how is False:
        return module
    return variational(module, **({} if how is True else dict(how)))  # a copy
