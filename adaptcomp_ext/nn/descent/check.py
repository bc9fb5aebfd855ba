"""The check that a backward pass of a descent evaluates the energy that the call has descended."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from adaptcomp_ext.nn._snapshot import Snapshot
from adaptcomp_ext.nn.descent.adjoint import Inputs
from adaptcomp_ext.ops._backend import on_cuda


class Check:
    """Compares the evaluations of a backward pass with those of the call.

    They have to have the same energies and the same sources of their graph. Equal bits are not asked for:
    rows that are evaluated in other company may be rounded differently.

    Parameters
    ----------
    snapshot : Snapshot
    typical : Tensor, optional
        Energies whose size rounding errors are compared with. Default: energies are not compared.
    autocast : iterable of torch.dtype
        The dtypes to which autocast rounds within the energy.
    """

    def __init__(
        self, snapshot: Snapshot, typical: Tensor | None, autocast: Iterable[torch.dtype] = ()
    ) -> None:
        self._snapshot = snapshot
        self._typical = typical
        self._autocast = tuple(autocast)
        self._size: Tensor | None = None
        self._rounding = (0.0, 0.0)  # allowed for a whole block, and for a part of one
        self._differs: list[Tensor] = []
        self._sources_checked = False

    def evaluation(
        self, value: Tensor, but: Sequence[Tensor], sources: Inputs, recorded: Tensor | None, partial: bool
    ) -> None:
        """Compare the energies `value` of an evaluation with those `recorded` at the call.

        The first evaluation has its sources checked as well. With `partial`, more rows were evaluated at the
        call.
        """
        if not self._sources_checked:
            self._snapshot.check_sources(value, but, sources, partial)
            self._sources_checked = True
        if recorded is None or recorded.shape[0] == 0 or self._typical is None:
            return
        if value.dtype == recorded.dtype and not on_cuda(value.device) and torch.equal(value, recorded):
            return  # the usual case, in one operation instead of ten
        with torch.no_grad():
            if self._size is None:
                rounding = math.sqrt(max(torch.finfo(d).eps for d in (value.dtype, *self._autocast)))
                typical = self._typical.to(recorded.dtype).abs().nan_to_num(0.0, 0.0)
                self._size = typical.amax().clamp(min=rounding)
                self._rounding = rounding, max(rounding, 0.05)
            allowed = self._rounding[partial] * torch.maximum(self._size, recorded.abs().amax())
            self._differs.append(~((value.to(recorded.dtype) - recorded).abs().amax() <= allowed))

    def done(self) -> None:
        """Raise if an evaluation differed. On CUDA the host waits here."""
        if self._differs and bool(torch.stack(self._differs).any()):
            raise self._snapshot.other_values("energies")
