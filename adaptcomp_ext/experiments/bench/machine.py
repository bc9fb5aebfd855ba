"""What the numbers are measured on."""

from __future__ import annotations

import ctypes
import getpass
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import adaptcomp_ext as ac

__all__ = ["describe", "heap_bytes", "keep_freed_memory", "separate_compiled_code", "threads"]

# Options of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

# They bind torch, MKL and oneDNN to a lower instruction set. Of these torch reports its own only.
_TORCH_VARIABLES = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Have torch use this number of threads inside; None: as many as it does."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def separate_compiled_code() -> None:
    """Give what torch.compile keeps on disk a folder of its own under ATEN_CPU_CAPABILITY.

    torch 2.13.0 does not ask for the variable when it finds compiled code again. Code for another instruction
    set computes with vectors of another width: results were wrong, and processes were aborted.
    """
    capability = os.environ.get("ATEN_CPU_CAPABILITY")
    if capability and "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        folder = f"torchinductor_{getpass.getuser()}_{capability}"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), folder)


def keep_freed_memory() -> bool:
    """Have glibc's allocator keep freed memory instead of giving it back; returns whether it will.

    By default it may give memory back whenever the last block of the heap is freed, and the next step then
    takes a page fault for every 4 KB: whether it does depends on where small blocks happen to lie, and
    doubled the time of one baseline or another at random.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)) and bool(mallopt(_M_MMAP_THRESHOLD, 32 << 20))


class _MallInfo(ctypes.Structure):
    """The struct mallinfo2 of glibc's malloc.h."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks")
    _fields_ = tuple((name, ctypes.c_size_t) for name in (*_names, "keepcost"))


def heap_bytes() -> int | None:
    """Return the bytes that this process has allocated from glibc's malloc, or None under another one.

    Tensors on the CPU, what compiled code allocates for itself and autograd's nodes are all in it; Python's
    small objects are not.
    """
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return None
    mallinfo.restype = _MallInfo
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, Any]:
    """Return processor, cores, threads, device, versions and instruction sets."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "machine": {
            "cpu": _cpu_name(),
            "cores": available,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
            "torch_variables": {name: os.environ[name] for name in _TORCH_VARIABLES if name in os.environ},
            "system": platform.system(),
            "build": dict(ac.build_info()),
        },
    }
