"""Tensors as the compiled module takes them: of class ``torch.Tensor`` or ``nn.Parameter``, with memory of their own.

A subclass without a ``__torch_dispatch__`` (an image, an array with units) is such a tensor under another
name: the kernels work on it as a plain tensor, and what comes out as rows of it gets its class back. A
subclass with one (FakeTensor, DTensor, MaskedTensor) computes in a way of its own, on memory that its address
does not show: it is refused by name, except for ``AsyncCollectiveTensor``, the result of a collective that is
under way, which is waited for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_NO_DISPATCH = Tensor.__torch_dispatch__

Kinds = list[type[Tensor]] | None
"""The classes of some tensors; None if all are plain."""


def plain(name: str, tensor: Tensor) -> Tensor:
    """The same values as a ``torch.Tensor`` or ``nn.Parameter``, with its gradient. TypeError where there is no such tensor."""
    kind = type(tensor)
    if kind is Tensor or kind is nn.Parameter:
        return tensor
    return _unwrap(name, tensor)


def resolved(name: str, tensor: Tensor) -> Tensor:
    """`plain`, with the values in memory that torch has left to be negated."""
    tensor = plain(name, tensor)
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def dressed(tensor: Tensor, kind: type[Tensor] | None) -> Tensor:
    """The same tensor as one of class `kind`, as torch itself would return it; None, Tensor, Parameter: as it is."""
    if (
        kind is None
        or kind is Tensor
        or issubclass(kind, nn.Parameter)
        or kind.__torch_dispatch__ is not _NO_DISPATCH
    ):
        return tensor
    return tensor.as_subclass(kind)


def dress(tensors: Sequence[Tensor], kinds: Kinds) -> Sequence[Tensor]:
    """Each as one of its class."""
    return tensors if kinds is None else [dressed(t, kind) for t, kind in zip(tensors, kinds, strict=True)]


def kinds_of(tensors: Sequence[object]) -> Kinds:
    """Their classes."""
    for tensor in tensors:
        kind = type(tensor)
        if kind is not Tensor and kind is not nn.Parameter:
            return [type(t) for t in tensors]  # type: ignore[misc]
    return None


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor is an array of numbers: not sparse, nested or quantized."""
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized


def is_released(tensor: Tensor) -> bool:
    """Whether the storage of a plain tensor was resized to nothing, as ``untyped_storage().resize_(0)`` does."""
    try:
        if tensor.data_ptr() or not tensor.numel():
            return False
    except RuntimeError:
        return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # those are for the reference
    return not (tensor.is_meta or tensor._is_zerotensor() or torch._is_functional_tensor(tensor))


def check_memory(name: str, tensor: Tensor) -> None:
    """Require of a plain tensor that its storage was not resized to nothing: torch's own operators would read there."""
    if is_released(tensor):
        _refuse(name, tensor)


def check_initialized(name: str, tensor: Tensor) -> None:
    """Require that a tensor is no parameter of a lazy module that has no shape yet: torch would raise at its sizes."""
    if is_lazy(tensor):
        _refuse(name, tensor)


def has_dispatch(tensor: Tensor) -> bool:
    """Whether the class of a tensor has a ``__torch_dispatch__``."""
    return type(tensor).__torch_dispatch__ is not _NO_DISPATCH


def is_traced(tensor: Tensor) -> bool:
    """Whether this is a tensor of a tracer, which has no values and is only for operators of torch."""
    kind = type(tensor)
    if kind is Tensor or kind is nn.Parameter:
        return False
    return has_dispatch(tensor) and isinstance(tensor, _traced_classes())


def plain_or_traced(name: str, tensor: Tensor) -> Tensor:
    """`plain`, for an operator that tracers know too."""
    return tensor if is_traced(tensor) else plain(name, tensor)


def _traced_classes() -> tuple[type, ...]:
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return FakeTensor, FunctionalTensor


def _unwrap(name: str, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__} {tensor!r}")
    check_initialized(name, tensor)
    if not has_dispatch(tensor):
        with torch._C.DisableTorchFunctionSubclass():
            return tensor.as_subclass(Tensor)
    collectives = sys.modules.get("torch.distributed._functional_collectives")
    if collectives is not None and isinstance(tensor, collectives.AsyncCollectiveTensor):
        # An operation that is no view waits, and autograd sees it.
        return tensor.clone()
    _refuse(name, tensor)


def with_memory(name: str, tensor: Tensor) -> Tensor:
    """`plain`, for a tensor whose address the compiled module could not take."""
    tensor = plain(name, tensor)
    if tensor._is_zerotensor():  # zeros that torch has not written down
        return tensor.clone()
    try:
        found = tensor.data_ptr() != 0 or tensor.numel() == 0
    except Exception as error:
        _refuse(name, tensor, error)
    if not found:
        _refuse(name, tensor)
    return tensor


def _refuse(name: str, tensor: Tensor, cause: Exception | None = None) -> NoReturn:
    raise TypeError(f"{name}: expected a tensor with data, got {_problem(tensor)}") from cause


def _problem(tensor: Tensor) -> str:
    """Why a kernel cannot read a tensor."""
    if is_lazy(tensor):
        return "an uninitialized one of a lazy module"
    if is_traced(tensor):
        return f"a {type(tensor).__name__}, which has a shape and no values (from FakeTensorMode, torch.export or make_fx)"
    if has_dispatch(tensor):
        kind = type(tensor)
        where = "to_local()" if kind.__name__ == "DTensor" else "the plain tensor in it"
        return f"a {kind.__module__}.{kind.__qualname__}, whose __torch_dispatch__ stands between it and its data: pass {where}"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "a wrapper of torch.func (vmap, grad, jvp and their like), which has no memory of its own"
    if torch._is_functional_tensor(tensor):
        return "a wrapper of functionalization, which has no memory of its own"
    if tensor.is_meta:
        return "one on meta"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return f"layout {tensor.layout}"
    return f"a tensor of shape {list(tensor.shape)}, {tensor.dtype}, on {tensor.device} whose storage was released"
