"""The choice between kernels and reference, and the passing of tensors to the compiled module."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from adaptcomp_ext import _C
from adaptcomp_ext.ops._capability import check_capability
from adaptcomp_ext.ops._plain import exporting, plain, with_memory

_on_reference: contextvars.ContextVar[bool] = contextvars.ContextVar("adaptcomp_reference", default=False)

CPU: int = _C.CPU
HAS_CUDA: bool = _C.build_info()["cuda"]
EMULATED: bool = _C.EMULATED
"""Whether the CUDA kernels were compiled for the host, for tests (tests/cuda_host). CPU tensors then take all
code paths of CUDA tensors."""

# The codes of csrc/common/dtype.h.
OPAQUE = 4
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def introduce_torch(exchange: object) -> None:
    """Give the compiled module, which includes no torch headers, the objects through which it uses torch.

    `exchange` is DLPack's table of functions, which says what a tensor is in one call. With None, as with
    torch before 2.10, the module reads one attribute of a tensor after the other.
    """
    _C.use_torch(
        *(Tensor, nn.Parameter, with_memory, torch.empty, getattr(torch._C, "_storage_Use_Count", None)),
        exchange,
        [*DTYPE_CODES, torch.int64, torch.int8, torch.bool, torch.uint8, torch.int32, torch.int16],
    )


EXCHANGE: object = getattr(Tensor, "__dlpack_c_exchange_api__", None)
introduce_torch(EXCHANGE)


@contextlib.contextmanager
def reference_kernels() -> Iterator[None]:
    """Run the ``with`` block on the plain PyTorch reference instead of the compiled kernels.

    Applies to the current thread or task only, and covers backward passes whose forward ran inside the block.
    A function compiled with ``torch.compile`` runs on the kernels wherever it is called.

    Examples
    --------
    >>> with ac.reference_kernels():
    ...     expected = halt(state)
    """
    token = _on_reference.set(True)
    try:
        yield
    finally:
        _on_reference.reset(token)


def on_reference() -> bool:
    """Whether `reference_kernels` is active; False while torch.compile traces, and True in an export.

    An exported program has operators of torch alone, so that it runs where this package is not.
    """
    # The first is a constant to the compiler, which cannot trace the look-up of a context variable.
    if torch.compiler.is_dynamo_compiling():
        return exporting()
    return (_on_reference.get() and not torch.compiler.is_compiling()) or exporting()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of `dtype` are accumulated: float32 or wider."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_code(dtype: torch.dtype) -> int:
    """Return the code of a dtype that the kernels compute with; ``OPAQUE`` for one that they only copy."""
    return DTYPE_CODES.get(dtype, OPAQUE)


def row_size(tensor: Tensor) -> int:
    """Return the number of elements of one row, also of an empty batch."""
    size = 1
    for extent in tensor.shape[1:]:
        size *= extent
    return size


def is_differentiable(tensor: Tensor) -> bool:
    """Whether a tensor of this dtype can have a gradient."""
    return tensor.is_floating_point() or tensor.is_complex()


def needs_grad(tensors: Iterable[Tensor]) -> bool:
    """Whether a result computed from `tensors` now needs a gradient."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return False


def on_cuda(device: torch.device) -> bool:
    """Whether tensors on `device` go through the CUDA kernels, for which the host does not wait."""
    return EMULATED or device.type == "cuda"


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make the CUDA device `device` the current one inside a ``with`` block."""
    return contextlib.nullcontext() if EMULATED else torch.cuda.device(device)


def capturing() -> bool:
    """Whether calls are being captured in a CUDA graph."""
    return not EMULATED and torch.cuda.is_current_stream_capturing()


_CPU_DEVICE = torch.device("cpu")
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def place(device: torch.device) -> tuple[int, int]:
    """Return device index and current stream, the last two integers of every call."""
    if EMULATED:
        return 0, 0
    if device == _CPU_DEVICE:
        return CPU, 0
    index = device.index if device.index is not None else torch.cuda.current_device()
    check_capability(index)
    stream = _raw_stream(index) if _raw_stream else torch.cuda.current_stream(index).cuda_stream
    return index, stream


def contiguous(name: str, tensor: Tensor) -> Tensor:
    """Return a plain contiguous tensor with its values in memory, as the compiled module keeps it."""
    kind = type(tensor)
    if kind is not Tensor and kind is not nn.Parameter:
        tensor = plain(name, tensor)
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor.contiguous()
