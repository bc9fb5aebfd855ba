"""Adaptive computation for PyTorch: easy inputs halt early, hard inputs get more steps, and time is saved.

A batch is B rows. Each row runs a step until it halts; only the active rows are kept, so that a halted row
costs nothing. CPU: tested and measured. CUDA: compiled and run under emulation, not yet on a GPU.
"""

from typing import Any

import torch  # first: the compiled module then shares torch's OpenMP runtime

try:
    import adaptcomp_ext._C as _C
except ModuleNotFoundError as error:
    if error.name != "adaptcomp_ext._C":
        raise
    raise ImportError(
        f"adaptcomp_ext in {__path__[0]} has no module compiled for this Python: install the package with "
        "`pip install .`, and start Python outside the source folder, which hides the installed package."
    ) from None
from adaptcomp_ext import models, ops, reference
from adaptcomp_ext.nn import (
    ACT,
    AdaptiveHalt,
    AllOf,
    AnyOf,
    BatcherStatistics,
    Bernoulli,
    Calibration,
    CarryBlock,
    CarryLoader,
    ComputeCurve,
    Confidence,
    ContinuousBatcher,
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
    QHalt,
    QuadraticEnergy,
    RaceResult,
    SampleError,
    StablePrediction,
    Status,
    Trace,
    VariationalDropout,
    calibrate,
    cells,
    compute_curve,
    export_notes,
    race,
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
        ("base", "avx2" or "avx512"), the widest unless the environment variable
        ``ADAPTCOMP_INSTRUCTION_SET`` named another one when the package was imported; ``cuda``: bool,
        whether CUDA was compiled in; ``cuda_compiler`` and ``cuda_architectures``; ``openmp``: the version
        of the standard, 0 without OpenMP; ``openmp_threads``; ``torch``, ``torch_cuda`` and
        ``torch_threads``: the torch in use.
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
    "AllOf",
    "AnyOf",
    "BatcherStatistics",
    "Bernoulli",
    "Calibration",
    "CarryBlock",
    "CarryLoader",
    "ComputeCurve",
    "Confidence",
    "ContinuousBatcher",
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
    "QHalt",
    "QuadraticEnergy",
    "RaceResult",
    "SampleError",
    "StablePrediction",
    "Status",
    "Trace",
    "VariationalDropout",
    "__version__",
    "build_info",
    "calibrate",
    "cells",
    "compute_curve",
    "export_notes",
    "models",
    "ops",
    "race",
    "reference",
    "reference_kernels",
    "route",
    "shrink",
]
