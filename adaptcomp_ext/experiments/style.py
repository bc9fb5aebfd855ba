"""How the pictures of the demonstration and the experiments look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptcomp_ext.experiments.files import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "FAINT",
    "GREEN",
    "INK",
    "MUTED",
    "ORANGE",
    "OTHERS",
    "OURS",
    "QUICK",
    "STYLE",
    "WRONG",
    "bar_chart",
    "bars",
    "curve",
    "note",
    "save",
    "span_at_least",
]

INK, MUTED, FAINT = "#22272e", "#6b7480", "#e3e6ea"
OURS, OTHERS, WRONG, ORANGE, GREEN = "#2166ac", "#b4bcc6", "#c2341d", "#f08a24", "#3f9c6c"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
}
"""For `matplotlib.rc_context`."""

QUICK = "Quick run (--quick): it shows that everything runs, and its figures mean nothing."
"""What every report of a quick run says of itself."""


def save(figure: Figure, path: Path, dpi: int, quick: bool = False) -> None:
    """Write a PNG whole; one of a quick run says so across the picture."""
    if quick:
        figure.text(
            0.5,
            0.5,
            "quick run",
            fontsize=64,
            color=WRONG,
            alpha=0.18,
            rotation=15,
            ha="center",
            va="center",
            zorder=10,
        )
    with whole(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")


def bars(values: Sequence[Any], scale: float = 1.0) -> list[float] | None:
    """Half of each interval, for ``errorbar``; None, and so no bars, where there is one seed."""
    return None if all(value.high is None for value in values) else [scale * value.half for value in values]


def curve(
    axes: Axes,
    x: Sequence[Any],
    y: Sequence[Any],
    label: str | None = None,
    *,
    scale: float = 1.0,
    x_bars: bool = False,
    **look: Any,
) -> None:
    """Draw means with their intervals against x.

    Parameters
    ----------
    axes : Axes
        Where to draw.
    x, y : sequence of numbers, Series over seeds, or intervals
        The points; bars are drawn along y, and with `x_bars` along x.
    label : str, optional
        The entry of the legend.
    scale : float
        Factor of y: 100 for shares in per cent.
    **look
        As for ``errorbar``.
    """
    from adaptcomp_ext.experiments.runs.statistics import estimate

    x, y = [estimate(v) for v in x], [estimate(v) for v in y]
    shown: dict[str, Any] = {"marker": "o", "ms": 4.5, "lw": 1.6, **look}
    axes.errorbar(
        [v.mean for v in x],
        [scale * v.mean for v in y],
        bars(y, scale),
        bars(x) if x_bars else None,
        label=label,
        **shown,
    )


def bar_chart(
    axes: Axes,
    labels: Sequence[str],
    values: Sequence[Any],
    *,
    horizontal: bool = False,
    scale: float = 1.0,
    **look: Any,
) -> None:
    """Draw a bar for each Series over seeds or interval, with its interval; `look` as for ``bar``."""
    from adaptcomp_ext.experiments.runs.statistics import estimate

    values, places = [estimate(v) for v in values], range(len(values))
    means = [scale * v.mean for v in values]
    line: dict[str, Any] = {"fmt": "none", "ecolor": INK, "elinewidth": 1}
    if horizontal:
        axes.barh(places, means, **look)
        axes.errorbar(means, places, xerr=bars(values, scale), **line)
        axes.set_yticks(places, labels)
    else:
        axes.bar(places, means, width=0.6, **look)
        axes.errorbar(places, means, bars(values, scale), **line)
        axes.set_xticks(places, labels)


def note(
    axes: Axes, text: str, at: tuple[Any, Any], offset: tuple[float, float] = (5, 5), **look: Any
) -> None:
    """Write a text beside a point, `offset` points of the font away from it; `look` as for ``annotate``."""
    axes.annotate(text, at, xytext=offset, textcoords="offset points", **look)


def span_at_least(axes: Axes, which: str, span: float) -> None:
    """Widen an axis ("x" or "y") about its middle to `span`, so that small differences do not look large."""
    get, set_ = (axes.get_xlim, axes.set_xlim) if which == "x" else (axes.get_ylim, axes.set_ylim)
    low, high = get()
    if abs(high - low) < span:
        middle, half = (low + high) / 2, span / 2 if high >= low else -span / 2
        set_(middle - half, middle + half)
