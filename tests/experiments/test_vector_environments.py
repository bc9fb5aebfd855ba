"""The environments' promises to Gymnasium: autoreset modes, seeds, wrappers, pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium")
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import vector as wrappers

from adaptcomp_ext.experiments.environments.maze import MOVES, POOL, Layouts, MazeVectorEnv, draw_layouts

MODES = list(AutoresetMode)
SIZE, DENSITY, STEPS = 4, 0.2, 6


def control(*arguments: Any, **options: Any) -> VectorEnv:
    pytest.importorskip("dm_control")
    from adaptcomp_ext.experiments.environments.control import ControlVectorEnv

    return ControlVectorEnv(*(arguments or ("pendulum-swingup", 3)), **{"max_steps": 5, **options})


def maze(*arguments: Any, **options: Any) -> VectorEnv:
    return MazeVectorEnv(*(arguments or (3, SIZE, DENSITY)), **{"max_steps": STEPS, **options})


BOTH = pytest.mark.parametrize("make", [control, maze])


class OneMaze(gymnasium.Env):
    """One maze in plain Python; the layouts come from an iterator that all mazes share."""

    def __init__(self, layouts: Iterator[Layouts], like: MazeVectorEnv) -> None:
        self.layouts, self.now = layouts, None
        self.observation_space, self.action_space = like.single_observation_space, like.single_action_space

    def seen(self) -> dict[str, np.ndarray]:
        return {
            "walls": self.now.walls[0].astype(np.int8),
            "position": self.at.copy(),
            "goal": self.now.goal[0],
        }

    def far(self) -> np.int64:
        return np.int64(self.now.distance[0][tuple(self.at)])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        self.now = next(self.layouts)
        self.at, self.steps = self.now.start[0].copy(), 0
        return self.seen(), {"distance": self.far()}

    def step(self, action: int):
        to = self.at + MOVES[action]
        if ((to >= 0) & (to < SIZE)).all() and not self.now.walls[0][tuple(to)]:
            self.at = to
        self.steps += 1
        arrived = bool((self.at == self.now.goal[0]).all())
        late = not arrived and self.steps >= STEPS
        info = {"distance": self.far()}
        if arrived or late:
            info |= {"steps": np.int64(self.steps), "shortest": np.int64(self.now.shortest[0])}
        return self.seen(), -0.01 + arrived, arrived, late, info


class OneControl(gymnasium.Env):
    """One copy of a task of the suite."""

    def __init__(self, words: np.ndarray, like: Any) -> None:
        from dm_control import suite

        self.task, self.like = suite.load(*like.task.split("-"), task_kwargs={"random": 0}), like
        self.task.task.random.seed(words)
        self.observation_space, self.action_space = like.single_observation_space, like.single_action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        self.steps = 0
        return self.like._flat(self.task.reset().observation), {}

    def step(self, action: np.ndarray):
        self.steps += 1
        seen = [self.task.step(action.astype(float)) for _ in range(2)]
        late = self.steps >= self.like.max_steps
        return (
            self.like._flat(seen[-1].observation),
            sum(s.reward for s in seen),
            False,
            late,
            {"broken": np.False_},
        )


def both_ways(make: Callable[..., VectorEnv], mode: AutoresetMode) -> tuple[VectorEnv, VectorEnv]:
    """Ours, and Gymnasium's loop over single environments that begin alike."""
    if make is maze:
        ours: Any = maze(autoreset_mode=mode)
        pool = draw_layouts(POOL, SIZE, DENSITY, np.random.default_rng(7))
        layouts = (pool.take(slice(k, k + 1)) for k in range(POOL))
        return ours, SyncVectorEnv([lambda: OneMaze(layouts, ours)] * 3, autoreset_mode=mode)
    ours = control("reacher-easy", 3, autoreset_mode=mode)
    words = [child.generate_state(4) for child in np.random.SeedSequence(7).spawn(3)]
    return ours, SyncVectorEnv([lambda w=w: OneControl(w, ours) for w in words], autoreset_mode=mode)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(np.array_equal(np.asarray(a), np.asarray(b)))


