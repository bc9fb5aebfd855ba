"""What a step is: a GRU cell, a residual MLP block, a transformer block; and a head whose halting is scripted.

A head must run for real, yet each row has to halt when the script says so. The state of a policy with a head
is therefore a pair ``(h, script)``, where ``script`` [B, 2] holds the row's remaining steps and its logit
while it is running. Every step takes one off the first column, and the head adds to its Linear of h the
running logit, or a large one once no step remains. All contenders run exactly these modules, so the few small
operations of the script weigh on all of them alike.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = [
    "CLASSES",
    "CORES",
    "TOKENS",
    "ScriptedHead",
    "ScriptedStep",
    "flops_per_row",
    "has_context",
    "state_shape",
]

TOKENS = 16
HEADS = 4
CLASSES = 10
HALT_LOGIT = 20.0


class GRUCore(nn.Module):
    """GRU cell: h [B, D] is the state, x [B, D] the row's context."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(dim, dim)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.cell(x, h)


class MLPCore(nn.Module):
    """Pre-norm residual block D → 4D → D."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(nn.functional.gelu(self.up(self.norm(h))))


class TransformerCore(nn.Module):
    """Pre-norm transformer block over the tokens of one row, state [B, T, D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.mlp = MLPCore(dim)

    def forward(self, h: Tensor) -> Tensor:
        rows, tokens, dim = h.shape
        q, k, v = self.qkv(self.norm(h)).view(rows, tokens, 3, HEADS, dim // HEADS).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.mlp(h + self.out(mixed.transpose(1, 2).reshape(rows, tokens, dim)))


CORES: dict[str, type[nn.Module]] = {"gru": GRUCore, "mlp": MLPCore, "transformer": TransformerCore}


def has_context(core: str) -> bool:
    """Tell whether the core takes a per-row input besides its state."""
    return core == "gru"


def state_shape(core: str, batch: int, dim: int) -> tuple[int, ...]:
    """Return the shape of the core's state."""
    return (batch, TOKENS, dim) if core == "transformer" else (batch, dim)


def flops_per_row(core: str, dim: int) -> float:
    """Return the floating-point operations of one step on one row (matrix products only)."""
    if core == "gru":
        return 12.0 * dim * dim
    if core == "mlp":
        return 16.0 * dim * dim
    return TOKENS * (24.0 * dim * dim + 4.0 * TOKENS * dim)


class ScriptedStep(nn.Module):
    """Apply the core to h and count the script down: ``(h,) → (h,)`` or ``(h, script) → (h, script)``."""

    tick: Tensor

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core
        self.register_buffer("tick", torch.tensor([1.0, 0.0]))

    def forward(self, state: tuple[Tensor, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
        """Do one step."""
        h = self.core(state[0], *inputs)
        return (h,) if len(state) == 1 else (h, state[1] - self.tick)


class ScriptedHead(nn.Module):
    """Linear of h (mean over tokens), plus the scripted logit on output 0: ``(h, script) → [B, width]``.

    The Linear's weights are small, so it is computed and trained but never decides; the benchmark verifies
    the step counts.
    """

    first: Tensor

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, width)
        nn.init.normal_(self.linear.weight, std=0.02 / dim**0.5)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("first", (torch.arange(width) == 0).float())

    def forward(self, state: tuple[Tensor, Tensor]) -> Tensor:
        """Return the logits."""
        h, script = state
        pooled = h.mean(dim=1) if h.dim() == 3 else h
        left, running = script[:, :1], script[:, 1:]
        return self.linear(pooled) + torch.where(left < 0.5, HALT_LOGIT, running) * self.first
