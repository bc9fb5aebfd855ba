"""What an agent lived through, and one update from it: model and values, then the habit, then the gate.

Values are learned from the rewards up to the end of a stretch and the slow value of its last state
(uncorrected n-step returns): where rewards are rare, one step at a time takes too many updates to reach the
states before them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adaptcomp_ext.models.agents import PlanningAgent, divergence

LEAST_SPREAD = 0.01
SPREAD_RATE = 0.01
GATE_HASTE = 2.0  # of its learning rate: it learns in every second update
PLANNED = ("mean", "std", "gain", "divergence", "glance")
FIELDS = ("observation", "following", "action", "reward", "ended", *PLANNED)
"""What is kept of a step: what was seen, and what a plan gave."""


class Piece(NamedTuple):
    """Stretches of H steps, or whole episodes that are shorter.

    `length` [B], int64, is the number of steps, 1 to H. `observation` [B, H + 1, O] is that before each step
    and after the last, which fills the rest of a shorter stretch; `action` [B, H, A] and `reward` [B, H] are
    0 there.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    length: Tensor


class Planned(NamedTuple):
    """States that were planned [B, O], the plans' first actions [B, A], and what came of them [B]."""

    observation: Tensor
    mean: Tensor
    std: Tensor
    gain: Tensor
    divergence: Tensor
    glance: Tensor


