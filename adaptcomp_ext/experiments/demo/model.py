"""A reader of digits that looks at an image through a small window, several times, until it halts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import adaptcomp_ext as ac


class GlimpseStep(nn.Module):
    """One look: choose a place from what is known so far, read the window there, update what is known.

    The window is a soft one (a normalised Gaussian around each of its points, after DRAW), so that the choice
    of the place has a gradient. `side` and `window` are the heights and widths of image and window in pixels,
    `dim` and `features` the widths of the state and of an encoded glimpse.
    """

    pixels: Tensor
    offsets: Tensor

    def __init__(self, side: int, window: int, dim: int, features: int = 128) -> None:
        super().__init__()
        pixel = 2 / (side - 1)
        self.place = nn.Linear(dim, 2)
        self.encode = nn.Linear(window * window + 2, features)
        self.cell = nn.GRUCell(features, dim)
        self.sharpness = 1 / pixel**2
        self.register_buffer("pixels", torch.linspace(-1, 1, side))
        self.register_buffer("offsets", (torch.arange(window) - (window - 1) / 2) * pixel)

    def where(self, state: Tensor) -> Tensor:
        """Centre of the next glimpse, [n, 2]: row and column, the image's corners being at -1 and 1."""
        return torch.tanh(self.place(state))

    def forward(self, state: Tensor, images: Tensor) -> Tensor:
        """State [n, dim] and images [n, H, W] to the next state."""
        centre = self.where(state)
        distance = (centre[:, :, None] + self.offsets)[..., None] - self.pixels
        kernel = torch.softmax(-self.sharpness * distance.square(), dim=-1)
        glimpse = kernel[:, 0] @ images @ kernel[:, 1].transpose(1, 2)
        seen = torch.relu(self.encode(torch.cat((glimpse.flatten(1), centre), dim=1)))
        return self.cell(seen, state)


class GlimpseReader(nn.Module):
    """`GlimpseStep` under ACT: how many looks an image gets, of at most `max_steps`, depends on the image."""

    def __init__(
        self, side: int, window: int, dim: int = 256, max_steps: int = 16, classes: int = 10
    ) -> None:
        super().__init__()
        self.max_steps = max_steps
        self.threshold = 0.99
        self.first = nn.Parameter(torch.zeros(dim))
        self.step = GlimpseStep(side, window, dim)
        self.head = nn.Linear(dim, 1)
        self.readout = nn.Linear(dim, classes)
        # Long thinking first; a start bias of 0 or more traps most runs at one or two steps.
        nn.init.constant_(self.head.bias, -3.0)
        policy = ac.ACT(self.head, threshold=self.threshold)
        self.halt = ac.AdaptiveHalt(self.step, policy, max_steps=max_steps, readout=self.readout)

    def start(self, rows: int) -> Tensor:
        """What is known before the first look, [rows, dim]."""
        return self.first.expand(rows, -1)

    def forward(self, images: Tensor) -> ac.HaltResult:
        """Read images [B, H, W]; ``output`` holds the class logits [B, classes]."""
        return self.halt(self.start(len(images)), images)

    @torch.no_grad()
    def path(self, image: Tensor, steps: int) -> Tensor:
        """Where the first `steps` looks at one image [H, W] go: [steps, 2], as in `GlimpseStep.where`."""
        state, places = self.start(1), []
        for _ in range(steps):
            places.append(self.step.where(state)[0])
            state = self.step(state, image[None])
        return torch.stack(places)
