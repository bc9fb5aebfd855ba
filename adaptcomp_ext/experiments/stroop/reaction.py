"""Steps as reaction time: a recurrent network under ACT reads a digit or names its ink, as a cue says.

Five responses serve both tasks: digits 0 to 4, and the inks that belong to them. A neutral item is one whose
distractor is outside the response set: when reading, an ink of a digit from 5 to 9; when naming, a digit from
5 to 9.

What was tried, on MNIST, one seed, 1,500 updates, 80 % congruent; steps to read a congruent and an
incongruent item (right ones):

===============================================  =====================
noise 1.0, price of a step 0.01                  16.0 and 16.0, the limit
noise 0.7, price 0.03                            11.2 and 13.4
noise 0.5, price 0.02                            9.3 and 11.8
noise 0.5, price 0.05, as it is                  4.5 and 7.1
===============================================  =====================

With inks of unlike lengths in RGB neutral items were read faster than congruent ones (5.3 against 7.8 steps
at 20 % congruent): their inks happen to be brighter, and a bright shape is easier to see in noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptcomp_ext as ac

from .. import vision
from ..data import COLOURS, Condition, ImageData, find_images
from ..device import here
from ..runs import Cell, Tick, span

__all__ = ["TASKS", "Design", "Recipe", "designs_for", "measure_reaction", "recipe_for"]

READ, NAME = 0, 1
TASKS = {"read": READ, "name": NAME}
RESPONSES = 5
BIASED = 3
"""With the control for contingency: responses below this are biased, the others are congruent half of the
time."""
SATURATION = 0.5
MAX_STEPS = 16
TIMED_ROWS = 256


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


@dataclass(frozen=True, kw_only=True)
class Recipe(vision.Recipe):
    """How long an observer practises: `updates` of an epoch, `trials` of each tested task and condition."""

    updates: int
    trials: int
    price: float = 0.05
    noise: float = 0.5
    features: int = 96
    dim: int = 64


def recipe_for(mnist: bool, quick: bool) -> Recipe:
    """Return the recipe that suits the images."""
    if quick:
        return Recipe(epochs=2, updates=250, trials=500, batch=64, features=64, dim=32)
    return Recipe(epochs=5, updates=300, trials=4000) if mnist else Recipe(epochs=5, updates=200, trials=2000)


def designs_for(quick: bool) -> dict[str, Design]:
    """Return what is compared: proportion congruent, share of practice, and the control for contingency."""
    designs = {f"congruent {p:g}": Design(p) for p in ((0.2, 0.8) if quick else (0.2, 0.5, 0.8))}
    if not quick:
        designs |= {f"reading {r:g}": Design(0.5, reading=r) for r in (0.1, 0.9)}
        designs |= {f"unbiased items, congruent {p:g}": Design(p, control=True) for p in (0.2, 0.8)}
    return designs


class _Trials(NamedTuple):
    """Images float32 [B, 3·H·W] without noise; tasks and targets (0 to 4), int64 [B]."""

    images: Tensor
    tasks: Tensor
    targets: Tensor


class _Pool:
    """The "train" or the "test" images, to draw trials from; large ones are halved by 2×2 means."""

    def __init__(self, data: ImageData, half: str) -> None:
        images, labels = getattr(data, f"{half}_images"), getattr(data, f"{half}_labels")
        if data.side >= vision.LARGE:
            images = F.avg_pool2d(images[:, None], 2)[:, 0]
        self.shapes = images.flatten(1)
        self.items_of = [(labels == digit).nonzero()[:, 0] for digit in range(vision.CLASSES)]
        # Under white noise a shape is as visible as its ink is long in RGB: all inks are brought to the same
        # length.
        hues = F.normalize(torch.tensor(list(COLOURS.values()), dtype=torch.float32))
        grey = F.normalize(torch.ones(3), dim=0)
        self.hues = F.normalize(SATURATION * hues + (1 - SATURATION) * grey)

    def draw(self, tasks: Tensor, targets: Tensor, conditions: Tensor, design: Design) -> _Trials:
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
        outside = torch.randint(RESPONSES, vision.CLASSES, (rows,))
        distractor = torch.where(conditions == Condition.CONGRUENT, targets, other)
        distractor = torch.where(conditions == Condition.NEUTRAL, outside, distractor)
        digits = torch.where(tasks == READ, targets, distractor)
        inks = torch.where(tasks == READ, distractor, targets)
        which = torch.rand(rows)
        items = torch.empty(rows, dtype=torch.int64)
        for digit, of_digit in enumerate(self.items_of):
            here = digits == digit
            items[here] = of_digit[(which[here] * len(of_digit)).long()]
        images = self.hues[inks][:, :, None] * self.shapes[items][:, None]
        return _Trials(images.flatten(1), tasks, targets)

    def practise(self, rows: int, design: Design) -> _Trials:
        """Draw trials as a design has them."""
        tasks = (torch.rand(rows) >= design.reading).long()
        targets = torch.randint(0, RESPONSES, (rows,))
        proportion = torch.full((rows,), design.congruent)
        if design.control:
            proportion = torch.where(targets < BIASED, proportion, torch.full_like(proportion, 0.5))
        conditions = torch.where(torch.rand(rows) < proportion, Condition.CONGRUENT, Condition.INCONGRUENT)
        conditions = torch.where(torch.rand(rows) < design.neutral, Condition.NEUTRAL, conditions)
        return self.draw(tasks, targets, conditions, design)


class _Look(nn.Module):
    """One look: the item with new noise, and the cue, into a GRU cell, which accumulates evidence over looks.

    The noise comes from torch's global generator: rows that have halted draw none, so a row's noise depends
    on its batch.
    """

    def __init__(self, width: int, recipe: Recipe) -> None:
        super().__init__()
        self.noise = recipe.noise
        self.encode = nn.Linear(width, recipe.features)
        self.cue = nn.Embedding(len(TASKS), recipe.features)
        self.cell = nn.GRUCell(recipe.features, recipe.dim)

    def forward(self, state: Tensor, images: Tensor, tasks: Tensor) -> Tensor:
        seen = self.encode(torch.randn_like(images).mul_(self.noise).add_(images)) + self.cue(tasks)
        return self.cell(torch.relu(seen), state)


class _Observer(nn.Module):
    """Looks under ACT at a trial of `width` inputs; the number of looks is its reaction time."""

    def __init__(self, width: int, recipe: Recipe) -> None:
        super().__init__()
        self.dim = recipe.dim
        self.look = _Look(width, recipe)
        self.readout = nn.Linear(self.dim, RESPONSES)
        head = nn.Linear(self.dim, 1)
        nn.init.constant_(head.bias, -3.0)  # long looking first
        self.halt = ac.AdaptiveHalt(self.look, ac.ACT(head), max_steps=MAX_STEPS, readout=self.readout)

    def forward(self, trials: _Trials) -> ac.HaltResult:
        """``output``: logits [B, 5]; ``steps``: int64 [B]."""
        start = trials.images.new_zeros(len(trials.images), self.dim)
        return self.halt(start, trials.images, trials.tasks)


def measure_reaction(cell: Cell, folder: Path, tick: Tick) -> dict[str, Any]:
    """Train one observer, and measure its steps in each task and condition after every epoch.

    Returns
    -------
    dict
        ``history``: for each epoch the loss and the `_measure` of it; ``final``, the last of these;
        ``timing``.
    """
    design, recipe = Design(**cell.options["design"]), Recipe(**cell.options["recipe"])
    data = here(find_images(cell.options["data"]))
    practice, test = _Pool(data, "train"), _Pool(data, "test")
    torch.manual_seed(cell.seed)
    model = _Observer(3 * practice.shapes.shape[1], recipe)

    def loss(index: Tensor, done: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        trials = practice.practise(len(index), design)  # new ones always: the index only counts them
        result = model(trials)
        cost = result.cost.mean()
        return F.cross_entropy(result.output, trials.targets) + recipe.price * cost, {"cost": cost}

    history = vision.train(
        model,
        loss,
        recipe.updates * recipe.batch,
        recipe,
        cell.seed,
        folder / "observer.safetensors",
        span(tick, "observer", 0.0, 0.95),
        after=lambda epoch: _measure(model, test, design, recipe.trials),
    )
    tick("timing", 0.96)
    return {
        "data": data.name,
        "design": asdict(design),
        "recipe": asdict(recipe),
        "history": history,
        "final": {key: value for key, value in history[-1].items() if "/" in key},
        "timing": _time(model, test.practise(TIMED_ROWS, design), cell.options["timing_seconds"]),
    }


@torch.no_grad()
def _measure(model: _Observer, pool: _Pool, design: Design, count: int) -> dict[str, float]:
    """Return ``TASK/CONDITION/steps``, the mean over right answers, and ``TASK/CONDITION/right``."""
    measured = {}
    responses = range(BIASED, RESPONSES) if design.control else range(RESPONSES)
    targets = torch.tensor(list(responses)).repeat(-(-count // len(responses)))[:count]
    for task, number in TASKS.items():
        for condition in Condition:
            conditions = torch.full((count,), int(condition))
            result = model(pool.draw(torch.full((count,), number), targets, conditions, design))
            right = result.output.argmax(dim=1) == targets
            where = f"{task}/{condition.name.lower()}"
            measured[f"{where}/right"] = float(right.double().mean())
            steps = result.steps[right] if bool(right.any()) else result.steps
            measured[f"{where}/steps"] = float(steps.double().mean())
    return measured


@torch.no_grad()
def _time(model: _Observer, trials: _Trials, seconds: float) -> dict[str, Any]:
    """Time one batch of practice trials: with compaction, and behind a mask until the last row has halted."""

    def run(compact: bool | str) -> None:
        model.halt.compact = compact
        model(trials)

    calls = {"compacted": lambda: run("auto"), "masked": lambda: run(False)}
    milliseconds, over = vision.time_calls(calls, seconds)
    model.halt.compact = "auto"
    masked = over("masked", "compacted")
    return {"rows": len(trials.images), "ms": milliseconds, "masked_over_compacted": masked}
