"""Energies with kernels for whole descents."""

from adaptcomp_ext.nn.energies.closed_form import ClosedFormEnergy
from adaptcomp_ext.nn.energies.hopfield import HopfieldEnergy
from adaptcomp_ext.nn.energies.mlp import MLPEnergy
from adaptcomp_ext.nn.energies.quadratic import QuadraticEnergy

__all__ = ["ClosedFormEnergy", "HopfieldEnergy", "MLPEnergy", "QuadraticEnergy"]
