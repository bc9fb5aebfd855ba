"""What was lived through: the past of N environments, sampled in short pieces."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Piece", "Planned", "Replay"]

FIELDS = (
    "observation",
    "following",
    "action",
    "reward",
    "ended",
    "mean",
    "std",
    "gain",
    "divergence",
    "glance",
)


class Piece(NamedTuple):
    """Stretches of H steps, or whole episodes that are shorter.

    Attributes
    ----------
    observation : Tensor
        [B, H + 1, O]: before each step, and after the last; where a stretch is shorter, its last one fills
        the rest.
    action, reward : Tensor
        [B, H, A], [B, H]; 0 after the end of a shorter stretch.
    length : Tensor
        int64 [B], 1 to H: the number of its steps.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    length: Tensor


class Planned(NamedTuple):
    """States that were planned, and what came of it.

    Attributes
    ----------
    observation : Tensor
        [B, O].
    mean, std : Tensor
        [B, A]: the plan's first action.
    gain, divergence, glance : Tensor
        [B].
    """

    observation: Tensor
    mean: Tensor
    std: Tensor
    gain: Tensor
    divergence: Tensor
    glance: Tensor


class Replay:
    """Steps of N environments in the order of time; nothing is thrown away.

    Parameters
    ----------
    steps, envs, observations, actions : int
        Room for so many steps of so many environments; sizes of an observation and an action.
    """

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
        parts = (self.observation, self.mean, self.std, self.gain, self.divergence, self.glance)
        return Planned(*(part[t, e] for part in parts))

    def part(self, begin: int, end: int) -> dict[str, Tensor]:
        """Steps `begin` to `end`, to be written."""
        return {name: getattr(self, name)[begin:end].clone() for name in FIELDS}

    def extend(self, part: dict[str, Tensor]) -> None:
        """Append what `part` gave."""
        count = len(part["reward"])
        for name in FIELDS:
            getattr(self, name)[self.length : self.length + count] = part[name]
        self.length += count
