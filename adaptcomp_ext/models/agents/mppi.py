"""Model predictive path integral planning (Williams et al. 2015) in a latent world model.

Each state is planned until its plan converges.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from adaptcomp_ext.models._precision import wide
from adaptcomp_ext.models.agents.world import WorldModel
from adaptcomp_ext.nn import AdaptiveHalt, Convergence, FixedSteps, Policy
from adaptcomp_ext.ops._backend import compute_dtype
from adaptcomp_ext.ops._checks import check_int
from adaptcomp_ext.ops.descent import check_number

__all__ = ["FIRST_STD", "Plan", "Planner"]

FIRST_STD = 0.6
"""σ before the first iteration, in units of actions (−1..1)."""
GLANCED = 8  # number of random actions of a glance


class Plan(NamedTuple):
    """The result of `Planner.plan`.

    Attributes
    ----------
    mean, std : Tensor
        [B, H, A]: mean and standard deviation of the normal over action sequences.
    first : Tensor
        [B]: the value that the model expects of the plan's first action followed by the habit's mean actions:
        a discounted mean of rewards, in units of the largest one. An agent that plans again in every state
        gets this value; the value of the full plan (`Planner.score` of ``mean``) grows with its length, and
        such an agent never realises it.
    habit : Tensor
        [B]: the value that the model expects of the habit's mean actions from the beginning.
    iterations : Tensor
        int64 [B]: number of iterations.
    """

    mean: Tensor
    std: Tensor
    first: Tensor
    habit: Tensor
    iterations: Tensor


class Planner:
    """The control policy π₂: MPPI improves a normal over action sequences until it converges.

    ::

        candidates: the plan's mean μ, roll-outs of the habit, samples of N(μ, σ²)
        score = (1 − γ) Σ γᵗ r(zₜ, aₜ) + γᴴ Q(z_H, π₁(z_H))
        elites: the best candidates, weighted by exp((score − best score) / temperature)
        μ, σ ← weighted mean and standard deviation of the elites

    Each row is one state; it halts when ‖Δμ‖ / √(HA) ≤ tol, or after `iterations`.

    Parameters
    ----------
    world : WorldModel
        The world model. It is not part of the planner's state.
    horizon : int
        H, in steps.
    samples, elites, habits : int
        Number of candidates, of the best ones that are kept, and of the habit's roll-outs among the
        candidates. The first roll-out has mean actions.
    iterations : int
        Upper bound on the number of iterations.
    tol : float
        Tolerance of convergence, in units of actions. 0: every row runs all iterations.
    temperature : float
        Temperature, relative to the range of the elites' scores.
    least_std : float
        Lower bound of σ.
    discount : float
        γ.
    enough : float
        Value above which `gain` sees no difference, in units of the largest reward: satisficing (Simon 1956).
        1: no bound.

    Notes
    -----
    Noise is drawn once for each call and iteration, and all rows share it: a row's plan does not depend on
    which other rows are planned. Plans are not differentiable. Arguments that are not as described raise
    TypeError or ValueError.
    """

    def __init__(
        self,
        world: WorldModel,
        horizon: int = 3,
        samples: int = 256,
        elites: int = 32,
        habits: int = 16,
        iterations: int = 6,
        tol: float = 0.05,
        temperature: float = 0.5,
        least_std: float = 0.05,
        discount: float = 0.99,
        enough: float = 1.0,
    ) -> None:
        self.world = world
        self.horizon = check_int("horizon", horizon, 1)
        self.habits = check_int("habits", habits, 1)
        self.samples = check_int("samples", samples, self.habits + 2)
        self.elites = check_int("elites", elites, 2)
        if elites > samples:
            raise ValueError(f"elites: expected at most samples = {samples}, got {elites}")
        self.iterations = check_int("iterations", iterations, 1)
        self.tol = check_number("tol", tol, 0.0, math.inf, ends="[)")
        self.temperature = check_number("temperature", temperature, 0.0, math.inf, ends="()")
        self.least_std = check_number("least_std", least_std, 0.0, 2.0, ends="()")
        self.discount = check_number("discount", discount, 0.0, 1.0, ends="[]")
        self.enough = check_number("enough", enough, 0.0, 1.0, ends="(]")

    def gain(self, plan: Tensor, habit: Tensor) -> Tensor:
        """Return plan − habit of two values [B], each clamped to at most `enough`.

        At γ = 0.99 a decision changes a value by about 0.01, and learned values have larger errors. Without
        the bound an agent keeps planning for a pendulum that already stands upright.
        """
        return plan.clamp(max=self.enough) - habit.clamp(max=self.enough)

    def score(self, latent: Tensor, actions: Tensor, horizon: int = 0) -> Tensor:
        """Return the value that the model expects of action sequences, float32 or wider.

        z [n, L], a [n, C, k, A] → [n, C]. After the k actions come the habit's mean actions, up to `horizon`
        steps in all. Rewards and values are clamped to 1, the largest possible.
        """
        n, candidates, given, size = actions.shape
        steps = max(given, horizon)
        z = latent[:, None].expand(n, candidates, latent.shape[1]).reshape(n * candidates, latent.shape[1])
        # Time comes first, so that each step of the roll-out reads contiguous actions.
        along = actions.permute(2, 0, 1, 3).reshape(given, n * candidates, size)
        total = torch.zeros(n * candidates, device=z.device, dtype=compute_dtype(z.dtype))
        for t in range(steps):
            z, reward = self.world.step(z, along[t] if t < given else self.world.habit.best(z))
            total.add_(reward.clamp(max=1.0), alpha=(1 - self.discount) * self.discount**t)
        last = self.world.value(z, self.world.habit.best(z)).mean(0).clamp_(max=1.0)
        return total.add_(last, alpha=self.discount**steps).view(n, candidates)

    def improve(
        self, mean: Tensor, std: Tensor, latent: Tensor, habit: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run one iteration.

        Parameters
        ----------
        mean, std : Tensor
            The normal before the iteration, [n, H, A].
        latent : Tensor
            z [n, L].
        habit : Tensor
            Roll-outs of the habit, [n, habits, H, A].
        noise : Tensor
            Standard normal, [samples − habits − 1, H, A].

        Returns
        -------
        tuple of Tensor
            New mean and std, and the score of the habit's mean roll-out [n].
        """
        tried = (mean[:, None] + std[:, None] * noise).clamp_(-1, 1)
        candidates = torch.cat([habit, tried, mean[:, None]], 1)
        score = self.score(latent, candidates)
        best = score.topk(self.elites, dim=1)
        elite = wide(candidates.gather(1, best.indices[:, :, None, None].expand(-1, -1, *mean.shape[1:])))
        spread = (best.values[:, :1] - best.values[:, -1:]).clamp(min=1e-6)
        weight = ((best.values - best.values[:, :1]) / (self.temperature * spread)).softmax(1)[
            :, :, None, None
        ]
        new = (weight * elite).sum(1)
        deviation = (weight * (elite - new[:, None]).square()).sum(1).sqrt_().clamp_(self.least_std, 2.0)
        # Candidate 0 is the habit's mean roll-out.
        return new.to(mean.dtype), deviation.to(std.dtype), score[:, 0]

    def habit_plans(self, latent: Tensor, horizon: int | None = None, count: int | None = None) -> Tensor:
        """Roll out the habit `count` (default: `habits`) times, once with mean actions: [n, count, H, A]."""
        n, horizon, count = len(latent), horizon or self.horizon, count or self.habits
        z = latent[:, None].expand(n, count, latent.shape[1])
        noise = torch.randn(horizon, count, self.world.actions, device=latent.device, dtype=latent.dtype)
        noise[:, 0] = 0.0
        steps = []
        for t in range(horizon):
            mean, log_std = self.world.habit.parameters_of(z)
            action = (mean + log_std.exp() * noise[t]).tanh()
            steps.append(action)
            if t + 1 < horizon:
                z, _ = self.world.step(z, action)
        return torch.stack(steps, 2)

    @torch.no_grad()
    def glance(self, latent: Tensor) -> Tensor:
        """Return the gain of the best of a few random actions around the habit's: z [n, L] → [n], at least 0.

        It hints at the gain of a plan's first action and is cheap beside a plan, which takes hundreds of
        candidates and several iterations.
        """
        habit = self.world.habit.best(latent)[:, None]
        noise = torch.randn(GLANCED, habit.shape[2], device=latent.device, dtype=latent.dtype)
        tried = torch.cat([habit, (habit + FIRST_STD * noise).clamp_(-1, 1)], 1)
        score = self.score(latent, tried[:, :, None], self.horizon)
        return self.gain(score.amax(1), score[:, 0])

    @torch.no_grad()
    def plan(self, latent: Tensor, before: Tensor | None = None, policy: Policy | None = None) -> Plan:
        """Plan for each row.

        Parameters
        ----------
        latent : Tensor
            z [B, L].
        before : Tensor, optional
            [B, H, A]: the plan of the step before, shifted by one step. A row with a NaN starts from the
            habit's mean roll-out, as all rows do by default.
        policy : Policy, optional
            Halting policy. Default: `Convergence` of the mean at `tol`.

        Returns
        -------
        Plan
        """
        batch, size = len(latent), self.world.actions
        habit = self.habit_plans(latent)
        mean = habit[:, 0]
        if before is not None:
            mean = torch.where(before.isnan().flatten(1).any(1)[:, None, None], mean, before)
        std = torch.full_like(mean, FIRST_STD)
        drawn = self.samples - self.habits - 1
        noise = torch.randn(
            self.iterations, drawn, self.horizon, size, device=latent.device, dtype=latent.dtype
        )
        count = 0

        def improve(state: tuple[Tensor, ...], latent: Tensor, habit: Tensor) -> tuple[Tensor, ...]:
            nonlocal count
            count += 1
            return self.improve(state[0], state[1], latent, habit, noise[count - 1])

        if policy is None:
            still = self.tol * math.sqrt(self.horizon * size)
            policy = Convergence(still, norm="absolute") if self.tol > 0 else FixedSteps(self.iterations)
        halt = AdaptiveHalt(
            improve,
            policy,
            max_steps=self.iterations,
            readout=lambda state: state[0],
            compact=True,
            check_rows=False,  # made anew in each call, so that it would be checked in each
        )
        start = (
            mean.contiguous(),
            std,
            torch.zeros(batch, device=latent.device, dtype=compute_dtype(latent.dtype)),
        )
        result = halt(start, latent, habit)
        mean, std, worth = result.state
        first = self.score(latent, mean[:, None, :1], self.horizon)[:, 0]
        return Plan(mean, std, first, worth, result.steps)
