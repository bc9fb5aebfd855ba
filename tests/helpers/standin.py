"""A second device for a machine that has none: which tensors live on it, and what that forbids.

Memory and arithmetic are the CPU's. Tensors that are made on the CPU, or moved there, are marked, and so is
what is computed from them alone; all others live on the device. What CUDA refuses is refused: an operation on
both kinds, NumPy's view of a tensor of the device, numbers for the device from a generator of the CPU. The
CUDA kernels that are compiled for the host (`tests.cuda_host`) take any tensor of the CPU for one of a GPU;
with this, torch's own operations do the same. What a function of torch calls within, such as a backward pass,
is not looked at.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
import torch._dynamo  # the optimisers import it, and it looks at what `StandIn` replaces
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves

__all__ = ["NAME", "StandIn", "WrongDevice"]

NAME = "cpu:0"
"""A valid name of the CPU, whose index tells it from "cpu"."""
DEVICE = torch.device(NAME)
CPU = torch.device("cpu")
MAKE = _device_constructors()
LIKE = {
    f
    for name in ("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor")
    if (f := getattr(Tensor, name))
}
COPIES = {Tensor.copy_, torch._has_compatible_shallow_copy_type}
TAKES_ANY_INDEX = {Tensor.__getitem__, Tensor.__setitem__}
READS = {Tensor.device.__get__}  # type: ignore[attr-defined]
GIVES_DATA = {Tensor.data.__set__}  # type: ignore[attr-defined]
MOVES = {Tensor.to, Tensor.cpu}
TO_NUMPY = {Tensor.numpy, Tensor.__array__}


class WrongDevice(RuntimeError):
    """What CUDA would have refused."""


class Generator(torch.Generator):
    """A generator that knows for which device it was asked."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        _for_device[made] = torch.device(device)
        return made


_for_device: weakref.WeakKeyDictionary[torch.Generator, torch.device] = weakref.WeakKeyDictionary()


def _behind(tensor: Tensor) -> bool:
    return getattr(tensor, "_left_behind", False)


def _mark(value: Any, behind: bool) -> Any:
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            leaf._left_behind = behind
    return value


class StandIn(TorchFunctionMode):
    """Have ``cpu:0`` be a device of its own inside the ``with`` block.

    Attributes
    ----------
    made : int
        Number of tensors that were made on the device or moved there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __enter__(self) -> StandIn:
        # No function mode sees these three.
        self._kept = torch.Generator, torch.from_numpy, Tensor._make_subclass
        _, from_numpy, make_subclass = self._kept

        def marked(array: np.ndarray) -> Tensor:
            return _mark(from_numpy(array), True)

        def subclass(cls: Any, data: Tensor, requires_grad: bool = False, **options: Any) -> Tensor:
            return _mark(make_subclass(cls, data, requires_grad, **options), _behind(data))

        torch.Generator, torch.from_numpy = Generator, marked
        Tensor._make_subclass = staticmethod(subclass)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.Generator, torch.from_numpy, Tensor._make_subclass = self._kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in READS:
            found = func(*args)
            return CPU if _behind(args[0]) or found.type != "cpu" else DEVICE
        if func in GIVES_DATA:
            _mark(args[0], _behind(args[1]))
            return func(*args)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in TO_NUMPY and not _behind(args[0]) and not kwargs.get("force", False):
            raise WrongDevice("NumPy was given a tensor of the device: .cpu() first")
        if func in MOVES:
            return self._move(func, args, kwargs)
        named = kwargs.get("device")
        named = None if named is None else torch.device(named)
        if func in MAKE or func in LIKE:
            return self._make(func, args, kwargs, named)
        here = [t for t in tensors if not _behind(t)]
        left = [t for t in tensors if _behind(t)]
        if func not in COPIES:
            strangers = left
            if func in TAKES_ANY_INDEX and not _behind(args[0]):
                strangers = [t for t in left if t.dtype not in (torch.int64, torch.bool)]
            if here and any(t.dim() for t in strangers):
                shapes = [list(t.shape) for t in strangers]
                raise WrongDevice(f"{func.__name__}: tensors on the device, and on the CPU {shapes}")
        self._check_generator(func, kwargs, bool(here))
        result = func(*args, **kwargs)
        behind = not here and bool(left)
        if func in COPIES or (result is not None and any(result is t for t in tensors)):
            return result
        if named is not None:
            behind = named == CPU
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (behind or _behind(leaf)):
                leaf._left_behind = behind
        return result

    def _make(self, func: Any, args: Any, kwargs: dict[str, Any], named: torch.device | None) -> Any:
        like = args[0] if func in LIKE else None
        behind = (like is None or _behind(like)) if named is None else named == CPU
        source = args[0] if args else kwargs.get("data")
        if func in (torch.as_tensor, torch.asarray) and isinstance(source, Tensor):
            return self._move(Tensor.to, (source, CPU if behind else DEVICE), {})
        self._check_generator(func, kwargs, not behind)
        self.made += not behind
        return _mark(func(*args, **kwargs), behind)

    def _move(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensor = args[0]
        wanted = CPU if func is Tensor.cpu else None
        rest = list(args[1:])
        for i, value in enumerate(rest):
            if isinstance(value, Tensor):  # .to(other)
                wanted = CPU if _behind(value) else DEVICE
            elif isinstance(value, (str, torch.device)):
                wanted = torch.device(value)
                rest[i] = CPU
        if "device" in kwargs and kwargs["device"] is not None:
            wanted = torch.device(kwargs["device"])
            kwargs["device"] = CPU
        result = func(tensor, *rest, **kwargs)
        if wanted is None or (wanted == CPU) == _behind(tensor):
            return _mark(result, _behind(tensor)) if result is not tensor else result
        if result is tensor or result.data_ptr() == tensor.data_ptr():
            result = result.clone()
        self.made += wanted != CPU
        return _mark(result, wanted == CPU)

    def _check_generator(self, func: Any, kwargs: dict[str, Any], here: bool) -> None:
        generator = kwargs.get("generator")
        if generator is not None and (_for_device.get(generator, CPU) == DEVICE) != here:
            raise WrongDevice(f"{func.__name__}: the generator belongs to another device than the numbers")
