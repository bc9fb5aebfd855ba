"""An agent for mazes: a reactive habit, a planner, and a gate that chooses the planner's number of sweeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adaptcomp_ext.models.agents.sweeps import UNKNOWN, sweep_plan
from adaptcomp_ext.nn._constants import WithConstants
from adaptcomp_ext.ops._checks import check_int, check_tensor

__all__ = ["SWEEPS", "Deliberation", "MazeAgent", "Seen"]

SWEEPS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""The numbers of sweeps that the gate chooses from."""
WORST = -4.0  # lower bound of an advantage, also for a move that the plan does not reach
NOVICE = 5.0
"""Initial bias of the gate for the largest number of sweeps: the agent plans at first, and learns where not
to."""
MOVES = ("up", "right", "down", "left")
GOAL_FEATURES = 4 + len(SWEEPS) - 1


class Seen(NamedTuple):
    """The inputs of a decision.

    Attributes
    ----------
    features : Tensor
        float32 [B, F]: the input of habit and gate.
    plan : Tensor
        float32 [B, 5]: each move's value minus the best move's, in −4..0; and 1 if the plan reaches the
        state, else 0.
    """

    features: Tensor
    plan: Tensor


class Deliberation(NamedTuple):
    """The agent's decision for each row.

    Attributes
    ----------
    action : Tensor
        int64 [B]: 0 up, 1 right, 2 down, 3 left.
    choice : Tensor
        int64 [B]: index of the number of sweeps in `SWEEPS`.
    sweeps : Tensor
        int64 [B]: number of sweeps.
    log_prob : Tensor
        float32 [B]: log-probability of choice and action together.
    seen : Seen
        Inputs of the decision.
    """

    action: Tensor
    choice: Tensor
    sweeps: Tensor
    log_prob: Tensor
    seen: Seen


def _log_softmax(logits: Tensor) -> Tensor:
    # For few categories this takes a third of the time of torch's log_softmax.
    return logits - logits.logsumexp(1, keepdim=True)


