"""Digits in coloured ink: habit and control, all gates, and steps as reaction time."""

from .report import stroop

__all__ = ["stroop"]
