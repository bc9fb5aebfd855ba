"""Tasks of the DeepMind Control Suite (Tassa et al. 2018), several copies as one vector environment."""

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

from .modes import RENDER_MODES, check_autoreset_mode, check_render_mode, check_reset_mask, refuse_ended

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
    autoreset_mode : AutoresetMode or str
        When an ended episode is followed by the next one (see the notes). Default: Gymnasium's own,
        ``NEXT_STEP``.
    render_mode : str or None
        "rgb_array" (the default): `render` returns pictures. None: it returns None. Nothing is drawn before
        `render` is called.

    Attributes
    ----------
    broken : int
        Episodes that the simulator ended with a number that is not one, since the environment was made.

    Notes
    -----
    Observations: float32 [N, O], the suite's, one after another. Actions: float32 [N, A] in −1..1, scaled to
    the task's. Rewards: float64 [N], 0 to `action_repeat`. Episodes are truncated after `max_steps` and never
    terminate; so all N end together, unless one breaks. One whose observation or reward is not finite, or
    whose simulation fails, is truncated at once: its reward is 0, the last finite observation stands for the
    bad one, ``info["broken"]`` marks it, and the others go on.

    Autoreset modes are Gymnasium's, as in its ``SyncVectorEnv``. ``NEXT_STEP``: the step that ends an episode
    returns its last observation; the step after it ignores that environment's action, begins the next episode
    and returns its first observation with reward 0. ``SAME_STEP``: the step that ends an episode already
    returns the next one's first observation, with the last one's under ``info["final_obs"]``, an array of N
    objects, each an observation or None, and what `info` said of the last step under ``info["final_info"]``;
    the masks ``_final_obs`` and ``_final_info`` say where. ``DISABLED``: an ended episode waits for
    ``reset(options={"reset_mask": mask})``, mask bool [N]; a step before that is refused. Gymnasium's
    wrappers of observations refuse ``SAME_STEP``.

    After ``reset(seed=s)`` `np_random_seed` is s, and the start of every episode follows from it. Without any
    seed it is drawn by the machine, as in Gymnasium, and `np_random_seed` says which it was.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_modes": list(RENDER_MODES)}  # noqa: RUF012 (as in Gymnasium)

    def __init__(
        self,
        task: str,
        num_envs: int = 1,
        action_repeat: int = ACTION_REPEAT,
        max_steps: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = "rgb_array",
    ) -> None:
        self.task = check_task(task)
        self.num_envs = check_int("num_envs", num_envs, 1)
        self.action_repeat = check_int("action_repeat", action_repeat, 1)
        longest = PHYSICS_STEPS // action_repeat
        self.max_steps = longest if max_steps is None else check_int("max_steps", max_steps, 1)
        if self.max_steps > longest:
            raise ValueError(f"max_steps: expected at most {longest}, the suite's own end, got {max_steps}")
        self.autoreset_mode = check_autoreset_mode(autoreset_mode)
        self.render_mode = check_render_mode(render_mode)
        domain, name = task.split("-")
        # The seeds are replaced at the first reset; without any, the suite would ask the machine for entropy
        # here already.
        self._suite = [suite.load(domain, name, task_kwargs={"random": i}) for i in range(num_envs)]
        spec = self._suite[0].action_spec()
        self._middle = (spec.maximum + spec.minimum) / 2
        self._half = (spec.maximum - spec.minimum) / 2
        size = sum(int(np.prod(s.shape)) for s in self._suite[0].observation_spec().values())
        self.single_observation_space = Box(-np.inf, np.inf, (size,), np.float32)
        self.single_action_space = Box(-1.0, 1.0, spec.shape, np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        seconds = self._suite[0].control_timestep() * action_repeat
        self.metadata = {
            **self.metadata,
            "autoreset_mode": self.autoreset_mode,
            "render_fps": max(1, round(1 / seconds)),
        }
        self.broken = 0
        self._observation: NDArray[np.float32] | None = None
        self._steps = np.zeros(num_envs, np.int64)
        self._ended = np.zeros(num_envs, bool)
        self._followed: np.random.Generator | None = None  # from which the copies' own were seeded

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin N episodes, or those of ``options["reset_mask"]``, bool [N].

        A seed makes the states repeatable from which these environments start, now and later. Without one
        their courses go on.
        """
        if seed is not None:
            check_int("seed", seed, 0, bounded=False)  # NumPy draws seeds of 128 bits
        mask = check_reset_mask(options, self.num_envs, self._observation is not None)
        super().reset(seed=seed)
        self._follow(mask)
        observation = np.empty(self.observation_space.shape or (), np.float32)
        if self._observation is not None:
            observation[:] = self._observation
        for i in np.flatnonzero(mask):
            observation[i] = self._begin(int(i))
        self._observation = observation
        return observation.copy(), {}

    def step(
        self, actions: NDArray[Any]
    ) -> tuple[
        NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]
    ]:
        """Hold each action for `action_repeat` steps of the suite."""
        if self._observation is None:
            raise RuntimeError("step: expected a reset() before the first step")
        actions = np.asarray(actions)
        if actions.shape != self.action_space.shape or actions.dtype.kind != "f":
            raise ValueError(
                f"actions: expected floating point of shape {self.action_space.shape}, got "
                f"{describe(actions)}"
            )
        if not np.isfinite(actions).all():
            raise ValueError("actions: expected finite numbers, got others")
        if self.autoreset_mode is AutoresetMode.DISABLED:
            refuse_ended(self._ended)
        begins = self._ended.copy()  # only in mode NEXT_STEP are there any
        self._follow(np.ones(self.num_envs, bool))
        scaled = self._middle + self._half * np.clip(actions, -1, 1)
        reward = np.zeros(self.num_envs)
        broken = np.zeros(self.num_envs, bool)
        observation = self._observation.copy()
        for i in range(self.num_envs):
            if begins[i]:
                observation[i] = self._begin(i)
                continue
            self._steps[i] += 1
            seen, gained = self._advance(i, scaled[i])
            if seen is None:
                broken[i] = True
            else:
                observation[i], reward[i] = seen, gained
        self.broken += int(broken.sum())
        truncated = broken | (self._steps >= self.max_steps)
        self._ended = truncated.copy()
        info: dict[str, Any] = {"broken": broken}
        if self.autoreset_mode is AutoresetMode.SAME_STEP and truncated.any():
            last = np.full(self.num_envs, None, object)
            for k in np.flatnonzero(truncated):
                last[k] = observation[k].copy()
                observation[k] = self._begin(int(k))
            info.update(final_obs=last, _final_obs=truncated.copy())
            info.update(final_info={"broken": broken.copy()}, _final_info=truncated.copy())
        self._observation = observation
        return observation.copy(), reward, np.zeros(self.num_envs, bool), truncated, info

    def _follow(self, mask: NDArray[np.bool_]) -> None:
        """Seed the generators of the copies in `mask` from `np_random`, if that is a new one."""
        if self._followed is self.np_random:
            return
        self._followed = self.np_random
        seed = self.np_random_seed
        if seed is not None and seed >= 0:
            words = [child.generate_state(4) for child in np.random.SeedSequence(seed).spawn(self.num_envs)]
        else:  # a generator that the user set
            words = list(self.np_random.integers(2**32, size=(self.num_envs, 4), dtype=np.uint32))
        for i in np.flatnonzero(mask):
            self._suite[i].task.random.seed(words[i])

    def __repr__(self) -> str:
        mode = f"autoreset_mode={self.autoreset_mode.value!r}"
        return f"{type(self).__name__}({self.task!r}, num_envs={self.num_envs}, {mode})"

    def _begin(self, i: int) -> NDArray[np.float32]:
        self._steps[i], self._ended[i] = 0, False
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
        """Return the state of each copy's random numbers, in JSON's types, with which episodes repeat."""
        out = []
        for one in self._suite:
            kind, keys, position, has_gauss, gauss = one.task.random.get_state()
            out.append((kind, keys.tolist(), int(position), int(has_gauss), float(gauss)))
        return out

    def set_random_state(self, state: list[Any]) -> None:
        """Put back what `random_state` gave."""
        for one, (kind, keys, position, has_gauss, gauss) in zip(self._suite, state, strict=True):
            one.task.random.set_state((kind, np.array(keys, np.uint32), position, has_gauss, gauss))
        self._followed = self.np_random

    def render(self) -> tuple[NDArray[np.uint8], ...] | None:
        """Draw each copy: N pictures, uint8 [180, 240, 3]; None where `render_mode` is None.

        Raises
        ------
        RuntimeError
            If MuJoCo has no library to draw with. It is chosen when this module is imported: set
            ``MUJOCO_GL`` to egl, osmesa or glfw in the environment before.
        """
        if self.render_mode is None:
            return None
        try:
            return tuple(one.physics.render(height=180, width=240, camera_id=0) for one in self._suite)
        except Exception as error:  # each library fails in its own way
            raise RuntimeError(
                "render: expected a library that MuJoCo can draw with, found none; set MUJOCO_GL to "
                f"egl, osmesa or glfw in the environment ({error})"
            ) from None