class Replay:
    """Steps of N environments in the order of time, in a room of fixed size; nothing is thrown away."""

    def __init__(self, steps: int, envs: int, observations: int, actions: int) -> None:
        self.observation = torch.zeros(steps, envs, observations)
        self.following = torch.zeros(steps, envs, observations)
        self.action, self.mean, self.std = (torch.zeros(steps, envs, actions) for _ in range(3))
        self.reward, self.gain, self.divergence, self.glance = (torch.zeros(steps, envs) for _ in range(4))
        self.ended = torch.zeros(steps, envs, dtype=torch.bool)
        self.length = 0

    def add(self, **step: Tensor) -> None:
        """Append one step of all environments."""
        for name in FIELDS:
            getattr(self, name)[self.length] = step[name]
        self.length += 1

    def sample(self, batch: int, horizon: int) -> Piece:
        """Draw `horizon` steps within an episode, or a shorter episode; `horizon` steps have to be there."""
        envs = self.observation.shape[1]
        begin, env = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        while len(begin) < batch:
            t = torch.randint(self.length - horizon + 1, (batch + batch // 8,))
            e = torch.randint(envs, t.shape)
            whole = ~self.ended[t[:, None] + torch.arange(horizon - 1), e[:, None]].any(1)
            # An episode that is shorter than a stretch is learned from too: from its first step, the rest
            # left blank.
            fits = whole | (t == 0) | self.ended[t - 1, e]
            begin, env = torch.cat([begin, t[fits]]), torch.cat([env, e[fits]])
        begin, env = begin[:batch], env[:batch]
        at, e = begin[:, None] + torch.arange(horizon), env[:, None]
        ended = self.ended[at, e]
        ended[:, -1] = True
        length = ended.int().argmax(1) + 1
        last = self.following[begin + length - 1, env][:, None]
        blank = torch.arange(horizon) >= length[:, None]
        observation = torch.cat([torch.where(blank[..., None], last, self.observation[at, e]), last], 1)
        action = self.action[at, e].masked_fill(blank[..., None], 0.0)
        return Piece(observation, action, self.reward[at, e].masked_fill(blank, 0.0), length)

    def planned(self, count: int, batch: int) -> Planned | None:
        """Draw `batch` of the last `count` steps' states that were planned; None if none was."""
        since = max(0, self.length - count)
        index = (~self.gain[since : self.length].isnan()).nonzero()
        if not len(index):
            return None
        index = index[torch.randint(len(index), (batch,))]
        t, e = index[:, 0] + since, index[:, 1]
        return Planned(*(getattr(self, name)[t, e] for name in Planned._fields))

    def part(self, begin: int, end: int) -> dict[str, Tensor]:
        """Steps `begin` to `end`, to be written."""
        return {name: getattr(self, name)[begin:end].clone() for name in FIELDS}

    def extend(self, part: dict[str, Tensor]) -> None:
        """Append what `part` gave."""
        count = len(part["reward"])
        for name in FIELDS:
            getattr(self, name)[self.length : self.length + count] = part[name]
        self.length += count


@dataclass(frozen=True)
class Learning:
    """Settings of the updates: sizes, rates, and the weights of the losses."""

    batch: int = 128
    horizon: int = 5
    learning_rate: float = 1e-3
    discount: float = 0.99
    decay: float = 0.8
    consistency: float = 2.0
    reward: float = 1.0
    value: float = 2.0
    distil: float = 0.5  # of log(1 + KL(π₂ ‖ π₁)) in the habit's loss, on states that were planned
    entropy: float = 3e-5  # of the habit
    description: float = 1e-7  # of the habit's description length, per update's row (β)
    follow: float = 0.02
    max_norm: float = 10.0
    recent: int = 250  # habit and gate learn from the plans of this many last steps of each environment
    plans: int = 128  # of them, for each update


class Learner:
    """Owns the optimizer; the agent learns in place."""

    def __init__(self, agent: PlanningAgent, settings: Learning) -> None:
        world = agent.world
        self.agent, self.settings = agent, settings
        self.model = [p for m in (world.encoder, world.dynamics, world.q) for p in m.parameters()]
        self.habit = list(world.habit.parameters())
        gate: dict[str, Any] = {
            "params": list(agent.gate.parameters()),
            "lr": GATE_HASTE * settings.learning_rate,
        }
        groups: list[dict[str, Any]] = [{"params": self.model}, {"params": self.habit}, gate]
        self.optimizer = torch.optim.Adam(groups, settings.learning_rate, fused=True)

    def update(self, replay: Replay, gate_too: bool = True) -> Tensor:
        """Improve once; return the losses [5] of consistency, reward, value, habit and gate (NaN without)."""
        s, world, gate = self.settings, self.agent.world, self.agent.gate
        world.habit.train()  # its noise belongs to learning alone
        piece = replay.sample(s.batch, s.horizon)
        # All of them, but of an episode that is shorter than a stretch.
        there = torch.arange(s.horizon) < piece.length[:, None]
        weight = s.decay ** torch.arange(s.horizon) * there
        with torch.no_grad():
            future = world.encode(piece.observation[:, 1:])
            final = future[torch.arange(s.batch), piece.length - 1]
            move = world.habit(final)
            # The mean of both, in the bounds that are known: the least of two, step after step, eats what
            # little a far reward is worth (measured: a pendulum at rest stayed at 0).
            worth = world.value(final, move.action, slow=True).mean(0).clamp(0.0, 1.0)
            target = torch.empty_like(piece.reward)
            for t in reversed(range(s.horizon)):
                longer = (1 - s.discount) * piece.reward[:, t] + s.discount * worth
                worth = torch.where(there[:, t], longer, worth)
                target[:, t] = worth
        z = world.encode(piece.observation[:, 0])
        states, rewards = [z], []
        for t in range(s.horizon):
            z, reward = world.step(z, piece.action[:, t])
            states.append(z)
            rewards.append(reward)
        along = torch.stack(states, 1)
        consistency = ((along[:, 1:] - future).square().sum(-1) * weight).mean()
        reward_error = ((torch.stack(rewards, 1) - piece.reward).square() * weight).mean()
        q = world.value(along[:, :-1].flatten(0, 1), piece.action.flatten(0, 1)).view(2, s.batch, s.horizon)
        value_error = ((q - target).square().sum(0) * weight).mean()
        loss = s.consistency * consistency + s.reward * reward_error + s.value * value_error
        self._set(self.model, loss)

        seen = along[:, :-1].detach()
        move = world.habit(seen)
        worth = world.value(seen.flatten(0, 1), move.action.flatten(0, 1)).mean(0).view(s.batch, s.horizon)
        with torch.no_grad():
            ends = torch.quantile(worth[:, 0], torch.tensor([0.05, 0.95]))
            world.spread.lerp_((ends[1] - ends[0]).clamp(min=LEAST_SPREAD), SPREAD_RATE)
        habit = ((s.entropy * move.log_prob - worth / world.spread) * weight).mean()
        # Of recent plans alone: what the planner thought when the model knew little averages to doing
        # nothing.
        some = replay.planned(s.recent, s.plans)
        gate_loss = torch.full((), torch.nan)
        if some is not None:
            with torch.no_grad():
                at = world.encode(some.observation)
            raw, log_std = world.habit.parameters_of(at)
            # The logarithm: what is far apart still counts, and does not drown the rest.
            habit = habit + s.distil * divergence(some.mean, some.std, raw, log_std).log1p().mean()
            if gate.looks and gate_too:
                world.habit.eval()
                with torch.no_grad():
                    log_std = world.habit.parameters_of(at)[1]
                gate_loss = gate.loss(at, log_std, some.glance, some.gain / world.spread, some.divergence)
                self._set(list(gate.parameters()), gate_loss)
        self._set(self.habit, habit + s.description * world.habit.kl())
        world.habit.eval()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        world.follow(s.follow)
        return torch.stack([v.detach() for v in (consistency, reward_error, value_error, habit, gate_loss)])

    def _set(self, parameters: list[nn.Parameter], loss: Tensor) -> None:
        # Of these parameters only: the habit's loss reaches through Q, which is not to learn from it.
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, self.settings.max_norm, foreach=True)
