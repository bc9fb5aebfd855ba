from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adaptcomp_ext.models.agents import UNKNOWN, MazeAgent, sweep_plan, value_sweep

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))


def mazes(batch: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    walls = torch.rand(batch, size, size, generator=g) < 0.3
    position = torch.randint(size, (batch, 2), generator=g)
    goal = torch.randint(size, (batch, 2), generator=g)
    rows = torch.arange(batch)
    walls[rows, position[:, 0], position[:, 1]] = False
    walls[rows, goal[:, 0], goal[:, 1]] = False
    return walls, position, goal


def steps_to_goal(walls: Tensor, goal: Tensor) -> dict[tuple[int, int], int]:
    size = len(walls)
    start = (int(goal[0]), int(goal[1]))
    found, front = {start: 0}, [start]
    while front:
        new = []
        for r, c in front:
            for dr, dc in MOVES:
                to = (r + dr, c + dc)
                if 0 <= to[0] < size and 0 <= to[1] < size and not walls[to] and to not in found:
                    found[to] = found[r, c] + 1
                    new.append(to)
        front = new
    return found


@pytest.mark.parametrize("size", [3, 7, 11])
@pytest.mark.parametrize("compact", [True, False, "auto"])
def test_moves_are_worth_minus_the_steps_that_the_sweeps_reached(size: int, compact: bool | str) -> None:
    walls, position, goal = mazes(40, size)
    sweeps = torch.arange(40) % 13
    found = sweep_plan(walls, position, goal, sweeps, compact)
    for i in range(40):
        distance = steps_to_goal(walls[i], goal[i])
        for move, (dr, dc) in enumerate(MOVES):
            far = distance.get((int(position[i, 0]) + dr, int(position[i, 1]) + dc))
            # Without a sweep there is no plan at all, not even for the goal's neighbours.
            if far is not None and far <= int(sweeps[i]) and int(sweeps[i]) > 0:
                assert float(found[i, move]) == -far
            else:
                assert float(found[i, move]) == UNKNOWN


def test_a_row_is_the_same_alone() -> None:
    walls, position, goal = mazes(32, 9, seed=3)
    sweeps = torch.randint(0, 20, (32,), generator=torch.Generator().manual_seed(1))
    together = sweep_plan(walls, position, goal, sweeps)
    for i in range(32):
        alone = sweep_plan(walls[i : i + 1], position[i : i + 1], goal[i : i + 1], sweeps[i : i + 1])
        assert torch.equal(alone[0], together[i])


def test_more_sweeps_than_cells_change_nothing() -> None:
    walls, position, goal = mazes(8, 5, seed=4)
    enough, many = torch.full((8,), 25), torch.full((8,), 10**12)
    assert torch.equal(sweep_plan(walls, position, goal, many), sweep_plan(walls, position, goal, enough))
    with pytest.raises(ValueError, match=r"^count: expected"):
        value_sweep(torch.zeros(1, 4, 4, dtype=torch.int16), torch.zeros(1, 4, 4, dtype=torch.int16), 0)


def test_no_row_and_no_sweep() -> None:
    walls, position, goal = mazes(4, 5)
    assert sweep_plan(walls[:0], position[:0], goal[:0], torch.zeros(0, dtype=torch.int64)).shape == (0, 4)
    assert bool((sweep_plan(walls, position, goal, torch.zeros(4, dtype=torch.int64)) == UNKNOWN).all())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"sweeps": torch.tensor([1, 2, -1, 0])}, "sweeps"),
        ({"sweeps": torch.ones(4)}, "sweeps"),
        ({"position": torch.zeros(4, 3, dtype=torch.int64)}, "position"),
        ({"goal": torch.zeros(4, 2)}, "goal"),
        ({"walls": torch.zeros(4, 5, 6)}, "walls"),
        ({"compact": "yes"}, "compact"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], name: str) -> None:
    walls, position, goal = mazes(4, 5)
    arguments = {
        "walls": walls,
        "position": position,
        "goal": goal,
        "sweeps": torch.ones(4, dtype=torch.int64),
        **change,
    }
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
        sweep_plan(**arguments)  # type: ignore[arg-type]


def test_the_agent_acts_from_habit_where_nothing_is_known() -> None:
    walls, position, goal = mazes(64, 11, seed=5)
    torch.manual_seed(0)
    agent = MazeAgent()
    features = agent.features(walls, position, goal)
    plan = agent.look(walls, position, goal, torch.ones(64, dtype=torch.int64))
    known = plan[:, 4].bool()
    near = (position - goal).abs().sum(1) <= 2
    assert bool((known <= near).all()) and bool(known.any())
    assert bool((plan[~known] == 0).all())
    assert bool((plan[:, :4] <= 0).all()) and bool((plan[known, :4].max(1).values == 0).all())
    assert torch.isfinite(features).all()


def test_the_choice_is_part_of_the_log_probability() -> None:
    walls, position, goal = mazes(16, 11, seed=7)
    torch.manual_seed(0)
    agent = MazeAgent()
    free = agent.act(walls, position, goal, generator=torch.Generator().manual_seed(2))
    given = agent.act(walls, position, goal, sweeps=free.sweeps)
    habit, gate = agent.react(free.seen.features)
    gate = gate.log_softmax(1).gather(1, free.choice[:, None])[:, 0]
    moves = agent.action_logits(habit, free.seen.plan).log_softmax(1).gather(1, free.action[:, None])[:, 0]
    torch.testing.assert_close(free.log_prob, gate + moves)
    assert torch.equal(given.seen.plan, free.seen.plan)
    assert bool((given.choice == -1).all())


def test_features_do_not_depend_on_the_size_of_the_maze() -> None:
    agent = MazeAgent()
    walls, position, goal = mazes(8, 9, seed=2)
    larger = torch.ones(8, 13, 13, dtype=torch.bool)
    larger[:, 2:11, 2:11] = walls
    torch.testing.assert_close(
        agent.features(walls, position, goal), agent.features(larger, position + 2, goal + 2)
    )
