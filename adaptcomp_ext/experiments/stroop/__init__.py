"""Digits in coloured ink: habit and control, all gates, and steps as reaction time."""

from .experiment import stroop

__all__ = ["stroop"]
