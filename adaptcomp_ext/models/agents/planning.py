"""An agent that acts from habit, and plans in the states that are worth it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adaptcomp_ext.models._precision import wide
from adaptcomp_ext.models.agents.gate import PlanGate
from adaptcomp_ext.models.agents.mppi import Planner
from adaptcomp_ext.models.agents.world import WorldModel
from adaptcomp_ext.nn import route

__all__ = ["Act", "PlanningAgent", "divergence"]

EDGE = 0.95  # a plan at the end of what an action can be is still a finite number before the tanh


class Act(NamedTuple):
    """What the agent does in each state. What belongs to a plan is NaN where there was none.

    Attributes
    ----------
    action : Tensor
        [B, A], in −1..1.
    called : Tensor
        Bool [B]: which states were planned.
    iterations : Tensor
        int64 [B]: of the planner; 0 where it did not run.
    mean, std : Tensor
        [B, A]: of the plan's first action.
    gain : Tensor
        [B]: what the model expects of the plan's first action more than of the habit's, the habit following
        either, in units of the largest reward, up to what is enough (`Planner.gain`). It may be negative: a
        plan is the best of what it tried as a whole.
    divergence : Tensor
        [B]: KL(π₂ ‖ π₁) of the first action, in nats, both taken as normals before the tanh.
    distance : Tensor
        [B]: of the plan's first action from the habit's, both means.
    following : Tensor
        [B, H, A]: the plan for the next step.
    score : Tensor
        [B]: the gate's, of its kind.
    glance : Tensor
        [B]: what a glance promised, in units of the spread of values; NaN where the gate does not look.
    """

    action: Tensor
    called: Tensor
    iterations: Tensor
    mean: Tensor
    std: Tensor
    gain: Tensor
    divergence: Tensor
    distance: Tensor
    following: Tensor
    score: Tensor
    glance: Tensor


def divergence(mean: Tensor, std: Tensor, raw: Tensor, log_std: Tensor) -> Tensor:
    """KL(π₂ ‖ π₁) [B] of the normals before the tanh: a habit that has run into the end of what it can do is still pulled back.

    In float32 (float64 for float64).

    Parameters
    ----------
    mean, std : Tensor
        [B, A]: of a plan's first action, in −1..1; carried through the inverse of the tanh to first order.
    raw, log_std : Tensor
        [B, A]: of the habit, before its tanh.
    """
    mean, std, raw, log_std = wide(mean), wide(std), wide(raw), wide(log_std)
    inside = mean.clamp(-EDGE, EDGE)
    width = log_std.exp()
    ratio = std / (1 - inside.square()) / width
    return 0.5 * (ratio.square() + ((inside.atanh() - raw) / width).square() - 1 - 2 * ratio.log()).sum(-1)


class PlanningAgent(nn.Module):
    """World model, gate and planner.

    Parameters
    ----------
    world : WorldModel
        Encoder, dynamics, values, habit π₁.
    gate : PlanGate
        Which states are planned.
    **planner
        Options of `Planner`, π₂.

    Notes
    -----
    Only the states that the gate calls pass through the planner (`route`), and each leaves it when its own
    plan has settled.
    """

    def __init__(self, world: WorldModel, gate: PlanGate, **planner: Any) -> None:
        super().__init__()
        self.world = world
        self.gate = gate
        self.planner = Planner(world, **planner)

    @torch.no_grad()
    def act(self, observation: Tensor, before: Tensor | None = None, explore: bool = False) -> Act:
        """Act in each state.

        Parameters
        ----------
        observation : Tensor
            [B, O].
        before : Tensor, optional
            [B, H, A]: ``following`` of the step before; NaN where an episode has begun.
        explore : bool
            Whether actions are drawn rather than the means taken.
        """
        z = self.world.encode(observation)
        raw, log_std = self.world.habit.parameters_of(z)
        habit = raw.tanh()
        blank = torch.full_like(wide(z[:, 0]), torch.nan)
        glance = self.planner.glance(z) / self.world.spread if self.gate.looks else blank
        score = self.gate.score(z, log_std, glance)
        called = self.gate.decide(score, explore)
        batch, horizon, size = len(z), self.planner.horizon, self.world.actions
        nothing = z.new_full((batch, horizon, size), torch.nan)
        before = nothing if before is None else before

        def plan(z: Tensor, before: Tensor) -> tuple[Tensor, ...]:
            return tuple(self.planner.plan(z, before))

        otherwise = (nothing, nothing, blank, blank, torch.zeros(batch, dtype=torch.int64, device=z.device))
        mean, std, worth, expected, iterations = route(called, plan, z, before, otherwise=otherwise)
        first, width = mean[:, 0], std[:, 0]
        free, planned = habit, first
        if explore:
            noise = torch.randn_like(habit)
            free = (raw + log_std.exp() * noise).tanh()
            planned = (first + width * noise).clamp(-1, 1)
        return Act(
            action=torch.where(called[:, None], planned, free),
            called=called,
            iterations=iterations,
            mean=first,
            std=width,
            gain=self.planner.gain(worth, expected),
            divergence=divergence(first, width, raw, log_std),
            distance=wide(first - habit).norm(dim=1),
            # Nothing is known of the last action of the next plan; 0, but NaN where there is no plan.
            following=torch.cat([mean[:, 1:], 0 * mean[:, :1]], 1),
            score=score,
            glance=glance,
        )
