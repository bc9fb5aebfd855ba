"""One configuration of the benchmark, the grid of them, and the branch and tensors each stands for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["GRIDS", "MODES", "Config", "Problem", "make_problem"]

MODES = ("infer", "train")
DIM = 128


@dataclass(frozen=True)
class Config:
    """One point of the grid.

    Attributes
    ----------
    mode : str
        "infer", or "train": forward and backward into the weights, the branch's input and what the other rows
        are.
    batch : int
        B.
    hidden : int
        Width of the branch's hidden layer, which is what it costs.
    share : float
        Of the rows that are routed.
    dim : int
        Elements of a row, before the branch and after it.
    """

    mode: str
    batch: int
    hidden: int
    share: float
    dim: int = DIM

    @property
    def routed(self) -> int:
        """K, the rows that are routed."""
        return round(self.share * self.batch)

    @property
    def label(self) -> str:
        """Short name for progress and messages."""
        return f"{self.mode} B={self.batch} hidden={self.hidden} share={self.share:g}"

    def as_dict(self) -> dict[str, Any]:
        """Plain form for the JSON report."""
        return asdict(self)


@dataclass
class Problem:
    """Everything a contender needs; built once, shared by all of them."""

    config: Config
    branch: nn.Module
    mask: Tensor
    x: Tensor
    otherwise: Tensor
    upstream: Tensor
    """Gradient of the result."""

    @property
    def leaves(self) -> list[Tensor]:
        """What a training call differentiates: the weights, and both tensors as if a network had made them."""
        return [*self.branch.parameters(), self.x, self.otherwise]


def default() -> Iterator[Config]:
    """Yield three batch sizes, three branches and four shares in both modes."""
    for mode, batch, hidden, share in product(
        MODES, (64, 1024, 16384), (64, 256, 1024), (0.1, 0.25, 0.5, 1.0)
    ):
        yield Config(mode, batch, hidden, share)


def quick() -> Iterator[Config]:
    """Yield a look at both modes in less than half a minute."""
    for mode, batch, share in product(MODES, (64, 1024), (0.1, 0.5)):
        yield Config(mode, batch, 256, share)


GRIDS = {"default": default, "quick": quick}


def make_problem(config: Config, device: torch.device, seed: int) -> Problem:
    """Build the branch and draw the tensors of one configuration. The routed rows are drawn without replacement."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        branch = nn.Sequential(
            nn.Linear(config.dim, config.hidden), nn.SiLU(), nn.Linear(config.hidden, config.dim)
        ).to(device)
    training = config.mode == "train"
    branch.requires_grad_(training)
    mask = torch.zeros(config.batch, dtype=torch.bool)
    mask[torch.randperm(config.batch, generator=generator)[: config.routed]] = True
    x, otherwise, upstream = (
        torch.randn(config.batch, config.dim, generator=generator).to(device) for _ in range(3)
    )
    return Problem(
        config,
        branch,
        mask.to(device),
        x.requires_grad_(training),
        otherwise.requires_grad_(training),
        upstream,
    )
