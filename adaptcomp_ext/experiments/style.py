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
    "PANEL",
    "QUICK",
    "STYLE",
    "WIDTH",
    "WRONG",
    "band",
    "bar_chart",
    "bars",
    "curve",
    "legend",
    "mark_cut_axes",
    "note",
    "save",
    "span_at_least",
]

INK, MUTED, FAINT = "#22272e", "#6b7480", "#e3e6ea"
OURS, OTHERS, WRONG, ORANGE, GREEN = "#2166ac", "#b4bcc6", "#c2341d", "#f08a24", "#3f9c6c"
STYLE: dict[Any, Any] = {
    "font.size": 12,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 13,
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
    "legend.fontsize": 11,
}
"""For `matplotlib.rc_context`."""
WIDTH, PANEL = 6.4, 3.5
"""Inches: the width of a picture, whose letters a phone still shows, and the height of a panel in it."""

QUICK = "Quick run (--quick): it shows that everything runs, and its figures mean nothing."
"""What every report of a quick run says of itself."""


def save(figure: Figure, path: Path, dpi: int, quick: bool = False) -> None:
    """Write a PNG whole, with its cut axes marked; one of a quick run says so across the picture."""
    mark_cut_axes(figure)
    if quick:
        look: dict[str, Any] = {"fontsize": 64, "color": WRONG, "alpha": 0.18, "rotation": 15, "zorder": 10}
        figure.text(0.5, 0.5, "quick run", ha="center", va="center", **look)
    with whole(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")


def mark_cut_axes(figure: Figure) -> None:
    """Draw two strokes across each linear axis that does not begin at zero although all of it is positive."""
    from matplotlib.lines import Line2D
    from matplotlib.path import Path as Outline
    from matplotlib.ticker import FixedLocator, ScalarFormatter

    for axes in figure.axes:
        if not axes.axison or axes.images:
            continue
        for axis, (low, high), at in (
            (axes.xaxis, sorted(axes.get_xlim()), ([0.03, 0.05], [0, 0])),
            (axes.yaxis, sorted(axes.get_ylim()), ([0, 0], [0.04, 0.07])),
        ):
            named = isinstance(axis.get_major_locator(), FixedLocator) and not isinstance(
                axis.get_major_formatter(), ScalarFormatter
            )  # labels of one's own: categories, which have no zero
            if axis.get_scale() == "linear" and low > 0.1 * (high - low) and not named:
                slant = (1, 0.5) if axis is axes.yaxis else (0.5, 1)
                stroke = Outline([(-slant[0], -slant[1]), slant])
                look: dict[str, Any] = {"marker": stroke, "markersize": 7, "markeredgecolor": MUTED}
                look |= {"markeredgewidth": 1.2, "color": "white", "linewidth": 3}
                line = Line2D(*at, transform=axes.transAxes, clip_on=False, zorder=9, **look)
                axes.add_line(line)


def legend(axes: Axes, columns: int = 2) -> None:
    """Place the legend between the title, which has to be there, and the panel, where it hides nothing."""
    rows = -(-len(axes.get_legend_handles_labels()[1]) // columns)
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, borderaxespad=0.2, columnspacing=1.2
    )
    axes.set_title(axes.get_title(loc="left"), pad=8 + 17 * rows)


def bars(values: Sequence[Any], scale: float = 1.0) -> list[float] | None:
    """Half of each interval, for ``errorbar``; None, and so no bars, where there is one seed."""
    return None if all(value.high is None for value in values) else [scale * value.half for value in values]


def _estimates(values: Sequence[Any]) -> list[Any]:
    from .runs.statistics import estimate  # `runs` imports this module

    return [estimate(value) for value in values]


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
    x, y = _estimates(x), _estimates(y)
    shown: dict[str, Any] = {"marker": "o", "ms": 4.5, "lw": 1.6, **look}
    axes.errorbar(
        [v.mean for v in x],
        [scale * v.mean for v in y],
        bars(y, scale),
        bars(x) if x_bars else None,
        label=label,
        **shown,
    )


def band(
    axes: Axes, x: Sequence[float], values: Sequence[Any], label: str, *, scale: float = 1.0, color: str
) -> None:
    """Draw means against x as a line, and their intervals around it; `scale`: 100 for per cent."""
    values = _estimates(values)
    low, high = ([scale * (v.mean + sign * v.half) for v in values] for sign in (-1, 1))
    axes.plot(x, [scale * v.mean for v in values], color=color, lw=1.6, label=label)
    axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)


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
    values, places = _estimates(values), range(len(values))
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
