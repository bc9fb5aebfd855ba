"""Contenders under ``torch.compile``: whether there is a compiler, what it has compiled, and how long that took."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["CompileCache", "why_not"]


def _double(x: torch.Tensor) -> torch.Tensor:
    return x + x


def why_not(device: torch.device) -> str | None:
    """Return None if `torch.compile` works for the device, else the first line of what it says."""
    try:
        torch.compile(_double)(torch.ones(8, device=device))
    except Exception as error:
        # Whatever is missing, a C++ compiler, Triton, or a Python that Dynamo knows, says so in an exception
        # of its own.
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


class CompileCache:
    """Compiled steps of one model at a time.

    TorchDynamo keeps its code per function and gives up after a few recompilations, hence the reset whenever
    the model changes.
    """

    def __init__(self) -> None:
        self._key: object = None
        self._modules: dict[str, Callable[..., Any]] = {}
        self.seconds: dict[str, float] = {}

    def get(self, key: object, name: str, module: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """Return the compiled form of the module, which belongs to the model ``key``; options as for `torch.compile`."""
        if key != self._key:
            torch._dynamo.reset()
            self._key, self._modules = key, {}
        if name not in self._modules:
            self._modules[name] = torch.compile(module, **options)
        return self._modules[name]

    def first_call(self, label: str, call: Callable[[], Any]) -> None:
        """Run what may have to compile, and book the time if it did: that takes far over a tenth of a second."""
        begin = time.perf_counter()
        call()
        seconds = time.perf_counter() - begin
        begin = time.perf_counter()
        call()
        compiling = seconds - (time.perf_counter() - begin)
        if compiling > 0.1:
            self.seconds[label] = self.seconds.get(label, 0.0) + compiling