def _draw(log_probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Sample a category for each row, [B], by inversion, in a third of the time of ``torch.multinomial``."""
    u = torch.rand(len(log_probs), 1, generator=generator, device=log_probs.device)
    return (log_probs.exp().cumsum(1) < u).sum(1).clamp_(max=log_probs.shape[1] - 1)


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    net = nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )
    last = net[-1]
    assert isinstance(last, nn.Linear)
    nn.init.normal_(last.weight, std=0.01)
    nn.init.zeros_(last.bias)
    return net


class MazeAgent(WithConstants):
    """An agent with a habit π₁ and a gate that chooses, in each state, the number of sweeps to plan for.

    ::

        f  = walls within `reach` cells, where the goal lies          h, g = react(f)
        π₁ = softmax(h)                                               K ~ softmax(g), one of `SWEEPS`
        π₂ = softmax(h + β · advantage of each move after K sweeps)

    A row acts from habit if K = 0 or its sweeps do not reach it. The rows that plan go through
    `AdaptiveHalt`, each for its own K (`sweep_plan`).

    Parameters
    ----------
    reach : int
        Number of cells that the habit sees to each side.
    hidden : int
        Number of units of each of two hidden layers. Habit and gate share them, because a gate that runs in
        every state has to be cheap.

    Notes
    -----
    The critic, which only training uses, gets the true remaining distance (asymmetric actor-critic: Pinto et
    al. 2018). A value computed from the neighbourhood alone would have a variance that hides the effect of a
    few sweeps.

    Plans are not kept from one step to the next: K is the cost of a decision. No parameter depends on the
    size of the maze. `react`, `action_logits` and `value` are differentiable; `act` and `look` are not.
    Arguments that are not as described raise TypeError or ValueError.
    """

    def __init__(self, reach: int = 3, hidden: int = 128) -> None:
        super().__init__()
        self.reach = check_int("reach", reach, 1)
        window = (2 * reach + 1) ** 2
        self.body = _mlp(window + GOAL_FEATURES, check_int("hidden", hidden, 1), len(MOVES) + len(SWEEPS))
        last = self.body[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            last.bias[-1] = NOVICE
        self.register_buffer("prior", last.bias.detach()[len(MOVES) :].log_softmax(0))
        self.critic = _mlp(window + GOAL_FEATURES + 2, hidden, 1)
        self.log_trust = nn.Parameter(torch.zeros(()))
        self.register_constants()

    numbers: Tensor
    prior: Tensor

    def constants(self) -> dict[str, Tensor]:
        """Return the numbers of sweeps to choose from."""
        return {"numbers": torch.tensor(SWEEPS)}

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        meta: Any,
        strict: bool,
        missing: list[str],
        *lists: Any,
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, meta, strict, missing, *lists)
        name = prefix + "prior"
        if name in missing and not self.prior.is_meta and abs(float(self.prior.logsumexp(0))) < 1e-3:
            missing.remove(name)  # an older checkpoint lacks the prior: this agent's, if normalised, stays

    def features(self, walls: Tensor, position: Tensor, goal: Tensor) -> Tensor:
        """Return the input of habit, gate and critic, [B, F]: near walls, the goal's direction and distance.

        A cell is −1 if it is free, 1 if it is a wall or outside the maze. The arguments are those of `act`.
        """
        batch, size = check_tensor("walls", walls).shape[0], walls.shape[-1]
        side = 2 * self.reach + 1
        wide = size + 2 * self.reach
        padded = nn.functional.pad(walls.float(), (self.reach,) * 4, value=1.0).view(batch, wide * wide)
        along = torch.arange(side, device=walls.device)
        window = (along[:, None] * wide + along).flatten()
        here = position[:, 0] * wide + position[:, 1]
        near = padded.gather(1, here[:, None] + window) * 2 - 1
        offset = (goal - position).float()
        length = offset.abs().sum(1, keepdim=True)
        beyond = ((length - self.numbers[1:]) / 4).clamp(-1, 1)
        return torch.cat([near, offset / 8, offset.clamp(-1, 1), beyond], 1)

    def look(
        self, walls: Tensor, position: Tensor, goal: Tensor, sweeps: Tensor, compact: bool | str = True
    ) -> Tensor:
        """Plan each row for its number of sweeps, and return ``plan`` of `Seen`; arguments as for `act`."""
        value = sweep_plan(walls, position, goal, sweeps, compact)
        best = value.max(1, keepdim=True).values
        known = best > UNKNOWN / 2
        return torch.cat([(value - best).clamp(min=WORST) * known, known.float()], 1)

    def react(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the habit [B, 4] and of the gate [B, len(SWEEPS)]."""
        habit, gate = self.body(features).split([len(MOVES), len(SWEEPS)], 1)
        return habit, gate

    def value(self, features: Tensor, distance: Tensor) -> Tensor:
        """Return the critic's value [B] of states with `distance` [B] remaining steps; for training only."""
        far = distance.float()[:, None]
        value: Tensor = self.critic(torch.cat([features, far / 16, torch.exp(-far / 16)], 1))[:, 0]
        return value

    def action_logits(self, habit: Tensor, plan: Tensor) -> Tensor:
        """Return the logits [B, 4] of π₂ from those of π₁ and a plan [B, 5]; π₁'s where the plan is empty."""
        return habit + self.log_trust.exp() * plan[:, : len(MOVES)]

    @torch.no_grad()
    def act(
        self,
        walls: Tensor,
        position: Tensor,
        goal: Tensor,
        sweeps: Tensor | None = None,
        compact: bool | str = True,
        generator: torch.Generator | None = None,
    ) -> Deliberation:
        """Sample a number of sweeps, plan, and sample an action.

        Parameters
        ----------
        walls : Tensor
            Bool or integer [B, S, S].
        position, goal : Tensor
            int64 [B, 2]: row and column.
        sweeps : Tensor, optional
            int64 [B]: numbers of sweeps to use instead of the gate's. ``choice`` is then −1, and ``log_prob``
            that of the action alone.
        compact : bool or "auto"
            As for `AdaptiveHalt`.
        generator : torch.Generator, optional
            Random generator. Default: torch's global one of the device.

        Returns
        -------
        Deliberation
        """
        features = self.features(walls, position, goal)
        habit, gate = self.react(features)
        log_prob = features.new_zeros(len(features))
        if sweeps is None:
            gate = _log_softmax(gate)
            choice = _draw(gate, generator)
            log_prob = log_prob + gate.gather(1, choice[:, None])[:, 0]
            sweeps = self.numbers[choice]
        else:
            choice = torch.full_like(sweeps, -1)
        seen = Seen(features, self.look(walls, position, goal, sweeps, compact))
        moves = _log_softmax(self.action_logits(habit, seen.plan))
        action = _draw(moves, generator)
        return Deliberation(action, choice, sweeps, log_prob + moves.gather(1, action[:, None])[:, 0], seen)
