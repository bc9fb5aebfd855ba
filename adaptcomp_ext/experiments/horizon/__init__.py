"""A planning horizon that follows the state."""

from .report import horizon

__all__ = ["horizon"]
