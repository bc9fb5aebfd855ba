"""A recurrent network that looks at a noisy item until it is sure."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import adaptcomp_ext as ac

from .trials import RESPONSES, Trials

__all__ = ["Observer"]


class _Look(nn.Module):
    """One look: the item with new noise, and the cue, into a GRU cell, which accumulates evidence over looks.

    The noise comes from torch's global generator: rows that have halted draw none, so a row's noise depends
    on its batch.
    """

    def __init__(self, width: int, features: int, dim: int, noise: float) -> None:
        super().__init__()
        self.noise = noise
        self.encode = nn.Linear(width, features)
        self.cue = nn.Embedding(2, features)
        self.cell = nn.GRUCell(features, dim)

    def forward(self, state: Tensor, images: Tensor, tasks: Tensor) -> Tensor:
        seen = self.encode(torch.randn_like(images).mul_(self.noise).add_(images)) + self.cue(tasks)
        return self.cell(torch.relu(seen), state)


class Observer(nn.Module):
    """Looks under ACT; the number of looks is its reaction time.

    Parameters
    ----------
    width : int
        Inputs of a trial.
    features, dim : int
        Widths of a look's encoding and of the state.
    noise : float
        Standard deviation of the pixels' noise, fresh at every look.
    max_steps : int
        M.
    """

    def __init__(
        self, width: int, features: int = 96, dim: int = 64, noise: float = 1.0, max_steps: int = 16
    ) -> None:
        super().__init__()
        self.dim = dim
        self.look = _Look(width, features, dim, noise)
        self.readout = nn.Linear(dim, RESPONSES)
        head = nn.Linear(dim, 1)
        nn.init.constant_(head.bias, -3.0)  # long looking first
        self.halt = ac.AdaptiveHalt(self.look, ac.ACT(head), max_steps=max_steps, readout=self.readout)

    def forward(self, trials: Trials) -> ac.HaltResult:
        """``output``: logits [B, 5]; ``steps``: int64 [B]."""
        start = trials.images.new_zeros(len(trials.images), self.dim)
        return self.halt(start, trials.images, trials.tasks)
