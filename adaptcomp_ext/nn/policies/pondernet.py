"""PonderNet."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptcomp_ext.nn._naming import named
from adaptcomp_ext.nn.policy import Decision, Policy, Run, View, check_head, head_logits
from adaptcomp_ext.ops import halting
from adaptcomp_ext.ops._checks import check_fraction, check_int
from adaptcomp_ext.ops.pondernet import pondernet_step_unchecked
from adaptcomp_ext.reference import uniform


def _check_prior(prior: Any) -> float | str:
    if prior == "uniform":
        return "uniform"
    if isinstance(prior, str):
        raise ValueError(f'prior: expected a number in (0, 1) or "uniform", got {prior!r}')
    if check_fraction("prior", prior) == 1.0:
        raise ValueError(
            "prior: expected a number in (0, 1), got 1.0: no step after the first would be possible"
        )
    return float(prior)


def _check_epsilon(epsilon: object) -> float:
    if check_fraction("epsilon", epsilon, zero=True) == 1.0:
        raise ValueError("epsilon: expected a number in [0, 1), got 1.0: nothing would be left to be spent")
    return float(epsilon)  # type: ignore[arg-type]


def _check_seed(seed: Any) -> int:
    if check_int("seed", seed, 0) >= 2**63:
        raise ValueError(f"seed: expected an int < 2**63, got {seed}")
    return int(seed)


class PonderNet(Policy):
    """PonderNet (Banino, Balaguer, Blundell 2021): halting as a random variable with a learned hazard.

    λₙ = sigmoid(head(sₙ)) is the probability of halting at step n for a row still running; pₙ = λₙ Π_{j<n}(1
    − λⱼ), and the last step is forced, so that the pₙ of a row sum to one.

    *In training mode* every row runs to `max_steps`, or to the first step with p₁ + … + pₙ > 1 − `epsilon`.
    The output is the expectation Σ pₙ·readoutₙ, the cost is KL(p ‖ prior), and the trace holds every step:
    for a loss per step, weigh ``loss(trace.outputs, target[trace.row])`` with ``trace.weights``.

    *In evaluation mode* a row halts with probability λₙ, drawn from a counter-based generator keyed by seed,
    sample and step. The output is the readout at that step and the cost is the number of steps.

    Parameters
    ----------
    head : callable
        Maps the state to one logit per row, [n] or [n, 1]. A logit of −∞ is λ = 0: the row does not halt
        here.
    prior : float or "uniform"
        λ_p of the geometric prior ∝ λ_p (1 − λ_p)^{n−1}, in (0, 1), renormalised over the steps a row may
        halt at; or uniform.
    epsilon : float
        In [0, 1). Truncates training rows whose halting probability is spent. 0: never.
    seed : int
        Of the draws in evaluation mode. The draws of a row depend on the seed, the step, and the row's sample
        id (its position in the batch, unless ``sample_ids`` is given to the call) and on nothing else.

    Notes
    -----
    Before `min_steps` the hazard counts as zero.
    """

    _settings: ClassVar = {
        "head": check_head,
        "prior": _check_prior,
        "epsilon": _check_epsilon,
        "seed": _check_seed,
    }

    def __init__(self, head: Any, prior: float | str = 0.2, epsilon: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.head = head
        self.prior = prior
        self.epsilon = epsilon
        self.seed = seed

    @property
    def weighted(self) -> bool:
        """In training mode the output is the expectation over the steps."""
        return self.training

    @property
    def traced(self) -> bool:
        """In training mode every step is kept."""
        return self.training

    def begin(self, run: Run) -> tuple[Tensor, ...]:
        """log Q₀ = 0."""
        return (torch.zeros(run.batch, device=run.device, dtype=run.scalar),) if self.training else ()

    def log_prior(self, run: Run, step: int) -> float:
        """log of the prior probability of halting at `step`, normalised over `min_steps` … `max_steps`."""
        if self.prior == "uniform":
            return -math.log(run.max_steps - run.min_steps + 1)
        log_q = math.log1p(
            -float(self.prior)
        )  # geometric: weights q^(n - min_steps), summing to (1 - q^K) / (1 - q)
        possible = run.max_steps - run.min_steps + 1
        log_total = math.log(-math.expm1(possible * log_q)) - math.log(-math.expm1(log_q))
        return (step - run.min_steps) * log_q - log_total

    def decide(self, view: View) -> Decision:
        """One step of the distribution (training), or one draw from the hazard (evaluation)."""
        run = view.run
        logits = head_logits(self.head, view)
        if not self.training:
            with torch.no_grad():
                sample = view.row if run.sample_ids is None else run.sample_ids[view.row.clamp(min=0)]
                draw = uniform(self.seed, sample, view.step).to(run.scalar)
                return Decision(draw < torch.sigmoid(logits.to(run.scalar)), logits=logits)
        weight, log_survival, cost, halt = pondernet_step_unchecked(
            logits,
            view.carry[0],
            *(view.step, run.min_steps, run.max_steps),
            self.log_prior(run, view.step),
            math.log(self.epsilon) if self.epsilon else -math.inf,
        )
        return Decision(halt, weight, cost, carry=(log_survival,), logits=logits)

    def fuse(self) -> halting.Fused | None:
        """One draw from the hazard, in the halting kernel. Training keeps every step and is not fused."""
        if self.training:
            return None
        return halting.Fused(halting.PONDER_SAMPLE, parameter=self.seed, head=self.head)

    def extra_repr(self) -> str:
        """A plain function's name, prior, truncation and seed."""
        return f"{named(head=self.head)}prior={self.prior!r}, epsilon={self.epsilon}, seed={self.seed}"
