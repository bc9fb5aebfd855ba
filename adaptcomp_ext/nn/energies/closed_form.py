"""What an energy offers that has kernels for whole descents."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from adaptcomp_ext.ops._checks import describe
from adaptcomp_ext.ops._whole_descent import ClosedForm


class ClosedFormEnergy(nn.Module, ABC):
    """An energy whose descents `EnergyDescent` runs in one kernel call, all steps of every row.

    As a module it is an energy like any other: ``energy(y, *context) -> [n]``, differentiable to any order.
    """

    @abstractmethod
    def closed_form(self, y: Tensor, *context: Tensor, dtype: torch.dtype) -> ClosedForm:
        """The energy of rows like `y` as its kernels take it, in a dtype. What does not depend on y is computed here."""

    def forward(self, y: Tensor, *context: Tensor) -> Tensor:
        """Energies [n] of points [n, dim_y].

        Parameters
        ----------
        y : Tensor
            [n, dim_y], in the dtype of the energy's own tensors.
        *context : Tensor
            What the class says.
        """
        form = self.closed_form(y, *context, dtype=y.dtype)
        return form.function(y, *form.tensors)

    @property
    def replaced(self) -> bool:
        """Whether something else stands in the place of the energy's arithmetic, which the kernels would not see."""
        hooks = (self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks)
        return type(self).forward is not ClosedFormEnergy.forward or "forward" in self.__dict__ or any(hooks)


def check_points(y: object, dim: int, like: Tensor) -> Tensor:
    """Require points [n, dim] in the dtype and on the device of `like`."""
    if not isinstance(y, Tensor):
        raise TypeError(f"y: expected a Tensor, got {describe(y)}")
    if y.dim() != 2 or y.shape[1] != dim:
        raise ValueError(f"y: expected shape [rows, {dim}], got {list(y.shape)}")
    if y.dtype != like.dtype and not torch.is_autocast_enabled(y.device.type):
        raise TypeError(f"y: expected {like.dtype}, the dtype of the energy, got {y.dtype}")
    if y.device != like.device:
        raise ValueError(f"y: expected a tensor on {like.device}, where the energy is, got one on {y.device}")
    return y


def check_number_of_contexts(context: tuple[Tensor, ...], expected: int) -> None:
    """Require so many context tensors."""
    if len(context) != expected:
        raise ValueError(f"context: expected {expected} tensor{'' if expected == 1 else 's'}, got {len(context)}")


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype. Asking is cheaper than converting what is right already."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
