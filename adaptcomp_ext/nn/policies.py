"""Halting policies: the public names of `adaptcomp_ext.nn.halting.policies`."""

from adaptcomp_ext.nn.halting.policies import (
    ACT,
    Bernoulli,
    Confidence,
    Convergence,
    FixedSteps,
    PonderNet,
    QHalt,
)

__all__ = ["ACT", "Bernoulli", "Confidence", "Convergence", "FixedSteps", "PonderNet", "QHalt"]
