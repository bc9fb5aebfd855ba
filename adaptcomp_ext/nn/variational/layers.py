"""What `VariationalDropout` has to know of the layer that it wraps: where its units lie, and whether weights may carry noise."""

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
"""Layers whose weights can carry the noise."""
ONLY_READ = (NonDynamicallyQuantizableLinear,)
"""Layers that their parent, nn.MultiheadAttention, never calls: noise would not reach it."""
_WIDTHS = ("out_features", "out_channels", "hidden_size", "num_features", "num_channels", "embedding_dim")
_CHANNELS_SECOND = (nn.BatchNorm1d, nn.SyncBatchNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.Upsample)
"""Layers that number dimensions from the front; torch's others with 1d, 2d or 3d in their name take unbatched
inputs too."""


def count_units(layer: nn.Module, features: int | None) -> int:
    """Number of units of a layer, from the layer or from the user, who must not contradict it."""
    known = next(
        (getattr(layer, name) for name in _WIDTHS if isinstance(getattr(layer, name, None), int)), None
    )
    shape: Any = getattr(layer, "normalized_shape", None)  # of nn.LayerNorm and nn.RMSNorm
    if known is None and isinstance(shape, tuple) and shape and isinstance(shape[-1], int):
        known = shape[-1]
    if known is None:
        if features is None:
            raise ValueError(
                f"features: expected the number of units, which {type(layer).__name__} does not tell, got None"
            )
        return check_int("features", features, 1)
    if features is not None and features != known:
        raise ValueError(f"features: expected {known}, as {type(layer).__name__} has, got {features}")
    return known


def unit_dimension(layer: nn.Module) -> int:
    """Dimension of the output in which a layer's units lie; of a sequence, as its last part that tells."""
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
            return -1 - int(
                base.__name__[-2]
            )  # behind the units there are as many dimensions as the name says
    return -1 if isinstance(layer, nn.Flatten) or any(hasattr(layer, name) for name in _WIDTHS) else None


def why_not_called(layer: nn.Module) -> str | None:
    """What form="sparse" expects of a layer at every call, and what came; None if it fits."""
    name = type(layer).__name__
    base = next((kind for kind in WEIGHTED if isinstance(layer, kind)), None)
    if base is None:
        return f"expects a linear or convolution layer, got {name}"
    if altered(layer, base):
        return f"expects a layer with the forward of nn.{base.__name__}, which the noise replaces, got {name} with its own"
    if hooked(layer):
        return f"expects a layer without hooks, which the noise would bypass, got {name} with hooks: hook the VariationalDropout"
    return None


def why_not_sparse(layer: nn.Module) -> str | None:
    """What form="sparse" expects of a layer that is wrapped, and what came; None if it fits."""
    if (obstacle := why_not_called(layer)) is not None:
        return obstacle
    name, weight = type(layer).__name__, layer.weight
    if "weight" not in layer._parameters and not is_parametrized(layer, "weight"):
        return f"expects a layer whose weight is a parameter, got {name} with a computed one"
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return f"expects real floating-point weights, got {weight.dtype if isinstance(weight, Tensor) else describe(weight)}"
    return None


def check_layer(layer: object) -> nn.Module:
    """Require a module that has weights, and that is called."""
    if not isinstance(layer, nn.Module):
        raise TypeError(f"layer: expected an nn.Module, got {describe(layer)}")
    name = type(layer).__name__
    if isinstance(layer, ONLY_READ):
        raise TypeError(
            f"layer: expected one that is called, got {name}, of which nn.MultiheadAttention only reads the weight"
        )
    if any(isinstance(p, UninitializedParameter) for p in layer.parameters()):
        raise ValueError(
            f"layer: expected initialised parameters, got {name}: run it once before you wrap it"
        )
    return layer


@torch.no_grad()
def plain(layer: nn.Module) -> None:
    """Make parametrised tensors of a layer plain parameters, in evaluation mode's values."""
    if not is_parametrized(layer):
        return
    # Not by `remove_parametrizations`: it changes the layer's class, which a layer has in common with what it
    # was copied from.
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
