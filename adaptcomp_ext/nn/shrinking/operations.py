"""Operations that do not mix units, so that they may lie between two layers, and their maps of constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from adaptcomp_ext.nn._plain import intact

__all__ = ["CONVOLUTIONS", "LAYERS", "NORMS", "flattens", "in_place", "passes"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, *CONVOLUTIONS)
"""Layers whose units can be removed."""
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Normalisations, which lose the units of the layer before them."""

Constant = Callable[[Tensor], Tensor]

_ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Tanh,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.Hardtanh,
    nn.Hardsigmoid,
    nn.Hardswish,
)
_ACTIVATION_FUNCTIONS = {
    F.relu,
    F.relu6,
    F.leaky_relu,
    F.elu,
    F.gelu,
    F.silu,
    F.softplus,
    F.hardtanh,
    F.tanh,
    F.sigmoid,
    torch.relu,
    torch.tanh,
    torch.sigmoid,
}
_ACTIVATION_METHODS = {"relu", "tanh", "sigmoid"}
_DROPOUTS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_DROPOUT_FUNCTIONS = {F.dropout}
# Max pooling ignores its padding; an unpadded average of a constant is the constant.
_MAX_POOLS = (
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
)
_MAX_POOL_FUNCTIONS = {F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool2d}
_ADAPTIVE_AVERAGES = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_ADAPTIVE_AVERAGE_FUNCTIONS = {F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d}
_AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def _same(constant: Tensor) -> Tensor:
    return constant


def _unknown_unless_zero(constant: Tensor) -> Tensor:
    # At the borders the padding's zeros enter the average: only a constant 0 stays constant.
    return torch.where(constant == 0, constant, torch.full_like(constant, float("nan")))


def _padded(pool: Any) -> bool:
    padding = pool.padding if isinstance(pool.padding, tuple) else (pool.padding,)
    return any(padding) or bool(pool.ceil_mode) or getattr(pool, "divisor_override", None) is not None


def passes(node: fx.Node, module: nn.Module | None, channels: bool) -> Constant | None:
    """Return the node's map of constant units, [units] → [units]; None if it may mix units or is unknown.

    NaN marks a unit that is no longer constant. `channels`: whether units lie in dimension 1, as in a
    convolution's output, rather than in the last.
    """
    if node.op == "call_module":
        return _module(module, channels)
    source = node.args[0] if node.args else None
    if node.op == "call_function":
        return _function(node, channels, source)
    if node.op == "call_method" and node.target in _ACTIVATION_METHODS and len(node.args) == 1:
        method = str(node.target)
        return lambda constant: getattr(constant, method)()
    return None


def _module(module: nn.Module | None, channels: bool) -> Constant | None:
    if module is None or not intact(module):
        return None
    if isinstance(module, _ACTIVATIONS):
        # An in-place activation would write into the constants, so that it gets a copy.
        return lambda constant: module(constant.clone())
    if isinstance(module, _DROPOUTS):
        return _same
    if not channels:
        return None
    if isinstance(module, (*_MAX_POOLS, *_ADAPTIVE_AVERAGES)):
        return _same
    if isinstance(module, _AVERAGES):
        return _unknown_unless_zero if _padded(module) else _same
    return None


def _function(node: fx.Node, channels: bool, source: Any) -> Constant | None:
    if node.target in _ACTIVATION_FUNCTIONS:
        function: Any = node.target
        rest = [a for a in node.args[1:] if not isinstance(a, fx.Node)]
        if len(rest) != len(node.args) - 1 or any(isinstance(v, fx.Node) for v in node.kwargs.values()):
            return None
        options = {k: v for k, v in node.kwargs.items() if k != "inplace"}
        return lambda constant: function(constant.clone(), *rest, **options)
    if node.target in _DROPOUT_FUNCTIONS:
        training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
        # Unless training=False, F.dropout adds noise in evaluation mode too.
        return _same if training is False else _unknown_unless_zero
    if (
        channels
        and node.target in _MAX_POOL_FUNCTIONS | _ADAPTIVE_AVERAGE_FUNCTIONS
        and isinstance(source, fx.Node)
    ):
        return _same
    return None


def flattens(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node flattens all dimensions except the batch, so that channels become runs of features."""
    if node.op == "call_module":
        return (
            isinstance(module, nn.Flatten)
            and intact(module)
            and module.start_dim == 1
            and module.end_dim == -1
        )
    if (node.op == "call_function" and node.target is torch.flatten) or (
        node.op == "call_method" and node.target == "flatten"
    ):
        start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
        end = node.args[2] if len(node.args) > 2 else node.kwargs.get("end_dim", -1)
        return bool(start == 1 and end == -1)
    return False


def in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether an operation may write into its argument, which other readers would then see."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if node.target in _DROPOUT_FUNCTIONS:
        return bool(node.args[3] if len(node.args) > 3 else node.kwargs.get("inplace", False))
    return any(value is True for value in (*node.args[1:], *node.kwargs.values()))  # one may be `inplace`
