"""Models: habit and control with a gate between them; an energy with a latent, to be descended."""

from adaptcomp_ext.models import acc
from adaptcomp_ext.models.acc import ACC
from adaptcomp_ext.models.energy import LatentEnergyClassifier

__all__ = ["ACC", "LatentEnergyClassifier", "acc"]
