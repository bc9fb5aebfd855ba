"""The settings of `EnergyDescent`, and their checks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptcomp_ext.nn._refused_cells import refuse_cell
from adaptcomp_ext.ops._backend import DTYPE_CODES
from adaptcomp_ext.ops._checks import check_choice, check_int, describe
from adaptcomp_ext.ops._plain import check_memory, is_dense, resolved
from adaptcomp_ext.ops.descent import check_clamp, check_clip, check_momentum, check_number
from adaptcomp_ext.reference import DescentRule

_FOR_EVER = 2**40  # more steps than any descent takes; the kernels count in 64 bits
_LASTING = {
    "max_steps",
    "tol",
    "stop",
    "accept",
    "noise",
    "momentum",
    "clip",
    "clamp",
    "gradient",
    "backtracking",
    "keep_trace",
    "seed",
}
"""Settings that only an assignment changes, where the instance itself holds them."""
GRADIENTS = ("unrolled", "stepwise", "implicit", "detached")


class Settings(NamedTuple):
    """The settings of an `EnergyDescent`, checked."""

    rule: DescentRule
    gradient: str
    last: int | None
    step_size: float | None
    """None: the step size is a tensor."""
    noise: float | None
    """None: the scale of the noise is a tensor."""


def check_settings(module: Any) -> tuple[Settings, bool]:
    """Check the settings of an `EnergyDescent`. Returns them and whether only an assignment changes them."""
    if not callable(module.energy):
        raise TypeError(f"energy: expected a callable or nn.Module, got {describe(module.energy)}")
    refuse_cell("energy", "energy(y, *context)", "one energy per row, [n]", module.energy)
    step_size = None
    if not isinstance(module.step_size, Tensor):
        step_size = check_number("step_size", module.step_size, 0, math.inf, ends="()")
    rule = _rule(module)
    noise = None if isinstance(module.noise, Tensor) else float(module.noise)
    settings = Settings(rule, *_mode(module.gradient), step_size, noise)
    # A list, a tensor or a property of a subclass can change without an assignment.
    own = module.__dict__
    lasting = (
        own.keys() >= _LASTING
        and (step_size is None or "step_size" in own)
        and noise is not None
        and not isinstance(module.clamp, list)
        and not isinstance(module.gradient, list)
    )
    return settings, lasting


def _rule(module: Any) -> DescentRule:
    check_choice("stop", module.stop, ("energy", "gradient"))
    check_choice("accept", module.accept, ("always", "if_lower"))
    if not isinstance(module.keep_trace, bool):
        raise TypeError(f"keep_trace: expected a bool, got {describe(module.keep_trace)}")
    backtracking = 0.0
    if module.backtracking is not None:
        backtracking = check_number("backtracking", module.backtracking, 0, 1, ends="()")
        if module.accept != "if_lower":
            raise ValueError(
                'backtracking: expected None unless accept="if_lower", got ' + repr(module.backtracking)
            )
    return DescentRule(
        max_steps=min(check_int("max_steps", module.max_steps, 1), _FOR_EVER),
        tol=check_number("tol", module.tol, 0, math.inf),
        on_gradient=module.stop == "gradient",
        if_lower=module.accept == "if_lower",
        noisy=_check_noise(module.noise),
        momentum=check_momentum(module.momentum),
        clip=check_clip(module.clip),
        low=(bounds := check_clamp(module.clamp))[0],
        high=bounds[1],
        backtracking=backtracking,
        seed=check_int("seed", module.seed, 0),
    )


def _mode(mode: Any) -> tuple[str, int | None]:
    if isinstance(mode, (tuple, list)):
        if len(mode) != 2 or mode[0] != "truncated":
            raise ValueError(f'gradient: expected ("truncated", k), got {mode!r}')
        return "unrolled", min(check_int('gradient: k of ("truncated", k)', mode[1], 1), _FOR_EVER)
    if mode not in GRADIENTS:
        expected = ", ".join(map(repr, GRADIENTS))
        raise ValueError(f'gradient: expected one of {expected} or ("truncated", k), got {mode!r}')
    return mode, None


def check_step_size(name: str, value: Any, y0: Tensor | None) -> float | Tensor:
    """Require a positive number, or a tensor of positive numbers that fits `y0`."""
    if not isinstance(value, Tensor):
        return check_number(name, value, 0, math.inf, ends="()")
    value = resolved(name, value)
    _check_scalars(name, value)
    if value.dim() > 1 or (y0 is not None and value.dim() == 1 and value.shape[0] != y0.shape[0]):
        batch = "B" if y0 is None else str(y0.shape[0])
        raise ValueError(
            f"{name}: expected a number or a tensor of shape [] or [{batch}], got {describe(value)}"
        )
    if value.is_cpu and not bool(((value > 0) & value.isfinite()).all()):
        raise ValueError(f"{name}: expected positive finite numbers, got a minimum of {value.min().item()}")
    return value if y0 is None else on_device(name, value, y0)


def _check_noise(value: Any) -> bool:
    """Require a number or a tensor without dimensions, at least 0. Returns whether there is noise."""
    if not isinstance(value, Tensor):
        return check_number("noise", value, 0, math.inf) > 0
    value = resolved("noise", value)
    _check_scalars("noise", value)
    if value.dim() != 0:
        raise ValueError(f"noise: expected a number or a tensor without dimensions, got {describe(value)}")
    if value.is_cpu and not 0 <= value.item() < math.inf:
        raise ValueError(f"noise: expected a finite number >= 0, got {value.item()}")
    return True


def _check_scalars(name: str, value: Tensor) -> None:
    """Require a dense floating-point tensor with data."""
    if value.dtype not in DTYPE_CODES:
        raise TypeError(
            f"{name}: expected a floating-point tensor (float32, float64, bfloat16 or float16), "
            f"got {describe(value)}"
        )
    if value.is_meta or not is_dense(value):
        raise TypeError(f"{name}: expected a dense tensor with data, got {describe(value)}")
    check_memory(name, value)


def on_device(name: str, value: float | Tensor, y0: Tensor) -> float | Tensor:
    """Require a tensor to be on the device of y0, unless it is a CPU tensor without dimensions."""
    if not isinstance(value, Tensor):
        return value
    if value.device != y0.device and not (value.is_cpu and value.dim() == 0):
        raise ValueError(f"{name}: expected a tensor on {y0.device} like y0, got one on {value.device}")
    return outside_inference(resolved(name, value))


def outside_inference(tensor: Tensor) -> Tensor:
    """Return a tensor that a backward pass may save: a copy of one that was made in inference mode."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor
