"""Halting policies: the public names of `adaptcomp_ext.nn.halting.policies`."""

from adaptcomp_ext.nn.halting.policies import ACT, Confidence, Convergence, FixedSteps, PonderNet

__all__ = ["ACT", "Confidence", "Convergence", "FixedSteps", "PonderNet"]
