"""`race`: several starts for each row, of which the first that halts wins while the others leave."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptcomp_ext.nn._tree import check_alike, check_tree, flatten, unflatten
from adaptcomp_ext.nn.descent.energy_descent import EnergyDescent
from adaptcomp_ext.nn.halting import equilibrium
from adaptcomp_ext.nn.halting.adaptive_halt import AdaptiveHalt
from adaptcomp_ext.nn.halting.fusing import begin
from adaptcomp_ext.nn.halting.policy import (
    Decision,
    Policy,
    Run,
    View,
    check_decision,
    decision_of,
    plain_decision,
)
from adaptcomp_ext.nn.result import EnergyResult, HaltResult, Status
from adaptcomp_ext.ops._checks import check_int, describe
from adaptcomp_ext.ops._fields import documented

Perturb = Callable[[Any, Tensor], Any]
"""``perturb(state, start) -> state``; ``start``, int64 [B · K], is the number of each row's start."""


@documented
class RaceResult(NamedTuple):
    """The result of `race`.

    Attributes
    ----------
    result : HaltResult or EnergyResult
        [B, ...] each: the results of the winners.
    start : Tensor
        int64 [B]: the number of the start that won, from 0.
    """

    result: Any
    start: Tensor


def race(
    halt: AdaptiveHalt | EnergyDescent,
    state: Any,
    *inputs: Any,
    starts: int,
    perturb: Perturb | None = None,
) -> RaceResult:
    """Run several starts of each row at once; the first that halts wins, and the others leave the batch.

    Parameters
    ----------
    halt : AdaptiveHalt or EnergyDescent
        What runs. A start of an `AdaptiveHalt` has halted when the policy halts it; one of an `EnergyDescent`
        when its status is HALTED or REJECTED.
    state : pytree of Tensor
        With `perturb` the initial state, [B, ...] each, as of a call of ``halt``. Without, the starts
        themselves: [B, K, ...] each.
    *inputs : pytree of Tensor
        [B, ...] each: inputs or context, the same for all starts of a row.
    starts : int
        K, the number of starts of each row, at least 1.
    perturb : callable, optional
        ``perturb(state, start) -> state`` makes the starts. It gets each row of the state K times in a row,
        [B · K, ...], and the number of each start, int64 [B · K], from 0 to K − 1.

    Returns
    -------
    RaceResult
        ``result``: the results of the winners, and ``start``: which start won. Starts that halt at the same
        step: the one with the lowest number wins. Where none halts, the result is that of the first start
        that took `max_steps` steps; of a descent, of the start with the lowest finite energy.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described, or the call of ``halt`` raises so.

    Notes
    -----
    *Same bits.* The result of a winner is bitwise that of ``halt`` on this start alone, as far as step or
    energy are row-independent. The random numbers of policies that sample, and the noise of a descent, belong
    to start k of row b under the sample id ``b * starts + k``.

    *Gradients* reach the winners, not the starts that lost. A descent repeats the winners alone for it.

    *What losers cost.* They take part in the step at which the winner halts, and in no later one; with
    ``compact="auto"`` they may stay in the block for as long as moving the others costs more. Policies decide
    in Python. The losers of a descent go on to their own end on CUDA, and where the energy is in closed form,
    because one kernel call then takes each row through all its steps.

    *Not promised:* that the first answer is the best one. A policy that halts carelessly makes the race a
    search for the most careless start.

    Examples
    --------
    >>> noise = lambda state, start: state + 0.5 * torch.randn_like(state) * (start > 0)[:, None]
    >>> result, start = ac.race(halt, state, x, starts=8, perturb=noise)
    """
    if not isinstance(halt, (AdaptiveHalt, EnergyDescent)):
        raise TypeError(f"halt: expected an AdaptiveHalt or EnergyDescent, got {describe(halt)}")
    count = check_int("starts", starts, 1)
    if perturb is not None and not callable(perturb):
        raise TypeError(f"perturb: expected a callable or None, got {describe(perturb)}")
    states, batch, device = _starts(state, count, perturb)
    repeated = tuple([_repeat(value, i, count, batch, device) for i, value in enumerate(inputs)])
    if isinstance(halt, AdaptiveHalt):
        return _race_halt(halt, states, repeated, count)
    return _race_descent(halt, states, repeated, count)


