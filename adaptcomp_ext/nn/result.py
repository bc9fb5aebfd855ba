"""What a run of `AdaptiveHalt` or `EnergyDescent` returns."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

from torch import Tensor

from adaptcomp_ext.ops._fields import documented


class Status(enum.IntEnum):
    """Why a row ended.

    Attributes
    ----------
    HALTED : 1
        The policy, or the stop rule of a descent, halted it.
    MAX_STEPS : 2
        It ran to the last step and the policy had not halted it.
    NONFINITE : 3
        A NaN or an infinity turned up in its state, readout or halting logit; in a descent, in its point or
        energy. −∞ in logits is none: it masks a class of a readout, or is a halting probability of 0. See
        `AdaptiveHalt`.
    REJECTED : 4
        Energy descent only: a step that did not lower the energy was rejected, and nothing further would
        change.
    """

    HALTED = 1
    MAX_STEPS = 2
    NONFINITE = 3
    REJECTED = 4


@documented
class Trace(NamedTuple):
    """Every step of every row, ragged: S is the sum of the steps over all rows. Ordered by step, then by row.

    Attributes
    ----------
    outputs : Tensor
        [S, ...]: the readout after each step (of a descent, the point). Differentiable.
    weights : Tensor
        [S], between 0 and 1: the weight of each readout in the output. Differentiable.
    row : Tensor
        int64 [S]: the batch row, from 0.
    step : Tensor
        int64 [S]: the step, from 1.
    """

    outputs: Tensor
    weights: Tensor
    row: Tensor
    step: Tensor


@documented
class HaltResult(NamedTuple):
    """Result of `AdaptiveHalt`. A named tuple, hence a pytree, and a valid output of a DDP module.

    Attributes
    ----------
    output : Tensor
        [B, ...]: what the policy makes of the readouts: a weighted sum, or the readout at each row's last
        step.
    state : pytree of Tensor
        [B, ...] each: each row's last state, with the structure, shapes and dtypes of the initial one.
    steps : Tensor
        int64 [B]: how often the row went through ``step``.
    cost : Tensor
        [B]: the policy's ponder cost, float32 (float64 in a float64 model); in steps, for PonderNet in
        training in nats. Differentiable where the policy's is; for policies without one of their own it is
        the number of steps. The step at which a row ended ``NONFINITE`` adds nothing to a cost of the
        policy's own.
    status : Tensor
        int8 [B]: a `Status` each.
    trace : Trace or None
        Every step of every row, for policies that need them (PonderNet in training), else None.
    log_prob : Tensor or None
        [B], in nats: log-probability of the sampled halting decisions, for policies that define it, else
        None. Without the step at which a row ended ``NONFINITE``.

    Notes
    -----
    Without a ``readout``, ``output`` may share its memory with the first tensor of ``state``: who writes to
    one may write to both.
    """

    output: Tensor
    state: Any
    steps: Tensor
    cost: Tensor
    status: Tensor
    trace: Trace | None
    log_prob: Tensor | None


@documented
class EnergyResult(NamedTuple):
    """Result of `EnergyDescent`. A named tuple, hence a pytree, and a valid output of a DDP module.

    Attributes
    ----------
    y : Tensor
        [B, ...]: each row's last accepted point, in the shape and dtype of ``y0``. Differentiable as the
        gradient mode says.
    energy : Tensor
        [B]: its energy, in the units of ``energy``, float32 (float64 for float64 points). Differentiable in
        the energy's parameters and the context, and through ``y`` where that is.
    steps : Tensor
        int64 [B]: how many steps the row took, rejected ones included.
    status : Tensor
        int8 [B]: a `Status` each.
    trace : Trace or None
        With ``keep_trace``: ``outputs`` [S, ...] are the points after every step; ``weights`` [S], float32,
        are 1 at each row's last step and 0 elsewhere. Else None.
    """

    y: Tensor
    energy: Tensor
    steps: Tensor
    status: Tensor
    trace: Trace | None
