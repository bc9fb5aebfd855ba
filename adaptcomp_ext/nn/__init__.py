"""Modules: the halting loop and its policies."""

from adaptcomp_ext.nn.adaptive_halt import AdaptiveHalt
from adaptcomp_ext.nn.policies import ACT, Confidence, FixedSteps, PonderNet
from adaptcomp_ext.nn.policy import Decision, Policy, Run, View
from adaptcomp_ext.nn.result import HaltResult, Status, Trace

__all__ = [
    "ACT",
    "AdaptiveHalt",
    "Confidence",
    "Decision",
    "FixedSteps",
    "HaltResult",
    "Policy",
    "PonderNet",
    "Run",
    "Status",
    "Trace",
    "View",
]
