"""Models: networks with habit, gate and control; a classifier that descends an energy; agents that plan."""

from adaptcomp_ext.models import acc, agents
from adaptcomp_ext.models.acc import ACC
from adaptcomp_ext.models.energy import LatentEnergyClassifier

__all__ = ["ACC", "LatentEnergyClassifier", "acc", "agents"]