@BOTH
@pytest.mark.parametrize("mode", MODES)
def test_modes_are_those_of_gymnasiums_own_loop(make: Callable[..., VectorEnv], mode: AutoresetMode) -> None:
    ours, theirs = both_ways(make, mode)
    # As lists of dictionaries: what a mask leaves out is not there, whatever fills its place in the arrays.
    ours, theirs = wrappers.DictInfoToList(ours), wrappers.DictInfoToList(theirs)
    (seen, about), (expected, theirs_about) = ours.reset(seed=7), theirs.reset(seed=7)
    assert same(seen, expected) and all(map(same, about, theirs_about))
    ours.action_space.seed(0)
    over, ended = np.zeros(3, bool), 0
    for step in range(40):
        if step == 2 or (mode is AutoresetMode.DISABLED and over.any()):
            # At step 2 one begins anew out of turn, so that the episodes no longer end together.
            mask = over | (np.arange(3) == 1) if step == 2 else over
            seen, about = ours.reset(options={"reset_mask": mask.copy()})
            expected, theirs_about = theirs.reset(options={"reset_mask": mask.copy()})
            assert same(seen, expected)
            assert all(same(a, b) for a, b, begun in zip(about, theirs_about, mask, strict=True) if begun)
        action = ours.action_space.sample()
        one, other = ours.step(action), theirs.step(action)
        assert all(map(same, one[:4], other[:4])), step
        for a, b in zip(one[4], other[4], strict=True):
            b = {k: v for k, v in b.items() if k != "broken"}
            assert same({k: v for k, v in a.items() if k != "broken"}, b), step
        over = one[2] | one[3]
        ended += int(over.sum())
    assert ended >= 12


@BOTH
def test_who_has_ended_waits_where_nobody_else_begins(make: Callable[..., VectorEnv]) -> None:
    env = make(autoreset_mode="Disabled")
    env.reset(seed=0)
    over = np.zeros(3, bool)
    while not over.any():
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        over = terminated | truncated
    which = int(np.flatnonzero(over)[0])
    with pytest.raises(
        RuntimeError, match=rf"step: expected reset\(.*whose episodes have ended, got none for {which}"
    ):
        env.step(env.action_space.sample())
    env.reset(options={"reset_mask": over})
    env.step(env.action_space.sample())


@BOTH
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"reset_mask": [True] * 3},
            TypeError,
            r"options\['reset_mask'\]: expected a NumPy array of bool, got list",
        ),
        ({"reset_mask": np.ones(2, bool)}, ValueError, r"expected shape \(3,\), got \(2,\)"),
        ({"reset_mask": np.zeros(3, bool)}, ValueError, "expected at least one True"),
        ({"mask": np.ones(3, bool)}, ValueError, "options: expected no key but 'reset_mask', got 'mask'"),
        ([1], TypeError, "options: expected a dict or None, got list"),
    ],
)
def test_bad_options_of_a_reset_are_named(
    make: Callable[..., VectorEnv], options: Any, error: type, message: str
) -> None:
    env = make()
    with pytest.raises(ValueError, match="at the first reset"):
        env.reset(options={"reset_mask": np.arange(3) > 0})
    env.reset(seed=0)
    with pytest.raises(error, match=message):
        env.reset(options=options)


@BOTH
def test_bad_modes_are_named(make: Callable[..., VectorEnv]) -> None:
    with pytest.raises(
        ValueError, match=r"autoreset_mode: expected an AutoresetMode of Gymnasium, .*'NextStep'.*got 'now'"
    ):
        make(autoreset_mode="now")
    with pytest.raises(ValueError, match="render_mode: expected 'rgb_array' or None, got 'human'"):
        make(render_mode="human")
    for seed, error in ((-1, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="seed: expected an int"):
            make().reset(seed=seed)


# --- seeds --------------------------------------------------------------------------------------------------
class Base(VectorEnv):
    num_envs = 3


def course(env: VectorEnv, look: bool = False) -> list[Any]:
    out = []
    for k in range(12):
        if look:
            assert isinstance(env.np_random_seed, int) and env.np_random is env.np_random
        out.append(env.step(np.full_like(env.action_space.sample(), 0 if k % 2 else 1))[0])
    return out


@BOTH
def test_the_seed_is_told_and_looking_at_it_changes_nothing(make: Callable[..., VectorEnv]) -> None:
    one, other, base = make(), make(), Base()
    base.reset(seed=3)
    for env in (one, other):
        env.reset(seed=3)
    assert one.np_random_seed == base.np_random_seed == 3
    assert all(map(same, course(one, look=True), course(other)))
    assert one.np_random_seed == 3
    for env in (one, other, base):
        env.reset()
    assert one.np_random_seed == base.np_random_seed == 3
    assert all(map(same, course(one), course(other)))
    one.reset(seed=4)
    assert one.np_random_seed == 4


@BOTH
def test_without_a_seed_the_machine_draws_one_and_it_is_told(make: Callable[..., VectorEnv]) -> None:
    looked, plain = make(), make()
    before = looked.np_random_seed
    first = looked.reset()[0]
    assert looked.np_random_seed == before and before != plain.np_random_seed
    plain.reset()
    again = make()
    assert same(again.reset(seed=before)[0], first)
    assert all(map(same, course(looked), course(again)))


@BOTH
def test_a_generator_that_is_set_draws_what_follows(make: Callable[..., VectorEnv]) -> None:
    one, other = make(), make()
    one.reset(seed=1)
    other.reset(seed=2)
    for env in (one, other):
        env.np_random = np.random.default_rng(9)
        assert env.np_random_seed == -1
    assert same(one.reset()[0], other.reset()[0])
    assert all(map(same, course(one), course(other)))


# --- wrappers -----------------------------------------------------------------------------------------------
OPTIONS: dict[str, dict[str, Any]] = {
    "DtypeObservation": {"dtype": np.float64},
    "ClipReward": {"min_reward": -1, "max_reward": 1},
    "TransformReward": {"func": lambda reward: 2 * reward},
}
EVERYWHERE = ("RecordEpisodeStatistics", "NormalizeReward", "ClipReward", "TransformReward", "DictInfoToList")
OF_OBSERVATIONS = ("FlattenObservation", "DtypeObservation", "NormalizeObservation")


@BOTH
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*EVERYWHERE, *OF_OBSERVATIONS])
def test_gymnasiums_wrappers_go_around_them(
    make: Callable[..., VectorEnv], name: str, mode: AutoresetMode
) -> None:
    if name in OF_OBSERVATIONS and mode not in (AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED):
        pytest.skip("Gymnasium's wrappers of observations refuse this mode")
    if name == "NormalizeObservation" and mode is AutoresetMode.DISABLED:
        pytest.skip("Gymnasium's wrapper refuses this mode")
    env = make(autoreset_mode=mode)
    if make is maze and name in OF_OBSERVATIONS[1:]:
        env = wrappers.FlattenObservation(env)  # they are for arrays, and a maze is seen as a dictionary
    env = getattr(wrappers, name)(env, **OPTIONS.get(name, {}))
    seen, _ = env.reset(seed=0)
    ended = 0
    for _ in range(14):
        assert env.observation_space.contains(seen)
        seen, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        over = terminated | truncated
        ended += int(over.sum())
        assert np.isfinite(reward).all()
        if mode is AutoresetMode.DISABLED and over.any():
            seen, _ = env.reset(options={"reset_mask": over})
    assert ended >= 6


