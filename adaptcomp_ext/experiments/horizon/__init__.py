"""A planning horizon that follows the state."""

from .experiment import horizon

__all__ = ["horizon"]
