"""Modules: the halting loop and its policies, descent on an energy, routing, variational dropout."""

from adaptcomp_ext.nn import cells
from adaptcomp_ext.nn.batching import (
    BadSampleError,
    BatcherStatistics,
    CarryBlock,
    CarryLoader,
    ContinuousBatcher,
    SampleError,
)
from adaptcomp_ext.nn.calibration import Calibration, ComputeCurve, calibrate, compute_curve
from adaptcomp_ext.nn.descent.energies import HopfieldEnergy, MLPEnergy, QuadraticEnergy
from adaptcomp_ext.nn.descent.energy_descent import EnergyDescent
from adaptcomp_ext.nn.export_notes import export_notes
from adaptcomp_ext.nn.halting.adaptive_halt import AdaptiveHalt
from adaptcomp_ext.nn.halting.plan import RunPlan
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
from adaptcomp_ext.nn.halting.policy import Decision, Policy, Run, Threshold, View
from adaptcomp_ext.nn.race import RaceResult, race
from adaptcomp_ext.nn.result import EnergyResult, HaltResult, Status, Trace
from adaptcomp_ext.nn.route import route
from adaptcomp_ext.nn.shrinking import shrink
from adaptcomp_ext.nn.variational import VariationalDropout, description_length, sparsity, variational

__all__ = [
    "ACT",
    "AdaptiveHalt",
    "AllOf",
    "AnyOf",
    "BadSampleError",
    "BatcherStatistics",
    "Bernoulli",
    "Calibration",
    "CarryBlock",
    "CarryLoader",
    "ComputeCurve",
    "Confidence",
    "ContinuousBatcher",
    "Convergence",
    "Decision",
    "EnergyDescent",
    "EnergyResult",
    "FixedSteps",
    "HaltResult",
    "HopfieldEnergy",
    "MLPEnergy",
    "Policy",
    "PonderNet",
    "QHalt",
    "QuadraticEnergy",
    "RaceResult",
    "Run",
    "RunPlan",
    "SampleError",
    "StablePrediction",
    "Status",
    "Threshold",
    "Trace",
    "VariationalDropout",
    "View",
    "calibrate",
    "cells",
    "compute_curve",
    "description_length",
    "export_notes",
    "race",
    "route",
    "shrink",
    "sparsity",
    "variational",
]
