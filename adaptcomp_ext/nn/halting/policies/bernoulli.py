"""The policy of sampled halting, for REINFORCE."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptcomp_ext.nn._naming import named
from adaptcomp_ext.nn.halting.policies._sampling import check_seed_or_none, drawn_seed, samples
from adaptcomp_ext.nn.halting.policy import Decision, Policy, Run, View, check_head, head_logits
from adaptcomp_ext.ops.bernoulli import bernoulli_step_unchecked


class Bernoulli(Policy):
    """Halt a row by a draw: an action with a log-probability, which REINFORCE (Williams 1992) trains.

    λₙ = sigmoid(head(sₙ)) is the probability that a row still running halts at step n. The result's
    ``log_prob`` is that of all actions of the row::

        Σ_{n<N} log(1 − λₙ) + log λ_N    where the row has halted after step N
        Σ_{n<N} log(1 − λₙ)              where `max_steps` or a value that is not finite ended it at step N

    Where a row cannot choose there is no action, and nothing is added: before `min_steps`, and at
    `max_steps`. With a reward r and a baseline b that does not depend on the actions,
    ``-(result.log_prob * (r - b)).mean()`` has the policy gradient.

    Parameters
    ----------
    head : callable
        Maps the state to one logit per row, [n] or [n, 1]. −∞ gives λ = 0. Start with a bias near −3, that
        is with many steps.
    seed : int, optional
        Seed of the draws, which depend only on seed, step, and the row's sample id (by default its place in
        the batch). Default: each call draws a seed from torch's generator of the CPU, as dropout draws its
        mask, so that the same row takes other actions in another call.
    lookahead : int
        0, or 1: the action at step n decides whether the row ends after step n + 1. See `Policy.lookahead`.

    Notes
    -----
    Training and evaluation mode are the same: the rows are sampled. For results that repeat, set `seed`. The
    output is the readout at the last step, and has its gradient; the draws have none. The ponder cost is the
    number of steps. A row that took no action at `max_steps` has the status ``MAX_STEPS``. A setting that is
    not as described raises TypeError or ValueError, also at a later assignment.

    Examples
    --------
    >>> halt = ac.AdaptiveHalt(step, ac.Bernoulli(nn.Linear(64, 1)), max_steps=16, readout=classify)
    >>> result = halt(state, x)
    >>> reward = (result.output.argmax(1) == target).float() - 0.01 * result.steps
    >>> loss = criterion(result.output, target) - (result.log_prob * (reward - reward.mean())).mean()
    """

    _settings: ClassVar = {**Policy._settings, "head": check_head, "seed": check_seed_or_none}

    def __init__(self, head: Any, seed: int | None = None, lookahead: int = 0) -> None:
        super().__init__()
        self.head = head
        self.seed = seed
        self.lookahead = lookahead

    @property
    def has_log_prob(self) -> bool:
        """True: each decision has the log-probability of its action."""
        return True

    def begin(self, run: Run) -> tuple[Tensor, ...]:
        """Return the run's seed, unless it is given; with a lookahead also whether each row may choose."""
        carry = []
        if self.seed is None:
            carry.append(torch.full((run.batch,), drawn_seed(), dtype=torch.int64, device=run.device))
        if self.lookahead:
            carry.append(torch.ones(run.batch, dtype=torch.bool, device=run.device))
        return tuple(carry)

    def decide(self, view: View) -> Decision:
        """Draw each row's action."""
        run, carry = view.run, view.carry
        logits = head_logits(self.head, view)
        log_prob, halt = bernoulli_step_unchecked(
            logits, samples(view), carry[0] if self.seed is None else self.seed, view.step
        )
        ends: Any = view.step + self.lookahead  # the step at which the action could end the row
        chooses = (run.min_steps <= ends) & (ends < run.max_steps)
        if self.lookahead:
            # A row that is to halt takes one step more, at which it has no choice.
            chooses = carry[-1] & chooses
            carry = (*carry[:-1], ~(halt & chooses))
        if chooses is False:  # of no row
            log_prob, halt = torch.zeros_like(log_prob), torch.zeros_like(halt)
        elif chooses is not True:
            log_prob, halt = torch.where(chooses, log_prob, 0.0), halt & chooses
        return Decision(halt, log_prob=log_prob, carry=carry, logits=logits)

    def extra_repr(self) -> str:
        """Return the head's name, if it is a plain function, seed and lookahead."""
        return f"{named(head=self.head)}seed={self.seed}, lookahead={self.lookahead}"
