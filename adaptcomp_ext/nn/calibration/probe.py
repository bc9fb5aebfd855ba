"""A policy that follows many thresholds of another one at once, so that the step runs once for all of them.

A row's states do not depend on the threshold: it says only where the row halts. The probe therefore lets a
row go on until the last threshold would have halted it, and notes on the way where each of them does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptcomp_ext.nn.halting.fusing import begin
from adaptcomp_ext.nn.halting.policy import (
    Decision,
    Policy,
    Run,
    View,
    check_decision,
    decision_of,
    plain_decision,
)
from adaptcomp_ext.nn.result import HaltResult
from adaptcomp_ext.ops._backend import compute_dtype


class Target(NamedTuple):
    """A setting of a policy or of a policy inside it, such as a member of a combination."""

    owner: Policy
    name: str


@dataclass(slots=True)
class Followed:
    """What one threshold does with the rows of a batch: the step at which each ends, and its output."""

    steps: Tensor  # int64 [B]; 0: not ended yet
    output: Tensor | None = None  # [B, ...]; a weighted one is a sum


class Probe(Policy):
    """Follow `policy` with each of `values` for one setting; `depth`: every row takes all steps."""

    def __init__(self, policy: Policy, target: Target, values: Sequence[float], depth: bool) -> None:
        super().__init__()
        self._followed_policy = (policy,)  # in a tuple: it is no submodule, and keeps its place and mode
        self._target = target
        self._values = values
        self._depth = depth
        self.followed: list[Followed] = []
        self.at_step: list[Tensor] = []  # the readout of all rows after each step, with `depth`
        self._carried: list[int] = []

    @property
    def reads_logits(self) -> bool:
        """As the policy's."""
        return self._followed_policy[0].reads_logits

    def check_readout(self, readout: Tensor) -> None:
        """Check as the policy does."""
        self._followed_policy[0].check_readout(readout)

    def begin(self, run: Run) -> tuple[Tensor, ...]:
        """Begin with every threshold."""
        (policy,) = self._followed_policy
        self.followed = [
            Followed(torch.zeros(run.batch, dtype=torch.int64, device=run.device)) for _ in self._values
        ]
        self.at_step = []
        carry: list[Tensor] = []
        for value in self._values:
            setattr(*self._target, value)
            carry += begin(policy, run, False)
        self._carried = [len(carry) // len(self._values)] * len(self._values)
        return tuple(carry)

    def decide(self, view: View) -> Decision:
        """Ask the policy once for each threshold; a row goes on until the last one has halted it."""
        (policy,) = self._followed_policy
        row, readout = view.row, view.readout
        place, real = row.clamp(min=0), row >= 0
        carries, start = [], 0
        for count in self._carried:
            carries.append(view.carry[start : start + count])
            start += count
        running = torch.zeros_like(real)
        carry: list[Tensor] = []
        ending = view.step >= view.run.max_steps
        for i, (value, followed) in enumerate(zip(self._values, self.followed, strict=True)):
            setattr(*self._target, value)
            own = replace(view, carry=carries[i])
            decision = plain_decision(decision_of(policy, own))
            check_decision(decision, own)
            self._carried[i] = len(decision.carry)
            carry += decision.carry
            active = (followed.steps[place] == 0) & real
            if policy.weighted:
                self._add(followed, decision.weight, readout, place, active)
            if ending:
                continue  # the loop ends all rows
            halts = decision.halt & active
            if view.step < view.run.min_steps:
                halts = torch.zeros_like(halts)
            running |= active & ~halts
            ended = place[halts]
            followed.steps[ended] = view.step
            if not policy.weighted:
                if followed.output is None:
                    followed.output = readout.new_zeros((view.run.batch, *readout.shape[1:]))
                followed.output[ended] = readout[halts]
        if self._depth:
            whole = readout.new_zeros((view.run.batch, *readout.shape[1:]))
            whole[place[real]] = readout[real]
            self.at_step.append(whole)
            running = torch.ones_like(running)
        return Decision(~running, carry=tuple(carry))

    @staticmethod
    def _add(
        followed: Followed, weight: Tensor | None, readout: Tensor, place: Tensor, active: Tensor
    ) -> None:
        if weight is None:
            raise ValueError("decide: expected a weight in the Decision of a weighted policy, got None")
        at = place[active]
        if followed.output is None:
            shape = (followed.steps.shape[0], *readout.shape[1:])
            followed.output = readout.new_zeros(shape, dtype=compute_dtype(readout.dtype))
        scale = weight[active].to(followed.output.dtype)
        scale = scale.reshape(-1, *[1] * (readout.dim() - 1))
        # A weight of zero leaves out a masked class's −inf.
        part = torch.where(scale == 0, torch.zeros_like(scale), scale * readout[active])
        followed.output[at] += part

    def finish(self, result: HaltResult) -> list[Followed]:
        """Return what each threshold does, after the run: rows that none halted end as the run ended them."""
        (policy,) = self._followed_policy
        for followed in self.followed:
            open_rows = followed.steps == 0
            followed.steps = torch.where(open_rows, result.steps, followed.steps)
            if followed.output is None:
                followed.output = result.output
            elif not policy.weighted:
                followed.output[open_rows] = result.output[open_rows]
            else:
                followed.output = followed.output.to(result.output.dtype)
        return self.followed


def resolve(policy: Policy, setting: str) -> Target:
    """Find the policy and the attribute that a dotted name means."""
    *path, name = setting.split(".")
    owner: Any = policy
    for part in path:
        owner = getattr(owner, part, None) if not part.isdigit() else owner[int(part)]
    if not isinstance(owner, Policy) or not hasattr(owner, name):
        raise ValueError(
            f"setting: expected the name of a threshold of {type(policy).__name__}, such as "
            f'"threshold", or "policies.0.threshold" of a policy inside it, got {setting!r}'
        )
    return Target(owner, name)
