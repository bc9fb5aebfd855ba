from __future__ import annotations

import numpy as np
import pytest

suite = pytest.importorskip("dm_control.suite")
pytest.importorskip("gymnasium")
from dm_control.rl.control import PhysicsError

from adaptcomp_ext.experiments.environments.control import TASKS, ControlVectorEnv


@pytest.mark.parametrize("task", TASKS)
def test_it_is_an_environment_of_gymnasium(task: str) -> None:
    env = ControlVectorEnv(task, 2)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
    assert env.observation_space.contains(observation)
    assert reward.shape == (2,) and (reward >= 0).all() and (reward <= 2).all()
    assert not terminated.any() and not truncated.any() and not info["broken"].any()


def test_rewards_are_those_of_the_suite() -> None:
    env = ControlVectorEnv("reacher-easy", 3)
    env.reset(seed=5)
    seeds = [child.generate_state(4) for child in np.random.SeedSequence(5).spawn(3)]
    alone = [suite.load("reacher", "easy", task_kwargs={"random": 0}) for _ in range(3)]
    for one, seed in zip(alone, seeds, strict=True):
        one.task.random.seed(seed)
        one.reset()
    random = np.random.default_rng(0)
    for _ in range(20):
        actions = random.uniform(-1, 1, (3, 2)).astype(np.float32)
        observation, reward, *_ = env.step(actions)
        for i, one in enumerate(alone):
            times = [one.step(actions[i].astype(float)) for _ in range(2)]
            assert reward[i] == sum(t.reward for t in times)
            expected = np.concatenate([np.ravel(v) for v in times[-1].observation.values()])
            assert (observation[i] == expected.astype(np.float32)).all()


def test_episodes_end_together_and_begin_anew() -> None:
    env = ControlVectorEnv("pendulum-swingup", 3, max_steps=7, autoreset_mode="SameStep")
    env.reset(seed=0)
    actions = np.zeros((3, 1), np.float32)
    for step in range(1, 15):
        observation, _, _, truncated, info = env.step(actions)
        assert (truncated == (step % 7 == 0)).all()
        if truncated.any():
            assert all((info["final_obs"][i] != observation[i]).any() for i in range(3))


def test_the_suites_own_length_is_the_default() -> None:
    assert ControlVectorEnv("pendulum-swingup").max_steps == 500
    assert ControlVectorEnv("pendulum-swingup", action_repeat=4).max_steps == 250


@pytest.mark.parametrize("how", ["observation", "simulation"])
def test_a_broken_simulation_ends_its_own_episode_alone(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env, calm = (ControlVectorEnv("pendulum-swingup", 3, autoreset_mode="SameStep") for _ in range(2))
    env.reset(seed=1)
    calm.reset(seed=1)
    actions = np.full((3, 1), 0.5, np.float32)
    before, *_ = env.step(actions)
    calm.step(actions)
    with monkeypatch.context() as patch:
        if how == "observation":
            real = env._suite[1].step
            patch.setattr(env._suite[1], "step", lambda action: _spoiled(real(action)))
        else:
            patch.setattr(env._suite[1], "step", _fail)
        observation, reward, terminated, truncated, info = env.step(actions)
    calm_observation, calm_reward, *_ = calm.step(actions)
    assert info["broken"].tolist() == truncated.tolist() == [False, True, False] and not terminated.any()
    assert env.broken == 1 and reward[1] == 0 and np.isfinite(observation).all()
    assert (info["final_obs"][1] == before[1]).all()
    for i in (0, 2):
        assert (observation[i] == calm_observation[i]).all() and reward[i] == calm_reward[i]
    # It goes on, with an episode of its own length.
    observation, _, _, truncated, info = env.step(actions)
    assert not truncated.any() and not info["broken"].any() and np.isfinite(observation).all()


def _spoiled(time_step):
    return time_step._replace(
        observation={k: np.full_like(v, np.nan) for k, v in time_step.observation.items()}
    )


def _fail(action):
    raise PhysicsError("the simulation has become unstable")


def test_random_state_goes_through_and_back() -> None:
    env = ControlVectorEnv("reacher-easy", 2)
    env.reset(seed=3)
    state = env.random_state()
    first = env.reset()[0]
    env.reset()
    env.set_random_state(state)
    assert (env.reset()[0] == first).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "walker-swim"}, "task: expected one of cheetah-run, .*walker-run, got 'walker-swim'"),
        ({"task": "pendulum-swingup", "num_envs": 0}, "num_envs: expected"),
        ({"task": "pendulum-swingup", "max_steps": 501}, "max_steps: expected at most 500"),
    ],
)
def test_bad_options_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ControlVectorEnv(**arguments)  # type: ignore[arg-type]


def test_bad_actions_are_named() -> None:
    env = ControlVectorEnv("pendulum-swingup", 2)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros((2, 1), np.float32))
    env.reset(seed=0)
    for actions in (np.zeros(2, np.float32), np.zeros((2, 1), int), np.full((2, 1), np.nan)):
        with pytest.raises(ValueError, match=r"^actions: expected"):
            env.step(actions)
