"""Layers that normalise by batch statistics: a row's result depends on the other rows of the block."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from adaptcomp_ext.nn._ownership import user_level

ADVICE = (
    "Replace batch normalisation by LayerNorm or GroupNorm; let attention and pooling run within a row, not "
    "over the first dimension (batch_first=True); or set compact=False, with which no row leaves the block. "
    "check_rows=False leaves this check out."
)
# A part of torch's message for a single row, which has no variance.
_ONE_ROW = "more than 1 value per channel"


def find(*functions: Any) -> list[_BatchNorm]:
    """Return the batch normalisations in those `functions` that are modules."""
    modules = [
        layer for function in functions if isinstance(function, nn.Module) for layer in function.modules()
    ]
    return [layer for layer in modules if isinstance(layer, _BatchNorm)]


def settle(layers: list[_BatchNorm], compact: bool | str, check_rows: bool, named: nn.Module) -> bool | str:
    """Return the setting of `compact` for a step with these layers: False if they use batch statistics.

    A smaller block would give them fewer and fewer rows, and torch raises for a single one. With `check_rows`
    they are refused. Their gradients need not show that they mix rows: those of a scale that starts at zero
    do not.
    """
    taking = [layer for layer in layers if layer.training or layer.running_mean is None]
    if compact is False or not taking:
        return compact
    reason = f"{type(taking[0]).__name__} takes its statistics over the rows in the block"
    if check_rows:
        name = next(name for name, module in named.named_modules() if module is taking[0])
        raise ValueError(
            f"{name}: expected each row's result to depend on that row alone, because halted rows leave the "
            f"block, but {reason}. {ADVICE}"
        )
    if compact is True:
        raise ValueError(f"compact: expected False where halted rows have to stay, since {reason}, got True")
    warnings.warn(
        f'{reason}: halted rows stay in it, and compact="auto" is compact=False here.',
        stacklevel=user_level(),
    )
    return False


def explain(error: ValueError, compact: bool | str) -> None:
    """Raise an error that tells the way out if this one is torch's for a single row."""
    if compact is False or _ONE_ROW not in str(error):
        return
    raise ValueError(
        "step: expected one row to be enough, got a layer that takes statistics over the rows in the block "
        f"({error}): use compact=False, with which halted rows stay in it"
    ) from error
