"""Modules: the halting loop and its policies, descent on an energy, and routing."""

from adaptcomp_ext.nn.adaptive_halt import AdaptiveHalt
from adaptcomp_ext.nn.energies import HopfieldEnergy, MLPEnergy, QuadraticEnergy
from adaptcomp_ext.nn.energy_descent import EnergyDescent
from adaptcomp_ext.nn.policies import ACT, Confidence, FixedSteps, PonderNet
from adaptcomp_ext.nn.policy import Decision, Policy, Run, View
from adaptcomp_ext.nn.result import EnergyResult, HaltResult, Status, Trace
from adaptcomp_ext.nn.route import route

__all__ = [
    "ACT",
    "AdaptiveHalt",
    "Confidence",
    "Decision",
    "EnergyDescent",
    "EnergyResult",
    "FixedSteps",
    "HaltResult",
    "HopfieldEnergy",
    "MLPEnergy",
    "Policy",
    "PonderNet",
    "QuadraticEnergy",
    "Run",
    "Status",
    "Trace",
    "View",
    "route",
]
