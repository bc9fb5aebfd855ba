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
    "INK",
    "MUTED",
    "ORANGE",
    "OTHERS",
    "OURS",
    "QUICK",
    "STYLE",
    "WRONG",
    "bars",
    "save",
    "span_at_least",
]

INK, MUTED, FAINT = "#22272e", "#6b7480", "#e3e6ea"
OURS, OTHERS, WRONG, ORANGE = "#2166ac", "#b4bcc6", "#c2341d", "#f08a24"
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
    """Half of each interval, for ``errorbar``; None, and so no bars, where there is one seed and no interval."""
    return None if all(value.high is None for value in values) else [scale * value.half for value in values]


def span_at_least(axes: Axes, which: str, span: float) -> None:
    """Widen an axis ("x" or "y") about its middle to `span`: without it, points that hardly differ seem to differ a lot."""
    get, set_ = (axes.get_xlim, axes.set_xlim) if which == "x" else (axes.get_ylim, axes.set_ylim)
    low, high = get()
    if abs(high - low) < span:
        middle, half = (low + high) / 2, span / 2 if high >= low else -span / 2
        set_(middle - half, middle + half)
