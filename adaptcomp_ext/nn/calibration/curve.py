"""The curve of accuracy against compute."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from adaptcomp_ext.nn.calibration.measured import Score, agreement, prepare
from adaptcomp_ext.nn.halting.adaptive_halt import AdaptiveHalt


@dataclass(frozen=True)
class ComputeCurve:
    """What each threshold makes of the same rows: a metric against the mean number of steps.

    Attributes
    ----------
    setting : str
        The name of the threshold.
    threshold : numpy.ndarray
        float64 [K]: the thresholds, the most careful one first.
    mean_steps : numpy.ndarray
        float64 [K]: the mean number of steps of a row.
    metric : numpy.ndarray
        float64 [K]: the mean of the metric.
    fixed_steps : numpy.ndarray
        int64 [M], or [0] for a weighted policy: 1, 2, …, the numbers of steps of the baseline.
    fixed_metric : numpy.ndarray
        float64, as long: the mean of the metric where every row takes that many steps.
    rows : int
        The number of rows.
    name : str
        The name of the metric.
    """

    setting: str
    threshold: np.ndarray
    mean_steps: np.ndarray
    metric: np.ndarray
    fixed_steps: np.ndarray
    fixed_metric: np.ndarray
    rows: int
    name: str

    def __str__(self) -> str:
        """Return a table; thresholds with the same figures share a line."""
        lines = [f"{self.setting:>12}  {'mean steps':>10}  {self.name:>10}"]
        last = None
        for value, steps, metric in zip(self.threshold, self.mean_steps, self.metric, strict=True):
            figures = f"{steps:>10.3f}  {metric:>10.4f}"
            if figures != last:
                lines.append(f"{value:>12.8g}  {figures}")
            last = figures
        return "\n".join(lines)

    def plot(self, ax: Any = None) -> Any:
        """Draw the curve, and the baseline of a fixed number of steps; return the axes.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Default: those of a new figure.

        Raises
        ------
        ImportError
            If matplotlib is not installed; the extra ``demo`` brings it.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots(layout="constrained")[1]
        if len(self.fixed_steps):
            label = "the same number of steps for all rows"
            ax.plot(self.fixed_steps, self.fixed_metric, "o--", ms=4, color="0.55", label=label)
        ax.plot(self.mean_steps, self.metric, "o-", ms=4, label=f"halting, by {self.setting}")
        ax.set_xlabel("mean steps per row")
        ax.set_ylabel(self.name)
        ax.legend()
        return ax


def compute_curve(
    halt: AdaptiveHalt,
    loader: Iterable[Any],
    metric: Score | None = None,
    *,
    targets: bool = False,
    setting: str | None = None,
    candidates: Sequence[float] | Tensor | None = None,
) -> ComputeCurve:
    """Measure a metric against the mean number of steps, for many thresholds of a policy in one pass.

    Each batch runs once, through all its steps; what every threshold would do with it follows from that run.
    The module comes out as it went in.

    Parameters
    ----------
    halt : AdaptiveHalt
        With `Confidence`, `ACT`, `Convergence`, or another policy that has a threshold.
    loader, targets, setting, candidates
        As of `calibrate`.
    metric : callable, optional
        ``metric(output, target) -> [B]``, numbers or bool, whose mean over the rows is reported. Default:
        whether a row's answers, the argmax over the last dimension of its output, are those of the target.
        Without `targets` the target is the output at full depth, so that the metric is agreement with it.

    Returns
    -------
    ComputeCurve

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described, or the loader yields no row.

    Examples
    --------
    >>> curve = ac.compute_curve(halt, [((state, x), labels) for state, x, labels in loader], targets=True)
    >>> print(curve)
    >>> curve.plot().figure.savefig("curve.png")
    """
    held, values = prepare(halt, loader, metric, targets, setting, candidates, agreement, "metric")
    return make_curve(held, values, metric)


def make_curve(held: Any, values: Sequence[float], metric: Any) -> ComputeCurve:
    """Measure the thresholds, with the baseline of a fixed number of steps."""
    done = held.measure(values, depth=True)
    name = "metric" if metric is not None else "accuracy" if held.targets else "agreement"
    return ComputeCurve(
        held.target.name,
        np.asarray(values, dtype=np.float64),
        np.asarray(done.steps),
        np.asarray(done.scores) / done.rows,
        np.arange(1, len(done.at_step) + 1),
        np.asarray(done.at_step, dtype=np.float64) / done.rows,
        done.rows,
        name,
    )
