"""How the pictures of the demonstration and the experiments look."""

from __future__ import annotations

from typing import Any

__all__ = ["FAINT", "INK", "MUTED", "ORANGE", "OTHERS", "OURS", "STYLE", "WRONG"]

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
