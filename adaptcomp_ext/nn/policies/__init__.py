"""Halting policies, one in each module."""

from adaptcomp_ext.nn.policies.act import ACT
from adaptcomp_ext.nn.policies.confidence import Confidence
from adaptcomp_ext.nn.policies.convergence import Convergence
from adaptcomp_ext.nn.policies.fixed_steps import FixedSteps
from adaptcomp_ext.nn.policies.pondernet import PonderNet

__all__ = ["ACT", "Confidence", "Convergence", "FixedSteps", "PonderNet"]
