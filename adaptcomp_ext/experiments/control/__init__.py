"""Planning on demand in the DeepMind Control Suite."""

from .experiment import control

__all__ = ["control"]
