"""Energies with kernels for fused descents: the public names of `adaptcomp_ext.nn.descent.energies`."""

from adaptcomp_ext.nn.descent.energies import ClosedFormEnergy, HopfieldEnergy, MLPEnergy, QuadraticEnergy

__all__ = ["ClosedFormEnergy", "HopfieldEnergy", "MLPEnergy", "QuadraticEnergy"]
