"""When each row halts: step counts drawn so that the mean is exactly what the benchmark asks for."""

from __future__ import annotations

import math

import torch

__all__ = ["active_counts", "scripted_steps"]


def _stop_probability(max_steps: int, mean: float) -> float:
    """Return p such that ``min(Geometric(p), max_steps)`` has the given mean, ``(1 - (1-p)**M) / p``."""
    low, high = 1e-9, 1.0
    for _ in range(80):
        p = (low + high) / 2
        if (1 - (1 - p) ** max_steps) / p > mean:
            low = p
        else:
            high = p
    return (low + high) / 2


def scripted_steps(batch: int, max_steps: int, fraction: float, seed: int = 0) -> torch.Tensor:
    """Draw how many steps each row runs.

    The law is a clipped geometric one, as if every row halted with the same probability at every step and
    were cut off at ``max_steps``: most rows are short, a few are long, which is what learned halting looks
    like. The values are stratified quantiles in a random order, so the mean does not wander with the seed.

    Parameters
    ----------
    batch, max_steps : int
        Rows, and the limit M of steps.
    fraction : float
        Wanted mean over M, in [1/M, 1]. At 1.0 every row runs all M steps.
    seed : int
        Seed of the order.

    Returns
    -------
    Tensor
        int64 [batch], values in 1…M.
    """
    mean = fraction * max_steps
    if not 1.0 <= mean <= max_steps:
        raise ValueError(
            f"fraction: expected a mean of 1 to {max_steps} steps, got {fraction} * {max_steps} = {mean:g}"
        )
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    if mean == max_steps:
        return torch.full((batch,), max_steps, dtype=torch.int64)
    if mean == 1.0:
        return torch.ones(batch, dtype=torch.int64)
    u = (torch.arange(batch, dtype=torch.float64) + 0.5) / batch
    quantiles = torch.ceil(torch.log1p(-u) / math.log1p(-_stop_probability(max_steps, mean)))
    return quantiles.clamp(1, max_steps).to(torch.int64)[order]


def active_counts(steps: torch.Tensor) -> list[int]:
    """Return how many rows take part in step 1, 2, … up to the longest row's last step."""
    last = int(steps.max()) if steps.numel() else 0
    return [int((steps >= n).sum()) for n in range(1, last + 1)]
