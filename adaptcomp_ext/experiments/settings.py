"""Threads and seed of a run, put back afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["settings"]


@contextlib.contextmanager
def settings(threads: int, seed: int) -> Iterator[None]:
    """Run with so many threads of torch and from this seed; restore threads and random state."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)
