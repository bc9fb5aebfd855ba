"""`calibrate`: the threshold that meets a compute budget, or the cheapest one whose risk is bounded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from adaptcomp_ext.nn.calibration.bounds import certified, p_value, rows_needed
from adaptcomp_ext.nn.calibration.measured import Held, Pass, Score, agreement, prepare
from adaptcomp_ext.nn.halting.adaptive_halt import AdaptiveHalt
from adaptcomp_ext.ops._checks import describe

_PASSES, _BETWEEN, _CLOSE = 3, 15, 0.005
"""A budget's passes after the first, as long as it is missed by more than 0.5 %, and the number of thresholds
that each tries between two others."""


@dataclass(frozen=True)
class Calibration:
    """The threshold that `calibrate` has set, and what it was chosen from. It prints as a short report.

    Attributes
    ----------
    setting : str
        The name of the threshold.
    threshold : float
        Its new value.
    met : bool
        Whether the budget is met, or the risk certified. If not, the threshold is the nearest to it: the
        cheapest for a budget, the most careful for a risk.
    goal : str
        What was asked for.
    mean_steps : float
        The mean number of steps of the held-out rows at the new threshold.
    loss : float
        Their mean loss.
    rows : int
        Their number.
    candidates : numpy.ndarray
        float64 [K]: the thresholds that were tried, the most careful one first.
    candidate_steps : numpy.ndarray
        float64 [K]: the mean number of steps with each.
    candidate_losses : numpy.ndarray
        float64 [K]: the mean loss with each.
    p_values : numpy.ndarray or None
        float64 [K], for a risk: the p-value of the hypothesis that the expected loss is above the bound.
    note : str
        Why the goal is not met; else empty.
    """

    setting: str
    threshold: float
    met: bool
    goal: str
    mean_steps: float
    loss: float
    rows: int
    candidates: np.ndarray
    candidate_steps: np.ndarray
    candidate_losses: np.ndarray
    p_values: np.ndarray | None
    note: str

    def __str__(self) -> str:
        """Return the result in one line, and the thresholds around it as a table."""
        lines = [
            f"{self.setting} = {self.threshold:.8g}: {self.goal} {'met' if self.met else 'NOT MET'}; "
            f"{self.mean_steps:.3f} steps, loss {self.loss:.4f}, on {self.rows:,} held-out rows"
        ]
        if self.note:
            lines.append(self.note)
        head = f"{self.setting:>12}  {'mean steps':>10}  {'loss':>8}"
        lines.append(head if self.p_values is None else f"{head}  {'p-value':>8}")
        at = int(np.argmin(np.abs(self.candidates - self.threshold)))
        shown = range(max(0, at - 4), min(len(self.candidates), at + 5))
        for i in shown:
            line = f"{self.candidates[i]:>12.8g}  {self.candidate_steps[i]:>10.3f}"
            line += f"  {self.candidate_losses[i]:>8.4f}"
            if self.p_values is not None:
                line += f"  {self.p_values[i]:>8.2g}"
            lines.append(line + ("  *" if i == at else ""))
        return "\n".join(lines)


def disagreement(output: Tensor, target: Any) -> Tensor:
    """Return, bool [B], whether an answer of each row is not its target's."""
    return ~agreement(output, target)


def calibrate(
    halt: AdaptiveHalt,
    loader: Iterable[Any],
    *,
    budget: float | None = None,
    risk: tuple[float, float] | None = None,
    loss: Score | None = None,
    targets: bool = False,
    setting: str | None = None,
    candidates: Sequence[float] | Tensor | None = None,
) -> Calibration:
    """Choose a policy's threshold on held-out rows, for a compute budget or a bounded risk, and set it.

    Each batch runs once through all its steps, and what every threshold would do with it follows from that
    run; a budget takes up to three more passes, for thresholds in between. The module runs in evaluation mode
    without gradients, and keeps the modes that it had.

    Parameters
    ----------
    halt : AdaptiveHalt
        With `Confidence`, `ACT`, `Convergence`, or another policy that has a threshold (`Policy.calibrated`).
    loader : iterable
        Held-out batches. Each is the arguments of a call, ``(state, *inputs)``, or a state alone; with
        `targets` a pair ``(arguments, target)``. An iterator, which can be read only once, is kept in memory.
    budget : float, optional
        The largest mean number of steps. The threshold that comes closest to it from below is set.
    risk : pair of float, optional
        ``(alpha, delta)``, both in (0, 1): the cheapest threshold is set whose risk, the expected loss of a
        row, is at most `alpha`, with probability at least 1 − `delta`. See *The guarantee* below.
    loss : callable, optional
        ``loss(output, target) -> [B]``, numbers in [0, 1], or bool. Default: whether an answer of the row,
        the argmax over the last dimension of its output, is not that of the target.
    targets : bool
        False: the target is the output at full depth, after `max_steps` steps; for weighted policies that of
        the most careful candidate. True: the loader yields the targets, for the default loss class numbers.
    setting : str, optional
        The name of the threshold. Default: the policy's own. ``"policies.0.threshold"`` is that of a policy
        within a policy, at the attribute ``policies``.
    candidates : sequence of float, optional
        The thresholds to try, the most careful one first, that is the one with the most steps. For a risk
        they must not depend on the rows of the loader. Default: the policy's own.

    Returns
    -------
    Calibration
        What was chosen and why; it prints as a report. If the goal cannot be met it says so, and the nearest
        threshold is set: the cheapest one for a budget, the most careful one for a risk.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described, or the loader yields no row.

    Notes
    -----
    *Saved with the module.* From then on the threshold is part of the policy's ``state_dict``, a float64
    scalar under the setting's name, and ``load_state_dict`` sets it. Pickles and copies have it as any
    setting.

    *The guarantee* of a risk is that of Learn-then-Test (Angelopoulos et al. 2021): over the draw of the
    held-out rows, the probability that the set threshold's expected loss on a new row is above `alpha`, and
    that `met` is True, is at most `delta`. It requires that the held-out rows and the new ones are
    independent draws from one distribution, that no model was trained or chosen on them, and that the step
    computes a row alone. The candidates are tested from the most careful one on, each at level `delta`, until
    the first that is not certified; no correction for their number is needed. A loss that returns bool is
    tested by the exact binomial tail, any other by the bound of Hoeffding and Bentkus. Without an error at
    least ``log(delta) / log(1 - alpha)`` rows are needed: 149 for ``(0.02, 0.05)``.

    *Not promised:* the guarantee for a budget, whose mean steps are those of the held-out rows; the cheapest
    of all possible thresholds, where a more careful candidate was not certified.

    Examples
    --------
    >>> report = ac.calibrate(halt, loader, budget=4.0)
    >>> report = ac.calibrate(halt, loader, risk=(0.02, 0.05))
    >>> print(report)
    """
    if (budget is None) == (risk is None):
        raise ValueError(
            f"budget: expected either a budget or a risk, got budget={budget!r} and risk={risk!r}"
        )
    if risk is None:
        _check_number("budget", budget)
        if not 1 <= float(budget or 0) < math.inf:
            raise ValueError(f"budget: expected a mean number of steps, at least 1, got {budget}")
    else:
        _check_risk(risk)
    held, values = prepare(halt, loader, loss, targets, setting, candidates, disagreement, "loss")
    report = _within(held, values, float(budget)) if budget is not None else _certify(held, values, risk)
    setattr(*held.target, report.threshold)
    held.target.owner.save_setting(held.target.name)
    return report


