"""What the experiments on images share: the reference CNN, and what networks cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import adaptcomp_ext as ac

__all__ = ["CLASSES", "LARGE", "Scale", "build_cnn", "multiply_adds", "weights"]

CLASSES = 10
LARGE = 20
"""Pixels of a side from which on images are taken for MNIST's."""


class Scale(nn.Module):
    """uint8 images to floats in 0..1."""

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W], uint8, to float32."""
        return images.float() / 255


def build_cnn(side: int, channels: int, hidden: int = 128) -> nn.Sequential:
    """The thesis' reference CNN: two convolutions with 3×3 kernels, each with a maximum pool, and two linear layers.

    Small images are padded, so that something is left of them after the second pool.
    """
    padding = 0 if side >= LARGE else 1
    left = side
    for _ in range(2):
        left = (left + 2 * padding - 2) // 2
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * left * left, hidden),
        nn.ReLU(),
        nn.Linear(hidden, CLASSES),
    )


def weights(module: nn.Module) -> int:
    """Weights and biases; the noise of variational dropout, which inference does not have, is not counted."""
    return sum(
        p.numel() for name, p in module.named_parameters() if not name.endswith(("log_variance", "log_noise"))
    )


def multiply_adds(module: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply–adds of one row through a network's linear and convolution layers, without dead units, counted while it runs."""
    total = 0

    def count(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal total
        assert isinstance(layer, (nn.Linear, nn.Conv2d))
        total += layer.weight.numel() * (output.numel() // (output.shape[0] * output.shape[1]))

    dense = ac.shrink(module)
    layers = [m for m in dense.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    handles = [m.register_forward_hook(count) for m in layers]
    with torch.no_grad():
        dense(torch.zeros(1, *shape))
    for handle in handles:
        handle.remove()
    return total
