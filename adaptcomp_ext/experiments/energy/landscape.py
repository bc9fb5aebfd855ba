"""The energy of one image on a plane, and the path of its descent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import adaptcomp_ext as ac
from adaptcomp_ext.models import LatentEnergyClassifier

from ..files import write_tensors
from ..runs.statistics import counted
from ..style import MUTED, ORANGE, OTHERS, OURS, WIDTH, WRONG
from .evaluation import Reading, setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


CELLS = 121
ORDER = ("easy", "hard", "turned")
MARGIN, LEAST = 0.35, 0.6


class Map(NamedTuple):
    """The energy on a plane through the ends of a path, and the path in it.

    The plane's first axis points from the first point to the last; the second is the first principal
    direction of what the path has beside it.
    """

    path: Tensor  # [P, 2]: the points, the first one at 0
    x: Tensor  # [CELLS]
    y: Tensor  # [CELLS]
    grid: Tensor  # [CELLS, CELLS], rows by y: the energies
    explained: float  # share of the points' squared distances from the first one that lies in the plane


class Landscape(NamedTuple):
    """The descent for one image, in N steps."""

    image: Tensor  # [H, W]
    label: int
    energies: Tensor  # [N + 1]: at v₀, …, v_N
    probabilities: Tensor  # [N + 1, classes]
    whole: Map  # of v₀, …, v_N
    # Of v₁, …, v_N: the first step is by far the longest. Of all points where there was one step only.
    close: Map


def _axes(offsets: Tensor) -> Tensor:
    """Two orthonormal directions [2, dim] for points [P, dim] relative to the first one."""
    first = offsets[-1] / offsets[-1].norm().clamp_min(1e-12)
    rest = offsets - (offsets @ first)[:, None] * first
    second = torch.linalg.svd(rest, full_matrices=False).Vh[0]
    second = second - (second @ first) * first  # a straight path has none of its own
    return torch.stack((first, second / second.norm().clamp_min(1e-12)))


def _ranges(path: Tensor) -> list[Tensor]:
    low, high = path.amin(dim=0), path.amax(dim=0)
    middle, span = (low + high) / 2, high - low
    half = torch.maximum(span, LEAST * span.max()) * (0.5 + MARGIN)
    return [torch.linspace(float(m - h), float(m + h), CELLS) for m, h in zip(middle, half, strict=True)]


def _survey(model: LatentEnergyClassifier, context: Tensor, points: Tensor) -> Map:
    offsets = (points - points[0]).double()
    axes = _axes(offsets)
    path = offsets @ axes.T
    x, y = _ranges(path)
    plane = points[0] + (torch.cartesian_prod(y, x).flip(1).double() @ axes).to(points.dtype)
    grid = model.energy(plane, context.expand(len(plane), -1)).view(CELLS, CELLS)
    explained = path.square().sum() / offsets.square().sum().clamp_min(1e-12)
    return Map(path.float(), x, y, grid, float(explained))


@torch.no_grad()
def survey(model: LatentEnergyClassifier, image: Tensor, label: int) -> Landscape:
    """Descend for one image [H, W] and map the energy around the path."""
    context = model.encoder(image[None])
    start = model.start(context)
    with setting(model.descend, keep_trace=True):
        trace = model.descend(start, context, step_size=model.step_size).trace
    assert trace is not None
    points = torch.cat((start, trace.outputs))
    return Landscape(
        image,
        label,
        model.energy(points, context.expand(len(points), -1)),
        model.logits(points).softmax(dim=1),
        _survey(model, context, points),
        _survey(model, context, points[1:] if len(points) > 2 else points),
    )


def choose(reading: Reading, first: Reading, hard: Tensor) -> dict[str, int]:
    """Images to show, by rules: rows of the reading. A rule that no image fulfils has no entry.

    ``easy``: the median by steps of the easiest tenth. ``hard``: of those in the hardest tenth that came to
    rest and were read right, the one with more steps than nine tenths of them. ``turned``: of those read
    right at rest, but not after one step (`first`), the one with the most steps.
    """
    order = hard.argsort(stable=True)
    tenth = max(len(order) // 10, 1)
    halted = reading.right & (reading.status == ac.Status.HALTED)

    def at(rows: Tensor, share: float) -> int:
        by_steps = rows[reading.steps[rows].argsort(stable=True)]
        return int(by_steps[int(share * (len(rows) - 1))])

    chosen = {"easy": at(order[:tenth], 0.5)}
    candidates = order[-tenth:][halted[order[-tenth:]]]
    if len(candidates):
        chosen["hard"] = at(candidates, 0.9)
    turned = (halted & ~first.right).nonzero()[:, 0]
    if len(turned):
        chosen["turned"] = int(turned[reading.steps[turned].argmax()])
    return chosen


def save(path: Path, landscapes: Mapping[str, Landscape]) -> None:
    """Write landscapes by their names into a safetensors file."""
    tensors: dict[str, Tensor] = {}
    for name, landscape in landscapes.items():
        for key, value in landscape._asdict().items():
            parts = value._asdict() if isinstance(value, Map) else {"": value}
            for part, content in parts.items():
                tensors[f"{name}/{key}/{part}"] = torch.as_tensor(content)
    write_tensors(path, tensors)


def load(path: Path) -> dict[str, Landscape]:
    """Read what `save` wrote."""
    tensors = load_file(path)

    def plane(name: str) -> Map:
        path, x, y, grid, explained = (tensors[f"{name}/{part}"] for part in Map._fields)
        return Map(path, x, y, grid, float(explained))

    return {
        name: Landscape(
            tensors[f"{name}/image/"],
            int(tensors[f"{name}/label/"]),
            tensors[f"{name}/energies/"],
            tensors[f"{name}/probabilities/"],
            plane(f"{name}/whole"),
            plane(f"{name}/close"),
        )
        for name in ORDER
        if f"{name}/label/" in tensors
    }


TITLES = {
    "easy": "An easy digit",
    "hard": "A hard digit",
    "turned": "A digit that is misread at first",
}
LEVELS, DEPTH = 26, 3000
ABOUT = """○ start   ● minimum.   Each plane holds the path's two ends and the direction
in which it strays most from the line between them. Contours: energies
above the lowest one on the plane, at equal ratios."""


def draw_descents(figure: Figure, landscapes: Mapping[str, Landscape]) -> None:
    """Draw two rows of panels for each landscape, by the names of `choose`."""
    figure.set_size_inches(WIDTH, 1.0 + 4.4 * len(landscapes))
    figure.suptitle(ABOUT, x=0.02, ha="left", fontsize=10, color=MUTED)
    blocks = figure.subfigures(len(landscapes), 1, squeeze=False)[:, 0]
    for block, (name, landscape) in zip(blocks, landscapes.items(), strict=True):
        steps = len(landscape.energies) - 1
        read = f"a {landscape.label}, read as {int(landscape.probabilities[-1].argmax())} in"
        title = f"{TITLES[name]}: {read} {counted(steps, 'step')}"
        block.suptitle(title, x=0.02, ha="left", weight="bold", fontsize=13)
        axes = block.subplot_mosaic([[*"iiwwcc"], [*"eeebbb"]], height_ratios=(1, 1.05))
        axes["i"].imshow(landscape.image.numpy(), cmap="Greys", vmin=0, vmax=1.15)
        axes["i"].set_axis_off()
        _map(axes["w"], landscape.whole, "The whole descent")
        _map(axes["c"], landscape.close, "After the first step")
        _energies(axes["e"], landscape)
        _beliefs(axes["b"], landscape)


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
    axis.plot(along, across, "-", color=ORANGE, lw=1.4)
    axis.plot(along[1:-1], across[1:-1], "o", color=ORANGE, ms=3.5)
    axis.plot(along[0], across[0], "o", color=ORANGE, ms=7, mfc="white", mew=1.6)
    axis.plot(along[-1], across[-1], "o", color=ORANGE, ms=7, mec="white")
    axis.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), xticks=[], yticks=[])
    axis.set_xlabel(f"{plane.explained:.1%} of the path\nlie in the plane", fontsize=9.5)
    axis.set_title(title, fontsize=10, weight="normal")


def _whole_numbers(axis: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _energies(axis: Axes, landscape: Landscape) -> None:
    energies = landscape.energies.double()
    above = (energies - energies[-1]).numpy()[:-1]
    axis.plot(range(len(above)), above, "o-", color=OURS, lw=1.6, ms=4)
    axis.set_yscale("log")
    axis.minorticks_off()
    _whole_numbers(axis)
    axis.set(xlabel="steps", xlim=(-0.4, len(above) - 0.6 + 1))
    axis.set_title("Energy above the last one", fontsize=10, weight="normal")


def _beliefs(axis: Axes, landscape: Landscape) -> None:
    p = landscape.probabilities
    steps = range(len(p))
    best = p.max(dim=0).values.argsort(descending=True)[:3].tolist()
    shown = sorted({landscape.label, *best}, key=lambda label: -float(p[-1, label]))[:3]
    colours = iter((WRONG, OTHERS, MUTED))
    for label in shown:
        colour = OURS if label == landscape.label else next(colours)
        axis.plot(steps, p[:, label].numpy(), "o-", color=colour, lw=1.6, ms=4, label=str(label))
    _whole_numbers(axis)
    axis.set(xlabel="steps", xlim=(-0.4, len(p) - 0.6), ylim=(-0.03, 1.03))
    axis.set_title("Probability of each class", fontsize=10, weight="normal", pad=24)
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "borderaxespad": 0.2}
    axis.legend(ncols=3, fontsize=10, columnspacing=1.2, handlelength=1.4, **place)