def _starts(state: Any, count: int, perturb: Perturb | None) -> tuple[Any, int, torch.device]:
    """Return the states of all starts, [B · K, ...], and B and the device."""
    leaves, structure = check_tree("state", state)
    batch, device = leaves[0].shape[0], leaves[0].device
    check_alike("state", leaves, batch, device)
    if perturb is None:
        for leaf in leaves:
            if leaf.dim() < 2 or leaf.shape[1] != count:
                raise ValueError(
                    f"state: expected {count} starts of each row, [B, {count}, ...], got shape "
                    f"{list(leaf.shape)}; with perturb= the state has no such dimension"
                )
        return unflatten([leaf.flatten(0, 1) for leaf in leaves], structure), batch, device
    start = torch.arange(count, device=device).repeat(batch)
    states = perturb(unflatten([t.repeat_interleave(count, 0) for t in leaves], structure), start)
    made, _ = check_tree("perturb", states)
    check_alike("perturb", made, batch * count, device, like="all starts of the state")
    return states, batch, device


def _repeat(value: Any, i: int, count: int, batch: int, device: torch.device) -> Any:
    leaves, structure = flatten(value)
    if not leaves:
        return value
    leaves, structure = check_tree("inputs", value, i)
    check_alike("inputs", leaves, batch, device, i)
    return unflatten([leaf.repeat_interleave(count, 0) for leaf in leaves], structure)