def _within(held: Held, values: list[float], budget: float) -> Calibration:
    """Choose the threshold whose mean steps come closest to the budget from below."""
    done = held.measure(values, depth=False)
    best = _closest(done.steps, budget)
    if best is not None:
        # Between the best threshold and the next more careful one, which exceeds the budget, there may be a
        # better one.
        for _ in range(_PASSES):
            above = [i for i in range(best) if done.steps[i] > budget]
            if not above or done.steps[best] >= (1 - _CLOSE) * budget:
                break
            at = above[-1] + 1
            low, high = values[at], values[above[-1]]
            between = [high + (low - high) * i / (_BETWEEN + 1) for i in range(1, _BETWEEN + 1)]
            finer = held.measure(between, depth=False)
            values = values[:at] + between + values[at:]
            done.steps[at:at], done.scores[at:at] = finer.steps, finer.scores
            fitting = _closest(done.steps, budget)
            assert fitting is not None
            best = fitting
        return _report(held, values, done, best, True, f"budget of {budget:g} steps")
    least = min(range(len(values)), key=done.steps.__getitem__)
    note = f"Every candidate takes more; the cheapest is set, at {done.steps[least]:.3f} steps."
    return _report(held, values, done, least, False, f"budget of {budget:g} steps", note)


def _closest(steps: Sequence[float], budget: float) -> int | None:
    """Return the first index of the largest number that is at most the budget; None: there is none."""
    fitting = [i for i, mean in enumerate(steps) if mean <= budget]
    return max(fitting, key=lambda i: (steps[i], -i)) if fitting else None


def _certify(held: Held, values: list[float], risk: Any) -> Calibration:
    """Choose the last threshold of those that are certified one after the other."""
    alpha, delta = map(float, risk)
    done = held.measure(values, depth=False)
    p_values = [p_value(total, done.rows, alpha, done.binary) for total in done.scores]
    count = certified(p_values, delta)
    goal, note = f"risk <= {alpha:g} with probability {1 - delta:g}", ""
    if count == 0:
        note = "No candidate is certified; the most careful one is set."
        needed = rows_needed(alpha, delta)
        if done.rows < needed:
            note += f" At least {needed:,} rows are needed, even without an error."
    # Of certified thresholds that take the same steps the most careful one, which is certified as well.
    at = done.steps.index(min(done.steps[:count])) if count else 0
    return _report(held, values, done, at, count > 0, goal, note, p_values)


def _report(
    held: Held,
    values: Sequence[float],
    done: Pass,
    at: int,
    met: bool,
    goal: str,
    note: str = "",
    p_values: Sequence[float] | None = None,
) -> Calibration:
    losses = np.asarray(done.scores) / done.rows
    return Calibration(
        held.target.name,
        float(values[at]),
        met,
        goal,
        done.steps[at],
        float(losses[at]),
        done.rows,
        np.asarray(values, dtype=np.float64),
        np.asarray(done.steps),
        losses,
        None if p_values is None else np.asarray(p_values),
        note,
    )


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")


def _check_risk(risk: Any) -> None:
    if not isinstance(risk, (tuple, list)) or len(risk) != 2:
        raise TypeError(f"risk: expected a pair (alpha, delta), got {describe(risk)}")
    for name, value in zip(("alpha", "delta"), risk, strict=True):
        _check_number(f"risk: {name}", value)
        if not 0 < value < 1:
            raise ValueError(f"risk: expected {name} in (0, 1), got {value}")