@pytest.mark.parametrize("mode", MODES)
def test_episodes_are_counted_by_gymnasiums_statistics(mode: AutoresetMode) -> None:
    env = wrappers.RecordEpisodeStatistics(control(autoreset_mode=mode))
    env.reset(seed=0)
    for _ in range(12):
        _, _, _, truncated, _ = env.step(env.action_space.sample())
        if mode is AutoresetMode.DISABLED and truncated.any():
            env.reset(options={"reset_mask": truncated})
    assert list(env.length_queue) == [5] * 6


# --- pictures -----------------------------------------------------------------------------------------------
def test_a_maze_is_drawn() -> None:
    env = maze(2, 5, 0.3)
    with pytest.raises(RuntimeError, match=r"render: expected a reset\(\)"):
        env.render()
    seen, _ = env.reset(seed=0)
    pictures = env.render()
    assert env.render_mode == "rgb_array" and len(pictures) == 2
    for i, picture in enumerate(pictures):
        assert picture.shape == (80, 80, 3) and picture.dtype == np.uint8
        cells = picture[8::16, 8::16]
        assert tuple(cells[tuple(seen["position"][i])]) == (33, 102, 172)
        assert tuple(cells[tuple(seen["goal"][i])]) == (240, 138, 36)
        assert ((cells == (34, 39, 46)).all(2) == (seen["walls"][i] > 0)).all()
    assert maze(render_mode=None).render() is None and maze().metadata["render_fps"] > 0


def test_a_copy_of_the_suite_is_drawn_where_there_is_a_library_for_it() -> None:
    env = control()
    env.reset(seed=0)
    assert env.render_mode == "rgb_array" and control(render_mode=None).render() is None
    assert env.metadata["render_fps"] == 25
    try:
        pictures = env.render()
    except RuntimeError as error:
        assert str(error).startswith("render: expected a library that MuJoCo can draw with")
    else:
        assert len(pictures) == 3 and pictures[0].shape == (180, 240, 3) and pictures[0].dtype == np.uint8


@pytest.mark.parametrize("mode", MODES)
def test_videos_are_recorded(mode: AutoresetMode, tmp_path: Path) -> None:
    pytest.importorskip("moviepy")
    env = wrappers.RecordVideo(maze(autoreset_mode=mode), str(tmp_path / "video"))
    env.reset(seed=0)
    over = np.zeros(3, bool)
    for _ in range(10):
        if mode is AutoresetMode.DISABLED and over.any():
            env.reset(options={"reset_mask": over})
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        over = terminated | truncated
    env.close()
    assert (tmp_path / "video" / "rl-video-episode-0.mp4").stat().st_size > 0
