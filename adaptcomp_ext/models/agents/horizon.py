"""Planning with a depth for each state: a gate predicts what each further level of the horizon gains."""

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

LEAST_SCALE = 1e-6  # lower bound of the standard deviations of gains and features


class DeepPlan(NamedTuple):
    """The result of `DepthPlanner.plan`.

    Attributes
    ----------
    action : Tensor
        [B, A]: the plan's first action; the habit's mean action where nothing was planned.
    horizon : Tensor
        int64 [B]: the horizon H of the plan; 0 where nothing was planned.
    worth : Tensor
        [B]: the value that the model expects of the plan, followed by the habit until the deepest horizon; in
        units of the largest reward.
    """

    action: Tensor
    horizon: Tensor
    worth: Tensor


class DepthPlanner:
    """Plan at increasing horizons, each starting from the plan of the one before, up to each row's own depth.

    Parameters
    ----------
    planner : Planner
        Runs an iteration; its own horizon and number of iterations are not used.
    levels : sequence of int
        Increasing horizons, in steps.
    iterations : int
        Number of iterations at each level.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described. Plans are not differentiable.
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
            int64 [B]: the number of levels that each row goes through, from 0 (habit) to all.

        Returns
        -------
        DeepPlan
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
        samples = planner.samples - planner.habits - 1
        # All rows share the noise, as in Planner: a row's plan does not depend on which other rows plan.
        noise = torch.randn(
            *(len(self.levels), self.iterations, samples, deepest, size),
            device=latent.device,
            dtype=latent.dtype,
        )
        rolled = planner.habit_plans(latent, deepest)
        level = 0

        def deeper(mean: Tensor, latent: Tensor, rolled: Tensor) -> Tensor:
            nonlocal level
            ahead = self.levels[level]
            plan, std = mean[:, :ahead], torch.full_like(mean[:, :ahead], FIRST_STD)
            for i in range(self.iterations):
                drawn = noise[level, i, :, :ahead]
                plan, std, _ = planner.improve(plan, std, latent, rolled[:, :, :ahead].contiguous(), drawn)
            level += 1
            return torch.cat([plan, mean[:, ahead:]], 1)

        def branch(latent: Tensor, rolled: Tensor, depth: Tensor) -> Tensor:
            # Made anew in each call, with a step that counts its calls: a check of the rows would cost more
            # than it shows.
            halt = AdaptiveHalt(
                deeper, FixedSteps(depth), max_steps=len(self.levels), compact=True, check_rows=False
            )
            result: Tensor = halt(rolled[:, 0].contiguous(), latent, rolled).output
            return result

        mean = route(depth > 0, branch, latent, rolled, depth, otherwise=rolled[:, 0].contiguous())
        horizons = torch.tensor((0, *self.levels), device=depth.device)[depth]
        return DeepPlan(mean[:, 0], horizons, self.worth(latent, mean, horizons))

    def worth(self, latent: Tensor, mean: Tensor, horizon: Tensor) -> Tensor:
        """Return the value [n] that the model expects of plans `mean` [n, deepest, A].

        Each plan is followed for its own `horizon` [n], and by the habit afterwards.
        """
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
        """Return the gain of each level in the value of the first action: z [n, L] → [n, levels], signed.

        The rows are planned at every depth. The first action of each plan is followed by a plan of the
        deepest horizon from the next state, and the expected values are compared. The plans' own values would
        not do: they grow with the horizon, because more actions are better than the habit's, although an
        agent that plans again in every state uses the first action only. All plans share their noise, which
        mostly cancels in the differences.
        """
        world, discount = self.planner.world, self.planner.discount
        n, depths = len(latent), len(self.levels) + 1
        states = latent.repeat(depths, 1)
        action = self.plan(states, torch.arange(depths, device=latent.device).repeat_interleave(n)).action
        z, reward = world.step(states, action)
        after = self.plan(z, torch.full((len(z),), depths - 1, device=latent.device)).worth
        worth = (1 - discount) * reward.clamp(max=1.0) + discount * after
        return worth.view(depths, n).diff(dim=0).T


class DepthGate(Precise):
    """Choose how deep to plan: the depth with the largest expected net gain.

    ::

        depth = argmax over d of  Σ_{k ≤ d} ( ĝₖ(s) − price · Hₖ )          d = 0: habit

    ĝₖ predicts, by least squares, the gain of level k over the level before it (`DepthPlanner.gains`), in
    units of the spread of values. The cost of a level is proportional to its horizon. Before `fit` all gains
    are 0.

    Parameters
    ----------
    latent, actions : int
        Sizes of the latent state and of an action.
    levels : sequence of int
        The planner's levels.
    hidden : int
        Number of units of the hidden layer.
    price : float
        Price of one step of the horizon, at least 0, in the unit of the gains.

    Notes
    -----
    A price that is not as described raises TypeError or ValueError; the sizes are not checked. Depths are not
    differentiable.
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
        """Return the predicted gain of each level, [B, levels]."""
        features = self._features(latent, log_std).to(next(self.net.parameters()).dtype)
        return wide(self.net(features)) * self.unit

    def _features(self, latent: Tensor, log_std: Tensor) -> Tensor:
        return (wide(torch.cat([latent, log_std], -1)) - self.center) / self.scale

    @torch.no_grad()
    def forward(self, latent: Tensor, log_std: Tensor) -> Tensor:
        """Return the depth of each row: int64 [B], from 0 to the number of levels."""
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
        """Train the gate further to predict gains.

        Parameters
        ----------
        latent, log_std : Tensor
            Latent states [n, L] and the habit's log standard deviations [n, A], n ≥ 2.
        gains : Tensor
            [n, levels], from `DepthPlanner.gains`.
        epochs, batch, seed : int
            Passes over the states, states of an update, and seed of their order; the global random state is
            not changed.

        Returns
        -------
        list of float
            Mean squared error of each epoch, divided by the variance of the gains.
        """
        if len(latent) < 2:
            raise ValueError(f"latent: expected at least two rows to fit on, got {len(latent)}")
        seen, gains = wide(torch.cat([latent, log_std], -1).detach()), wide(gains.detach())
        self.center.copy_(seen.mean(0))
        self.scale.copy_(seen.std(0).clamp(min=LEAST_SCALE))
        self.unit.copy_(gains.std(0).clamp(min=LEAST_SCALE))
        features, targets = self._features(latent, log_std), gains / self.unit
        dtype = next(self.net.parameters()).dtype
        self.net.to(features.dtype)  # half precision would round the optimiser's epsilon to 0
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
