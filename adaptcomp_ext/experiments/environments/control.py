"""Tasks of the DeepMind Control Suite (Tassa et al. 2018), several copies at once, as one vector environment of Gymnasium."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptcomp_ext.ops._checks import check_int, describe

# Without a display the suite would try one rendering library after another; physics needs none.
os.environ.setdefault("MUJOCO_GL", "disable")

from dm_control import suite
from dm_control.rl.control import PhysicsError
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

__all__ = ["TASKS", "ControlVectorEnv", "check_task"]

TASKS = (
    "cheetah-run",
    "hopper-stand",
    "pendulum-swingup",
    "reacher-easy",
    "walker-stand",
    "walker-walk",
    "walker-run",
)
"""The thesis' tasks, and the third one of its transfer."""
ACTION_REPEAT = 2
PHYSICS_STEPS = 1000  # of an episode, in all tasks of the suite


def check_task(task: str) -> str:
    """Require one of `TASKS`."""
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    return task


class ControlVectorEnv(VectorEnv[NDArray[Any], NDArray[Any], NDArray[Any]]):
    """N copies of one task of the suite, seen through positions and velocities.

    Parameters
    ----------
    task : str
        One of `TASKS`.
    num_envs : int
        N.
    action_repeat : int
        Steps of the suite for which an action is held; their rewards are added up.
    max_steps : int, optional
        Actions of an episode. Default: as many as make the suite's 1,000 steps; fewer begin anew more often.

    Attributes
    ----------
    broken : int
        Episodes that the simulator ended with a number that is not one, since the environment was made.

    Notes
    -----
    Observations: float32 [N, O], the suite's, one after another. Actions: float32 [N, A] in −1..1, scaled to the task's. Rewards:
    float64 [N], 0 to `action_repeat`. Episodes are truncated after `max_steps` and never terminate; so all N end together,
    unless one breaks. One whose observation or reward is not finite, or whose simulation fails, is truncated at once:
    its reward is 0, the last finite observation stands for the bad one, ``info["broken"]`` marks it, and the others go on.

    Mode ``SAME_STEP``: the step that ends an episode returns the next one's first observation, with the last one's under
    ``info["final_obs"]``.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": ["rgb_array"]}  # noqa: RUF012 (as in Gymnasium's base)

    def __init__(self, task: str, num_envs: int = 1, action_repeat: int = ACTION_REPEAT, max_steps: int | None = None) -> None:
        self.task = check_task(task)
        self.num_envs = check_int("num_envs", num_envs, 1)
        self.action_repeat = check_int("action_repeat", action_repeat, 1)
        longest = PHYSICS_STEPS // action_repeat
        self.max_steps = longest if max_steps is None else check_int("max_steps", max_steps, 1)
        if self.max_steps > longest:
            raise ValueError(f"max_steps: expected at most {longest}, the suite's own end, got {max_steps}")
        domain, name = task.split("-")
        # Seeded here as well: nothing may depend on the machine's entropy before the first reset.
        self._suite = [suite.load(domain, name, task_kwargs={"random": i}) for i in range(num_envs)]
        spec = self._suite[0].action_spec()
        self._middle = (spec.maximum + spec.minimum) / 2
        self._half = (spec.maximum - spec.minimum) / 2
        size = sum(int(np.prod(s.shape)) for s in self._suite[0].observation_spec().values())
        self.single_observation_space = Box(-np.inf, np.inf, (size,), np.float32)
        self.single_action_space = Box(-1.0, 1.0, spec.shape, np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.broken = 0
        self._observation: NDArray[np.float32] | None = None
        self._steps = np.zeros(num_envs, np.int64)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin N episodes. A seed makes the states they start from repeatable."""
        if seed is not None:
            for i, child in enumerate(np.random.SeedSequence(seed).spawn(self.num_envs)):
                self._suite[i].task.random.seed(child.generate_state(4))
        self._observation = np.stack([self._begin(i) for i in range(self.num_envs)])
        return self._observation.copy(), {}

    def step(
        self, actions: NDArray[Any]
    ) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Hold each action for `action_repeat` steps of the suite."""
        if self._observation is None:
            raise RuntimeError("step: expected a reset() before the first step")
        actions = np.asarray(actions)
        if actions.shape != self.action_space.shape or actions.dtype.kind != "f":
            raise ValueError(f"actions: expected floating point of shape {self.action_space.shape}, got {describe(actions)}")
        if not np.isfinite(actions).all():
            raise ValueError("actions: expected finite numbers, got others")
        scaled = self._middle + self._half * np.clip(actions, -1, 1)
        reward = np.zeros(self.num_envs)
        broken = np.zeros(self.num_envs, bool)
        observation = self._observation.copy()
        for i in range(self.num_envs):
            seen, gained = self._advance(i, scaled[i])
            if seen is None:
                broken[i] = True
            else:
                observation[i], reward[i] = seen, gained
        self._steps += 1
        self.broken += int(broken.sum())
        truncated = broken | (self._steps >= self.max_steps)
        info: dict[str, Any] = {"broken": broken}
        ended = np.flatnonzero(truncated)
        if len(ended):
            last = np.full(self.num_envs, None, object)
            for k in ended:
                last[k] = observation[k].copy()
                observation[k] = self._begin(int(k))
            info.update(final_obs=last, _final_obs=truncated.copy())
        self._observation = observation
        return observation.copy(), reward, np.zeros(self.num_envs, bool), truncated, info

    def _begin(self, i: int) -> NDArray[np.float32]:
        self._steps[i] = 0
        return self._flat(self._suite[i].reset().observation)

    def _advance(self, i: int, action: NDArray[np.float64]) -> tuple[NDArray[np.float32] | None, float]:
        total = 0.0
        try:
            for _ in range(self.action_repeat):
                now = self._suite[i].step(action)
                total += now.reward or 0.0
        except PhysicsError:
            return None, 0.0
        seen = self._flat(now.observation)
        return (seen, total) if np.isfinite(total) and np.isfinite(seen).all() else (None, 0.0)

    @staticmethod
    def _flat(observation: dict[str, Any]) -> NDArray[np.float32]:
        return np.concatenate([np.ravel(part) for part in observation.values()]).astype(np.float32)

    def random_state(self) -> list[tuple[Any, ...]]:
        """The state of each copy's random numbers, as JSON can keep it; with it, episodes begin where they would have."""
        out = []
        for one in self._suite:
            kind, keys, position, has_gauss, gauss = one.task.random.get_state()
            out.append((kind, keys.tolist(), int(position), int(has_gauss), float(gauss)))
        return out

    def set_random_state(self, state: list[Any]) -> None:
        """Put back what `random_state` gave."""
        for one, (kind, keys, position, has_gauss, gauss) in zip(self._suite, state, strict=True):
            one.task.random.set_state((kind, np.array(keys, np.uint32), position, has_gauss, gauss))

    def render(self) -> tuple[NDArray[np.uint8], ...] | None:
        """A picture of each copy; None where no rendering library was found (set ``MUJOCO_GL`` to egl, osmesa or glfw)."""
        try:
            return tuple(one.physics.render(height=180, width=240, camera_id=0) for one in self._suite)
        except (RuntimeError, AttributeError, ImportError):
            return None
