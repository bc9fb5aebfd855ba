"""Combinations of policies: a row halts as soon as one of them says so, or as soon as all do."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from adaptcomp_ext.nn.halting.fusing import begin
from adaptcomp_ext.nn.halting.policies.convergence import Convergence
from adaptcomp_ext.nn.halting.policy import (
    Decision,
    Policy,
    Run,
    View,
    check_decision,
    decision_of,
    plain_decision,
)
from adaptcomp_ext.ops._checks import describe


class Combination(Policy):
    """Base class of `AnyOf` and `AllOf`."""

    policies: nn.ModuleList
    """The members."""

    def __init__(self, *policies: Policy, lookahead: int = 0) -> None:
        super().__init__()
        for i, policy in enumerate(policies):
            if not isinstance(policy, Policy):
                raise TypeError(
                    f"policies: expected policies, each an argument of its own, got {describe(policy)} at {i}"
                )
        self.policies = nn.ModuleList(policies)
        self.lookahead = lookahead
        self._check_members()

    def _check_members(self) -> None:
        """Require members that choose a step: the outputs of weighted ones would have to be mixed, too."""
        if not len(self.policies):
            raise ValueError("policies: expected at least one policy, got none")
        for i, policy in enumerate(self._members()):
            if not isinstance(policy, Policy):
                raise TypeError(f"policies: expected an adaptcomp_ext.Policy, got {describe(policy)} at {i}")
            if policy.weighted or policy.traced:
                mode = " in training mode" if policy.training else ""
                raise ValueError(
                    "policies: expected policies that only decide which rows halt, got "
                    f"{type(policy).__name__}{mode} at {i}, which weights or keeps all steps of a row"
                )
            if isinstance(policy, Convergence) and policy.gradient != "unrolled":
                raise ValueError(
                    'policies: expected Convergence(gradient="unrolled"), because a row that another policy '
                    f'halts is at no fixed point, got gradient="{policy.gradient}" at {i}'
                )

    def _members(self) -> list[Any]:
        return list(self.policies)

    @property
    def reads_logits(self) -> bool:
        """Whether a member reads the readout as class logits."""
        return any(policy.reads_logits for policy in self._members())

    @property
    def has_log_prob(self) -> bool:
        """Whether a member's decisions have one."""
        return any(policy.has_log_prob for policy in self._members())

    def check_readout(self, readout: Tensor) -> None:
        """Require a readout that all members can use."""
        for policy in self._members():
            policy.check_readout(readout)

    def begin(self, run: Run) -> tuple[Tensor, ...]:
        """Return the carries of all members, behind one another."""
        self._check_members()
        return _joined([begin(policy, run, False) for policy in self._members()], run.batch, run.device)

    def decide(self, view: View) -> Decision:
        """Combine what the members decide."""
        decisions, at = [], 1
        # Its shape says how many tensors each member carries: see `_joined`.
        counts = view.carry[0].shape[2:]
        for policy, count in zip(self._members(), counts, strict=True):
            own = replace(view, carry=view.carry[at : at + count])
            decision = plain_decision(decision_of(policy, own))
            check_decision(decision, own)
            decisions.append(decision)
            at += count
        return Decision(
            self._combine([d.halt for d in decisions]),
            cost=_sum([d.cost for d in decisions]),
            log_prob=_sum([d.log_prob for d in decisions]),
            carry=_joined([d.carry for d in decisions], view.row.shape[0], view.row.device),
            # NaN and +inf remain, so that the row ends NONFINITE.
            logits=_reduce(torch.maximum, [d.logits for d in decisions]),
        )

    def _combine(self, halts: list[Tensor]) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return the lookahead."""
        return f"lookahead={self.lookahead}"


class AnyOf(Combination):
    """Halt a row as soon as one of several policies halts it.

    Parameters
    ----------
    *policies : Policy
        At least one. They may be combinations themselves, and each may have a `lookahead` of its own. A
        policy that is weighted or traced, such as `ACT` or `PonderNet` in training mode, is refused.
    lookahead : int
        0, or 1: the combination's decision at step n ends the row after step n + 1. See `Policy.lookahead`.

    Notes
    -----
    Every member decides at every step, with a carry of its own. The result's ``cost`` is the sum of the costs
    that members define; where none does, it is the number of steps. The result's ``log_prob`` is the sum of
    the members' log-probabilities: that of all their draws up to the row's last step, which are independent.
    A logit of any member that is NaN or +∞ ends the row ``NONFINITE``. Members are the submodules
    ``policies.0``, ``policies.1``, …

    Examples
    --------
    Halt where the answer is sure, or stands still, and not before step 3:

    >>> policy = ac.AllOf(ac.AnyOf(ac.Confidence(0.95), ac.Convergence(1e-3)), ac.FixedSteps(3))
    """

    def _combine(self, halts: list[Tensor]) -> Tensor:
        return reduce(torch.logical_or, halts)


class AllOf(Combination):
    """Halt a row at the first step at which several policies halt it, all at this same step.

    A member that has said so before and does not any more does not count. One whose decision stays, such as
    `FixedSteps`, is a lower bound on the number of steps.

    Parameters
    ----------
    *policies : Policy
        At least one, as for `AnyOf`.
    lookahead : int
        0, or 1: the combination's decision at step n ends the row after step n + 1. See `Policy.lookahead`.

    Notes
    -----
    Carries, ``cost``, ``log_prob`` and logits are combined as those of `AnyOf`. A member that samples draws
    at every step until the row ends, also after a step at which it was to halt.
    """

    def _combine(self, halts: list[Tensor]) -> Tensor:
        return reduce(torch.logical_and, halts)


def _joined(carries: list[tuple[Tensor, ...]], rows: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return the tensors of all carries, after a tensor without elements whose shape holds their numbers.

    A policy may carry another number of tensors from its first decision on than from its beginning.
    """
    counts = torch.empty((rows, 0, *map(len, carries)), dtype=torch.bool, device=device)
    return (counts, *(tensor for carry in carries for tensor in carry))


def _reduce(function: Any, values: list[Tensor | None]) -> Tensor | None:
    present = [value for value in values if value is not None]
    return reduce(function, present) if present else None


def _sum(values: list[Tensor | None]) -> Tensor | None:
    return _reduce(torch.add, values)
