"""Layers that normalise by the statistics of the batch: what they make of a row depends on the rows that share the block."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_USER = 8  # of the frames between a warning and the call of the module
# Of torch's message where one row is left, which has no variance.
_ONE_ROW = "more than 1 value per channel"


def find(*functions: Any) -> list[_BatchNorm]:
    """The batch normalisations in what is an ``nn.Module`` of `functions`."""
    modules = [
        layer for function in functions if isinstance(function, nn.Module) for layer in function.modules()
    ]
    return [layer for layer in modules if isinstance(layer, _BatchNorm)]


def settle(layers: list[_BatchNorm], compact: bool | str) -> bool | str:
    """The way of compaction for a step with these layers: where they take statistics of the batch, halted rows stay in the block.

    A block that shrinks gives them fewer and fewer rows, and torch refuses the last one.
    """
    taking = [layer for layer in layers if layer.training or layer.running_mean is None]
    if compact is False or not taking:
        return compact
    what = f"{type(taking[0]).__name__} takes its statistics over the rows in the block"
    if compact is True:
        raise ValueError(f"compact: expected False where halted rows have to stay, since {what}, got True")
    warnings.warn(
        f'{what}: halted rows stay in it, and compact="auto" is compact=False here.', stacklevel=_USER
    )
    return False


def explain(error: ValueError) -> ValueError:
    """Torch's refusal of a single row, with the way out; any other error as it is."""
    if _ONE_ROW not in str(error):
        return error
    return ValueError(
        f"step: expected one row to be enough, got a layer that takes statistics over the rows in the block ({error}): use "
        "compact=False, with which halted rows stay in it"
    )
