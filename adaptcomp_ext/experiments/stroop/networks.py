"""Habit, control, and the ordinary CNN that they are held against."""

from __future__ import annotations

from torch import nn

import adaptcomp_ext as ac
from adaptcomp_ext.experiments.vision import CLASSES, LARGE, Scale, build_cnn, weights
from adaptcomp_ext.models.acc import Objective

__all__ = ["CHANNELS", "build_acc", "build_baseline", "build_habit"]

CHANNELS = 3


def build_habit(side: int) -> nn.Sequential:
    """π₁: one coarse convolution and a linear layer, a sixteenth of the reference CNN's multiply–adds."""
    kernel, stride = (5, 2) if side >= LARGE else (3, 1)
    left = ((side - kernel) // stride + 1) // 2
    return nn.Sequential(
        nn.Conv2d(CHANNELS, 16, kernel, stride=stride),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * left * left, CLASSES),
    )


def build_acc(side: int, objective: Objective) -> ac.models.ACC:
    """Habit with variational dropout, and the reference CNN as control. Each reads the image for itself."""
    return ac.models.ACC(Scale(), build_habit(side), build_cnn(side, CHANNELS), CLASSES, objective=objective)


def build_baseline(side: int, parameters: int) -> nn.Sequential:
    """The reference CNN alone, its hidden layer as wide as comes closest to so many weights and biases."""

    def difference(hidden: int) -> int:
        return abs(weights(build_cnn(side, CHANNELS, hidden)) - parameters)

    return nn.Sequential(Scale(), *build_cnn(side, CHANNELS, min(range(96, 193), key=difference)))
