"""One configuration of the benchmark, and the modules and tensors it stands for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .cores import (
    CLASSES,
    CORES,
    HALT_LOGIT,
    ScriptedHead,
    ScriptedStep,
    flops_per_row,
    has_context,
    state_shape,
)
from .schedule import scripted_steps

__all__ = [
    "ACT_THRESHOLD",
    "CONFIDENCE_THRESHOLD",
    "POLICIES",
    "Config",
    "Problem",
    "make_model",
    "make_problem",
]

POLICIES = ("fixed", "confidence", "act")
ACT_THRESHOLD = 0.99
CONFIDENCE_THRESHOLD = 0.9


@dataclass(frozen=True)
class Config:
    """One point of the grid.

    Attributes
    ----------
    core : str
        "gru", "mlp" or "transformer".
    batch, dim, max_steps : int
        B rows, width D, at most M steps.
    fraction : float
        Mean steps over M.
    policy : str
        "fixed", "confidence" or "act".
    training : bool
        Forward and backward, or forward only.
    compiled : bool
        Whether the compiled contenders take part: compiling takes seconds per model.
    """

    core: str
    batch: int
    dim: int
    max_steps: int = 16
    fraction: float = 0.25
    policy: str = "fixed"
    training: bool = False
    compiled: bool = True

    @property
    def model_key(self) -> tuple[str, int, str, bool]:
        """What needs its own weights and its own compilation; B, M and the fraction share them."""
        return (self.core, self.dim, self.policy, self.training)

    @property
    def label(self) -> str:
        """Short name for progress and messages."""
        mode = "train" if self.training else "infer"
        size = f"B={self.batch} D={self.dim} M={self.max_steps}"
        return f"{self.core} {size} mean/M={self.fraction:g} {self.policy} {mode}"

    def masked_flops(self) -> float:
        """Operations of the masked forms: every row at every step, three times as many with a backward."""
        flops = flops_per_row(self.core, self.dim) * self.batch * self.max_steps
        return 3 * flops if self.training else flops

    def as_dict(self) -> dict[str, Any]:
        """Plain form for the JSON report."""
        return asdict(self)


@dataclass
class Problem:
    """Everything a contender needs; built once, shared by all of them."""

    config: Config
    step: ScriptedStep
    head: ScriptedHead | None
    state: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]
    steps: Tensor

    def logits(self, state: tuple[Tensor, ...]) -> Tensor:
        """Apply the head of a policy that has one."""
        if self.head is None:
            raise TypeError(f"policy: {self.config.policy} has no head")
        logits: Tensor = self.head(state)
        return logits

    @property
    def leaves(self) -> list[Tensor]:
        """What a training call differentiates: the weights, and h and x as if an encoder had made them."""
        modules = [self.step] if self.head is None else [self.step, self.head]
        return [p for m in modules for p in m.parameters()] + [self.state[0], *self.inputs]


def make_model(config: Config, device: torch.device, seed: int) -> tuple[ScriptedStep, ScriptedHead | None]:
    """Build the step and, for policies that have one, the head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        step = ScriptedStep(CORES[config.core](config.dim))
        head = None
        if config.policy != "fixed":
            head = ScriptedHead(config.dim, CLASSES if config.policy == "confidence" else 1)
    for module in (step, head):
        if module is not None:
            module.to(device).requires_grad_(config.training)
    return step, head


def _script(config: Config, steps: Tensor) -> Tensor:
    """Return the script's columns: steps that remain, and the logit while running."""
    left = steps.to(torch.float32)
    running = torch.full_like(left, -HALT_LOGIT)
    if config.policy == "act":
        # h_n ≈ 0.8/N: the weights are spread over all N steps, and N - 1 of them stay clear of the threshold.
        running = torch.logit(0.8 / left.clamp(min=2))
    return torch.stack([left, running], dim=1)


def make_problem(
    config: Config, model: tuple[ScriptedStep, ScriptedHead | None], device: torch.device, seed: int
) -> Problem:
    """Draw the tensors of one configuration."""
    generator = torch.Generator().manual_seed(seed)
    steps = scripted_steps(config.batch, config.max_steps, config.fraction, seed)
    h = torch.randn(state_shape(config.core, config.batch, config.dim), generator=generator)
    inputs: tuple[Tensor, ...] = ()
    if has_context(config.core):
        inputs = (torch.randn(config.batch, config.dim, generator=generator),)
    state: tuple[Tensor, ...] = (h.to(device).requires_grad_(config.training),)
    if config.policy != "fixed":
        state += (_script(config, steps).to(device),)
    inputs = tuple(x.to(device).requires_grad_(config.training) for x in inputs)
    return Problem(config, *model, state=state, inputs=inputs, steps=steps.to(device))
