"""How far to look ahead, state by state: plans that are made deeper while that is worth its price."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptcomp_ext.models._precision import Precise, wide
from adaptcomp_ext.models.agents.mppi import FIRST_STD, Planner
from adaptcomp_ext.nn import AdaptiveHalt, FixedSteps, route
from adaptcomp_ext.ops._checks import check_int, check_tensor
from adaptcomp_ext.ops.descent import check_number

__all__ = ["DeepPlan", "DepthGate", "DepthPlanner"]

LEAST_SCALE = 1e-6  # of gains and of what they are predicted from


class DeepPlan(NamedTuple):
    """What was planned.

    Attributes
    ----------
    action : Tensor
        [B, A]: the first action; the habit's mean where nothing was planned.
    horizon : Tensor
        int64 [B]: H; 0 where nothing was planned.
    worth : Tensor
        [B]: what the model expects of the plan, followed by the habit until the deepest horizon; in units of
        the largest reward.
    """

    action: Tensor
    horizon: Tensor
    worth: Tensor


class DepthPlanner:
    """Plan at the first horizon, then at the next with that plan for a start, as many times as each row is to go deeper.

    Parameters
    ----------
    planner : Planner
        Does an iteration; its own horizon and number of iterations are not used.
    levels : sequence of int
        Increasing horizons.
    iterations : int
        Of the planner, at each level.
    """

    def __init__(self, planner: Planner, levels: Sequence[int] = (1, 2, 4, 8), iterations: int = 2) -> None:
        self.planner = planner
        self.levels = tuple(check_int("levels", level, 1) for level in levels)
        if not self.levels or list(self.levels) != sorted(set(self.levels)):
            raise ValueError(f"levels: expected increasing horizons, got {tuple(levels)}")
        self.iterations = check_int("iterations", iterations, 1)

    @torch.no_grad()
    def plan(self, latent: Tensor, depth: Tensor) -> DeepPlan:
        """Plan for each row.

        Parameters
        ----------
        latent : Tensor
            z [B, L].
        depth : Tensor
            int64 [B], from 0 (habit) to the number of levels: how many levels each row goes through.
        """
        batch, size = len(latent), self.planner.world.actions
        if check_tensor("depth", depth).shape != (batch,) or depth.dtype != torch.int64:
            raise ValueError(
                f"depth: expected int64 of shape [{batch}], got {depth.dtype} of shape {list(depth.shape)}"
            )
        if batch and (int(depth.min()) < 0 or int(depth.max()) > len(self.levels)):
            raise ValueError(
                f"depth: expected 0 to {len(self.levels)}, got {int(depth.min())} to {int(depth.max())}"
            )
        planner, deepest = self.planner, self.levels[-1]
        drawn = planner.samples - planner.habits - 1
        # One noise for all rows, as in Planner: which other rows plan, and how deep, changes nothing for a
        # row.
        noise = torch.randn(
            len(self.levels), self.iterations, drawn, deepest, size, device=latent.device, dtype=latent.dtype
        )
        rolled = planner.habit_plans(latent, deepest)
        level = 0

        def deeper(mean: Tensor, latent: Tensor, rolled: Tensor) -> Tensor:
            nonlocal level
            ahead = self.levels[level]
            plan, std = mean[:, :ahead], torch.full_like(mean[:, :ahead], FIRST_STD)
            for i in range(self.iterations):
                some = noise[level, i, :, :ahead]
                plan, std, _ = planner.improve(plan, std, latent, rolled[:, :, :ahead].contiguous(), some)
            level += 1
            return torch.cat([plan, mean[:, ahead:]], 1)

        def branch(latent: Tensor, rolled: Tensor, depth: Tensor) -> Tensor:
            halt = AdaptiveHalt(deeper, FixedSteps(depth), max_steps=len(self.levels), compact=True)
            result: Tensor = halt(rolled[:, 0].contiguous(), latent, rolled).output
            return result

        mean = route(depth > 0, branch, latent, rolled, depth, otherwise=rolled[:, 0].contiguous())
        horizons = torch.tensor((0, *self.levels), device=depth.device)[depth]
        return DeepPlan(mean[:, 0], horizons, self.worth(latent, mean, horizons))

    def worth(self, latent: Tensor, mean: Tensor, horizon: Tensor) -> Tensor:
        """What the model expects of plans [n, deepest, A], each followed for its own horizon and by the habit afterwards."""
        world, discount = self.planner.world, self.planner.discount
        z, total = latent, torch.zeros_like(wide(latent[:, 0]))
        for t in range(self.levels[-1]):
            action = torch.where((t < horizon)[:, None], mean[:, t], world.habit.best(z))
            z, reward = world.step(z, action)
            total = total + (1 - discount) * discount**t * reward.clamp(max=1.0)
        last = world.value(z, world.habit.best(z)).mean(0).clamp(max=1.0)
        return total + discount ** self.levels[-1] * last

    @torch.no_grad()
    def gains(self, latent: Tensor) -> Tensor:
        """What each level adds to the decision that is taken: z [n, L] → [n, levels], of either sign.

        All depths are planned, each one's first action is followed by a plan of the deepest horizon from
        where it leads to, and what the model expects of that is compared. What a plan promises for itself
        would not do: it grows with its length, because more of its actions are better than the habit's,
        although a plan that is made anew in every state uses the first one only.

        Notes
        -----
        The noise of all plans is the same, so that it mostly cancels in the differences.
        """
        world, discount = self.planner.world, self.planner.discount
        n, depths = len(latent), len(self.levels) + 1
        every = latent.repeat(depths, 1)
        action = self.plan(every, torch.arange(depths, device=latent.device).repeat_interleave(n)).action
        z, reward = world.step(every, action)
        after = self.plan(z, torch.full((len(z),), depths - 1, device=latent.device)).worth
        worth = (1 - discount) * reward.clamp(max=1.0) + discount * after
        return worth.view(depths, n).diff(dim=0).T


class DepthGate(Precise):
    """Choose how deep to plan: the depth with the largest expected net gain.

    ::

        depth = argmax over d of  Σ_{k ≤ d} ( ĝₖ(s) − price · Hₖ )          d = 0: habit

    ĝₖ predicts what level k gains over the one before it (`DepthPlanner.gains`) by least squares, in units of
    the spread of values; a level costs in proportion to its horizon. Before `fit` all gains are 0.

    Parameters
    ----------
    latent, actions : int
        Sizes.
    levels : sequence of int
        The planner's.
    hidden : int
        Units of the hidden layer.
    price : float
        Of a step of the horizon, at least 0.
    """

    cost: Tensor
    center: Tensor
    scale: Tensor
    unit: Tensor
    precise: tuple[str, ...] = ("cost", "center", "scale", "unit")

    def __init__(
        self,
        latent: int,
        actions: int,
        levels: Sequence[int] = (1, 2, 4, 8),
        hidden: int = 64,
        price: float = 0.0001,
    ) -> None:
        super().__init__()
        self.price = check_number("price", price, 0.0, float("inf"), ends="[)")
        last = nn.Linear(hidden, len(levels))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(nn.Linear(latent + actions, hidden), nn.SiLU(), last)
        self.register_buffer("cost", torch.tensor(levels, dtype=torch.float32))
        self.register_buffer("center", torch.zeros(latent + actions))
        self.register_buffer("scale", torch.ones(latent + actions))
        self.register_buffer("unit", torch.ones(len(levels)))

    def gains(self, latent: Tensor, log_std: Tensor) -> Tensor:
        """Predicted gain of each level [B, K]."""
        features = self._features(latent, log_std).to(next(self.net.parameters()).dtype)
        return wide(self.net(features)) * self.unit

    def _features(self, latent: Tensor, log_std: Tensor) -> Tensor:
        return (wide(torch.cat([latent, log_std], -1)) - self.center) / self.scale

    @torch.no_grad()
    def forward(self, latent: Tensor, log_std: Tensor) -> Tensor:
        """How deep: int64 [B], from 0 to the number of levels."""
        net = (self.gains(latent, log_std) - self.price * self.cost).cumsum(1)
        return torch.cat([torch.zeros_like(net[:, :1]), net], 1).argmax(1)

    def fit(
        self,
        latent: Tensor,
        log_std: Tensor,
        gains: Tensor,
        *,
        epochs: int = 10,
        batch: int = 64,
        seed: int = 0,
    ) -> list[float]:
        """Learn to predict gains [n, K] from states where every depth was tried.

        Returns
        -------
        list of float
            Mean squared error of each epoch, over the gains' variance.
        """
        if len(latent) < 2:
            raise ValueError(f"latent: expected at least two rows to fit on, got {len(latent)}")
        seen, gains = wide(torch.cat([latent, log_std], -1).detach()), wide(gains.detach())
        self.center.copy_(seen.mean(0))
        self.scale.copy_(seen.std(0).clamp(min=LEAST_SCALE))
        self.unit.copy_(gains.std(0).clamp(min=LEAST_SCALE))
        features, targets = self._features(latent, log_std), gains / self.unit
        dtype = next(self.net.parameters()).dtype
        self.net.to(features.dtype)  # the optimiser's own floors vanish in half precision
        try:
            return self._fit(features, targets, epochs, batch, seed)
        finally:
            self.net.to(dtype)

    def _fit(self, features: Tensor, targets: Tensor, epochs: int, batch: int, seed: int) -> list[float]:
        optimizer = torch.optim.AdamW(self.parameters(), 3e-3, weight_decay=0.01)
        history = []
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            for _ in range(epochs):
                total = 0.0
                for rows in torch.randperm(len(features), device="cpu").split(batch):
                    loss = F.mse_loss(self.net(features[rows]), targets[rows])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    total += float(loss.detach()) * len(rows)
                history.append(total / len(features))
        return history
