"""Whether contenders have computed the same: times of different results mean nothing."""

from __future__ import annotations

from torch import Tensor

__all__ = ["DisagreementError", "difference", "require"]


class DisagreementError(RuntimeError):
    """A contender gave another result: its times mean nothing."""


def difference(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value."""
    scale = max(float(want.detach().abs().max()), 1e-12)
    return float((got.detach() - want.detach()).abs().max()) / scale


def require(name: str, what: str, found: float, allowed: float, than: str) -> None:
    """Raise DisagreementError if the difference of a contender from the form ``than`` is too large, or not a number."""
    if not found <= allowed:
        raise DisagreementError(
            f"{name}: {what} differs from the {than} form by {found:.2e}, allowed {allowed:.0e}"
        )
