"""Plain tensors, as the compiled module takes them: ``torch.Tensor`` or ``nn.Parameter`` with memory.

A subclass without a ``__torch_dispatch__`` (an image, an array with units) is treated as a plain tensor, and
rows copied from it get its class back. A subclass with a ``__torch_dispatch__`` (FakeTensor, DTensor,
MaskedTensor) may keep its values elsewhere than at its address: it raises TypeError, except for
``AsyncCollectiveTensor``, the result of a collective that is under way, which is waited for.
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


TELLS_EXPORT = hasattr(torch.compiler, "is_exporting")
"""Whether torch tells an export from a compilation."""


def exporting() -> bool:
    """Whether `torch.export` records: tensors have no values, and have to be taken for plain ones."""
    return TELLS_EXPORT and torch.compiler.is_exporting()


def plain(name: str, tensor: Tensor) -> Tensor:
    """Return the values as a ``torch.Tensor`` or ``nn.Parameter``, differentiably, or raise TypeError."""
    kind = type(tensor)
    if kind is Tensor or kind is nn.Parameter:
        return tensor
    return _unwrap(name, tensor)


def resolved(name: str, tensor: Tensor) -> Tensor:
    """Return the plain tensor, with a pending negation of torch carried out."""
    tensor = plain(name, tensor)
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def dressed(tensor: Tensor, kind: type[Tensor] | None) -> Tensor:
    """Return the tensor in class `kind`, as torch's own ops do; unchanged for None, Tensor and Parameter."""
    if (
        kind is None
        or kind is Tensor
        or issubclass(kind, nn.Parameter)
        or kind.__torch_dispatch__ is not _NO_DISPATCH
    ):
        return tensor
    return tensor.as_subclass(kind)


def dress(tensors: Sequence[Tensor], kinds: Kinds) -> Sequence[Tensor]:
    """Return each tensor in its class."""
    return tensors if kinds is None else [dressed(t, kind) for t, kind in zip(tensors, kinds, strict=True)]


def kinds_of(tensors: Sequence[object]) -> Kinds:
    """Return the classes of the tensors; None if all are plain."""
    for tensor in tensors:
        kind = type(tensor)
        if kind is not Tensor and kind is not nn.Parameter:
            return [type(t) for t in tensors]  # type: ignore[misc]
    return None


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor is an array of numbers: not sparse, nested or quantized."""
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized


def is_released(tensor: Tensor) -> bool:
    """Whether a plain tensor's storage was released, as by ``untyped_storage().resize_(0)``."""
    try:
        if tensor.data_ptr() or not tensor.numel():
            return False
    except RuntimeError:
        return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # the reference serves wrappers
    return not (tensor.is_meta or tensor._is_zerotensor() or torch._is_functional_tensor(tensor))


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor is dense and has its values at its address, so that it can be copied."""
    return not has_dispatch(tensor) and is_dense(tensor) and not tensor.is_meta and not is_released(tensor)


def check_memory(name: str, tensor: Tensor) -> None:
    """Require that a plain tensor's storage was not released: torch's operators would read it."""
    if not exporting() and is_released(tensor):
        _refuse(name, tensor)


def check_initialized(name: str, tensor: Tensor) -> None:
    """Require that a tensor is not a parameter of an uninitialized lazy module, which has no shape."""
    if is_lazy(tensor):
        _refuse(name, tensor)


def has_dispatch(tensor: Tensor) -> bool:
    """Whether the class of a tensor has a ``__torch_dispatch__``."""
    return type(tensor).__torch_dispatch__ is not _NO_DISPATCH


def is_traced(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a tracer: it has no values, and only registered operators take it."""
    kind = type(tensor)
    if kind is Tensor or kind is nn.Parameter:
        return False
    return has_dispatch(tensor) and isinstance(tensor, _traced_classes())


def plain_or_traced(name: str, tensor: Tensor) -> Tensor:
    """Return the plain tensor, or a tracer's tensor as it is, for a registered operator."""
    return tensor if is_traced(tensor) else plain(name, tensor)


def _traced_classes() -> tuple[type, ...]:
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return FakeTensor, FunctionalTensor


def _unwrap(name: str, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__} {tensor!r}")
    check_initialized(name, tensor)
    if exporting() and is_traced(tensor):
        return tensor
    if not has_dispatch(tensor):
        with torch._C.DisableTorchFunctionSubclass():
            return tensor.as_subclass(Tensor)
    collectives = sys.modules.get("torch.distributed._functional_collectives")
    if collectives is not None and isinstance(tensor, collectives.AsyncCollectiveTensor):
        # An operation other than a view waits for the collective, and autograd records it.
        complete: Tensor = tensor.clone()
        return complete
    _refuse(name, tensor)


def with_memory(name: str, tensor: Tensor) -> Tensor:
    """Return a plain tensor with an address, for one whose address the compiled module could not take."""
    tensor = plain(name, tensor)
    if tensor._is_zerotensor():  # torch has not allocated its zeros
        complete: Tensor = tensor.clone()
        return complete
    try:
        has_address = tensor.data_ptr() != 0 or tensor.numel() == 0
    except Exception as error:
        _refuse(name, tensor, error)
    if not has_address:
        _refuse(name, tensor)
    return tensor


def _refuse(name: str, tensor: Tensor, cause: Exception | None = None) -> NoReturn:
    raise TypeError(f"{name}: expected a tensor with data, got {_problem(tensor)}") from cause


def _problem(tensor: Tensor) -> str:
    """Say why a kernel cannot read a tensor."""
    if is_lazy(tensor):
        return "an uninitialized one of a lazy module"
    if is_traced(tensor):
        kind = type(tensor).__name__
        return f"a {kind}, which has a shape and no values (from FakeTensorMode, torch.export or make_fx)"
    if has_dispatch(tensor):
        name = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
        instead = "to_local()" if type(tensor).__name__ == "DTensor" else "the plain tensor in it"
        return f"a {name}, whose __torch_dispatch__ stands between it and its data: pass {instead}"
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
    shape = list(tensor.shape)
    return f"a tensor of shape {shape}, {tensor.dtype}, on {tensor.device} whose storage was released"
