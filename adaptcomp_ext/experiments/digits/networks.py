"""A recurrent reader that looks through a small window, and a pair of networks; what a look costs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import adaptcomp_ext as ac
from adaptcomp_ext.models.acc import Objective

from ..demo.model import GlimpseStep
from ..vision import CLASSES, LARGE, Scale, build_cnn

__all__ = ["MAX_STEPS", "Reader", "build_pair"]

MAX_STEPS = 10
WINDOW = 5


class Reader(nn.Module):
    """Looks at an image through a window, as often as a policy says.

    Parameters
    ----------
    side : int
        Height and width of the images.
    policy : str
        "act", "ponder" or "depth": which head there is, if any.
    prior : float
        Of PonderNet.
    dim, features : int
        Widths of the state and of a look.
    """

    def __init__(self, side: int, policy: str, prior: float = 0.2, dim: int = 96, features: int = 64) -> None:
        super().__init__()
        self.side, self.dim, self.features = side, dim, features
        self.first = nn.Parameter(torch.zeros(dim))
        self.look = GlimpseStep(side, WINDOW, dim, features)
        self.readout = nn.Linear(dim, CLASSES)
        self.policy: ac.Policy = ac.FixedSteps(MAX_STEPS)
        if policy != "depth":
            head = nn.Linear(dim, 1)
            nn.init.constant_(head.bias, -3.0 if policy == "act" else -1.5)  # long looking first
            self.policy = ac.ACT(head) if policy == "act" else ac.PonderNet(head, prior=prior)

    def start(self, rows: int) -> Tensor:
        """What is known before the first look, [rows, dim]."""
        return self.first.expand(rows, -1)

    def read(
        self, images: Tensor, policy: ac.Policy | None = None, compact: bool | str = "auto"
    ) -> ac.HaltResult:
        """Read images float32 [B, H, W] under its own policy or another; ``output``: logits [B, 10]."""
        halt = ac.AdaptiveHalt(
            self.look, policy or self.policy, MAX_STEPS, readout=self.readout, compact=compact
        )
        return halt(self.start(len(images)), images)

    def every_step(self, images: Tensor) -> list[Tensor]:
        """Logits [B, 10] after each of all steps, for a loss at every depth."""
        state, found = self.start(len(images)), []
        for _ in range(MAX_STEPS):
            state = self.look(state, images)
            found.append(self.readout(state))
        return found

    def multiply_adds(self, halts: bool) -> int:
        """Of one look: window, encoding, cell, next place, readout, and where it `halts` the head."""
        side, dim, features = self.side, self.dim, self.features
        window = WINDOW * side * side + WINDOW * WINDOW * side
        cell = 3 * (features + dim) * dim
        return (
            window + (WINDOW * WINDOW + 2) * features + cell + 2 * dim + CLASSES * dim + (dim if halts else 0)
        )


def build_pair(side: int) -> ac.models.ACC:
    """Habit: a coarse convolution and a linear layer; control: the reference CNN."""
    kernel, stride = (5, 2) if side >= LARGE else (3, 1)
    left = ((side - kernel) // stride + 1) // 2
    habit = nn.Sequential(
        nn.Conv2d(1, 16, kernel, stride=stride),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * left * left, CLASSES),
    )
    return ac.models.ACC(Scale(), habit, build_cnn(side, 1), CLASSES, objective=Objective())
