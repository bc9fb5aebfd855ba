"""Models: an energy with a latent, to be descended."""

from adaptcomp_ext.models.energy import LatentEnergyClassifier

__all__ = ["LatentEnergyClassifier"]
