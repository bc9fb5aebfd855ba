"""Act and learn, round after round; what was done is on disk after each few rounds, to the bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from adaptcomp_ext.experiments.files import write_tensors
from adaptcomp_ext.experiments.runs import Checkpoint
from adaptcomp_ext.models.agents import PlanGate, PlanningAgent, WorldModel

from .learning import PLANNED, Learner, Learning, Replay

MT_WORDS = 624
BURST = 12  # decisions for which an exploratory action is held, on average
FULL = 500  # decisions of the suite's own episode


@dataclass(frozen=True)
class Settings:
    """Settings of one training."""

    task: str  # one of `adaptcomp_ext.experiments.environments.control.TASKS`
    gate: str = "value"  # of `adaptcomp_ext.models.agents.GATES`: which states are planned
    # κ of the value gate while it learns: a state is planned where the predicted gain exceeds it, in units of
    # the spread of values; κ in evaluations, where a plan costs no time to learn (None: the same).
    price: float = 0.003
    test_price: float | None = None
    # Of the random gate: the share of the states planned in each round, the last one in all after it.
    rates: tuple[float, ...] | None = None
    envs: int = 32  # environments side by side
    rounds: int = 20
    episode: int = 100  # decisions of a round, after which all environments begin anew
    warm: int = 2  # rounds of random bursts before the agent acts
    updates: int = 5  # of the networks, for each decision of all environments together
    first_updates: int = 500  # after the warm rounds
    wide: float = 0.5  # least σ of plans at first; falls to the planner's own by half of the training
    # Probability per decision that a random action is held for some time; 0 from 60 % of the training on.
    bursts: float = 0.01
    latent: int = 32  # sizes of the networks
    hidden: int = 128
    planner: dict[str, Any] = field(default_factory=dict)  # options of `adaptcomp_ext.models.agents.Planner`
    learning: dict[str, Any] = field(default_factory=dict)  # options of `Learning`


SMALL = Settings("", hidden=64, updates=4, planner={"samples": 512})
LARGE = Settings("", latent=64, hidden=128, rounds=60, updates=8, planner={"samples": 256})
PRESETS: Mapping[str, Settings] = {
    # Values at rest, where there is nothing more to win, came out between 0.93 and 1.
    "pendulum-swingup": replace(
        SMALL,
        rounds=24,
        price=0.0012,
        test_price=0.0012 / 16,
        bursts=0.02,
        planner={**SMALL.planner, "enough": 0.9},
    ),
    "reacher-easy": replace(SMALL, rounds=28, price=0.012),
    "walker-stand": LARGE,
    "walker-walk": LARGE,
    "walker-run": LARGE,
    "hopper-stand": LARGE,
    "cheetah-run": LARGE,
}


def preset(task: str, *, steps: int | None = None, quick: bool = False) -> Settings:
    """The settings of a task; `steps` of the suite are rounded up to whole rounds."""
    # Imported where it is needed: without the simulator the experiments can still be listed.
    from ..environments.control import ACTION_REPEAT, check_task

    settings = replace(PRESETS[check_task(task)], task=task)
    if quick:
        planner = {**settings.planner, "samples": 64, "elites": 12, "habits": 4, "iterations": 3}
        small: dict[str, Any] = {"latent": 16, "hidden": 32, "learning": {"batch": 32}}
        shape: dict[str, Any] = {"envs": 6, "rounds": 3, "episode": 24, "warm": 1}
        settings = replace(settings, updates=1, first_updates=15, planner=planner, **small, **shape)
    if steps is not None:
        round_ = settings.envs * settings.episode * ACTION_REPEAT
        settings = replace(settings, rounds=max(settings.warm + 1, -(-steps // round_)))
    return settings


def build(settings: Settings, observations: int, actions: int) -> PlanningAgent:
    """A new agent, from torch's random state."""
    learning = Learning(**settings.learning)
    world = WorldModel(observations, actions, settings.latent, settings.hidden)
    gate = PlanGate(settings.latent, actions, price=settings.price)
    gate.kind = settings.gate
    agent = PlanningAgent(world, gate, discount=learning.discount, **settings.planner)
    return agent.eval()


