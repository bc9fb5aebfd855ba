"""A whole run of a recurrent cell with given numbers of steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptcomp_ext.reference.halting import NONFINITE
from adaptcomp_ext.reference.mlp_energy import ACTIVATIONS


def _step(settings: Any, tensors: Any, x: Tensor | None, state: list[Tensor]) -> list[Tensor]:
    given = tensors.bias_ih if x is None else F.linear(x, tensors.weight_ih, tensors.bias_ih)
    h = state[0]
    if settings.kind == "mlp":
        hidden = list(ACTIVATIONS.values())[settings.activation](given + F.linear(h, tensors.weight_hh))
        change = F.linear(hidden, tensors.weight2, tensors.bias2)
        return [h + change if settings.residual else change]
    own = F.linear(h, tensors.weight_hh, tensors.bias_hh)
    if settings.kind == "gru":
        (i_r, i_z, i_n), (h_r, h_z, h_n) = given.chunk(3, dim=1), own.chunk(3, dim=1)
        keep = torch.sigmoid(i_z + h_z)
        fresh = torch.tanh(i_n + torch.sigmoid(i_r + h_r) * h_n)
        return [fresh + keep * (h - fresh)]
    i, f, g, o = (given + own).chunk(4, dim=1)
    cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return [torch.sigmoid(o) * torch.tanh(cell), cell]


def _ponder(
    settings: Any, n: int, logit: Tensor, log_survival: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return PonderNet's weight of a step, the log of the survival after it, and its part of the cost."""
    if n < settings.min_steps:
        return torch.zeros_like(logit), log_survival, torch.zeros_like(logit)
    log_decay, log_total = settings.prior
    log_prior = (n - settings.min_steps) * log_decay - log_total
    log_p = torch.where(ends, log_survival, log_survival + F.logsigmoid(logit))
    weight = torch.exp(log_p)
    cost = torch.where(weight == 0, 0, weight * (log_p - log_prior))
    return weight, log_survival + F.logsigmoid(-logit), cost


def recurrence(settings: Any, tensors: Any, steps: Tensor, status: Tensor) -> list[Tensor]:
    """Return output (where it is not the state), state, cost and trace (where the policy has them).

    The trace is [S, dim] and [S]: the first tensor of the state after each step, and the weights, ordered by
    step and then by row; S is the sum of the steps. `settings` and `tensors` are those of
    `adaptcomp_ext.ops.recurrence`, `steps` and `status` the results of a run, int64 and int8 [B]. Rows that
    ended NONFINITE are zero. Differentiable to any order.
    """
    batch = steps.shape[0]
    row = (status != NONFINITE).nonzero()[:, 0]
    state = [t.index_select(0, row) for t in (tensors.state, tensors.second) if t is not None]
    x = None if tensors.x is None else tensors.x.index_select(0, row)
    last, results = (
        steps[row],
        [torch.zeros_like(t) for t in (tensors.state, tensors.second) if t is not None],
    )
    width = results[0].shape[1] if tensors.readout is None else tensors.readout.shape[0]
    output, cost = results[0].new_zeros((batch, width)), results[0].new_zeros(batch)
    accumulated = cost[row]
    total, seen = int(steps.sum()) if settings.prior is not None else 0, 0
    states, weights = results[0].new_zeros((total, results[0].shape[1])), results[0].new_zeros(total)
    for n in range(1, int(last.max()) + 1 if row.numel() else 0):
        state = _step(settings, tensors, x, state)
        read = (
            state[0] if tensors.readout is None else F.linear(state[0], tensors.readout, tensors.readout_bias)
        )
        ends = last == n
        weight = ends.to(read.dtype)
        if settings.prior is not None:
            logit = F.linear(state[0], tensors.head, tensors.head_bias)[:, 0]
            weight, kept, add = _ponder(settings, n, logit, accumulated, ends)
            accumulated = kept
            cost = cost.index_add(0, row, add)
            here = (steps >= n).nonzero()[:, 0]
            place = seen + torch.searchsorted(here, row)
            seen += here.shape[0]
            states, weights = states.index_copy(0, place, state[0]), weights.index_copy(0, place, weight)
        elif settings.weighted:
            p = torch.sigmoid(F.linear(state[0], tensors.head, tensors.head_bias)[:, 0])
            p = p if n >= settings.min_steps else torch.zeros_like(p)
            weight = torch.where(ends, 1 - accumulated, p)
            accumulated = accumulated + p
            cost = cost.index_add(0, row, torch.where(ends, n + weight, 0))
        masked = read == -torch.inf
        add = torch.where(masked & (weight == 0)[:, None], 0, weight[:, None] * read)
        output = output.index_add(0, row, add)
        gone = ends.nonzero()[:, 0]
        for i, t in enumerate(state):
            results[i] = results[i].index_copy(0, row[gone], t[gone])
        stays = (~ends).nonzero()[:, 0]
        state = [t[stays] for t in state]
        x = None if x is None else x[stays]
        row, last, accumulated = row[stays], last[stays], accumulated[stays]
    has_output = settings.weighted or tensors.readout is not None
    return [
        *([output] if has_output else []),
        *results,
        *([cost] if settings.has_cost else []),
        *([states, weights] if settings.prior is not None else []),
    ]
