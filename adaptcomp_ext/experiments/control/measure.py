"""One agent, one task and one seed: train, with evaluations on the way and a close look at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adaptcomp_ext.experiments.bench.machine import keep_freed_memory
from adaptcomp_ext.experiments.device import gpus
from adaptcomp_ext.experiments.files import whole
from adaptcomp_ext.experiments.runs import Cell, Tick, rank_correlation, read_json, span, write_json
from adaptcomp_ext.models.agents import PlanningAgent

from .training import Settings, Trainer, train

if TYPE_CHECKING:
    from ..environments.control import ControlVectorEnv

PRICES = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0)
"""Prices at which the trained value gate's agent is tested, as multiples of the one in training."""
CHECK_SEED, TEST_SEED = 20_000, 10_000
SHOWN = 250  # decisions of the episode that is drawn
FRAMES = 8
FRAMES_NAME = "frames.npy"


def measure(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    """Train as the settings say, and test the agent."""
    keep_freed_memory()
    settings = Settings(**cell.options["settings"])
    trainer = Trainer(settings, cell.seed, folder)
    checks = _Checks(cell, folder, trainer)
    history = train(trainer, checks.after, span(tick, "training", 0.0, 0.9))
    tick("evaluation", 0.9)
    agent = trainer.agent
    length = cell.options["length"]
    test = partial(run_episodes, agent, settings.task, cell.options["episodes"], length=length)
    camera = _Camera(length)
    with _priced(agent, settings):
        if settings.gate == "value":
            own = test(TEST_SEED + cell.seed, watch=camera)
            closely = _look_closely(agent, test, TEST_SEED + cell.seed, own, settings.price, tick)
        else:
            own, closely = test(TEST_SEED + cell.seed), {}
    found: dict[str, Any] = {
        "history": history,
        "warm": settings.warm,
        "checks": checks.found,
        "own": _judge(own),
        "training": {key: sum(r[key] for r in history) for key in ("act", "simulate", "learn")},
        "steps": settings.rounds * settings.episode * settings.envs * trainer.env.action_repeat,
        **closely,
    }
    if settings.gate == "value":
        found["strip"] = _strip(own, camera, folder)
    return found


class _Checks:
    """Evaluate during training: full episodes from the same states, on disk, so that each runs once."""

    def __init__(self, cell: Cell, folder: Path, trainer: Trainer) -> None:
        settings, count = trainer.settings, cell.options["checks"]
        self.at = {max(1, round(settings.rounds * (i + 1) / count)) for i in range(count)}
        self.path, self.trainer = folder / "checks.json", trainer
        self.episodes, self.seed = cell.options["check_episodes"], CHECK_SEED + cell.seed
        self.length = cell.options["length"]
        self.found: list[dict[str, Any]] = read_json(self.path) if self.path.is_file() else []

    def after(self, number: int) -> None:
        if number not in self.at or any(entry["round"] == number for entry in self.found):
            return
        agent, settings = self.trainer.agent, self.trainer.settings
        test = partial(run_episodes, agent, settings.task, self.episodes, length=self.length)
        with _priced(agent, settings):
            own = test(self.seed)
            entry: dict[str, Any] = {"round": number, "return": float(own.returns.mean()), "rate": own.rate}
            if settings.gate == "value":
                # While the habit is still learning: afterwards it may do without plans, and then no gate
                # makes a difference.
                agent.gate.calibrate("random", torch.empty(0), own.rate)
                entry["at random"] = float(test(self.seed, "random").returns.mean())
                entry["where"] = _where(agent, test, self.seed)
        self.found.append(entry)
        write_json(self.path, self.found)


def _judge(episodes: Episodes) -> dict[str, Any]:
    return {
        "return": float(episodes.returns.mean()),
        "returns": episodes.returns.tolist(),
        "rate": episodes.rate,
        "iterations": float(episodes.iterations.sum() / max(1, int(episodes.called.sum()))),
        "broken": episodes.broken,
    }


def _look_closely(
    agent: PlanningAgent, test: Callable[..., Episodes], seed: int, own: Episodes, price: float, tick: Tick
) -> dict[str, Any]:
    """Other gates at the same rate; other prices; where the gate plans."""
    tick("other gates", 0.93)
    scores = {kind: test(seed + 1, kind).score for kind in ("kl", "entropy")}
    gates = {
        "value": _judge(own),
        "always": _judge(test(seed, "always")),
        "never": _judge(test(seed, "never")),
    }
    with _kept_thresholds(agent):
        for kind in ("kl", "entropy", "random"):
            # Calibrated on other episodes; on these the rate comes out as it does, and is reported.
            agent.gate.calibrate(kind, scores.get(kind, torch.empty(0)).flatten(), own.rate)
            gates[kind] = _judge(test(seed, kind))
    tick("other prices", 0.96)
    tested, prices = float(agent.gate.thresholds[0]), []
    with _kept_thresholds(agent):
        for other in sorted({tested, *(factor * price for factor in PRICES)}):
            agent.gate.thresholds[0] = other
            prices.append({"price": other, **_judge(own if other == tested else test(seed, "value"))})
    tick("where it plans", 0.98)
    return {"gates": gates, "prices": prices, "where": _where(agent, test, seed)}


@contextmanager
def _priced(agent: PlanningAgent, settings: Settings) -> Iterator[None]:
    """As in evaluations; what is changed of the gate's thresholds is put back."""
    with _kept_thresholds(agent):
        if settings.test_price is not None:
            agent.gate.thresholds[0] = settings.test_price
        yield


@contextmanager
def _kept_thresholds(agent: PlanningAgent) -> Iterator[None]:
    kept = agent.gate.thresholds.clone()
    try:
        yield
    finally:
        agent.gate.thresholds.copy_(kept)


def _where(agent: PlanningAgent, test: Callable[..., Episodes], seed: int) -> dict[str, Any]:
    """Measure whether the gate calls where habit and planner disagree; the planner runs in all states."""
    price = float(agent.gate.thresholds[0])
    with _kept_thresholds(agent):
        agent.gate.thresholds[0] = -1.0  # below all scores: every state is planned, and its score reported
        episodes = test(seed, "value")
    score = episodes.score.flatten()
    called = score > price
    found: dict[str, Any] = {}
    for name in ("distance", "divergence", "gain"):
        apart = getattr(episodes, name).flatten()
        thirds = apart.argsort(stable=True).tensor_split(3)
        found[f"rate by {name}"] = [float(called[third].double().mean()) for third in thirds]
        found[f"rank correlation with {name}"] = rank_correlation(score, apart)
    return found


class _Camera:
    """Pictures of all episodes at even distances, where MuJoCo has a library to draw with."""

    def __init__(self, length: int | None) -> None:
        self.every = max(1, (length or SHOWN) // FRAMES)
        self.decisions = 0
        self.wanted = FRAMES
        self.pictures: list[tuple[np.ndarray, ...]] = []

    def __call__(self, env: ControlVectorEnv) -> None:
        if self.decisions % self.every == 0 and len(self.pictures) < self.wanted:
            try:
                self.pictures.append(env.render() or ())
            except RuntimeError:
                self.wanted = 0  # the report goes without pictures
        self.decisions += 1


def _strip(episodes: Episodes, camera: _Camera, folder: Path) -> dict[str, Any]:
    """The episode that was planned most: another may have begun where there is nothing to do."""
    iterations = episodes.iterations[:SHOWN]
    shown = int(iterations.sum(0).argmax())
    if camera.pictures:
        with whole(folder / FRAMES_NAME) as path, path.open("wb") as file:
            np.save(file, np.stack([picture[shown] for picture in camera.pictures]))
    return {
        "episode": shown,
        "reward": episodes.reward[:SHOWN, shown].tolist(),
        "iterations": iterations[:, shown].tolist(),
    }


class Episodes(NamedTuple):
    """N episodes of T decisions: returns [N], what came of each state [T, N], and how many broke.

    `gain`, `divergence` and `distance` are those of plans, NaN where there was none; `score` is the gate's.
    """

    returns: Tensor
    called: Tensor
    iterations: Tensor
    gain: Tensor
    divergence: Tensor
    distance: Tensor
    score: Tensor
    reward: Tensor
    broken: int

    @property
    def rate(self) -> float:
        """Share of the states that were planned."""
        return float(self.called.double().mean())


def walk(
    agent: PlanningAgent,
    task: str,
    count: int,
    seed: int,
    decide: Callable[[Tensor], tuple[Tensor, tuple[Tensor, ...]]],
    length: int | None = None,
    watch: Callable[[ControlVectorEnv], None] | None = None,
) -> tuple[list[Tensor], int]:
    """Run `count` episodes of `length` decisions, or whole ones, without exploration.

    The same `seed` begins in the same states. ``decide(observation) -> (action, record)``; `watch` is shown
    the environment before each decision. Returns the stacked records [T, N, …], after them the rewards, which
    are 0 after an episode's end, and the number of episodes that broke.
    """
    from ..environments.control import ControlVectorEnv

    env = ControlVectorEnv(task, count, max_steps=length, autoreset_mode="SameStep")
    observation, _ = env.reset(seed=seed)
    least, agent.planner.least_std = agent.planner.least_std, 0.05
    records: list[tuple[Tensor, ...]] = []
    going = np.ones(count, bool)
    try:
        with torch.random.fork_rng(devices=gpus()), torch.no_grad():
            torch.manual_seed(seed)
            while going.any():
                if watch is not None:
                    watch(env)
                action, record = decide(torch.as_tensor(observation))
                observation, reward, _, truncated, _ = env.step(action.cpu().numpy())
                records.append((*record, torch.as_tensor(np.where(going, reward, 0.0))))
                going &= ~truncated
    finally:
        agent.planner.least_std = least
    return [torch.stack(part) for part in zip(*records, strict=True)], env.broken


def run_episodes(
    agent: PlanningAgent,
    task: str,
    count: int,
    seed: int,
    kind: str | None = None,
    length: int | None = None,
    watch: Callable[[ControlVectorEnv], None] | None = None,
) -> Episodes:
    """`walk` with an agent as it is. `kind` is that of the gate: by default its own, to which it returns."""
    before: Tensor | None = None

    def decide(observation: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        nonlocal before
        act = agent.act(observation, before)
        before = act.following
        return act.action, (act.called, act.iterations, act.gain, act.divergence, act.distance, act.score)

    own, agent.gate.kind = agent.gate.kind, kind or agent.gate.kind
    try:
        parts, broken = walk(agent, task, count, seed, decide, length, watch)
    finally:
        agent.gate.kind = own
    called, iterations, gain, apart, distance, score, rewards = parts
    return Episodes(rewards.sum(0), called, iterations, gain, apart, distance, score, rewards, broken)
