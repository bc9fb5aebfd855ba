"""The units of layers that `VariationalDropout` wraps, and the conditions for noise on their weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from adaptcomp_ext.nn._plain import altered, hooked
from adaptcomp_ext.ops._checks import check_int, describe

__all__ = [
    "ONLY_READ",
    "WEIGHTED",
    "check_layer",
    "count_units",
    "plain",
    "unit_dimension",
    "why_not_called",
    "why_not_sparse",
]

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weights can have the noise."""
ONLY_READ = (NonDynamicallyQuantizableLinear,)
"""Layers that their parent, nn.MultiheadAttention, never calls: noise would not reach it."""
_WIDTHS = ("out_features", "out_channels", "hidden_size", "num_features", "num_channels", "embedding_dim")
_CHANNELS_SECOND = (nn.BatchNorm1d, nn.SyncBatchNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.Upsample)
"""Layers whose units are in dimension 1. Torch's other layers with 1d, 2d or 3d in their names also take
inputs without a batch."""


def count_units(layer: nn.Module, features: int | None) -> int:
    """Return the number of units that the layer has, or `features` if the layer does not tell it."""
    known: int | None = next(
        (getattr(layer, name) for name in _WIDTHS if isinstance(getattr(layer, name, None), int)), None
    )
    shape: Any = getattr(layer, "normalized_shape", None)  # of nn.LayerNorm and nn.RMSNorm
    if known is None and isinstance(shape, tuple) and shape and isinstance(shape[-1], int):
        known = shape[-1]
    if known is None:
        if features is None:
            name = type(layer).__name__
            raise ValueError(f"features: expected the number of units, which {name} does not tell, got None")
        return check_int("features", features, 1)
    if features is not None and features != known:
        raise ValueError(f"features: expected {known}, as {type(layer).__name__} has, got {features}")
    return known


def unit_dimension(layer: nn.Module) -> int:
    """Return the output dimension in which a layer's units lie; in an nn.Sequential, the last known one."""
    return next((dim for dim in map(_known_dimension, _parts(layer)) if dim is not None), -1)


def _parts(layer: nn.Module) -> Iterator[nn.Module]:
    if type(layer) is nn.Sequential:
        for part in reversed(layer):
            yield from _parts(part)
    else:
        yield layer


def _known_dimension(layer: nn.Module) -> int | None:
    if isinstance(layer, _CHANNELS_SECOND):
        return 1
    for base in type(layer).__mro__:
        if base.__module__.startswith("torch.nn.") and base.__name__[-2:] in ("1d", "2d", "3d"):
            return -1 - int(base.__name__[-2])  # the name tells the number of dimensions after the units
    return -1 if isinstance(layer, nn.Flatten) or any(hasattr(layer, name) for name in _WIDTHS) else None


def why_not_called(layer: nn.Module) -> str | None:
    """Say what form="sparse" expects of a layer at every call, and what came; None if the layer fits."""
    name = type(layer).__name__
    base = next((kind for kind in WEIGHTED if isinstance(layer, kind)), None)
    if base is None:
        return f"expects a linear or convolution layer, got {name}"
    if altered(layer, base):
        expected = f"a layer with the forward of nn.{base.__name__}, which the noise replaces"
        return f"expects {expected}, got {name} with its own"
    if hooked(layer):
        expected = "a layer without hooks, which the noise would bypass"
        return f"expects {expected}, got {name} with hooks: hook the VariationalDropout"
    return None


def why_not_sparse(layer: nn.Module) -> str | None:
    """Say what form="sparse" expects of a layer to be wrapped, and what came; None if the layer fits."""
    if (obstacle := why_not_called(layer)) is not None:
        return obstacle
    name, weight = type(layer).__name__, layer.weight
    if "weight" not in layer._parameters and not is_parametrized(layer, "weight"):
        return f"expects a layer whose weight is a parameter, got {name} with a computed one"
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        came = weight.dtype if isinstance(weight, Tensor) else describe(weight)
        return f"expects real floating-point weights, got {came}"
    return None


def check_layer(layer: object) -> nn.Module:
    """Require a module with initialised parameters that its parent calls."""
    if not isinstance(layer, nn.Module):
        raise TypeError(f"layer: expected an nn.Module, got {describe(layer)}")
    name = type(layer).__name__
    if isinstance(layer, ONLY_READ):
        raise TypeError(
            f"layer: expected one that is called, got {name}, whose weight nn.MultiheadAttention only reads"
        )
    if any(isinstance(p, UninitializedParameter) for p in layer.parameters()):
        raise ValueError(
            f"layer: expected initialised parameters, got {name}: run it once before you wrap it"
        )
    return layer


@torch.no_grad()
def plain(layer: nn.Module) -> None:
    """Replace parametrised tensors of a layer by plain parameters with their values in evaluation mode."""
    if not is_parametrized(layer):
        return
    # `remove_parametrizations` would change the layer's class, which a copied layer shares with its original.
    assert isinstance(layer.parametrizations, nn.ModuleDict)
    mode = layer.training
    layer.eval()
    made = {
        name: nn.Parameter(
            getattr(layer, name).clone(), requires_grad=any(p.requires_grad for p in how.parameters())
        )
        for name, how in layer.parametrizations.items()
    }
    kind = type_before_parametrizations(layer)
    del layer.parametrizations
    layer.__class__ = kind
    parameters = {**dict.fromkeys(("weight", "bias")), **layer._parameters, **made}  # in the usual order
    for name, parameter in parameters.items():
        layer._parameters.pop(name, None)
        layer.register_parameter(name, parameter)
    layer.train(mode)
