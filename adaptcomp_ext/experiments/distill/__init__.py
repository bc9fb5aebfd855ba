"""Distillation: online, after training, or none; and a System 1 whose dead units are gone."""

from .experiment import distill

__all__ = ["distill"]
