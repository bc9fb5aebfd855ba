"""Adaptive computational control: habit runs for every row, control only for rows where a gate calls it."""

from adaptcomp_ext.models.acc.effort import Effort
from adaptcomp_ext.models.acc.features import confidence_features, normalised_entropy
from adaptcomp_ext.models.acc.gates import (
    AlwaysGate,
    BatchMeanGate,
    EntropyGate,
    Gate,
    MarginGate,
    NeverGate,
    RandomGate,
)
from adaptcomp_ext.models.acc.learned_gates import KLGate, LearnedGate, ValueGate
from adaptcomp_ext.models.acc.loss import ACCLoss, Objective
from adaptcomp_ext.models.acc.model import ACC, ACCResult

__all__ = [
    "ACC",
    "ACCLoss",
    "ACCResult",
    "AlwaysGate",
    "BatchMeanGate",
    "Effort",
    "EntropyGate",
    "Gate",
    "KLGate",
    "LearnedGate",
    "MarginGate",
    "NeverGate",
    "Objective",
    "RandomGate",
    "ValueGate",
    "confidence_features",
    "normalised_entropy",
]
