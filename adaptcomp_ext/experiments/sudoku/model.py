"""Three solvers on one body: an energy to descend, a feed-forward network, a recurrent one.

The body looks at the cells of a board as tokens and lets rows, columns and boxes carry messages between them.
It knows no cell by its place, only by its company, and treats all rows alike, all columns, and all boxes.
Tensors within it are cells first, so that everything is a matrix product of contiguous matrices: the
second-order graph of an energy runs through all of it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def units(box: int) -> Tensor:
    """Which cells belong to which rows, columns and boxes: float32 [3 * side, cells], side = box²."""
    side = box * box
    row, column = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    groups = (row, column, row // box * box + column // box)
    return torch.cat([F.one_hot(group, side).T for group in groups]).float()


class Body(nn.Module):
    """Rounds of messages between the cells of a row, of a column and of a box; `width` features of a cell."""

    units: Tensor

    def __init__(self, box: int, width: int, rounds: int = 2) -> None:
        super().__init__()
        self.side, self.width = box * box, width
        self.enter = nn.Linear(self.side + 1, width)
        self.own = nn.ModuleList(nn.Linear(width, width) for _ in range(rounds))
        scale = 0.25 / math.sqrt(width)
        self.sent = nn.ParameterList(scale * torch.randn(3, width, width) for _ in range(rounds))
        self.register_buffer("units", units(box))

    def forward(self, answer: Tensor, board: Tensor) -> Tensor:
        """Features [cells, B, width] of an answer, logits [B, cells, side], to a board of `Puzzles.board`.

        Logits enter through a softmax, and only where the cell is blank.
        """
        rows, cells, side = answer.shape
        blank = board[..., side:]
        digits = answer.softmax(dim=2) * blank + board[..., :side]
        tokens = torch.cat((digits, blank), dim=2).transpose(0, 1).reshape(cells * rows, side + 1)
        state = F.silu(self.enter(tokens))
        for own, sent in zip(self.own, self.sent, strict=True):
            gathered = (self.units @ state.view(cells, -1)).view(3, side * rows, self.width)
            messages = self.units.T @ torch.bmm(gathered, sent).view(3 * side, -1)
            state = state + F.silu(own(state) + messages.view(cells * rows, self.width))
        return state.view(cells, rows, self.width)


class Energy(nn.Module):
    """Squared length of the features of a board with its answer: E(answer, board) ≥ 0."""

    def __init__(self, box: int, width: int, features: int = 32) -> None:
        super().__init__()
        self.body = Body(box, width)
        self.readout = nn.Linear(width, features)

    def forward(self, answer: Tensor, board: Tensor) -> Tensor:
        """Energies [B] of answers [B, cells, side] to boards [B, cells, side + 1]."""
        return self.readout(self.body(answer, board)).square().sum(dim=(0, 2))


class FeedForward(nn.Module):
    """The body once, from no answer, and logits read out of it."""

    def __init__(self, box: int, width: int) -> None:
        super().__init__()
        self.body = Body(box, width)
        self.readout = nn.Linear(width, self.body.side)

    def forward(self, board: Tensor) -> Tensor:
        """Logits [B, cells, side]."""
        return self.readout(self.body(torch.zeros_like(board[..., 1:]), board)).transpose(0, 1)


class Recurrent(nn.Module):
    """One step from answer to answer: the body, whose readout is added to the answer."""

    def __init__(self, box: int, width: int) -> None:
        super().__init__()
        self.body = Body(box, width)
        self.readout = nn.Linear(width, self.body.side)

    def forward(self, answer: Tensor, board: Tensor) -> Tensor:
        """The next answer, [B, cells, side]."""
        return answer + self.readout(self.body(answer, board)).transpose(0, 1)
