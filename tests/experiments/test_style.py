"""How pictures are drawn: cut axes are marked, legends hide no data."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
import matplotlib
from matplotlib.figure import Figure

from adaptcomp_ext.experiments.style import STYLE, WIDTH, legend, mark_cut_axes, save


def marks(low: float, high: float, scale: str = "linear") -> int:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], [low, high])
    axes.set(yscale=scale, ylim=(low, high))
    before = len(axes.lines)
    mark_cut_axes(figure)
    return len(axes.lines) - before


def test_an_axis_that_does_not_begin_at_zero_is_marked() -> None:
    assert marks(800, 845) == 1
    assert marks(0, 845) == 0 and marks(-3, 2) == 0
    assert marks(0.1, 10, "log") == 0


def test_names_on_an_axis_are_no_cut() -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([4, 5, 6], [0, 1, 2])
    axes.set(xlim=(4, 6), ylim=(0, 2))
    mark_cut_axes(figure)
    assert len(axes.lines) == 2
    axes.set_xticks([4, 5, 6], ["a", "b", "c"])
    mark_cut_axes(figure)
    assert len(axes.lines) == 2


def test_a_legend_lies_between_title_and_data(tmp_path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4), layout="constrained")
        axes = figure.subplots()
        for i in range(5):
            axes.plot([0, 1], [i, i], label=f"line {i}")
        axes.set_title("Lines")
        legend(axes)
        save(figure, tmp_path / "x.png", 100)
        box, data = axes.get_legend().get_window_extent(), axes.get_window_extent()
        title = axes._left_title.get_window_extent()
    assert box.y0 >= data.y1 and title.y0 >= box.y1 - 2
    assert box.x1 <= figure.bbox.x1
