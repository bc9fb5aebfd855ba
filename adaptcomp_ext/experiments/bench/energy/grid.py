"""Which configurations are run."""

from __future__ import annotations

from collections.abc import Iterator

from .problem import Config

__all__ = ["GRIDS", "MEMORY_STEPS", "SIZES", "at"]

# B, elements of the context, elements of y, hidden.
SIZES = ((16, 32, 32, 128), (128, 32, 32, 128), (256, 64, 64, 256), (1024, 128, 128, 512))
MEMORY_STEPS = (5, 10, 20, 40)


def at(mode: str, size: int, **changes: object) -> Config:
    """Return the configuration of a mode at one of `SIZES`."""
    batch, context, dim, hidden = SIZES[size]
    return Config(
        **{"mode": mode, "batch": batch, "context": context, "dim": dim, "hidden": (hidden,), **changes}  # type: ignore[arg-type]
    )


def default() -> Iterator[Config]:
    """Yield the four sizes in every mode, but for training at the largest; other activations, two layers, other energies."""
    for size in range(4):
        yield at("all", size)
    for activation in ("softplus", "tanh", "gelu"):
        yield at("all", 2, activation=activation)
    yield at("all", 2, hidden=(256, 256))
    yield at("all", 2, kind="hopfield", context=0, hidden=(256,))
    yield at("all", 2, kind="quadratic", hidden=())
    for size in range(4):
        yield at("stop", size)
    for size in range(3):
        yield at("train", size)


def quick() -> Iterator[Config]:
    """Yield a look at everything in less than a minute; one step is compiled."""
    yield at("all", 0, compiled=False)
    yield at("all", 1)
    yield at("all", 1, kind="hopfield", context=0, compiled=False)
    yield at("all", 1, kind="quadratic", hidden=(), compiled=False)
    yield at("stop", 1, compiled=False)
    yield at("train", 0)


GRIDS = {"default": default, "quick": quick}
