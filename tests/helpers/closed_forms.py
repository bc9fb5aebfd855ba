"""Energies in closed form, with points and context, for the tests of fused descents."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import adaptcomp_ext as ac
from tests.helpers.tensors import generator, values

ACTIVATIONS = ("softplus", "silu", "tanh", "gelu")
KINDS = (
    *(f"mlp-{a}" for a in ACTIVATIONS),
    *(f"deep-{a}" for a in ACTIVATIONS),
    "hopfield",
    "quadratic",
    "linear rows",
)
SHORT = ("mlp-silu", "deep-softplus", "hopfield", "quadratic", "linear rows")
"""One energy for each kind of kernel."""

# Every branch of a step; the step sizes are such that rows stop at different steps for each reason there is.
OPTIONS = {
    "plain": dict(step_size=0.1, max_steps=6, tol=0.0),
    "energy": dict(step_size=0.3, max_steps=12, tol=3e-2),
    "gradient": dict(step_size=0.3, max_steps=12, tol=0.3, stop="gradient"),
    "momentum": dict(step_size=0.1, max_steps=6, tol=0.0, momentum=0.7),
    "clip": dict(step_size=0.3, max_steps=6, tol=0.0, clip=0.8),
    "clip and momentum": dict(step_size=0.3, max_steps=6, tol=0.0, clip=0.8, momentum=0.5),
    "clamp": dict(step_size=0.3, max_steps=6, tol=0.0, clamp=(0.1, 0.6)),
    "noise": dict(step_size=0.1, max_steps=6, tol=0.0, noise=0.2, seed=5),
    "if lower": dict(step_size=1.87, max_steps=8, tol=1e-3, accept="if_lower"),
    "backtracking": dict(step_size=3.7, max_steps=8, tol=1e-3, accept="if_lower", backtracking=0.5),
    "all": dict(
        step_size=1.5,
        max_steps=8,
        tol=1e-3,
        accept="if_lower",
        noise=0.05,
        momentum=0.5,
        clip=2.0,
        clamp=(-1.5, 1.5),
        seed=3,
    ),
}


def energy(
    kind: str, dim: int = 5, width: int = 9, context: int = 3, dtype=torch.float64, device="cpu", seed=0
) -> nn.Module:
    """Return random numbers that a seed makes the same in every dtype, up to rounding."""

    def numbers(*shape: int, of: int = 0) -> Tensor:
        return values(shape, torch.float64, device, seed + of)

    if kind == "hopfield":
        return ac.HopfieldEnergy(nn.Parameter(numbers(width, dim)), nn.Parameter(torch.tensor(1.3))).to(
            device, dtype
        )
    if kind in ("quadratic", "linear rows"):
        # Not symmetric: only the symmetric part counts. Eigenvalues of that between 0.2 and 2 or so.
        a = numbers(dim, dim)
        a = a @ a.T / dim + 0.2 * torch.eye(dim, device=device) + 0.5 * (a - a.T)
        b = None if kind == "linear rows" else nn.Parameter(numbers(dim, of=1).to(dtype))
        return ac.QuadraticEnergy(nn.Parameter(a.to(dtype)), b)
    shape, activation = kind.split("-")
    hidden = width if shape == "mlp" else (width, width + 4)
    network = ac.MLPEnergy(dim, context, hidden, activation, ridge=0.7, dtype=torch.float64, device=device)
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter.copy_(numbers(*parameter.shape, of=i) * (2.0 / max(parameter.shape)) ** 0.5)
    return network.to(dtype)


def contexts(
    kind: str, rows: int, dim: int = 5, context: int = 3, dtype=torch.float64, device="cpu", seed=50
) -> list[Tensor]:
    if kind == "linear rows":
        return [values((rows, dim), dtype, device, seed)]
    network = kind.startswith(("mlp", "deep"))
    return [values((rows, context), dtype, device, seed)] if network and context else []


def points(rows: int, dim: int = 5, dtype=torch.float64, device="cpu", seed=100) -> Tensor:
    return values((rows, dim), dtype, device, seed)


def step_sizes(rows: int, mean: float, dtype=torch.float64, device="cpu", seed=7) -> Tensor:
    """Return step sizes [rows], between 0.7 and 1.3 of the mean."""
    return (
        (mean * (0.7 + 0.6 * torch.rand(rows, generator=generator(seed), dtype=torch.float64)))
        .to(dtype)
        .to(device)
    )
