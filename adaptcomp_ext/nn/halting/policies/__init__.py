"""Halting policies, one in each module."""

from adaptcomp_ext.nn.halting.policies.act import ACT
from adaptcomp_ext.nn.halting.policies.bernoulli import Bernoulli
from adaptcomp_ext.nn.halting.policies.combined import AllOf, AnyOf
from adaptcomp_ext.nn.halting.policies.confidence import Confidence
from adaptcomp_ext.nn.halting.policies.convergence import Convergence
from adaptcomp_ext.nn.halting.policies.fixed_steps import FixedSteps
from adaptcomp_ext.nn.halting.policies.pondernet import PonderNet
from adaptcomp_ext.nn.halting.policies.q_halt import QHalt
from adaptcomp_ext.nn.halting.policies.stable_prediction import StablePrediction

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
