"""Models: habit and control with a gate between them; an energy with a latent; agents that plan where it pays."""

from adaptcomp_ext.models import acc, agents
from adaptcomp_ext.models.acc import ACC
from adaptcomp_ext.models.energy import LatentEnergyClassifier

__all__ = ["ACC", "LatentEnergyClassifier", "acc", "agents"]
