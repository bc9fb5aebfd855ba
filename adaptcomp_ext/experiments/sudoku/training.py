"""Training of the three solvers: the same puzzles, the same number of updates, the same loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptcomp_ext as ac

from ..device import seeded
from .model import Energy, FeedForward, Recurrent
from .puzzles import Puzzles, Source

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Recipe:
    """How the solvers are built and trained."""

    width: int = 64  # of the body
    updates: int = 1500
    batch: int = 64
    # Reached after `warm_up` updates; from there a cosine down to 0. The last weights are the ones used.
    learning_rate: float = 2e-3
    warm_up: int = 50
    steps: int = 6  # the steps of an update are drawn from 1 to this
    step_size: float = 10.0  # at first; its logarithm is learnt, at `step_rate` times the learning rate
    step_rate: float = 5.0
    jitter: float = 0.3  # the step size of a sample is multiplied by a number drawn from 1 ± this
    clip: float = 1.0  # largest norm of the gradient of all parameters


class EnergySolver(nn.Module):
    """An energy, the learnt size of a step down it, and the descent; `box` is 2 for 4×4, 3 for 9×9."""

    def __init__(self, box: int, recipe: Recipe) -> None:
        super().__init__()
        self.energy = Energy(box, recipe.width)
        self.log_step = nn.Parameter(torch.tensor(math.log(recipe.step_size)))
        self.descend = ac.EnergyDescent(self.energy, gradient="stepwise")

    def forward(self, answer: Tensor, board: Tensor, jitter: Tensor | float = 1.0) -> ac.EnergyResult:
        """Descend from `answer`, [B, cells, side], with the step size times `jitter`, one number or [B]."""
        return self.descend(answer, board, step_size=self.log_step.exp() * jitter)


def first_answer(board: Tensor, generator: torch.Generator) -> Tensor:
    """Random logits to start from, standard normal, [B, cells, side]."""
    rows, cells, channels = board.shape
    return torch.randn(rows, cells, channels - 1, generator=generator)


def loss_of(answer: Tensor, puzzles: Puzzles) -> Tensor:
    """Return the cross-entropy of logits [n, cells, side], averaged over blank cells, then over puzzles."""
    each = F.cross_entropy(answer.flatten(0, 1), puzzles.solution.flatten(), reduction="none")
    each, blank = each.view_as(puzzles.given), ~puzzles.given
    return ((each * blank).sum(dim=1) / blank.sum(dim=1)).mean()


def train(
    solver: nn.Module,
    loss: Callable[[Puzzles, torch.Generator], Tensor],
    source: Source,
    recipe: Recipe,
    seed: int,
    progress: Progress,
) -> float:
    """Train in place, and return the seconds.

    ``loss(puzzles, generator)``: the generator is for whatever is random in it. The puzzles follow from the
    `seed`, and are the same whatever the loss draws. ``progress(loss)`` is called after every update.
    """
    begin = time.perf_counter()
    of_puzzles, of_loss = seeded(2 * seed), seeded(2 * seed + 1)
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in solver.named_parameters() if name != "log_step"]},
        {
            "params": [p for name, p in solver.named_parameters() if name == "log_step"],
            "lr": recipe.learning_rate * recipe.step_rate,
        },
    ]
    optimizer = torch.optim.Adam(groups, lr=recipe.learning_rate)

    def factor(done: int) -> float:
        return min(1.0, (done + 1) / recipe.warm_up) * 0.5 * (1 + math.cos(math.pi * done / recipe.updates))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    solver.train()
    for _ in range(recipe.updates):
        value = loss(source.train(recipe.batch, of_puzzles), of_loss)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(solver.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        progress(value.item())
    solver.eval()
    return time.perf_counter() - begin


def _steps(recipe: Recipe, generator: torch.Generator) -> int:
    return int(torch.randint(1, recipe.steps + 1, (), generator=generator))


def train_energy(
    solver: EnergySolver, source: Source, recipe: Recipe, seed: int, progress: Progress
) -> float:
    """Train an energy so that every step down it, from anywhere on the way, leads towards the solution.

    The answer is detached between steps, and the loss taken after every step through that step's own
    second-order graph.
    """
    solver.descend.tol, solver.descend.keep_trace = 0.0, True

    def loss(puzzles: Puzzles, generator: torch.Generator) -> Tensor:
        board = puzzles.board()
        solver.descend.max_steps = _steps(recipe, generator)
        jitter = 1 + recipe.jitter * (2 * torch.rand(len(board), generator=generator) - 1)
        trace = solver(first_answer(board, generator), board, jitter).trace
        assert trace is not None
        return loss_of(trace.outputs, Puzzles(puzzles.solution[trace.row], puzzles.given[trace.row]))

    seconds = train(solver, loss, source, recipe, seed, progress)
    solver.descend.keep_trace = False
    return seconds


def train_feed_forward(
    solver: FeedForward, source: Source, recipe: Recipe, seed: int, progress: Progress
) -> float:
    """Train a feed-forward network on the same loss."""

    def loss(puzzles: Puzzles, generator: torch.Generator) -> Tensor:
        return loss_of(solver(puzzles.board()), puzzles)

    return train(solver, loss, source, recipe, seed, progress)


def train_recurrent(
    solver: Recurrent, source: Source, recipe: Recipe, seed: int, progress: Progress
) -> float:
    """Train a recurrent network like the energy: random start, a loss after every step, detached steps."""

    def loss(puzzles: Puzzles, generator: torch.Generator) -> Tensor:
        board = puzzles.board()
        total, steps = torch.zeros(()), _steps(recipe, generator)
        answer = first_answer(board, generator)
        for _ in range(steps):
            answer = solver(answer.detach(), board)
            total = total + loss_of(answer, puzzles)
        return total / steps

    return train(solver, loss, source, recipe, seed, progress)
