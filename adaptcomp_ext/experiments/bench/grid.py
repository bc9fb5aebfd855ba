"""Which configurations are run.

The full product of cores, sizes, step limits, fractions, policies and modes would take days on a small
machine. The default grid takes, in this order of importance:

- the required points: GRU at (B, D) = (32, 64), (256, 128), (1024, 256), (4096, 256), M = 16, mean/M = 0.25,
  for
every policy
  in inference, and the two largest in training for ``fixed`` and ``act``;
- the whole axis of mean/M at those sizes, up to 1.0, where no row ever leaves and compaction can only lose;
- the other cores, widths, batches and step limits around them, small ones included, where bookkeeping weighs
  most.

A configuration whose masked form is estimated to take longer than the limit per call is left out, unless it
is required; the report lists it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import torch

from .problem import POLICIES, Config

__all__ = ["GRIDS", "REQUIRED_SIZES", "estimate_seconds", "is_required", "machine_flops", "select"]

REQUIRED_SIZES = ((32, 64), (256, 128), (1024, 256), (4096, 256))
FRACTIONS = (0.1, 0.25, 0.5, 1.0)

# Seconds that one step costs at least, whatever its size: a handful of small operations and what is around
# them.
STEP_OVERHEAD = 1.5e-4


def is_required(config: Config) -> bool:
    """Tell whether the configuration is one of the points that every full run reports."""
    if (config.core, config.max_steps, config.fraction) != ("gru", 16, 0.25):
        return False
    if config.training:
        return (config.batch, config.dim) in REQUIRED_SIZES[2:] and config.policy in ("fixed", "act")
    return (config.batch, config.dim) in REQUIRED_SIZES


def required() -> Iterator[Config]:
    """Yield the required points alone."""
    for policy in POLICIES:
        for batch, dim in REQUIRED_SIZES:
            yield Config("gru", batch, dim, policy=policy)
    for policy in ("fixed", "act"):
        for batch, dim in REQUIRED_SIZES[2:]:
            yield Config("gru", batch, dim, policy=policy, training=True)


def default() -> Iterator[Config]:
    """Yield every axis value several times: some twenty minutes on two cores."""
    yield from required()
    for batch, dim in REQUIRED_SIZES:
        for fraction in FRACTIONS:
            yield Config("gru", batch, dim, fraction=fraction)
    for batch, dim in REQUIRED_SIZES[:3]:
        for fraction in (0.1, 0.5, 1.0):
            yield Config("gru", batch, dim, fraction=fraction, policy="act")
    for fraction in (0.5, 1.0):
        yield Config("gru", 256, 128, fraction=fraction, policy="confidence")
        yield Config("gru", 32, 64, fraction=fraction, policy="confidence")
    for max_steps in (8, 32):
        yield Config("gru", 256, 128, max_steps)
        yield Config("gru", 1024, 256, max_steps)
        yield Config("gru", 256, 128, max_steps, policy="act")
    yield Config("gru", 32, 1024)
    yield Config("gru", 256, 1024, fraction=0.5)
    yield Config("gru", 256, 1024, 8, 1.0)
    yield Config("gru", 4096, 64)
    yield Config("gru", 4096, 64, fraction=1.0)
    yield Config("gru", 4096, 128, 8)
    yield Config("gru", 32, 256, 32)

    for fraction in (0.25, 1.0):
        for batch, dim in ((32, 64), (256, 128), (1024, 256), (4096, 128)):
            yield Config("mlp", batch, dim, fraction=fraction)
        yield Config("mlp", 256, 128, fraction=fraction, policy="act")
    yield Config("mlp", 1024, 256, 8, 0.5)
    yield Config("mlp", 256, 1024, 8, 0.5)
    yield Config("mlp", 32, 64, 32, 0.1)
    yield Config("mlp", 1024, 64, 32, 0.1)
    yield Config("mlp", 256, 128, fraction=0.5, policy="confidence")
    yield Config("mlp", 1024, 128, 32, policy="confidence")

    for fraction in (0.25, 1.0):
        yield Config("transformer", 32, 64, fraction=fraction)
        yield Config("transformer", 256, 128, fraction=fraction)
    yield Config("transformer", 256, 64, 32, 0.1)
    yield Config("transformer", 1024, 64, 8, 0.5)
    yield Config("transformer", 32, 256, 8, 0.25)
    yield Config("transformer", 256, 256, 8, 0.25)
    yield Config("transformer", 32, 128, fraction=0.5, policy="act")
    yield Config("transformer", 256, 128, policy="confidence")

    for policy in ("fixed", "act"):
        for fraction in (0.25, 1.0):
            yield Config("gru", 256, 128, fraction=fraction, policy=policy, training=True)
        yield Config("gru", 32, 64, policy=policy, training=True)
        yield Config("gru", 1024, 256, fraction=0.5, policy=policy, training=True)
    yield Config("gru", 1024, 256, fraction=0.1, training=True)
    yield Config("gru", 1024, 256, fraction=1.0, training=True)
    yield Config("mlp", 256, 128, training=True)
    yield Config("mlp", 1024, 128, 8, 0.5, training=True)
    yield Config("transformer", 32, 64, training=True)
    yield Config("transformer", 256, 64, 8, 0.25, training=True)


def quick() -> Iterator[Config]:
    """Yield a look at everything in a minute or two; only one model is compiled."""
    for batch, dim in REQUIRED_SIZES[:3]:
        for policy in POLICIES:
            yield Config("gru", batch, dim, policy=policy, compiled=(policy, dim) == ("fixed", 128))
    for fraction in (0.1, 0.5, 1.0):
        yield Config("gru", 256, 128, fraction=fraction)
        yield Config("gru", 32, 64, fraction=fraction, compiled=False)
    for policy in ("fixed", "act"):
        yield Config("gru", 256, 128, policy=policy, training=True, compiled=False)
    yield Config("mlp", 256, 128, compiled=False)
    yield Config("mlp", 32, 64, fraction=1.0, compiled=False)
    yield Config("transformer", 32, 64, compiled=False)


GRIDS = {"default": default, "quick": quick, "required": required}


def machine_flops(device: torch.device) -> float:
    """Measure the rate of a middling matrix product, for estimates only."""
    a, b = torch.randn(512, 256, device=device), torch.randn(256, 1024, device=device)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(10):
            begin = time.perf_counter()
            (a @ b)[0, 0].item()
            best = min(best, time.perf_counter() - begin)
    return 2 * 512 * 256 * 1024 / best


def estimate_seconds(config: Config, flops: float) -> float:
    """Estimate one masked call: overhead, and half the measured rate for what is not a matrix product."""
    overhead = STEP_OVERHEAD * (3 if config.training else 1)
    return config.masked_flops() / (0.5 * flops) + config.max_steps * overhead


def select(
    configs: Iterable[Config], cores: tuple[str, ...], flops: float, limit_seconds: float
) -> tuple[list[Config], list[Config]]:
    """Drop repetitions and what does not fit, and put configurations of one model side by side.

    Returns
    -------
    chosen, skipped : list of Config
        Training may take three times the limit. A required point is never skipped.
    """
    chosen: list[Config] = []
    skipped: list[Config] = []
    for config in dict.fromkeys(configs):
        if config.core not in cores:
            continue
        allowed = limit_seconds * (3 if config.training else 1)
        fits = is_required(config) or estimate_seconds(config, flops) <= allowed
        (chosen if fits else skipped).append(config)
    first_of = {config.model_key: i for i, config in reversed(list(enumerate(chosen)))}
    chosen.sort(key=lambda config: first_of[config.model_key])
    return chosen, skipped
