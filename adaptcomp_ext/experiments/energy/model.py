"""The networks: the energy model of digits, and the ordinary classifier that says which digits are hard."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

import adaptcomp_ext as ac
from adaptcomp_ext.models import LatentEnergyClassifier

__all__ = ["build_classifier", "build_model", "setting"]

WIDE, FEATURES = 256, 128
HIDDEN, LATENT = 64, 16
DROPOUT = 0.1


def _encoder(side: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(side * side, WIDE),
        nn.ReLU(),
        nn.Dropout(DROPOUT),
        nn.Linear(WIDE, FEATURES),
        nn.ReLU(),
    )


def build_model(side: int) -> LatentEnergyClassifier:
    """The energy model for images [B, side, side]."""
    return LatentEnergyClassifier(_encoder(side), FEATURES, dim_latent=LATENT, hidden=HIDDEN)


def build_classifier(side: int) -> nn.Sequential:
    """An ordinary classifier: an encoder of the same shape, and a linear readout where the energy model descends."""
    return nn.Sequential(_encoder(side), nn.Linear(FEATURES, 10))


@contextlib.contextmanager
def setting(descend: ac.EnergyDescent, **options: Any) -> Iterator[None]:
    """Set attributes of a descent, and put them back."""
    before = {name: getattr(descend, name) for name in options}
    try:
        for name, value in options.items():
            setattr(descend, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(descend, name, value)