class _Bursts:
    """Explore by holding an action for a while now and then (εz-greedy: Dabney et al. 2021)."""

    def __init__(self, envs: int, actions: int) -> None:
        self.left = torch.zeros(envs, dtype=torch.int64)
        self.held = torch.zeros(envs, actions)

    def apply(self, action: Tensor | None, probability: float) -> Tensor:
        begins = (self.left <= 0) & (torch.rand(len(self.left)) < probability)
        length = torch.empty(len(self.left)).geometric_(1 / BURST).long()
        self.left = torch.where(begins, length, self.left - 1)
        drawn = (3 * torch.rand_like(self.held) - 1.5).clamp(-1, 1)
        self.held = torch.where(begins[:, None], drawn, self.held)
        if action is None:
            return self.held
        return torch.where((self.left > 0)[:, None], self.held, action)


class Trainer:
    """One agent, its environments and its past.

    The environments take `seed`, all else torch's random state. A training of which `folder` holds a part
    goes on from there. `agent` is trained instead of a new one.
    """

    def __init__(
        self, settings: Settings, seed: int, folder: Path | None = None, agent: PlanningAgent | None = None
    ) -> None:
        from ..environments.control import ControlVectorEnv

        self.settings, self.folder = settings, folder
        self.env = ControlVectorEnv(
            settings.task, settings.envs, max_steps=settings.episode, autoreset_mode="SameStep"
        )
        spaces = self.env.single_observation_space, self.env.single_action_space
        (observations,), (actions,) = (space.shape or () for space in spaces)
        self.agent = build(settings, observations, actions) if agent is None else agent
        self.learner = Learner(self.agent, Learning(**settings.learning))
        self.replay = Replay(settings.rounds * settings.episode, settings.envs, observations, actions)
        self.history: list[dict[str, float]] = []
        self.env.reset(seed=seed)
        self.kept = 0
        if folder is not None:
            self._load(folder)

    def _load(self, folder: Path) -> None:
        history = Checkpoint(folder / "agent.safetensors").load(self.agent, self.learner.optimizer, None)
        for part in sorted(folder.glob("past-*.safetensors")):
            if int(part.stem.partition("-")[2]) > len(history):
                # It was written, but the run was killed before the checkpoint: its rounds run again.
                part.unlink()
                continue
            tensors = load_file(part)
            self._restore_random(tensors.pop("random"))
            self.replay.extend(tensors)
        self.history = list(history)
        self.kept = len(history)

    def save(self) -> None:
        """Write what was done since the last time."""
        if self.folder is None or self.kept == len(self.history):
            return
        length = self.settings.episode
        part = self.replay.part(self.kept * length, len(self.history) * length)
        write_tensors(
            self.folder / f"past-{len(self.history):05d}.safetensors", {**part, "random": self._random()}
        )
        # The checkpoint is written last: it says how much of the past counts.
        Checkpoint(self.folder / "agent.safetensors").save(
            self.agent, self.learner.optimizer, None, self.history
        )
        self.kept = len(self.history)

    def _random(self) -> Tensor:
        rows = []
        for _, keys, position, has_gauss, gauss in self.env.random_state():
            rows.append([*map(float, keys), float(position), float(has_gauss), gauss])
        return torch.tensor(rows, dtype=torch.float64)

    def _restore_random(self, rows: Tensor) -> None:
        state = []
        for row in rows.tolist():
            keys, (position, has_gauss, gauss) = row[:MT_WORDS], row[MT_WORDS:]
            state.append(("MT19937", [int(key) for key in keys], int(position), int(has_gauss), gauss))
        self.env.set_random_state(state)

    def round(self) -> dict[str, float]:
        """One episode in every environment, with the updates that belong to it."""
        s, agent, horizon = self.settings, self.agent, self.learner.settings.horizon
        number = len(self.history)
        done = number / s.rounds
        agent.planner.least_std = max(0.05, s.wide * (1 - 2 * done))
        if s.rates is not None:
            rate = s.rates[min(number, len(s.rates) - 1)]
            agent.gate.calibrate("random", torch.empty(0), rate)
        warm = number < s.warm
        bursts = _Bursts(s.envs, agent.world.actions)
        burst = s.bursts * max(0.0, 1 - done / 0.6)
        observation, _ = self.env.reset()
        before = None
        broken = self.env.broken
        total = dict.fromkeys(("reward", "planned", "iterations", "gain", "divergence"), 0.0)
        seconds = dict.fromkeys(("act", "simulate", "learn"), 0.0)
        losses: list[Tensor] = []
        for k in range(s.episode):
            clock = time.perf_counter()
            seen = torch.as_tensor(observation)
            if warm:
                action = bursts.apply(None, 1.0)
                blank = torch.full_like(action, torch.nan)
                about = {name: blank if name in ("mean", "std") else blank[:, 0] for name in PLANNED}
            else:
                act = agent.act(seen, before, explore=True)
                action, before = bursts.apply(act.action, burst), act.following
                about = {name: getattr(act, name) for name in PLANNED}
                total["planned"] += float(act.called.sum())
                total["iterations"] += float(act.iterations.sum())
                total["gain"] += float(act.gain.nansum())
                total["divergence"] += float(act.divergence.nansum())
            clock = _lap(seconds, "act", clock)
            observation, reward, _, truncated, info = self.env.step(action.cpu().numpy())
            following = observation.copy()
            for i in np.flatnonzero(truncated):
                following[i] = info["final_obs"][i]
                if before is not None:
                    before[i] = torch.nan
            total["reward"] += float(reward.sum())
            ended = torch.as_tensor(truncated | (k == s.episode - 1))
            self.replay.add(
                observation=seen,
                following=torch.as_tensor(following),
                action=action,
                reward=torch.as_tensor(reward / self.env.action_repeat).float(),
                ended=ended,
                **about,
            )
            clock = _lap(seconds, "simulate", clock)
            if not warm and self.replay.length > horizon:
                # The gate is a small network with an easy task, and what it costs to learn is not saved.
                losses += [self.learner.update(self.replay, gate_too=i % 2 == 0) for i in range(s.updates)]
            elif number == s.warm - 1 and k == s.episode - 1 and self.replay.length >= horizon:
                losses += [self.learner.update(self.replay) for _ in range(s.first_updates)]
            _lap(seconds, "learn", clock)
        decisions = s.envs * s.episode
        planned = max(total["planned"], 1.0)
        record = {
            "return": total["reward"] / decisions * FULL,
            "rate": total["planned"] / decisions,
            **{name: total[name] / planned for name in ("iterations", "gain", "divergence")},
            "broken": float(self.env.broken - broken),
            **seconds,
        }
        names = ("consistency", "reward error", "value error", "habit loss", "gate loss")
        mean = torch.stack(losses).nanmean(0).nan_to_num().tolist() if losses else [0.0] * len(names)
        record.update(zip(names, mean, strict=True))
        self.history.append(record)
        return record


def _lap(seconds: dict[str, float], name: str, since: float) -> float:
    now = time.perf_counter()
    seconds[name] += now - since
    return now


def train(
    trainer: Trainer,
    after: Callable[[int], None] | None = None,
    tick: Callable[[float], None] | None = None,
    every: float = 20.0,
) -> list[dict[str, float]]:
    """Run the rounds that are missing, write checkpoints at intervals, and call `after(round)` after each."""
    last = time.monotonic()
    while len(trainer.history) < trainer.settings.rounds:
        trainer.round()
        if after is not None:
            after(len(trainer.history))
        if time.monotonic() - last > every or len(trainer.history) == trainer.settings.rounds:
            trainer.save()
            last = time.monotonic()
        if tick is not None:
            tick(len(trainer.history) / trainer.settings.rounds)
    return trainer.history
