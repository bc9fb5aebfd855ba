"""System 1 and System 2 for grey digits."""

from __future__ import annotations

from torch import nn

import adaptcomp_ext as ac
from adaptcomp_ext.models.acc import Objective

from ..vision import CLASSES, LARGE, Scale, build_cnn

__all__ = ["CHANNELS", "FORMS", "build_pair", "build_student", "build_teacher"]

CHANNELS = 1
FORMS: dict[str, bool | dict[str, str]] = {
    "dense": False,
    "sparse": {"form": "sparse"},
    "units": {"form": "sparse", "per": "unit"},
}
"""What noise π₁ carries while it is trained: none, of each weight, of each unit's weights."""


def build_teacher(side: int) -> nn.Sequential:
    """π₂: the reference CNN."""
    return build_cnn(side, CHANNELS)


def build_student(side: int) -> nn.Sequential:
    """π₁: two convolutions and two linear layers, with more units than it needs, so that there is something to remove."""
    kernel, stride = (5, 2) if side >= LARGE else (3, 1)
    left = ((side - kernel) // stride + 1 - 2) // 2
    return nn.Sequential(
        nn.Conv2d(CHANNELS, 32, kernel, stride=stride),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * left * left, 64),
        nn.ReLU(),
        nn.Linear(64, CLASSES),
    )


def build_pair(side: int, form: str, objective: Objective) -> ac.models.ACC:
    """Both, π₁ with the noise of that form."""
    return ac.models.ACC(
        Scale(),
        build_student(side),
        build_teacher(side),
        CLASSES,
        variational=FORMS[form],
        objective=objective,
    )
