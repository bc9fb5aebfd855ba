"""Halting policies, one in each module."""

from adaptcomp_ext.nn.halting.policies.act import ACT
from adaptcomp_ext.nn.halting.policies.confidence import Confidence
from adaptcomp_ext.nn.halting.policies.convergence import Convergence
from adaptcomp_ext.nn.halting.policies.fixed_steps import FixedSteps
from adaptcomp_ext.nn.halting.policies.pondernet import PonderNet

__all__ = ["ACT", "Confidence", "Convergence", "FixedSteps", "PonderNet"]
