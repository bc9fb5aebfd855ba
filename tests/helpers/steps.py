"""A step on state and input that is a module, for tests of what surrounds it."""

import torch
from torch import nn


class Step(nn.Module):
    """h ← tanh(W [h, x] + b) of width `dim`."""

    def __init__(self, dim=6):
        super().__init__()
        self.linear = nn.Linear(2 * dim, dim)

    def forward(self, h, x):
        return torch.tanh(self.linear(torch.cat([h, x], -1)))
