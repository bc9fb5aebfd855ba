"""An agent that acts from habit, and plans in the states that its gate calls."""

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

EDGE = 0.95  # bound on a plan's mean action, so that its inverse tanh stays finite


class Act(NamedTuple):
    """The agent's action in each state. Numbers of a plan are NaN where there is none.

    Attributes
    ----------
    action : Tensor
        [B, A], in −1..1.
    called : Tensor
        Bool [B]: which states were planned.
    iterations : Tensor
        int64 [B]: number of iterations of the planner; 0 where it did not run.
    mean, std : Tensor
        [B, A]: mean and standard deviation of the plan's first action.
    gain : Tensor
        [B]: the value that the model expects of the plan's first action minus that of the habit's, each
        followed by the habit, in units of the largest reward (`Planner.gain`). It may be negative, because a
        plan is optimised as a whole.
    divergence : Tensor
        [B]: KL(π₂ ‖ π₁) of the first action, in nats, of the normals before the tanh.
    distance : Tensor
        [B]: distance of the plan's mean first action from the habit's mean action.
    following : Tensor
        [B, H, A]: the plan for the next step.
    score : Tensor
        [B]: the gate's score.
    glance : Tensor
        [B]: the gain that a glance estimates, in units of the spread of values; NaN if the gate needs none.
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
    """Return KL(π₂ ‖ π₁) [B] of the normals before the tanh, in nats, float32 (float64 for float64).

    Before the tanh a habit whose action is saturated still has a gradient.

    Parameters
    ----------
    mean, std : Tensor
        [B, A]: a plan's first action, in −1..1; mapped through the inverse tanh to first order.
    raw, log_std : Tensor
        [B, A]: the habit's mean and log standard deviation before the tanh.
    """
    mean, std, raw, log_std = wide(mean), wide(std), wide(raw), wide(log_std)
    inside = mean.clamp(-EDGE, EDGE)
    width = log_std.exp()
    ratio = std / (1 - inside.square()) / width
    return 0.5 * (ratio.square() + ((inside.atanh() - raw) / width).square() - 1 - 2 * ratio.log()).sum(-1)


class PlanningAgent(nn.Module):
    """An agent made of a world model, a gate and a planner.

    Parameters
    ----------
    world : WorldModel
        Encoder, dynamics, values, and habit π₁.
    gate : PlanGate
        Decides which states are planned.
    **planner
        Options of `Planner`, π₂.

    Notes
    -----
    Only the states that the gate calls pass through the planner (`route`), and each halts when its own plan
    has converged. `act` is not differentiable.
    """

    def __init__(self, world: WorldModel, gate: PlanGate, **planner: Any) -> None:
        super().__init__()
        self.world = world
        self.gate = gate
        self.planner = Planner(world, **planner)

    @torch.no_grad()
    def act(self, observation: Tensor, before: Tensor | None = None, explore: bool = False) -> Act:
        """Choose an action in each state.

        Parameters
        ----------
        observation : Tensor
            [B, O].
        before : Tensor, optional
            [B, H, A]: ``following`` of the step before; NaN where an episode has begun.
        explore : bool
            Whether actions are sampled, and the gate also calls states at random; otherwise actions are
            means.

        Returns
        -------
        Act
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
            # The next plan has no last action yet: 0, but NaN where there is no plan.
            following=torch.cat([mean[:, 1:], 0 * mean[:, :1]], 1),
            score=score,
            glance=glance,
        )
