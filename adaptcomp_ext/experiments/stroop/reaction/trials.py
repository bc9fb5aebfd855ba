"""Trials: a digit in an ink, and the cue to read the one or to name the other.

Five responses serve both tasks: digits 0 to 4, and the inks that belong to them. A neutral item is one whose
distractor is outside the response set: when reading, an ink of a digit from 5 to 9; when naming, a digit from
5 to 9.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptcomp_ext.experiments.data import COLOURS, Condition, ImageData

__all__ = ["NAME", "READ", "RESPONSES", "Design", "Pool", "Trials"]

RESPONSES = 5
READ, NAME = 0, 1
SATURATION = 0.5
BIASED = 3
"""With the control for contingency: responses below this are biased, the others are congruent half of the
time."""


@dataclass(frozen=True)
class Design:
    """What is practised.

    Attributes
    ----------
    congruent : float
        Proportion congruent of the items that are not neutral.
    reading : float
        Share of reading trials.
    neutral : float
        Share of neutral items.
    control : bool
        Whether only responses 0 to 2 have that proportion, while 3 and 4 are congruent half of the time and
        never mixed with the others. An effect of the proportion on 3 and 4 cannot come from which inks go
        with which digits.
    """

    congruent: float
    reading: float = 0.5
    neutral: float = 0.2
    control: bool = False


@dataclass(frozen=True)
class Trials:
    """Images float32 [B, 3·H·W] without noise; tasks, targets (0 to 4) and conditions, int64 [B]."""

    images: Tensor
    tasks: Tensor
    targets: Tensor
    conditions: Tensor


class Pool:
    """Digits to draw trials from.

    Parameters
    ----------
    data : ImageData
        Images of 28 pixels are halved (2×2 means).
    half : str
        "train" or "test".
    """

    def __init__(self, data: ImageData, half: str) -> None:
        images, labels = (
            (data.train_images, data.train_labels)
            if half == "train"
            else (data.test_images, data.test_labels)
        )
        if data.side >= 20:
            images = F.avg_pool2d(images[:, None], 2)[:, 0]
        self.shapes = images.flatten(1)
        self.of = [(labels == digit).nonzero()[:, 0] for digit in range(10)]
        # Under white noise a shape is as visible as its ink is long in RGB: all inks are brought to the same
        # length.
        hues = F.normalize(torch.tensor(list(COLOURS.values()), dtype=torch.float32))
        grey = F.normalize(torch.ones(3), dim=0)
        self.hues = F.normalize(SATURATION * hues + (1 - SATURATION) * grey)

    @property
    def width(self) -> int:
        """Inputs of a trial: three times the pixels."""
        return 3 * self.shapes.shape[1]

    def draw(self, tasks: Tensor, targets: Tensor, conditions: Tensor, design: Design) -> Trials:
        """Draw items for given tasks, targets and conditions, from torch's global generator."""
        rows = len(tasks)
        if design.control:  # the other response of the same set
            biased = targets < BIASED
            shift = torch.where(biased, torch.randint(1, BIASED, (rows,)), torch.ones_like(targets))
            low = torch.where(biased, 0, BIASED)
            size = torch.where(biased, BIASED, RESPONSES - BIASED)
            other = low + (targets - low + shift) % size
        else:
            other = (targets + torch.randint(1, RESPONSES, (rows,))) % RESPONSES
        outside = torch.randint(RESPONSES, 10, (rows,))
        distractor = torch.where(conditions == Condition.CONGRUENT, targets, other)
        distractor = torch.where(conditions == Condition.NEUTRAL, outside, distractor)
        digits = torch.where(tasks == READ, targets, distractor)
        inks = torch.where(tasks == READ, distractor, targets)
        which = torch.rand(rows)
        items = torch.empty(rows, dtype=torch.int64)
        for digit, of in enumerate(self.of):
            here = digits == digit
            items[here] = of[(which[here] * len(of)).long()]
        images = self.hues[inks][:, :, None] * self.shapes[items][:, None]
        return Trials(images.flatten(1), tasks, targets, conditions)

    def practise(self, rows: int, design: Design) -> Trials:
        """Draw trials as a design has them."""
        tasks = (torch.rand(rows) >= design.reading).long()
        targets = torch.randint(0, RESPONSES, (rows,))
        proportion = torch.full((rows,), design.congruent)
        if design.control:
            proportion = torch.where(targets < BIASED, proportion, torch.full_like(proportion, 0.5))
        conditions = torch.where(torch.rand(rows) < proportion, Condition.CONGRUENT, Condition.INCONGRUENT)
        conditions = torch.where(torch.rand(rows) < design.neutral, Condition.NEUTRAL, conditions)
        return self.draw(tasks, targets, conditions, design)
