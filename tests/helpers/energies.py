"""Energies for the tests of EnergyDescent, and a descent of one row at a time, as the definition says."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

import adaptcomp_ext as ac

DIM = 4
HALTED, MAX_STEPS, NONFINITE, REJECTED = 1, 2, 3, 4


class Wells(nn.Module):
    """E = Σ a_j y_j⁴/4 − b_j y_j²/2 + c y_j y_{j+1} − x_j y_j: several minima, saddles between them.

    Only element-wise operations in a fixed order, so that a row has the same bits wherever it stands.
    """

    def __init__(self, dtype=torch.float32, device="cpu", seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)

        def parameter(low, high):
            t = torch.rand(DIM, generator=g, dtype=torch.float64) * (high - low) + low
            return nn.Parameter(t.to(dtype).to(device))

        self.a, self.b, self.c = parameter(0.5, 1.5), parameter(0.2, 1.0), parameter(-0.3, 0.3)

    def forward(self, y, x):
        square = y * y
        term = square * square * self.a * 0.25 - square * self.b * 0.5 + y * y.roll(1, 1) * self.c - x * y
        total = term[:, 0]
        for j in range(1, DIM):
            total = total + term[:, j]
        return total


class Bowl(nn.Module):
    """E = Σ_j k_j (y_j − x_j)²/2 + (Σ_j y_j)²/8: strictly convex, quadratic."""

    def __init__(self, dtype=torch.float64, device="cpu"):
        super().__init__()
        self.k = nn.Parameter(torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=dtype, device=device))

    def forward(self, y, x):
        return (self.k * (y - x).square()).sum(1) * 0.5 + y.sum(1).square() * 0.125


class Mlp(nn.Module):
    """A small network with a ridge, so that it has a minimum."""

    def __init__(self, act=nn.SiLU, dim=DIM, hidden=8, seed=0, dtype=torch.float32, device="cpu"):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = (
                nn.Sequential(nn.Linear(2 * dim, hidden), act(), nn.Linear(hidden, 1)).to(dtype).to(device)
            )

    def forward(self, y, x):
        return self.net(torch.cat([y, x], 1)).squeeze(1) + y.square().sum(1) * 0.5


def problem(batch=7, dtype=torch.float32, device="cpu", seed=0, requires_grad=False, scale=1.5):
    """Return y0 and x."""
    g = torch.Generator().manual_seed(seed + 1)

    def draw(size):
        t = torch.randn(batch, DIM, generator=g, dtype=torch.float64) * size
        return t.to(dtype).to(device).requires_grad_(requires_grad)

    return draw(scale), draw(0.5)


class ByHand(NamedTuple):
    y: Tensor
    energy: float
    steps: int
    status: int
    trace: list[Tensor]


def by_hand(
    energy, y0, x, *, step_size, max_steps, tol=0.0, stop="energy", accept="always", momentum=0.0, clip=None,
    clamp=None, backtracking=None, noise=0.0, eta=None,
):  # fmt: skip
    """Descend one row, y0 [D] and x [D], in y0's dtype. `eta`: the noise of each step, [M, D]."""

    def evaluate(y):
        y = y[None].clone().requires_grad_()
        e = energy(y, x[None])
        (g,) = torch.autograd.grad(e.sum(), y)
        return e.item(), g[0]

    y, trace = y0.clone(), []
    e, g = evaluate(y)
    if not (math.isfinite(e) and bool(y.isfinite().all())):
        return ByHand(y, e, 0, NONFINITE, trace)
    m, s = torch.zeros_like(y), 1.0
    for k in range(1, max_steps + 1):
        last = k == max_steps
        pushed = g
        if clip is not None and g.double().norm() > clip:
            pushed = g * (clip / g.double().norm()).to(g.dtype)
        had_velocity = momentum > 0 and bool((m != 0).any())
        m = momentum * m + pushed
        p = y + (noise * eta[k - 1] if noise else 0) - step_size * s * m
        if clamp is not None:
            p = p.clamp(*clamp)
        e_new, g_new = evaluate(p)
        if not (math.isfinite(e_new) and bool(p.isfinite().all())):
            return ByHand(y, e, k, NONFINITE, [*trace, y])
        if accept == "if_lower" and not e_new <= e:
            m = torch.zeros_like(m)
            if backtracking is not None:
                s *= backtracking
            trace.append(y)
            if not noise and backtracking is None and not had_velocity:
                return ByHand(y, e, k, REJECTED, trace)
            if last:
                return ByHand(y, e, k, MAX_STEPS, trace)
            continue
        change, y, e, g = abs(e_new - e), p, e_new, g_new
        trace.append(y)
        if tol > 0 and (change if stop == "energy" else g.double().norm().item()) <= tol:
            return ByHand(y, e, k, HALTED, trace)
    return ByHand(y, e, max_steps, MAX_STEPS, trace)


def noise_of(seed, samples, max_steps, dtype):
    """Return the noise of all steps, [M, B, D]."""
    return torch.stack([ac.reference.normals(seed, samples, k, DIM) for k in range(1, max_steps + 1)]).to(
        dtype
    )


OPTIONS = {
    "plain": {},
    "to the end": {"tol": 0.0},
    "gradient rule": {"stop": "gradient", "tol": 0.05},
    "momentum": {"momentum": 0.6},
    "clip": {"clip": 0.8},
    "clamp": {"clamp": (-0.9, 0.7)},
    "noise": {"noise": 0.05},
    "if lower": {"accept": "if_lower", "step_size": 0.6},
    "if lower, momentum": {"accept": "if_lower", "step_size": 0.4, "momentum": 0.7},
    "backtracking": {"accept": "if_lower", "step_size": 1.5, "backtracking": 0.5},
    "backtracking, momentum": {"accept": "if_lower", "step_size": 1.0, "backtracking": 0.6, "momentum": 0.5},
    "if lower, noise": {"accept": "if_lower", "noise": 0.1},
    "everything": {
        **{
            "accept": "if_lower",
            "step_size": 0.8,
            "backtracking": 0.5,
            "momentum": 0.5,
            "clip": 1.0,
            "clamp": (-1.2, 1.1),
        },
        **{"noise": 0.02, "stop": "gradient", "tol": 0.1},
    },
}


def options_of(name, **more):
    return {"step_size": 0.15, "max_steps": 12, "tol": 5e-3, "seed": 3, **OPTIONS[name], **more}
