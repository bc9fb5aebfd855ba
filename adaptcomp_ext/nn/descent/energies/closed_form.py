"""The base class of energies with kernels that run all steps of a descent in one call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from adaptcomp_ext import _C
from adaptcomp_ext.nn._scripting import refuse_scripting
from adaptcomp_ext.ops._backend import DTYPE_CODES, contiguous
from adaptcomp_ext.ops._checks import describe
from adaptcomp_ext.ops._fused_descent import ClosedForm
from adaptcomp_ext.ops._plain import check_initialized, check_memory, is_dense, plain, plain_or_traced


class ClosedFormEnergy(nn.Module, ABC):
    """An energy that `EnergyDescent` descends in one kernel call, with all steps of every row.

    As a module it is an energy like any other: ``energy(y, *context) -> [n]``, differentiable to any order.
    """

    __prepare_scriptable__ = refuse_scripting

    @abstractmethod
    def closed_form(
        self, y: Tensor, *context: Tensor, dtype: torch.dtype, kernels: bool = False
    ) -> ClosedForm:
        """Return the energy of rows like `y` as its kernels take it.

        All that does not depend on y is computed here.

        Parameters
        ----------
        y, *context : Tensor
            `EnergyDescent` gives plain dense tensors on one device.
        dtype : torch.dtype
            The dtype of the tensors in the result.
        kernels : bool
            Whether kernels are about to read the result: then its tensors are plain and contiguous, and a
            row's bits depend on that row alone.
        """

    def forward(self, y: Tensor, *context: Tensor) -> Tensor:
        """Energies [n] of points [n, dim_y], float32 (float64 for float64 points).

        Parameters
        ----------
        y : Tensor
            [n, dim_y], in the dtype of the energy's own tensors.
        *context : Tensor
            The context that the class asks for.
        """
        form = self.closed_form(y, *context, dtype=y.dtype)
        return form.function(y, *form.tensors)

    @property
    def replaced(self) -> bool:
        """Whether calling the energy does what the kernels would not: a ``forward`` of its own, or a hook."""
        hooks = (self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks)
        return type(self).forward is not ClosedFormEnergy.forward or "forward" in self.__dict__ or any(hooks)


def check_points(y: object, dim: int, name: str, like: object) -> Tensor:
    """Require points [n, dim], in the dtype of `like`, the energy's own tensor `name`."""
    if not isinstance(y, Tensor):
        raise TypeError(f"y: expected a Tensor, got {describe(y)}")
    if y.ndim != 2 or y.shape[1] != dim:
        check_initialized("y", y)
        raise ValueError(f"y: expected shape [rows, {dim}], got {list(y.shape)}")
    if not isinstance(like, Tensor) or like.dtype not in DTYPE_CODES:
        raise TypeError(
            f"{name}: expected a tensor of float32, float64, bfloat16 or float16, got {describe(like)}"
        )
    if y.dtype != like.dtype and not torch.is_autocast_enabled(y.device.type):
        raise TypeError(f"y: expected {like.dtype}, the dtype of the energy, got {y.dtype}")
    return y


def own_tensor(energy: nn.Module, name: str) -> Any:
    """Return an attribute that holds a tensor, faster than by the look-up of `torch.nn.Module`."""
    tensor: Any = energy._parameters.get(name)
    if tensor is None:
        tensor = energy._buffers.get(name)
    return getattr(energy, name) if tensor is None else tensor


def check_own(
    name: str, tensor: Any, shape: tuple[int, ...], y: Tensor, dtype: torch.dtype, kernels: bool
) -> Tensor:
    """Require one of the energy's own tensors to fit points `y`, and return it in `dtype`.

    Its owner may have assigned anything since the energy was made.
    """
    if not (_C.is_ordinary(tensor, shape) and y.is_cpu if kernels else _is_like(tensor, shape, y)):
        tensor = _plain_given(name, tensor, shape, y, kernels)
        if tensor.dtype not in DTYPE_CODES:
            raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}")
    converted: Tensor = tensor if tensor.dtype == dtype else tensor.to(dtype)
    return converted


def _is_like(tensor: Any, shape: tuple[int, ...], y: Tensor) -> bool:
    """Whether torch's operators can take a tensor unchecked. In Python, for torch.compile to trace it."""
    if type(tensor) is nn.Parameter:
        return True  # the operators check it themselves, at every evaluation
    if type(tensor) is not Tensor or tensor.is_nested:
        return False
    return (
        tensor.is_cpu
        and y.is_cpu
        and tensor.dtype in DTYPE_CODES
        and tensor.shape == shape
        and tensor.is_contiguous()
    )


def check_given(
    name: str, tensor: Tensor, shape: tuple[int, ...], y: Tensor, dtype: torch.dtype, kernels: bool
) -> Tensor:
    """Require a tensor that came with points `y` to have a shape and their device; return it in `dtype`."""
    if not kernels or tensor.shape != shape:
        tensor = _plain_given(name, tensor, shape, y, kernels)
    elif not tensor.is_contiguous():
        tensor = tensor.contiguous()
    converted: Tensor = tensor if tensor.dtype == dtype else tensor.to(dtype)
    return converted


def _plain_given(name: str, tensor: object, shape: tuple[int, ...], y: Tensor, kernels: bool) -> Tensor:
    """Require a dense tensor of a shape on the device of `y`; return it plain, contiguous for `kernels`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {describe(tensor)}")
    if type(tensor) is not nn.Parameter:
        tensor = plain_or_traced(name, tensor)
    if tensor.device != y.device:
        raise ValueError(f"{name}: expected a tensor on {y.device} like y, got one on {tensor.device}")
    if not is_dense(tensor):
        raise TypeError(f"{name}: expected a dense tensor, got {describe(tensor)}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if kernels:
        tensor = plain(name, tensor)
        check_memory(name, tensor)  # before torch reads there
        tensor = contiguous(name, tensor)
    return tensor


def check_matrix(name: str, tensor: object) -> tuple[int, int]:
    """Require a dense matrix that is not empty, and return its sizes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {describe(tensor)}")
    if not is_dense(tensor):
        raise TypeError(f"{name}: expected a dense tensor, got {describe(tensor)}")
    if tensor.ndim != 2 or 0 in tensor.shape:
        check_initialized(name, tensor)
        raise ValueError(f"{name}: expected a matrix that is not empty, got shape {list(tensor.shape)}")
    return tensor.shape[0], tensor.shape[1]


def check_number_of_contexts(context: tuple[Tensor, ...], expected: int) -> None:
    """Require the expected number of context tensors."""
    if len(context) != expected:
        raise ValueError(
            f"context: expected {expected} tensor{'' if expected == 1 else 's'}, got {len(context)}"
        )
