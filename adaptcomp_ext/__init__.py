"""Adaptive computation for PyTorch: easy inputs halt early, hard inputs get more steps, and time is saved.

A batch is B rows. Each row runs a step until it halts; only the active rows are kept, so that a halted row
costs nothing. CPU: tested and measured. CUDA: compiled and run under emulation, not yet on a GPU.
"""

from typing import Any

import torch  # first: the compiled module then shares torch's OpenMP runtime

try:
    from adaptcomp_ext import _C
except ImportError as error:
    raise ImportError(
        "adaptcomp_ext's compiled module could not be loaded: install the package with `pip install .` "
        "and start Python outside the source folder, whose uncompiled sources would be imported instead."
    ) from error
from adaptcomp_ext import models, ops, reference
from adaptcomp_ext.nn import (
    ACT,
    AdaptiveHalt,
    Confidence,
    Convergence,
    Decision,
    EnergyDescent,
    EnergyResult,
    FixedSteps,
    HaltResult,
    HopfieldEnergy,
    MLPEnergy,
    Policy,
    PonderNet,
    QuadraticEnergy,
    Status,
    Trace,
    VariationalDropout,
    cells,
    route,
    shrink,
)
from adaptcomp_ext.ops import reference_kernels

__version__ = "0.1.0"


def build_info() -> dict[str, Any]:
    """Describe the compiled module and the torch it runs with.

    Returns
    -------
    dict
        ``version``; ``compiler``; ``instruction_set``: the one that the CPU kernels use on this machine
        ("base", "avx2" or "avx512"); ``cuda``: bool, whether CUDA was compiled in; ``cuda_compiler`` and
        ``cuda_architectures``; ``openmp``: the version of the standard, 0 without OpenMP; ``openmp_threads``;
        ``torch``, ``torch_cuda`` and ``torch_threads``: the torch in use.
    """
    return {
        **_C.build_info(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "torch_threads": torch.get_num_threads(),
    }


__all__ = [
    "ACT",
    "AdaptiveHalt",
    "Confidence",
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
    "QuadraticEnergy",
    "Status",
    "Trace",
    "VariationalDropout",
    "__version__",
    "build_info",
    "cells",
    "models",
    "ops",
    "reference",
    "reference_kernels",
    "route",
    "shrink",
]
