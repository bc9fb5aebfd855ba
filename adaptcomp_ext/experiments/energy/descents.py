"""The picture of single descents: the image, the energy around the path, and what is believed on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..style import FAINT, INK, MUTED, ORANGE, OTHERS, OURS, WRONG
from .landscape import Landscape, Map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_descents"]

TITLES = {
    "easy": "An easy digit",
    "hard": "A hard digit",
    "turned": "A digit that is misread at first",
}
LEVELS, DEPTH = 26, 3000


def draw_descents(figure: Figure, landscapes: Mapping[str, Landscape]) -> None:
    """Draw one row for each landscape, by the names of `landscape.choose`."""
    rows = len(landscapes)
    height = 1.0 + 3.7 * rows
    figure.set_size_inches(18, height)
    figure.set_layout_engine("none")
    figure.text(0.02, 1 - 0.48 / height, "Down the energy, one digit at a time", fontsize=19, weight="bold")
    about = (
        "○ start   ● minimum.  Each plane holds the path's two ends and the direction in which it "
        "strays most from the line between them. Contours: energies above the lowest one on the plane, "
        "at equal ratios."
    )
    figure.text(0.02, 1 - 0.8 / height, about, fontsize=11, color=MUTED)
    grid = figure.add_gridspec(
        rows,
        5,
        width_ratios=(0.74, 1.1, 1.1, 0.9, 0.9),
        left=0.02,
        right=0.988,
        top=1 - 1.4 / height,
        bottom=0.55 / height,
        wspace=0.22,
        hspace=0.42,
    )
    for i, (name, landscape) in enumerate(landscapes.items()):
        _image(figure.add_subplot(grid[i, 0]), landscape, TITLES[name])
        _map(figure.add_subplot(grid[i, 1]), landscape.whole, "The whole descent")
        _map(figure.add_subplot(grid[i, 2]), landscape.close, "After the first step")
        _energies(figure.add_subplot(grid[i, 3]), landscape)
        _beliefs(figure.add_subplot(grid[i, 4]), landscape)


def _image(axis: Axes, landscape: Landscape, title: str) -> None:
    axis.imshow(landscape.image.numpy(), cmap="Greys", vmin=0, vmax=1.15)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(visible=True, color=FAINT)
    steps, predicted = len(landscape.energies) - 1, int(landscape.probabilities[-1].argmax())
    axis.set_title(title, pad=8)
    axis.set_xlabel(
        f"a {landscape.label}, read as {predicted} in {steps} step{'s' if steps > 1 else ''}",
        color=INK,
        fontsize=10.5,
    )


def _map(axis: Axes, plane: Map, title: str) -> None:
    from matplotlib.colors import LogNorm

    grid = plane.grid.double().numpy()
    above = grid - grid.min()
    levels = np.geomspace(above.max() / DEPTH, above.max(), LEVELS)
    x, y = plane.x.numpy(), plane.y.numpy()
    norm = LogNorm(levels[0], levels[-1])
    axis.contourf(x, y, np.maximum(above, levels[0]), levels=levels, cmap="Blues", norm=norm, extend="min")
    axis.contour(x, y, above, levels=levels, colors="white", linewidths=0.45, alpha=0.7)
    along, across = plane.path.numpy().T
    axis.plot(along, across, "-", color=ORANGE, linewidth=1.4)
    axis.plot(along[1:-1], across[1:-1], "o", color=ORANGE, markersize=3.5)
    axis.plot(
        along[0], across[0], "o", color=ORANGE, markersize=7, markerfacecolor="white", markeredgewidth=1.6
    )
    axis.plot(along[-1], across[-1], "o", color=ORANGE, markersize=7, markeredgecolor="white")
    axis.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    axis.set_xlabel(f"towards the minimum; {plane.explained:.1%} of the path in the plane", fontsize=9)
    axis.set_title(title, pad=8)


def _whole_numbers(axis: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _energies(axis: Axes, landscape: Landscape) -> None:
    energies = landscape.energies.double()
    above = (energies - energies[-1]).numpy()[:-1]
    axis.plot(range(len(above)), above, "o-", color=OURS, linewidth=1.6, markersize=4)
    axis.set_yscale("log")
    axis.minorticks_off()
    _whole_numbers(axis)
    axis.set(xlabel="steps", xlim=(-0.4, len(above) - 0.6 + 1))
    axis.set_title("Energy above the last one", pad=8)


def _beliefs(axis: Axes, landscape: Landscape) -> None:
    p = landscape.probabilities
    steps = range(len(p))
    best = p.max(dim=0).values.argsort(descending=True)[:3].tolist()
    shown = sorted({landscape.label, *best}, key=lambda label: -float(p[-1, label]))[:3]
    colours = iter((WRONG, OTHERS, MUTED))
    for label in shown:
        colour = OURS if label == landscape.label else next(colours)
        axis.plot(
            steps, p[:, label].numpy(), "o-", color=colour, linewidth=1.6, markersize=4, label=str(label)
        )
    _whole_numbers(axis)
    axis.set(xlabel="steps", xlim=(-0.4, len(p) - 0.6), ylim=(-0.03, 1.03))
    axis.legend(loc="best", title="class", fontsize=9)
    axis.set_title("Probabilities on the way", pad=8)
