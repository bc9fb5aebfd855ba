"""Variational dropout over a whole network."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from adaptcomp_ext.nn.variational.dropout import WEIGHTED, VariationalDropout
from adaptcomp_ext.ops._checks import describe

__all__ = ["description_length", "sparsity", "variational"]


def _layers(module: nn.Module) -> list[VariationalDropout]:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {describe(module)}")
    return [part for part in module.modules() if isinstance(part, VariationalDropout)]


def variational(module: nn.Module, **options: Any) -> nn.Module:
    """Return a copy of a network, each of its linear and convolution layers in a `VariationalDropout`.

    Parameters
    ----------
    module : nn.Module
        Left as it is. Layers that are in a `VariationalDropout` already stay so; a layer that is used in two places stays one.
    **options
        Of `VariationalDropout`.

    Returns
    -------
    nn.Module

    Raises
    ------
    ValueError
        If there is no such layer.

    Notes
    -----
    Recurrent cells have weights of their own, which are not wrapped: put them into ``VariationalDropout(cell)`` by hand.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {describe(module)}")
    wrapped: dict[nn.Module, VariationalDropout] = {}

    def replace(part: nn.Module) -> nn.Module:
        if isinstance(part, VariationalDropout):
            wrapped[part] = part
            return part
        if type(part) in WEIGHTED:
            if part not in wrapped:
                wrapped[part] = VariationalDropout(part, **options)
            return wrapped[part]
        for name, child in list(part.named_children()):
            if (new := replace(child)) is not child:
                setattr(part, name, new)
        return part

    result = replace(copy.deepcopy(module))
    if not wrapped:
        raise ValueError(f"module: expected a network with linear or convolution layers, found none in {type(module).__name__}")
    return result


def description_length(module: nn.Module) -> Tensor:
    """Sum of `VariationalDropout.kl` over a network, in nats: scalar, differentiable; 0 where there is none."""
    lengths = [layer.kl() for layer in _layers(module)]
    return torch.stack(lengths).sum() if lengths else torch.zeros(())


def sparsity(module: nn.Module) -> float:
    """Share of the weights under variational dropout that evaluation prunes; 0 where there are none."""
    kept = [layer.kept for layer in _layers(module) if layer.form == "sparse"]
    weights = sum(part.numel() for part in kept)
    return 1.0 - sum(int(part.sum()) for part in kept) / weights if weights else 0.0
