"""Mazes: an agent that plans for as many sweeps as a state is worth."""

from .report import maze

__all__ = ["maze"]
