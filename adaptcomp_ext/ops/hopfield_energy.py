"""The Hopfield energy in the form that its descent kernels take."""

from __future__ import annotations

from torch import Tensor

from adaptcomp_ext import reference
from adaptcomp_ext.ops._fused_descent import ClosedForm, EnergyKernels

KERNELS = EnergyKernels("hopfield")


def hopfield_closed_form(patterns: Tensor, beta: Tensor) -> ClosedForm:
    """Return the closed form with the tensors of `reference.hopfield_energy`."""
    return ClosedForm(KERNELS, reference.hopfield_energy, (patterns, beta), sizes=(patterns.shape[0],))
