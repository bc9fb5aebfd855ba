"""One pass over held-out rows: the mean steps and the mean score of many thresholds."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptcomp_ext.nn.calibration.probe import Probe, Target, resolve
from adaptcomp_ext.nn.halting.adaptive_halt import AdaptiveHalt
from adaptcomp_ext.nn.halting.policy import Policy
from adaptcomp_ext.ops._checks import describe

Score = Callable[[Tensor, Any], Tensor]
"""``score(output, target) -> [B]``."""


def agreement(output: Tensor, target: Any) -> Tensor:
    """Return, bool [B], whether the answers of each row are its target's.

    The answer is the argmax over the last dimension of ``output``. The target is a tensor of class numbers,
    or of logits in the shape of ``output``. Where a row has several answers, all have to be right.
    """
    if not output.is_floating_point() or output.dim() < 2:
        raise TypeError(
            "halt: expected outputs that are class logits, [B, ..., C], where no function reads them, got "
            f"{describe(output)}"
        )
    answer = output.argmax(-1)
    if isinstance(target, Tensor) and target.is_floating_point() and target.shape == output.shape:
        target = target.argmax(-1)
    if not isinstance(target, Tensor) or target.is_floating_point() or target.shape != answer.shape:
        raise TypeError(
            "loader: expected targets of class numbers, an integer tensor of shape "
            f"{list(answer.shape)}, got {describe(target)}"
        )
    return (answer == target).flatten(1).all(1) if answer.dim() > 1 else answer == target


@dataclass
class Pass:
    """What a pass over the loader found, for each threshold in order."""

    rows: int
    steps: list[float]  # mean steps
    scores: list[float]  # sums of the scores
    binary: bool  # every score was a bool
    at_step: list[float]  # sums of the scores of all rows after step 1, 2, …; empty for weighted policies


@dataclass
class Held:
    """Held-out rows and what is to be found out about them."""

    halt: AdaptiveHalt
    batches: Iterable[Any]
    target: Target
    score: Score
    targets: bool
    bounds: tuple[float, float]  # of a score

    def measure(self, values: Sequence[float], depth: bool) -> Pass:
        """Run the loader once, and follow each of the thresholds.

        Parameters
        ----------
        values : sequence of float
            The thresholds, the most careful one first.
        depth : bool
            Whether every row takes all steps, so that the scores at a fixed number of steps are found too.
        """
        halt, policy = self.halt, self.halt.policy
        weighted, needs_last = policy.weighted, not self.targets
        probe = Probe(policy, self.target, values, depth or (needs_last and not weighted))
        steps, scores = [0.0] * len(values), [0.0] * len(values)
        at_step: list[float] = []
        rows, binary = 0, True
        with _probing(halt, probe, self.target), torch.no_grad():
            for item in self.batches:
                arguments, target = self._split(item)
                result = halt(*arguments)
                followed = probe.finish(result)
                batch = int(result.steps.shape[0])
                if batch == 0:
                    continue
                rows += batch
                if needs_last:
                    target = followed[0].output if weighted else result.output
                for i, each in enumerate(followed):
                    steps[i] += float(each.steps.double().sum())
                    score = self._scored(each.output, target, batch)
                    binary &= score.dtype == torch.bool
                    scores[i] += float(score.double().sum())
                if depth and not weighted:
                    readouts = [*probe.at_step[:-1], result.output]
                    at_step += [0.0] * (len(readouts) - len(at_step))
                    for n in range(len(at_step)):  # a batch may end sooner: then nothing changes any more
                        score = self._scored(readouts[min(n, len(readouts) - 1)], target, batch)
                        at_step[n] += float(score.double().sum())
        if rows == 0:
            raise ValueError("loader: expected at least one row, got none")
        return Pass(rows, [s / rows for s in steps], scores, binary, at_step)

    def _split(self, item: Any) -> tuple[tuple[Any, ...], Any]:
        target = None
        if self.targets:
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise TypeError(
                    f"loader: expected pairs (arguments, target), because targets=True, got {_kind(item)}"
                )
            item, target = item
        if isinstance(item, Tensor):
            item = (item,)
        if not isinstance(item, (tuple, list)) or not item:
            raise TypeError(
                f"loader: expected the arguments of a call, (state, *inputs), or the state, got {_kind(item)}"
            )
        return tuple(item), target

    def _scored(self, output: Tensor | None, target: Any, batch: int) -> Tensor:
        assert output is not None
        score = self.score(output, target)
        if not isinstance(score, Tensor) or score.shape != (batch,):
            raise ValueError(f"{self._name}: expected one number per row, [{batch}], got {describe(score)}")
        low, high = self.bounds
        if score.dtype != torch.bool and not bool(((score >= low) & (score <= high)).all()):
            raise ValueError(
                f"{self._name}: expected {'finite numbers' if math.isinf(low) else 'numbers in [0, 1]'}, "
                f"got a minimum of {float(score.min())} and a maximum of {float(score.max())}"
            )
        return score

    @property
    def _name(self) -> str:
        return "metric" if math.isinf(self.bounds[0]) else "loss"


def _kind(item: Any) -> str:
    return f"{type(item).__name__} of {len(item)}" if isinstance(item, (tuple, list)) else describe(item)


@contextlib.contextmanager
def _probing(halt: AdaptiveHalt, probe: Probe, target: Target) -> Iterator[None]:
    """Put the probe in the policy's place, in evaluation mode; put everything back at the end."""
    policy, before = halt.policy, getattr(*target)
    modes = [(module, module.training) for module in halt.modules()]
    halt.eval()
    halt.policy = probe
    try:
        yield
    finally:
        halt.policy = policy
        setattr(*target, before)
        for module, training in modes:
            module.training = training


