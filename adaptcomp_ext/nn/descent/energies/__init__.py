"""Energies with kernels for whole descents."""

from adaptcomp_ext.nn.descent.energies.closed_form import ClosedFormEnergy
from adaptcomp_ext.nn.descent.energies.hopfield import HopfieldEnergy
from adaptcomp_ext.nn.descent.energies.mlp import MLPEnergy
from adaptcomp_ext.nn.descent.energies.quadratic import QuadraticEnergy

__all__ = ["ClosedFormEnergy", "HopfieldEnergy", "MLPEnergy", "QuadraticEnergy"]
