"""A latent world model with values and a habit, after TD-MPC (Hansen et al. 2022) and TD-MPC2 (2024)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptcomp_ext.models._precision import wide
from adaptcomp_ext.nn import VariationalDropout
from adaptcomp_ext.nn._constants import WithConstants
from adaptcomp_ext.ops._checks import check_int

__all__ = ["Habit", "Move", "WorldModel"]

GROUP = 8  # latent units per softmax (SimNorm), which keeps long roll-outs bounded
LARGEST = 15.0  # bound on a latent unit before the softmax
LOG_STD = (-4.0, 0.7)
SQUASH_FLOOR = 1e-6


class Move(NamedTuple):
    """A sample of the habit.

    Attributes
    ----------
    action : Tensor
        [B, A]: the sampled action, in −1..1.
    raw : Tensor
        [B, A]: mean of the normal, before the tanh.
    log_prob : Tensor
        [B]: log-density of the sampled action; float32 or wider.
    log_std : Tensor
        [B, A]: log standard deviation of the normal, before the tanh.
    """

    action: Tensor
    raw: Tensor
    log_prob: Tensor
    log_std: Tensor


class _Simplex(WithConstants):
    """A softmax over each group of units. As a matrix product it is ten times as fast as torch's softmax."""

    blocks: Tensor

    def __init__(self, units: int) -> None:
        super().__init__()
        self.units = units
        self.register_constants()

    def constants(self) -> dict[str, Tensor]:
        """Return which units share a group."""
        group = torch.arange(self.units) // GROUP
        return {"blocks": (group[:, None] == group).float()}

    def forward(self, x: Tensor) -> Tensor:
        if self.blocks.is_meta:
            self.leave_meta(x.device)
        # Under autocast the product would be in half precision, where exp(15) is infinite.
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x)
        e = wide(x).clamp(-LARGEST, LARGEST).exp()
        return (e / (e @ self.blocks.to(e.dtype))).to(x.dtype)


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.LayerNorm(hidden),
        nn.SiLU(),
        nn.Linear(hidden, hidden),
        nn.SiLU(),
        nn.Linear(hidden, outputs),
    )


