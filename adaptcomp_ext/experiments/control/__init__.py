"""Planning on demand in the DeepMind Control Suite."""

from .report import control

__all__ = ["control"]
