"""Harder images: noise, and a patch that hides a part."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_noise", "corrupt", "occlude"]


def add_noise(images: Tensor, scale: float | Tensor, generator: torch.Generator) -> Tensor:
    """Add normal noise of standard deviation `scale`, a number or [N, 1, 1], to images [N, H, W] in 0..1, and clip."""
    return (images + scale * torch.randn(images.shape, generator=generator)).clamp_(0, 1)


def occlude(images: Tensor, share: float | Tensor, generator: torch.Generator) -> Tensor:
    """Black out a square at a random place, its side `share` of the image's side: a number or [N]."""
    n, side = images.shape[0], images.shape[-1]
    patch = torch.as_tensor(share).expand(n)[:, None] * side
    low = torch.rand(n, 2, generator=generator) * (side - patch)
    pixel = torch.arange(side) + 0.5
    hidden = [(pixel > low[:, i : i + 1]) & (pixel < low[:, i : i + 1] + patch) for i in (0, 1)]
    return images.masked_fill(hidden[0][:, :, None] & hidden[1][:, None, :], 0)


def corrupt(images: Tensor, share: float, noise: float, patch: float, generator: torch.Generator) -> Tensor:
    """Noise for a share of the images, a patch for another such share, each of a strength from 0 to `noise` and `patch`."""
    n = images.shape[0]
    strength, chosen = torch.rand(2, n, generator=generator), torch.rand(2, n, generator=generator) < share
    scales = strength * chosen
    images = add_noise(images, noise * scales[0][:, None, None], generator)
    return occlude(images, patch * scales[1], generator)
