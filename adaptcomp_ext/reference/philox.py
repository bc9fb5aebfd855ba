"""Philox 4x32-10 (Salmon et al. 2011): random numbers as a function of seed, sample and step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    # The product of two 32-bit numbers does not fit int64: it is computed in 16-bit halves.
    below, above = constant * (x & 0xFFFF), constant * (x >> 16)
    rest = below + ((above & 0xFFFF) << 16)
    return (above >> 16) + (rest >> 32), rest & _LOW


def philox(
    seed: int | Tensor, sample: Tensor, step: int | Tensor, last: int | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four 32-bit words, in int64. The key is `seed`; the counter is `sample`, `step` and `last`."""
    c0, c1, c2, c3 = torch.broadcast_tensors(
        sample & _LOW,
        (sample >> 32) & _LOW,
        torch.as_tensor(step & _LOW, device=sample.device),
        torch.as_tensor(last, device=sample.device),
    )
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        h0, l0 = _multiply(0xD2511F53, c0)
        h1, l1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def uniform(seed: int | Tensor, sample: Tensor, step: int | Tensor) -> Tensor:
    """Return a uniform number in [0, 1) of 24 bits for each sample id: float32, in the shape of `sample`.

    Seed and step may be int64 tensors in that shape.
    """
    return (philox(seed, sample, step, step >> 32)[0] >> 8).to(torch.float32) / 16777216.0


def normals(seed: int, sample: Tensor, step: int, elements: int) -> Tensor:
    """Return `elements` standard normals for each sample id [n], by Box and Muller: float64 [n, elements].

    Of each block of four elements, words one and two make the first two, words three and four the others.
    """
    block = torch.arange(1, (elements + 3) // 4 + 1, device=sample.device)
    words = torch.stack(philox(seed, sample[:, None], step, block), dim=-1).to(torch.float64)
    u = (words[..., 0::2] + 1.0) / 4294967296.0
    angle = words[..., 1::2] * (2 * math.pi / 4294967296.0)
    radius = torch.sqrt(-2.0 * torch.log(u))
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.flatten(1)[:, :elements]
