"""An agent that plans: in mazes it acts from habit, and plans as far as it is worth the price.

The habit is a network that sees the walls nearby and where the goal lies. The planner knows the map and runs
sweeps of value iteration, each at a price. Before every move the agent chooses the number of sweeps for its
state, often none: such a state never reaches the planner, and the others leave it after their own number.

    python examples/planning_agent.py

Expect that about 74 % of the walks arrive from habit alone, 87 % with the sweeps that the agent chooses
(about 6 per move), 2 points less with the same sweeps dealt at random, and 98 % with 32 sweeps.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adaptcomp_ext.models.agents import SWEEPS, UNKNOWN, MazeAgent, sweep_plan

SIZE, MOST, PRICE = 13, SWEEPS[-1], 0.01  # the price of one sweep, where the best move is worth 1
MOVES = torch.tensor([[-1, 0], [0, 1], [1, 0], [0, -1]])  # up, right, down, left


def draw(rows: int) -> tuple[Tensor, ...]:
    """Walls [n, 13, 13], positions and goals [n, 2], values of the moves [n, 4]; the goal can be reached."""
    walls, (position, goal) = torch.rand(rows, SIZE, SIZE) < 0.35, torch.randint(SIZE, (2, rows, 2))
    walls[(torch.arange(rows), *position.T)] = walls[(torch.arange(rows), *goal.T)] = False
    value = sweep_plan(walls, position, goal, torch.full((rows,), MOST))
    keep = (value.amax(1) > UNKNOWN) & (position != goal).any(1)
    return walls[keep], position[keep], goal[keep], value[keep]


def loss(agent: MazeAgent, walls: Tensor, position: Tensor, goal: Tensor, value: Tensor) -> Tensor:
    """Habit and trust in plans learn the best moves; the choice learns what so many sweeps are worth."""
    best = value.amax(1, keepdim=True)
    target = (value == best).float() / (value == best).sum(1, keepdim=True)
    habit, choice = agent.react(agent.features(walls, position, goal))
    plan = agent.look(walls, position, goal, torch.full((len(walls),), MOST))
    moves = cross_entropy(habit, target) + cross_entropy(agent.action_logits(habit.detach(), plan), target)
    doubt = 1 - (habit.softmax(1) * (value == best)).sum(1, keepdim=True).detach()
    reached = agent.numbers >= (-best).clamp(min=1)  # fewer sweeps than that leave the move to the habit
    return moves + cross_entropy(choice, ((reached * doubt - PRICE * agent.numbers) / 0.02).softmax(1))


@torch.no_grad()
def walk(agent: MazeAgent, sweeps: int | None = None, shuffled: bool = False) -> tuple[float, float]:
    """Share of walks that arrive within 40 moves, and sweeps per move."""
    torch.manual_seed(1)  # the same mazes at every call
    walls, position, goal, _ = draw(4000)
    rows, spent, moves = torch.arange(len(walls)), 0, 0
    for _ in range(40):
        away = (position != goal).any(1)
        act = agent.act(walls, position, goal, None if sweeps is None else torch.full((len(walls),), sweeps))
        if shuffled:
            act.sweeps[away] = act.sweeps[away][torch.randperm(int(away.sum()))]
            act = agent.act(walls, position, goal, act.sweeps)
        after = (position + MOVES[act.action]).clamp(0, SIZE - 1)
        position = torch.where((away & ~walls[(rows, *after.T)])[:, None], after, position)
        spent, moves = spent + int(act.sweeps[away].sum()), moves + int(away.sum())
    return (position == goal).all(1).float().mean().item(), spent / moves


def main() -> tuple[nn.Module, dict[str, float]]:
    torch.manual_seed(0)
    agent = MazeAgent(reach=2)
    agent.critic.requires_grad_(False)  # only reinforcement learning needs it
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3)
    for _ in range(250):
        optimizer.zero_grad()
        loss(agent, *draw(512)).backward()
        optimizer.step()
    figures = {}
    for name, options in {"habit": [0], "chosen": [], "shuffled": [None, True], "everywhere": [MOST]}.items():
        figures[name], figures[f"{name}, sweeps"] = walk(agent, *options)
        print(f"{name:10} {figures[name]:5.1%} arrive, {figures[f'{name}, sweeps']:4.1f} sweeps per move")
    return agent, figures


if __name__ == "__main__":
    main()