def prepare(
    halt: Any, loader: Any, score: Any, targets: Any, setting: Any, candidates: Any, default: Score, name: str
) -> tuple[Held, list[float]]:
    """Check the arguments; return what is held out, and the thresholds, the most careful one first."""
    if not isinstance(halt, AdaptiveHalt):
        raise TypeError(f"halt: expected an AdaptiveHalt, got {describe(halt)}")
    if not isinstance(targets, bool):
        raise TypeError(f"targets: expected a bool, got {describe(targets)}")
    if score is not None and not callable(score):
        raise TypeError(f"{name}: expected a callable or None, got {describe(score)}")
    if not isinstance(loader, Iterable) or isinstance(loader, Tensor):
        raise TypeError(f"loader: expected an iterable of batches, got {describe(loader)}")
    target = _find(halt.policy, setting)
    values = _candidates(target, candidates)
    batches = list(loader) if isinstance(loader, Iterator) else loader
    bounds = (0.0, 1.0) if name == "loss" else (-math.inf, math.inf)
    return Held(halt, batches, target, score or default, targets, bounds), values


def _find(policy: Policy, setting: Any) -> Target:
    if setting is None:
        if policy.calibrated is None:
            raise ValueError(
                f"policy: expected one with a threshold, got {type(policy).__name__}, which names none; name "
                "it by setting=, and values for it by candidates="
            )
        setting = policy.calibrated.name
    if not isinstance(setting, str):
        raise TypeError(f"setting: expected the name of a setting, got {describe(setting)}")
    target = resolve(policy, setting)
    value = getattr(*target)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"setting: expected {setting} to be a number, got {describe(value)}")
    return target


def _candidates(target: Target, candidates: Any) -> list[float]:
    if candidates is None:
        own = target.owner.calibrated
        if own is None or own.name != target.name:
            raise ValueError(
                f"candidates: expected values for {target.name}, because {type(target.owner).__name__} names "
                "none, got None"
            )
        return list(own.candidates)
    values = candidates.tolist() if isinstance(candidates, Tensor) else list(candidates)
    if not values or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values):
        raise TypeError(f"candidates: expected at least one number, got {values!r}")
    before = getattr(*target)
    try:
        for value in values:
            setattr(*target, value)
    finally:
        setattr(*target, before)
    return values
