from __future__ import annotations

import time

import numpy as np
import pytest

pytest.importorskip("gymnasium")
from gymnasium.vector import AutoresetMode

from adaptcomp_ext.experiments.environments.maze import FAR, MOVES, MazeVectorEnv, distances, draw_layouts

SAME_STEP = AutoresetMode.SAME_STEP


def test_distances_are_those_of_a_search_cell_by_cell() -> None:
    random = np.random.default_rng(0)
    layouts = draw_layouts(20, 8, 0.35, random)
    for walls, goal, found in zip(layouts.walls, layouts.goal, layouts.distance, strict=True):
        expected = np.full(walls.shape, FAR)
        expected[tuple(goal)] = 0
        queue = [tuple(goal)]
        for r, c in queue:
            for dr, dc in MOVES:
                to = (r + dr, c + dc)
                if 0 <= to[0] < 8 and 0 <= to[1] < 8 and not walls[to] and expected[to] == FAR:
                    expected[to] = expected[r, c] + 1
                    queue.append(to)
        assert (found == expected).all()


@pytest.mark.parametrize(("size", "density"), [(3, 0.0), (3, 0.6), (11, 0.3), (17, 0.4)])
def test_every_layout_can_be_walked(size: int, density: float) -> None:
    layouts = draw_layouts(200, size, density, np.random.default_rng(1))
    rows = np.arange(200)
    assert len(layouts.start) == 200
    assert not layouts.walls[rows, layouts.start[:, 0], layouts.start[:, 1]].any()
    assert not layouts.walls[rows, layouts.goal[:, 0], layouts.goal[:, 1]].any()
    assert (layouts.shortest >= 2).all() and (layouts.shortest < FAR).all()
    assert abs(layouts.walls.mean() - density) < 0.15
    assert (distances(layouts.walls, layouts.goal) == layouts.distance).all()


def down_the_slope(env: MazeVectorEnv) -> np.ndarray:
    around = env._position[:, None, :] + MOVES
    inside = ((around >= 0) & (around < env.size)).all(2)
    r, c = around.clip(0, env.size - 1).transpose(2, 0, 1)
    far = np.where(inside, env.layouts.distance[np.arange(env.num_envs)[:, None], r, c], FAR)
    return far.argmin(1)


def test_the_shortest_way_takes_as_many_steps_as_it_says() -> None:
    env = MazeVectorEnv(64, 9, autoreset_mode=SAME_STEP)
    _, info = env.reset(seed=0)
    layouts = env.layouts.take(slice(None))
    shortest = layouts.shortest.copy()
    assert (info["distance"] == shortest).all()
    open_ = np.ones(64, bool)
    for step in range(1, int(shortest.max()) + 1):
        observation, reward, terminated, truncated, info = env.step(down_the_slope(env))
        arrived = open_ & terminated
        assert (shortest[arrived] == step).all() and not truncated.any()
        assert np.allclose(reward, -0.01 + terminated)
        for i in np.flatnonzero(terminated):
            assert (info["final_obs"][i]["position"] == info["final_obs"][i]["goal"]).all()
        if terminated.any():
            assert (info["_final_obs"] == terminated).all()
            # The next episode has begun: the observation is its first.
            assert (observation["position"][terminated] == env.layouts.start[terminated]).all()
        for i in np.flatnonzero(arrived):
            assert {k: int(v[i]) for k, v in info["final_info"].items()} == {
                "steps": step,
                "shortest": step,
                "distance": 0,
            }
        open_ &= ~terminated
    assert not open_.any()


def test_walls_and_rim_stop_a_step() -> None:
    env = MazeVectorEnv(256, 5, 0.4, max_steps=1000, autoreset_mode=SAME_STEP)
    env.reset(seed=3)
    random = np.random.default_rng(0)
    for _ in range(50):
        before, walls = env._position.copy(), env.layouts.walls.copy()
        actions = random.integers(0, 4, 256)
        _, _, terminated, truncated, _ = env.step(actions)
        to = before + MOVES[actions]
        inside = ((to >= 0) & (to < 5)).all(1)
        free = inside.copy()
        free[inside] = ~walls[np.flatnonzero(inside), to[inside, 0], to[inside, 1]]
        going = ~(terminated | truncated)
        assert (env._position[going] == np.where(free[:, None], to, before)[going]).all()


def test_time_runs_out() -> None:
    env = MazeVectorEnv(4, 5, 0.0, max_steps=3, autoreset_mode=SAME_STEP)
    env.reset(seed=0)
    for step in (1, 2, 3):
        # Up and down again: nobody arrives but who starts beside the goal, and nobody does.
        _, _, terminated, truncated, info = env.step(np.full(4, 0 if step % 2 else 2))
        assert (truncated == (~terminated & (step == 3))).all()
    assert (info["final_info"]["steps"][truncated] == 3).all()


def test_the_same_seed_is_the_same_course() -> None:
    def course(seed: int) -> list[np.ndarray]:
        env = MazeVectorEnv(16, 7)
        observation, _ = env.reset(seed=seed)
        out = [observation["walls"]]
        random = np.random.default_rng(0)
        for _ in range(100):
            observation = env.step(random.integers(0, 4, 16))[0]
            out += [observation["walls"], observation["position"]]
        return out

    first, second, other = course(1), course(1), course(2)
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_given_layouts_come_first() -> None:
    layouts = draw_layouts(8, 6, 0.3, np.random.default_rng(5))
    env = MazeVectorEnv(8, 6, layouts=layouts)
    for _ in range(2):
        observation, _ = env.reset()
        assert (observation["walls"] == layouts.walls).all() and (
            observation["position"] == layouts.start
        ).all()
        env.step(np.zeros(8, int))


def test_what_was_observed_does_not_change_later() -> None:
    env = MazeVectorEnv(32, 5)
    observation, _ = env.reset(seed=0)
    kept = {k: v.copy() for k, v in observation.items()}
    for _ in range(60):
        env.step(np.random.default_rng(0).integers(0, 4, 32))
    assert all((observation[k] == kept[k]).all() for k in kept)


def test_it_is_an_environment_of_gymnasium() -> None:
    env = MazeVectorEnv(4, 5)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert env.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP  # Gymnasium's own default
    actions = env.action_space.sample()
    assert env.observation_space.contains(env.step(actions)[0])


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"size": 2}, "size"),
        ({"num_envs": 0}, "num_envs"),
        ({"density": 0.7}, "density"),
        ({"max_steps": 0}, "max_steps"),
    ],
)
def test_bad_options_are_named(arguments: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        MazeVectorEnv(**arguments)  # type: ignore[arg-type]


def test_bad_actions_are_named() -> None:
    env = MazeVectorEnv(4, 5)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(4, int))
    env.reset(seed=0)
    for actions in (np.zeros(3, int), np.zeros(4), np.full(4, 4), np.full(4, -1)):
        with pytest.raises(ValueError, match=r"^actions: expected"):
            env.step(actions)


def test_it_is_far_from_being_the_bottleneck() -> None:
    # Not a benchmark: ten times slower than measured, and still fast enough.
    env = MazeVectorEnv(256, 11, autoreset_mode=SAME_STEP)
    env.reset(seed=0)
    actions = np.random.default_rng(0).integers(0, 4, (200, 256))
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        for some in actions:
            env.step(some)
        best = min(best, time.perf_counter() - begin)
    assert 200 * 256 / best > 50_000
