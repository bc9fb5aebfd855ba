"""The results of `AdaptiveHalt` and `EnergyDescent`."""

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
        The policy halted it; a descent converged.
    MAX_STEPS : 2
        It took the last step without being halted.
    NONFINITE : 3
        Its state, readout or halting logit, in a descent its point or energy, had a NaN or an infinity. −∞ is
        allowed in logits, where it masks a class or is a halting probability of 0: see `AdaptiveHalt`.
    REJECTED : 4
        Descents only: a step that did not lower the energy was rejected, and every further step would be the
        same.
    """

    HALTED = 1
    MAX_STEPS = 2
    NONFINITE = 3
    REJECTED = 4


@documented
class Trace(NamedTuple):
    """All steps of all rows, ordered by step and then by row; S is the sum of the steps over all rows.

    Attributes
    ----------
    outputs : Tensor
        [S, ...]: the readout after each step; in a descent the point. Differentiable.
    weights : Tensor or None
        [S], in [0, 1]: the weight of each readout in the output. Differentiable. None where `AdaptiveHalt`
        keeps the trace by ``keep_trace`` alone.
    row : Tensor
        int64 [S]: the batch row, counted from 0.
    step : Tensor
        int64 [S]: the step, counted from 1.
    """

    outputs: Tensor
    weights: Tensor | None
    row: Tensor
    step: Tensor


@documented
class HaltResult(NamedTuple):
    """The result of `AdaptiveHalt`: a named tuple, hence a pytree and a valid output of a DDP module.

    Attributes
    ----------
    output : Tensor
        [B, ...]: the weighted sum of the readouts, or the readout at each row's last step, by policy.
        Differentiable.
    state : pytree of Tensor
        [B, ...] each: each row's last state, with the structure, shapes and dtypes of the initial one.
        Differentiable. Where the stages of a ModuleList have changed the shapes after the first step: a list
        of states, of which number n - 1 has the rows with ``steps == n``, in the order of the batch.
    steps : Tensor
        int64 [B]: number of calls of ``step`` with the row.
    cost : Tensor
        [B]: the policy's ponder cost, float32 (float64 in a float64 model), in steps; for PonderNet in
        training mode in nats. Differentiable if the policy defines a cost; otherwise it is the number of
        steps. The step at which a row ended ``NONFINITE`` adds nothing to a policy's own cost.
    status : Tensor
        int8 [B]: the `Status` of each row.
    trace : Trace or None
        All steps of all rows for policies that need them (PonderNet in training mode), or with
        ``keep_trace``; else None.
    log_prob : Tensor or None
        [B], in nats: log-probability of the sampled halting decisions for policies that define it, without
        the step at which a row ended ``NONFINITE``; else None.

    Notes
    -----
    Without a ``readout``, ``output`` may share memory with the first tensor of ``state``: writing to one may
    write to both.
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
    """The result of `EnergyDescent`: a named tuple, hence a pytree and a valid output of a DDP module.

    Attributes
    ----------
    y : Tensor
        [B, ...]: each row's last accepted point, in the shape and dtype of ``y0``. The gradient mode decides
        how it is differentiable.
    energy : Tensor
        [B]: the energy of ``y``, float32 (float64 for float64 points). Differentiable in the energy's
        parameters and the context, and through ``y`` if ``y`` is.
    steps : Tensor
        int64 [B]: number of steps, rejected ones included.
    status : Tensor
        int8 [B]: the `Status` of each row.
    trace : Trace or None
        With ``keep_trace``: ``outputs`` [S, ...] are the points after every step; ``weights`` [S], float32,
        are 1 at each row's last step and 0 elsewhere. Else None.
    """

    y: Tensor
    energy: Tensor
    steps: Tensor
    status: Tensor
    trace: Trace | None
