"""What policies that draw random numbers share: the seed of a run, and the number of a row's sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaptcomp_ext.nn.halting.policy import Run, View
from adaptcomp_ext.ops._checks import check_int


def check_seed(seed: Any) -> int:
    """Require a seed."""
    if check_int("seed", seed, 0) >= 2**63:
        raise ValueError(f"seed: expected an int < 2**63, got {seed}")
    return int(seed)


def check_seed_or_none(seed: Any) -> int | None:
    """Require a seed, or None for a new one in each run."""
    return None if seed is None else check_seed(seed)


def drawn_seed() -> int:
    """Draw a seed from torch's generator, as dropout does; `torch.manual_seed` makes it repeatable."""
    return int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))


def samples(view: View) -> Tensor:
    """Return the numbers of the samples of a block, int64 [n], which key their random numbers."""
    ids = view.run.sample_ids
    return view.row if ids is None else ids[view.row.clamp(min=0)]


def all_samples(run: Run) -> Tensor:
    """Return the numbers of all samples of a run, int64 [B]."""
    return torch.arange(run.batch, device=run.device) if run.sample_ids is None else run.sample_ids
