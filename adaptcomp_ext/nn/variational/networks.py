"""Variational dropout for a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adaptcomp_ext.nn._plain import copied
from adaptcomp_ext.nn.variational.dropout import VariationalDropout
from adaptcomp_ext.nn.variational.layers import ONLY_READ, WEIGHTED
from adaptcomp_ext.ops._checks import describe

__all__ = ["description_length", "sparsity", "variational"]


def _layers(module: nn.Module) -> list[VariationalDropout]:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {describe(module)}")
    return [part for part in module.modules() if isinstance(part, VariationalDropout)]


def variational(module: nn.Module, **options: Any) -> nn.Module:
    """Return a copy of a network with each linear and convolution layer in a `VariationalDropout`.

    Parameters
    ----------
    module : nn.Module
        The network; it is not changed. Layers that are already in a `VariationalDropout` stay there; a layer
        used in two places is wrapped once; layers that share a weight share its noise.
    **options
        Options of `VariationalDropout`.

    Returns
    -------
    nn.Module

    Raises
    ------
    TypeError
        If the network cannot be copied, or a layer does not fit the option `form`; the message names it.
    ValueError
        If there is no such layer, or an option is out of range.

    Notes
    -----
    Recurrent cells are not wrapped: use ``VariationalDropout(cell)``. Nor are the layers of
    ``nn.MultiheadAttention``, which reads their weights and does not call them. A custom parent that does so
    in training mode gets no noise: see ``VariationalDropout.weight``. A layer that was compiled by itself is
    wrapped as it was before.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {describe(module)}")
    wrapped: dict[nn.Module, VariationalDropout] = {}
    by_weight: dict[int, VariationalDropout] = {}

    def wrap(part: nn.Module, path: str) -> VariationalDropout:
        try:
            new = VariationalDropout(part, **options)
        except (TypeError, ValueError) as error:
            if not str(error).startswith("layer:"):
                raise
            raise type(error)(f"module, at {path or 'its root'}: {error}") from error
        if new.form == "sparse":
            first = by_weight.setdefault(id(part._parameters.get("weight", part)), new)
            setattr(new, _noise_of(new), getattr(first, _noise_of(first)))
        return new

    def replace(part: nn.Module, path: str) -> nn.Module:
        if isinstance(part, VariationalDropout):
            wrapped[part] = part
            return part
        if isinstance(part, (nn.MultiheadAttention, *ONLY_READ)):
            return part
        if isinstance(compiled := getattr(part, "_orig_mod", None), WEIGHTED):
            # torch.compile has bound the forward of this layer: a replacement inside it would not be called.
            return replace(compiled, path)
        if isinstance(part, WEIGHTED):
            if part not in wrapped:
                wrapped[part] = wrap(part, path)
            return wrapped[part]
        for name, child in list(part._modules.items()):  # a child may have several names
            if child is not None and (new := replace(child, f"{path}.{name}" if path else name)) is not child:
                setattr(part, name, new)
        return part

    result = replace(copied("module", module), "")
    if not wrapped:
        raise ValueError(
            f"module: expected a network with linear or convolution layers, got {type(module).__name__} "
            "without any"
        )
    return result


def _noise_of(layer: VariationalDropout) -> str:
    return "log_variance" if layer.form == "sparse" and layer.per == "weight" else "log_noise"


def _distinct(layers: list[VariationalDropout]) -> list[VariationalDropout]:
    """Return one layer for each noise, because shared noise has one posterior."""
    return list({id(getattr(layer, _noise_of(layer))): layer for layer in layers}.values())


def description_length(module: nn.Module) -> Tensor:
    """Return the sum of `VariationalDropout.kl` over a network, a differentiable scalar in nats.

    Layers that share a weight and therefore, by `variational`, a noise count once.
    """
    lengths = [layer.kl() for layer in _distinct(_layers(module))]
    return torch.stack(lengths).sum() if lengths else torch.zeros(())


def sparsity(module: nn.Module) -> float:
    """Return the share of weights with variational dropout that evaluation mode prunes; 0 without any."""
    kept = [layer.kept for layer in _distinct(_layers(module)) if layer.form == "sparse"]
    weights = sum(part.numel() for part in kept)
    return 1.0 - sum(int(part.sum()) for part in kept) / weights if weights else 0.0
