"""Proximal policy optimisation (Schulman et al. 2017) of choice and action, with a price on sweeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptcomp_ext.experiments.environments.maze import MazeVectorEnv
from adaptcomp_ext.models.agents import MazeAgent, Seen


@dataclass(frozen=True)
class Settings:
    """Of one training."""

    price: float = 0.0009  # κ, of a sweep, in units of reward (the goal is worth 1)
    sweeps: int | None = None  # all states get so many; None: the gate chooses
    size: int = 11
    density: float = 0.3
    mazes: int = 256
    updates: int = 500  # so many times, `horizon` steps in every maze are collected and learned from
    horizon: int = 32
    distil: float = 0.3  # weight of KL(π₂ ‖ π₁): the habit learns from the plan
    learning_rate: float = 2e-3
    discount: float = 0.98
    trace: float = 0.6
    clip: float = 0.2
    epochs: int = 3
    minibatch: int = 2048
    entropy: float = 0.003
    gate_prior: float = 0.003
    value_weight: float = 0.5
    max_norm: float = 0.5


class _Step(NamedTuple):
    seen: Seen
    distance: Tensor
    action: Tensor
    choice: Tensor
    log_prob: Tensor
    reward: Tensor
    ended: Tensor


def observe(observation: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Walls, position and goal as tensors."""
    return tuple(torch.as_tensor(observation[key]) for key in ("walls", "position", "goal"))  # type: ignore[return-value]


def train(
    agent: MazeAgent, settings: Settings, seed: int, tick: Callable[[float], None] | None = None
) -> list[dict[str, float]]:
    """Train an agent in fresh mazes; a record for each update."""
    env = MazeVectorEnv(settings.mazes, settings.size, settings.density, autoreset_mode="SameStep")
    observation, info = env.reset(seed=seed)
    optimizer = torch.optim.Adam(agent.parameters(), settings.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - 0.9 * k / settings.updates)
    history = []
    given = None if settings.sweeps is None else torch.full((settings.mazes,), settings.sweeps)
    for update in range(settings.updates):
        steps: list[_Step] = []
        record: dict[str, float] = {}
        sweeps: list[Tensor] = []
        done = success = 0
        ratio = 0.0
        for _ in range(settings.horizon):
            decided = agent.act(*observe(observation), sweeps=given)
            distance = torch.as_tensor(info["distance"])
            sweeps.append(decided.sweeps)
            observation, gained, terminated, truncated, info = env.step(decided.action.cpu().numpy())
            reward = torch.as_tensor(gained).float() - settings.price * decided.sweeps
            if truncated.any():
                # A cut episode goes on as far as its value is concerned.
                at = np.flatnonzero(truncated)
                cut = {k: np.stack([info["final_obs"][i][k] for i in at]) for k in observation}
                remaining = torch.as_tensor(info["final_info"]["distance"][at])
                with torch.no_grad():
                    reward[at] += settings.discount * agent.value(agent.features(*observe(cut)), remaining)
            ended = torch.as_tensor(terminated | truncated)
            steps.append(
                _Step(decided.seen, distance, decided.action, decided.choice, decided.log_prob, reward, ended)
            )
            done += int((terminated | truncated).sum())
            success += int(terminated.sum())
            if terminated.any():
                ways = info["final_info"]
                ratio += float((ways["shortest"][terminated] / ways["steps"][terminated]).sum())
        last = agent.features(*observe(observation))
        record.update(_improve(agent, optimizer, settings, steps, last, torch.as_tensor(info["distance"])))
        schedule.step()
        spent, far = torch.cat(sweeps).float(), torch.cat([s.distance for s in steps]).float()
        record.update(
            sweeps=float(spent.mean()),
            success=success / max(done, 1),
            efficiency=ratio / max(done, 1),
            correlation=float(torch.corrcoef(torch.stack([spent, far]))[0, 1]) if spent.std() > 0 else 0.0,
        )
        history.append(record)
        if tick is not None:
            tick((update + 1) / settings.updates)
    return history


def _improve(
    agent: MazeAgent,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    steps: list[_Step],
    last: Tensor,
    far: Tensor,
) -> dict[str, float]:
    features = torch.stack([s.seen.features for s in steps])
    plan = torch.stack([s.seen.plan for s in steps])
    rest: list[tuple[Tensor, ...]] = [s[1:] for s in steps]
    distance, action, choice, log_prob, reward, ended = (
        torch.stack(part) for part in zip(*rest, strict=True)
    )
    with torch.no_grad():
        value = agent.value(torch.cat([features.flatten(0, 1), last]), torch.cat([distance.flatten(), far]))
    value = value.view(len(steps) + 1, -1)
    advantage = torch.empty_like(reward)
    running = torch.zeros_like(reward[0])
    for t in reversed(range(len(steps))):
        goes_on = (~ended[t]).float()
        surprise = reward[t] + settings.discount * goes_on * value[t + 1] - value[t]
        running = surprise + settings.discount * settings.trace * goes_on * running
        advantage[t] = running
    target = (advantage + value[:-1]).flatten()
    advantage = advantage.flatten()
    seen = Seen(features.flatten(0, 1), plan.flatten(0, 1))
    distance, action, choice, log_prob = (part.flatten() for part in (distance, action, choice, log_prob))
    planned = seen.plan[:, 4]
    totals = torch.zeros(3)
    batches = 0
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(action)).split(settings.minibatch):
            some = Seen(seen.features[rows], seen.plan[rows])
            habit, gate = agent.react(some.features)
            moves = agent.action_logits(habit, some.plan).log_softmax(1)
            new = moves.gather(1, action[rows, None])[:, 0]
            entropy = settings.entropy * -(moves.exp() * moves).sum(1).mean()
            if settings.sweeps is None:
                gate = gate.log_softmax(1)
                new = new + gate.gather(1, choice[rows, None])[:, 0]
                entropy = entropy - settings.gate_prior * (gate.exp() * (gate - agent.prior)).sum(1).mean()
            gain = advantage[rows]
            gain = (gain - gain.mean()) / (gain.std() + 1e-8)
            odds = (new - log_prob[rows]).exp()
            cut = odds.clamp(1 - settings.clip, 1 + settings.clip)
            surrogate = torch.minimum(odds * gain, cut * gain).mean()
            error = F.mse_loss(agent.value(some.features, distance[rows]), target[rows])
            # Only where there was a plan is there anything for the habit to learn from it.
            apart = (moves.detach().exp() * (moves.detach() - habit.log_softmax(1))).sum(1)
            distil = (apart * planned[rows]).mean()
            loss = -surrogate - entropy + settings.value_weight * error + settings.distil * distil
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(agent.parameters(), settings.max_norm)
            optimizer.step()
            totals += torch.stack([error.detach(), distil.detach(), entropy.detach()])
            batches += 1
    return dict(zip(("value_error", "distil", "entropy"), (totals / batches).tolist(), strict=True))
