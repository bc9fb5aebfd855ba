"""Model predictive path integral planning (Williams et al. 2015) in a latent world model, each state until its plan settles."""

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
GLANCED = 8


class Plan(NamedTuple):
    """What planning found for each row.

    Attributes
    ----------
    mean, std : Tensor
        [B, H, A]: the plan, and what is still open about it.
    first : Tensor
        [B]: what the model expects of the plan's first action, followed by the habit's mean actions, in units
        of the largest reward: a discounted mean of what is to come. It is what an agent gets that plans anew
        in every state: what the whole plan promises (`Planner.score` of ``mean``) grows with its length, and
        is never cashed in.
    habit : Tensor
        [B]: the same for following the habit's mean actions from the beginning.
    iterations : Tensor
        int64 [B].
    """

    mean: Tensor
    std: Tensor
    first: Tensor
    habit: Tensor
    iterations: Tensor


class Planner:
    """π₂: improve a normal over action sequences until it stands still.

    ::

        candidates: the plan's mean, the habit's roll-outs, samples N(μ, σ²) score = (1 − γ) Σ γᵗ r(zₜ, aₜ) +
        γᴴ Q(z_H, π₁(z_H)) elites: the best of them, weighted by exp((score − best) / temperature)      μ, σ ←
        their weighted mean, deviation

    Each row is one state; it leaves `AdaptiveHalt` when ‖Δμ‖ / √(HA) ≤ tol, or after `iterations`.

    Parameters
    ----------
    world : WorldModel
        The model; not a part of this object's state.
    horizon : int
        H.
    samples, elites, habits : int
        Candidates in all, the best of them, and how many are the habit's roll-outs (the first one of mean
        actions).
    iterations : int
        At most so many.
    tol : float
        In units of actions; 0: every row goes on to the end.
    temperature : float
        Relative to the spread of the elites' scores.
    least_std : float
        σ is at least this.
    discount : float
        γ.
    enough : float
        From here on a state counts as won (`gain`), in units of the largest reward: satisficing (Simon 1956).
        1: never.

    Notes
    -----
    Noise is drawn once per call and iteration and shared by all rows: what a row's plan becomes does not
    depend on which other rows plan, and drawing costs nothing against the roll-outs.
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
        """How much more a plan is expected to bring than the habit, both counted up to `enough`.

        One decision is worth a hundredth of a value at γ = 0.99, and values are not learned to a hundredth:
        without it, a pendulum that stands upright is planned for ever, for what the model believes is missing
        there.
        """
        return plan.clamp(max=self.enough) - habit.clamp(max=self.enough)

    def score(self, latent: Tensor, actions: Tensor, horizon: int = 0) -> Tensor:
        """What the model expects of action sequences of any length, which the habit's mean actions follow up to `horizon`.

        z [n, L], a [n, C, k, A] → [n, C], float32 at least; of k actions, max(k, horizon) steps are looked
        at. No reward or value is above 1, the largest: where all is won already, a plan cannot promise more.
        """
        n, candidates, given, size = actions.shape
        steps = max(given, horizon)
        z = latent[:, None].expand(n, candidates, latent.shape[1]).reshape(n * candidates, latent.shape[1])
        # Time first: each step of the roll-out reads its actions in one piece.
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
        """One iteration.

        Parameters
        ----------
        mean, std : Tensor
            [n, H, A].
        latent : Tensor
            z [n, L].
        habit : Tensor
            [n, habits, H, A].
        noise : Tensor
            [samples − habits − 1, H, A], standard normal.

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
        return (
            new.to(mean.dtype),
            deviation.to(std.dtype),
            score[:, 0],
        )  # the first candidate is the habit's mean roll-out

    def habit_plans(self, latent: Tensor, horizon: int | None = None, count: int | None = None) -> Tensor:
        """Roll-outs of the habit, the first of mean actions: z [n, L] → [n, count, H, A]; as many as `habits` by default."""
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
        """What the best of a few random actions around the habit's gains over the habit's: z [n, L] → [n], at least 0.

        Cheap beside a plan of hundreds of candidates and several iterations, and a hint of what its first
        action would gain.
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
            [B, H, A]: the plan of the step before, shifted by one; where a row is all NaN, and by default,
            the habit's mean roll-out instead.
        policy : Policy, optional
            When a row stops. Default: `Convergence` of its mean at `tol`.

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
            improve, policy, max_steps=self.iterations, readout=lambda state: state[0], compact=True
        )
        start = (
            mean.contiguous(),
            std,
            torch.zeros(batch, device=latent.device, dtype=compute_dtype(latent.dtype)),
        )
        found = halt(start, latent, habit)
        mean, std, worth = found.state
        first = self.score(latent, mean[:, None, :1], self.horizon)[:, 0]
        return Plan(mean, std, first, worth, found.steps)
