"""The policy of PonderNet."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptcomp_ext.nn._naming import named
from adaptcomp_ext.nn.halting.policies._sampling import check_seed, samples
from adaptcomp_ext.nn.halting.policy import Decision, Policy, Run, View, check_head, head_logits, no_lookahead
from adaptcomp_ext.ops import halting
from adaptcomp_ext.ops._checks import check_fraction
from adaptcomp_ext.ops.bernoulli import uniform_draws
from adaptcomp_ext.ops.pondernet import pondernet_step_unchecked


def _check_prior(prior: Any) -> float | str:
    if prior == "uniform":
        return "uniform"
    if isinstance(prior, str):
        raise ValueError(f'prior: expected a number in (0, 1) or "uniform", got {prior!r}')
    if check_fraction("prior", prior) == 1.0:
        raise ValueError(
            "prior: expected a number in (0, 1), got 1.0, with which every row would halt at the first step"
        )
    return float(prior)


def _check_epsilon(epsilon: object) -> float:
    if check_fraction("epsilon", epsilon, zero=True) == 1.0:
        raise ValueError("epsilon: expected a number in [0, 1), got 1.0, which would truncate every row")
    return float(epsilon)  # type: ignore[arg-type]


def _hazard(logits: Tensor) -> Tensor:
    """Return the probability that a row halts; `torch.sigmoid` would round it by the row's place."""
    return torch.exp(-logits).add(1).reciprocal()


class PonderNet(Policy):
    """PonderNet (Banino, Balaguer, Blundell 2021): the halting step is random, with a learned hazard.

    λₙ = sigmoid(head(sₙ)) is the probability that a row still running halts at step n. At the last step λ is
    taken as 1, so that pₙ = λₙ Π_{j<n} (1 − λⱼ) sum to 1.

    *In training mode* every row runs to `max_steps`, or to the first step with p₁ + … + pₙ > 1 − `epsilon`.
    The output is the expectation Σ pₙ·readoutₙ, the cost is KL(p ‖ prior) in nats, and the trace has all
    steps: for a loss per step, weight ``loss(trace.outputs, target[trace.row])`` with ``trace.weights``.

    *In evaluation mode* a row halts with probability λₙ, sampled by a counter-based generator keyed by seed,
    sample and step. The output is the readout at that step and the cost is the number of steps.

    Parameters
    ----------
    head : callable
        Maps the state to one logit per row, [n] or [n, 1]; a ModuleList has a head for each step. A logit of
        −∞ gives λ = 0.
    prior : float or "uniform"
        λ_p in (0, 1) of the geometric prior ∝ λ_p (1 − λ_p)^{n−1}, renormalised over `min_steps` to
        `max_steps`; or the uniform prior over these steps.
    epsilon : float
        In [0, 1). A row is truncated in training mode when its survival falls below it. 0: no truncation.
    seed : int
        Seed of the samples in evaluation mode, which depend only on seed, step, and the row's sample id (by
        default its place in the batch).

    Notes
    -----
    Before `min_steps` the hazard is zero. Output and cost are differentiable in training mode. A setting that
    is not as described raises TypeError or ValueError, also at a later assignment.
    """

    _settings: ClassVar = {
        "lookahead": partial(no_lookahead, "PonderNet"),
        "head": check_head,
        "prior": _check_prior,
        "epsilon": _check_epsilon,
        "seed": check_seed,
    }

    def __init__(self, head: Any, prior: float | str = 0.2, epsilon: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.head = head
        self.prior = prior
        self.epsilon = epsilon
        self.seed = seed

    @property
    def weighted(self) -> bool:
        """Whether the output is the expectation over the steps, as in training mode."""
        return self.training

    @property
    def traced(self) -> bool:
        """Whether all steps are kept, as in training mode."""
        return self.training

    def begin(self, run: Run) -> tuple[Tensor, ...]:
        """Return log Q₀ = 0 in training mode."""
        return (torch.zeros(run.batch, device=run.device, dtype=run.scalar),) if self.training else ()

    def prior_terms(self, run: Run) -> tuple[float, float]:
        """Return a and b with the log prior probability (n − min_steps) a − b of halting at step n."""
        possible = run.max_steps - run.min_steps + 1
        if self.prior == "uniform":
            return 0.0, math.log(possible)
        # The geometric weights q^(n - min_steps) sum to (1 - q^K) / (1 - q).
        log_q = math.log1p(-float(self.prior))
        return log_q, math.log(-math.expm1(possible * log_q)) - math.log(-math.expm1(log_q))

    def log_prior(self, run: Run, step: int) -> float:
        """Return the log prior probability of halting at `step`, between `min_steps` and `max_steps`."""
        log_decay, log_total = self.prior_terms(run)
        return (step - run.min_steps) * log_decay - log_total

    def decide(self, view: View) -> Decision:
        """Take one step of the distribution (training mode), or sample from the hazard (evaluation mode)."""
        run = view.run
        logits = head_logits(self.head, view)
        if not self.training:
            with torch.no_grad():
                draw = uniform_draws(self.seed, samples(view), view.step).to(run.scalar)
                return Decision(draw < _hazard(logits.to(run.scalar)), logits=logits)
        weight, log_survival, cost, halt = pondernet_step_unchecked(
            logits,
            view.carry[0],
            *(view.step, run.min_steps, run.max_steps),
            self.log_prior(run, view.step),
            math.log(self.epsilon) if self.epsilon else -math.inf,
        )
        return Decision(halt, weight, cost, carry=(log_survival,), logits=logits)

    def fuse(self) -> halting.Fused | None:
        """Let the halting kernel sample in evaluation mode; training mode keeps all steps, and has none."""
        if self.training:
            return None
        return halting.Fused(halting.PONDER_SAMPLE, parameter=self.seed, head=self.head)

    def extra_repr(self) -> str:
        """Return the head's name, if it is a plain function, prior, epsilon and seed."""
        return f"{named(head=self.head)}prior={self.prior!r}, epsilon={self.epsilon}, seed={self.seed}"
