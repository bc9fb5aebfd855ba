"""Halting policies: the public names of `adaptcomp_ext.nn.halting.policies`."""

from adaptcomp_ext.nn.halting.policies import (
    ACT,
    AllOf,
    AnyOf,
    Bernoulli,
    Confidence,
    Convergence,
    FixedSteps,
    PonderNet,
    QHalt,
    StablePrediction,
)

__all__ = [
    "ACT",
    "AllOf",
    "AnyOf",
    "Bernoulli",
    "Confidence",
    "Convergence",
    "FixedSteps",
    "PonderNet",
    "QHalt",
    "StablePrediction",
]
