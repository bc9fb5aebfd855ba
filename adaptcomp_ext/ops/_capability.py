"""Whether the CUDA code of this build runs on a device."""

from __future__ import annotations

import functools
import re

import torch

from adaptcomp_ext import _C

__all__ = ["check_capability", "runs_on"]


@functools.cache
def check_capability(index: int) -> None:
    """Check, at the first use of the CUDA device with this index, that the kernels were compiled for it.

    Raises
    ------
    RuntimeError
        If no architecture of this build runs on the device. The message names the option of the build.
    """
    architectures = _C.build_info()["cuda_architectures"]
    capability = torch.cuda.get_device_capability(index)
    if architectures and not runs_on(architectures, capability):
        name = torch.cuda.get_device_name(index)
        raise RuntimeError(
            f"device cuda:{index}: expected a device that the CUDA kernels were compiled for "
            f"({architectures}), got {name} with compute capability {capability[0]}.{capability[1]}; "
            "build the package again with "
            f"pip install . -C cmake.define.CMAKE_CUDA_ARCHITECTURES={capability[0]}{capability[1]}"
        )


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code that was compiled for CMake's `architectures` runs on a device of this compute capability.

    Machine code (``NN-real``) runs on devices of the same major version with the same or a later minor
    version, PTX (``NN-virtual``) on the same and all later devices, and ``NN`` has both. Code for an
    architecture with a letter (``90a``) runs on exactly that one. Words such as ``all`` and ``native`` are
    taken to fit.
    """
    major, minor = capability
    for architecture in architectures.split(","):
        match = re.fullmatch(r"(\d+)(\d)([a-z]?)(-real|-virtual)?", architecture)
        if match is None:
            return True
        built = int(match[1]), int(match[2])
        if match[3]:
            fits = built == capability
        elif match[4] == "-virtual":
            fits = built <= capability
        else:
            machine_code = built[0] == major and built[1] <= minor
            fits = machine_code or (match[4] is None and built <= capability)
        if fits:
            return True
    return False
