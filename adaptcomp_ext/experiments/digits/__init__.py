"""The reference task: when to stop, on grey digits: ACT, PonderNet, confidence, and habit with control."""

from .experiment import digits

__all__ = ["digits"]