class Habit(nn.Module):
    """The default policy π₁: a normal over actions, squashed by tanh.

    Parameters
    ----------
    latent, actions, hidden : int
        Sizes of the latent state, of an action, and of the hidden layers.
    variational : bool
        Whether the hidden layers are wrapped in `VariationalDropout`, which gives them a description length.
    """

    def __init__(self, latent: int, actions: int, hidden: int, variational: bool = True) -> None:
        super().__init__()
        layers = [nn.Linear(latent, hidden), nn.Linear(hidden, hidden)]
        wrapped = [VariationalDropout(layer, log_alpha=-6.0) if variational else layer for layer in layers]
        self.body = nn.Sequential(wrapped[0], nn.SiLU(), wrapped[1], nn.SiLU())
        self.out = nn.Linear(hidden, 2 * actions)
        nn.init.normal_(self.out.weight, std=0.01)
        nn.init.zeros_(self.out.bias)

    def parameters_of(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log standard deviation before the tanh: z [..., L] → [..., A] each."""
        mean, raw = self.out(self.body(latent)).chunk(2, -1)
        low, high = LOG_STD
        return mean, low + (high - low) * torch.sigmoid(raw)

    def forward(self, latent: Tensor) -> Move:
        """Sample an action: z [B, L] → `Move`, differentiable by reparametrisation."""
        mean, log_std = self.parameters_of(latent)
        noise = torch.randn_like(mean)
        # In half precision most large actions would round to 1, where the log-density has no finite slope.
        action = (wide(mean) + wide(log_std).exp() * wide(noise)).tanh()
        normal = -0.5 * wide(noise).square() - wide(log_std) - 0.5 * math.log(2 * math.pi)
        log_prob = (normal - (1 - action.square() + SQUASH_FLOOR).log()).sum(-1)
        return Move(action.to(mean.dtype), mean, log_prob, log_std)

    def best(self, latent: Tensor) -> Tensor:
        """Return the mean action, in −1..1: z [..., L] → [..., A]."""
        action: Tensor = self.parameters_of(latent)[0].tanh()
        return action

    def kl(self) -> Tensor:
        """Return the description length, a scalar in nats: KL from the weights' posterior to their prior."""
        parts = [m.kl() for m in self.modules() if isinstance(m, VariationalDropout)]
        return torch.stack(parts).sum() if parts else self.out.weight.new_zeros(())


class _Ensemble(nn.Module):
    """Q-functions with common inputs, as one batched product."""

    def __init__(self, members: int, inputs: int, hidden: int) -> None:
        super().__init__()
        shapes = ((inputs, hidden), (hidden, hidden), (hidden, 1))
        self.weights = nn.ParameterList(
            [nn.Parameter(torch.randn(members, i, o) / math.sqrt(i)) for i, o in shapes]
        )
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(members, 1, o)) for _, o in shapes])
        with torch.no_grad():
            self.weights[2].zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Return the values of all members: [n, I] → [members, n]."""
        y = x.expand(self.weights[0].shape[0], *x.shape)
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            y = torch.baddbmm(bias, y, weight)
            if k < len(self.weights) - 1:
                y = F.silu(y)
        return y[..., 0]


class WorldModel(nn.Module):
    """A world model: encoder, dynamics with reward, two Q-functions with slow copies, and habit.

    ::

        z = encode(o)      z', r = step(z, a)      Q(z, a): the mean of two      a ~ π₁(z)

    Rewards are in 0..1, and Q is their discounted mean, Q = (1 − γ) r + γ Q', also in 0..1.

    Parameters
    ----------
    observations, actions : int
        Sizes of an observation and an action.
    latent : int
        Size of z, a multiple of 8.
    hidden : int
        Number of units of the hidden layers.
    variational : bool
        Whether the habit's layers have variational dropout.

    Attributes
    ----------
    spread : Tensor
        Scalar buffer: running range of Q, from its 5th to its 95th percentile, on the training data; the unit
        of the habit's loss and of gains.

    Notes
    -----
    All methods but `follow` are differentiable, also in the weights. Arguments of the constructor that are
    not as described raise TypeError or ValueError.
    """

    spread: Tensor

    def __init__(
        self, observations: int, actions: int, latent: int = 32, hidden: int = 128, variational: bool = True
    ) -> None:
        super().__init__()
        self.actions = check_int("actions", actions, 1)
        if check_int("latent", latent, GROUP) % GROUP:
            raise ValueError(f"latent: expected a multiple of {GROUP}, got {latent}")
        self.latent = latent
        self.encoder = _mlp(
            check_int("observations", observations, 1), check_int("hidden", hidden, 1), latent
        )
        self.dynamics = _mlp(latent + actions, hidden, latent + 1)
        self.simplex = _Simplex(latent)
        self.q = _Ensemble(2, latent + actions, hidden)
        self.slow_q = _Ensemble(2, latent + actions, hidden)
        self.slow_q.load_state_dict(self.q.state_dict())
        self.slow_q.requires_grad_(False)
        self.habit = Habit(latent, actions, hidden, variational)
        self.register_buffer("spread", torch.tensor(0.05))

    def encode(self, observation: Tensor) -> Tensor:
        """Encode o [B, O] → z [B, L]. Because o may be unbounded, sign(o)·log(1 + |o|) is encoded."""
        latent: Tensor = self.simplex(self.encoder(observation.sign() * observation.abs().log1p()))
        return latent

    def step(self, latent: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the next state and the reward: z [n, L], a [n, A] → z' [n, L], r [n]."""
        out = self.dynamics(torch.cat([latent, action], -1))
        return self.simplex(out[..., :-1]), out[..., -1]

    def value(self, latent: Tensor, action: Tensor, slow: bool = False) -> Tensor:
        """Return both Q-functions' values [2, n], or those of their slow copies."""
        values: Tensor = (self.slow_q if slow else self.q)(torch.cat([latent, action], -1))
        return values

    @torch.no_grad()
    def follow(self, rate: float) -> None:
        """Move the slow copies toward the Q-functions by a share `rate` of the difference."""
        slow: list[Tensor] = list(self.slow_q.parameters())
        fast: list[Tensor] = list(self.q.parameters())
        torch._foreach_lerp_(slow, fast, rate)
