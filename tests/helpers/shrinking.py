"""A small network with a constant unit and one that nobody reads."""

from __future__ import annotations

import torch
from torch import nn

D = torch.float64


class Net(nn.Module):
    """Three linear layers a, b, c. Unit 1 of a is constant, its bias; no layer reads unit 2 of a."""

    def __init__(self, inputs: int = 4, hidden: int = 4, outputs: int = 3) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Linear(inputs, hidden),
            nn.Linear(hidden, outputs),
            nn.Linear(hidden, outputs),
        )
        with torch.no_grad():
            self.a.weight[1] = 0
            self.b.weight[:, 2] = 0
            self.c.weight[:, 2] = 0


class Control(Net):
    """A network that shrinks: the other ones must keep their units for the tested reason."""

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))
