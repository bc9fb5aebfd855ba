"""The reference task: when to stop, on grey digits: ACT, PonderNet, confidence, and habit with control."""

from .report import digits

__all__ = ["digits"]
