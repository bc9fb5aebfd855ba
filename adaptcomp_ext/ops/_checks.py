"""Argument checks shared by the ops. Each error names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaptcomp_ext.ops._backend import DTYPE_CODES, HAS_CUDA
from adaptcomp_ext.ops._plain import is_dense, plain_or_traced

_STRIDED = torch.strided


def describe(value: object) -> str:
    """Describe a value for an error message: shape and dtype for a tensor, type and value otherwise."""
    if isinstance(value, Tensor):
        if value.is_nested:
            return "a nested tensor"
        if torch.nn.parameter.is_lazy(value):
            return "an uninitialized parameter"
        if value.layout != torch.strided:
            return f"layout {value.layout}"
        if value.is_quantized:
            return f"a quantized tensor of {value.dtype}"
        return f"a tensor of shape {list(value.shape)}, {value.dtype}, on {value.device}"
    return f"{type(value).__name__} {value!r}"


def check_tensor(name: str, value: object) -> Tensor:
    """Require a dense tensor on a device that this build serves, and return it as a plain tensor."""
    if (  # the usual case first: in a call of few rows every test costs
        type(value) is Tensor
        and value.is_cpu
        and value.layout is _STRIDED
        and not value.is_nested
        and not value.is_quantized
    ):
        return value
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {describe(value)}")
    if type(value) is not Tensor:
        value = plain_or_traced(name, value)
    if not is_dense(value):
        raise TypeError(f"{name}: expected a dense tensor, got {describe(value)}")
    check_device(name, value.device)
    return value


def check_device(name: str, device: torch.device) -> None:
    """Require the CPU, or CUDA where it was compiled in."""
    kind = device.type  # each access makes a new string
    if kind == "cuda" and not HAS_CUDA:
        raise RuntimeError(
            f"{name} is on {device}, but adaptcomp_ext was built without CUDA: reinstall it on a machine "
            "with nvcc, or move the tensors to the CPU."
        )
    if kind not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{name}: expected a CPU or CUDA tensor, got one on {device}")


def check_rows(
    name: str, value: object, rows: int, device: torch.device, position: int | None = None
) -> Tensor:
    """Require a tensor with `rows` rows on `device`; `position` is its index in a sequence `name`."""
    if (  # the usual case first, as in `check_tensor`
        type(value) is Tensor
        and value.layout is _STRIDED
        and value.device == device
        and value.is_cpu
        and not value.is_nested
        and not value.is_quantized
        and value.dim()
        and value.shape[0] == rows
    ):
        return value
    if position is not None:
        name = f"{name}[{position}]"
    tensor = check_tensor(name, value)
    if tensor.dim() == 0 or tensor.shape[0] != rows:
        raise ValueError(
            f"{name}: expected {rows} rows in the first dimension, got shape {list(tensor.shape)}"
        )
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")
    return tensor


def check_row_scalars(name: str, value: object, rows: int | None = None) -> Tensor:
    """Require a floating-point tensor [rows]."""
    tensor = check_floating(name, value)
    if tensor.dim() != 1 or (rows is not None and tensor.shape[0] != rows):
        expected = "[rows]" if rows is None else f"[{rows}]"
        raise ValueError(f"{name}: expected shape {expected}, got {list(tensor.shape)}")
    return tensor


def check_floating(name: str, value: object) -> Tensor:
    """Require float32, float64, bfloat16 or float16."""
    tensor = check_tensor(name, value)
    if tensor.dtype not in DTYPE_CODES:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}")
    return tensor


def check_int(name: str, value: object, least: int, *, bounded: bool = True) -> int:
    """Require an int (no bool) of at least `least`; it has to fit in 64 bits, unless ``bounded=False``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {describe(value)}")
    if value < least:
        raise ValueError(f"{name}: expected an int >= {least}, got {value}")
    if bounded and value >= 2**63:
        raise ValueError(f"{name}: expected an int < 2**63, got {value}")
    return value


def check_steps(step: int, min_steps: int, max_steps: int) -> None:
    """Require 1 <= step <= max_steps and 1 <= min_steps <= max_steps."""
    if (
        type(step) is type(min_steps) is type(max_steps) is int
        and 1 <= step <= max_steps
        and 1 <= min_steps <= max_steps < 2**63
    ):
        return
    check_int("max_steps", max_steps, 1)
    check_int("min_steps", min_steps, 1)
    check_int("step", step, 1)
    if min_steps > max_steps:
        raise ValueError(f"min_steps: expected at most max_steps = {max_steps}, got {min_steps}")
    if step > max_steps:
        raise ValueError(f"step: expected at most max_steps = {max_steps}, got {step}")


def check_fraction(name: str, value: object, *, zero: bool = False) -> float:
    """Require a number in (0, 1], or in [0, 1] with ``zero=True``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    number = float(value)
    if not (0.0 < number <= 1.0 or (zero and number == 0.0)):
        raise ValueError(f"{name}: expected a number in {'[' if zero else '('}0, 1], got {value}")
    return number


def check_log_probability(name: str, value: object) -> float:
    """Require a number at most 0, minus infinity included."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    number = float(value)
    if not number <= 1e-6:  # rounding may put a computed logarithm of 1 slightly above 0
        raise ValueError(f"{name}: expected the logarithm of a probability, at most 0, got {value}")
    return number


def check_choice(name: str, value: Any, choices: Sequence[object]) -> Any:
    """Require one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return value