class FirstToHalt(Policy):
    """Halt as `policy` does, and with the first of the `starts` rows of a race all others of it."""

    def __init__(self, policy: Policy, starts: int) -> None:
        super().__init__()
        self.policy = policy
        self.starts = starts
        self.winner = torch.empty(0, dtype=torch.int64)  # [B]: the start that has won; `starts`: none yet

    @property
    def weighted(self) -> bool:
        """As the policy's."""
        return self.policy.weighted

    @property
    def traced(self) -> bool:
        """As the policy's."""
        return self.policy.traced

    @property
    def reads_logits(self) -> bool:
        """As the policy's."""
        return self.policy.reads_logits

    def check_readout(self, readout: Tensor) -> None:
        """Check as the policy does."""
        self.policy.check_readout(readout)

    def begin(self, run: Run) -> tuple[Tensor, ...]:
        """Begin as the policy does, with no winner."""
        shape = (run.batch // self.starts,)
        self.winner = torch.full(shape, self.starts, dtype=torch.int64, device=run.device)
        return begin(self.policy, run, False)

    def decide(self, view: View) -> Decision:
        """Decide as the policy does; then halt the rows of races that have a winner."""
        decision: Decision = plain_decision(decision_of(self.policy, view))
        check_decision(decision, view)
        with torch.no_grad():
            place = view.row.clamp(min=0)
            row, start = place // self.starts, place % self.starts
            wins = decision.halt & (view.row >= 0) & _finite(view, decision)
            wins &= view.step >= torch.tensor(view.run.min_steps)
            entered = torch.full_like(self.winner, self.starts)
            entered.scatter_reduce_(0, row, torch.where(wins, start, self.starts), "amin")
            self.winner = torch.where(self.winner == self.starts, entered, self.winner)
            return decision._replace(halt=decision.halt | (self.winner < self.starts)[row])


def _finite(view: View, decision: Decision) -> Tensor:
    """Return, bool [n], which rows do not end as NONFINITE at this step."""
    readout = view.readout
    fine = torch.ones_like(view.row, dtype=torch.bool)
    for leaf in [*flatten(view.state)[0], readout]:
        if not leaf.is_floating_point():
            continue
        # −inf masks a class in a readout, and is divergence elsewhere.
        masks = leaf.data_ptr() == readout.data_ptr()
        bad = leaf.isnan() | (leaf == torch.inf) if masks else ~leaf.isfinite()
        fine &= ~bad.flatten(1).any(1) if bad.dim() > 1 else ~bad
    if decision.logits is not None:
        fine &= ~(decision.logits.isnan() | (decision.logits == torch.inf))
    return fine


def _race_halt(halt: AdaptiveHalt, states: Any, inputs: tuple[Any, ...], count: int) -> RaceResult:
    halt._problem(states, inputs, None)  # checks the arguments and, once, that rows stay apart
    if equilibrium.is_wanted(halt.policy):
        raise ValueError(
            'halt: expected Convergence(gradient="unrolled") for a race with gradients, because starts that '
            f'leave are at no fixed point, got gradient="{halt.policy.gradient}"; race under '
            "torch.no_grad(), and call halt on the winner's state"
        )
    first = FirstToHalt(halt.policy, count)
    # The same module with another policy; the caller's stays as it is, for other threads.
    twin = copy.copy(halt)
    twin.__dict__["_modules"] = dict(halt._modules)
    twin.__dict__["_known_run"] = twin.__dict__["_learned"] = None
    twin.policy = first
    twin.check_rows = False
    result: HaltResult = twin(states, *inputs)
    status = result.status.view(-1, count)
    steps = torch.arange(count, device=status.device) + count * (status != Status.MAX_STEPS)
    start = torch.where(first.winner < count, first.winner, steps.argmin(1))
    index = start + count * torch.arange(len(start), device=start.device)
    same = flatten(result.state)[1] == flatten(states)[1]
    state = _take(result.state, index) if same else _of_stages(result, index)
    return RaceResult(_of_rows(result, state, index, count), start)


def _take(state: Any, index: Tensor) -> Any:
    leaves, structure = flatten(state)
    return unflatten([leaf[index] for leaf in leaves], structure)


def _of_stages(result: HaltResult, index: Tensor) -> list[Any]:
    """Return the states where stages change their shapes: one for each number of steps, of its rows."""
    kept = torch.zeros_like(result.status, dtype=torch.bool)
    kept[index] = True
    return [_take(state, kept[result.steps == n].nonzero()[:, 0]) for n, state in enumerate(result.state, 1)]


def _of_rows(result: HaltResult, state: Any, index: Tensor, count: int) -> HaltResult:
    """Return the results of the rows `index` of all starts, with their `state`."""
    trace = result.trace
    if trace is not None:
        kept = torch.zeros_like(result.status, dtype=torch.bool)
        kept[index] = True
        at = kept[trace.row].nonzero()[:, 0]
        weights = None if trace.weights is None else trace.weights[at]
        trace = trace._replace(
            outputs=trace.outputs[at], weights=weights, row=trace.row[at] // count, step=trace.step[at]
        )
    return HaltResult(
        output=result.output[index],
        state=state,
        steps=result.steps[index],
        cost=result.cost[index],
        status=result.status[index],
        trace=trace,
        log_prob=None if result.log_prob is None else result.log_prob[index],
    )


def _race_descent(descend: EnergyDescent, y0: Any, context: tuple[Any, ...], count: int) -> RaceResult:
    with torch.no_grad():
        ended = descend._race(y0, context, count)
        batch = ended.steps.shape[0] // count
        status, steps = ended.status.view(batch, count), ended.steps.view(batch, count)
        halted = (status == Status.HALTED) | (status == Status.REJECTED)
        steps = torch.where(halted, steps, torch.iinfo(torch.int64).max)
        left = (status == 0) | (status == Status.NONFINITE)
        energy = torch.where(left, torch.inf, ended.energy.view(batch, count))
        start = torch.where(halted.any(1), _first_least(steps), _first_least(energy))
        index = start + count * torch.arange(batch, device=start.device)
    if torch.is_grad_enabled() or descend.keep_trace:
        result = descend(y0[index], *(value[index] for value in context), sample_ids=index)
    else:
        result = EnergyResult(
            ended.y[index], ended.energy[index], ended.steps[index], ended.status[index], None
        )
    return RaceResult(result, start)


def _first_least(values: Tensor) -> Tensor:
    """Return the place of the first of the least numbers of each row; `argmin` promises no order."""
    if values.shape[1] == 0 or values.shape[0] == 0:
        return values.new_zeros(values.shape[0], dtype=torch.int64)
    place = torch.arange(values.shape[1], device=values.device)
    is_least = values == values.amin(1, keepdim=True)
    return torch.where(is_least, place, values.shape[1] - 1).amin(1)
