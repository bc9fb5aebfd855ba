"""A report is a list of blocks: written as Markdown, as JSON and as pictures."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from rich.console import Console
from rich.markdown import Markdown

from adaptcomp_ext.experiments.bench import machine
from adaptcomp_ext.experiments.files import write_json, write_text
from adaptcomp_ext.experiments.style import PANEL, QUICK, STYLE, WIDTH, save

from .results import Results
from .statistics import Shown, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Block", "Column", "Picture", "Table", "Verdicts", "column", "panels", "publish", "tabulate"]


@dataclass(frozen=True)
class Verdicts:
    """Sentences that follow from the figures; they are printed, too, when the run ends."""

    sentences: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table of texts; those that `interval` and `points` made come into the JSON file as numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG.

    Attributes
    ----------
    name : str
        The file's, in the folder of the results.
    alt : str
        What it shows, in a few words.
    draw : callable
        ``draw(figure)`` draws on an empty figure of matplotlib; `panels` makes one.
    size : (float, float)
        Width and height in inches.
    dpi : int
        Pixels in an inch.
    """

    name: str
    alt: str
    draw: Callable[[Figure], None]
    size: tuple[float, float]
    dpi: int = 130


Block: TypeAlias = str | Verdicts | Table | Picture
"""A str is a paragraph or a heading in Markdown; the first block of a report is its title."""


def panels(
    found: Any, *draw: Callable[[Axes, Any], None], widths: Sequence[float] | None = None, rows: int = 1
) -> Callable[[Figure], None]:
    """Return the ``draw`` of a picture of several panels, each by ``draw(axes, found)``, row after row.

    `widths` are the relative widths of the columns.
    """

    def draw_all(figure: Figure) -> None:
        axes = figure.subplots(rows, len(draw) // rows, squeeze=False, width_ratios=widths).flat
        for one, panel in zip(axes, draw, strict=True):
            panel(one, found)

    return draw_all


def column(
    name: str, alt: str, found: Any, *draw: Callable[[Axes, Any], None], height: float = PANEL
) -> Picture:
    """Make a `Picture` of panels one below the other, each `height` inches high, narrow enough for a phone.

    Each panel is drawn by ``draw(axes, found)``.
    """

    def draw_all(figure: Figure) -> None:
        panels(found, *draw, rows=len(draw))(figure)
        engine = figure.get_layout_engine()
        if engine is not None:
            engine.set(h_pad=0.12)  # type: ignore[call-arg]

    return Picture(name, alt, draw_all, (WIDTH, height * len(draw)))


@dataclass(frozen=True)
class Column:
    """A column of a table whose rows are settings.

    Attributes
    ----------
    header : str
        Its title.
    quantity : str or callable
        A path, or ``quantity(results)`` of the row's results: a Series over seeds, a number,
        a text, or None.
    form : callable
        Writes it, such as `percent` or `points`.
    """

    header: str
    quantity: str | Callable[[Results], Any]
    form: Callable[[Any], str] = str


def tabulate(first: str | Sequence[str], rows: Mapping[Any, Results], *columns: Column) -> Table:
    """Make a table, a row for each setting; "–" where a setting lacks the quantity or it is None.

    Parameters
    ----------
    first : str or sequence of str
        Title of the first column, or of the first columns.
    rows : mapping
        From a label, or a tuple of labels, to the results of the row.
    *columns : Column
        What is shown of each.
    """

    def cell(results: Results, column: Column) -> str:
        try:
            value = results[column.quantity] if isinstance(column.quantity, str) else column.quantity(results)
        except KeyError:
            return "–"
        return "–" if value is None else column.form(value)

    names = (first,) if isinstance(first, str) else tuple(first)
    return Table(
        [*names, *(column.header for column in columns)],
        [
            [*((label,) if isinstance(label, str) else label), *(cell(results, column) for column in columns)]
            for label, results in rows.items()
        ],
    )


def publish(
    name: str,
    out: Path,
    results: Results,
    report: Callable[[Results], Sequence[Block]],
    console: Console,
) -> dict[str, Any]:
    """Draw the pictures, write ``NAME.json`` and ``NAME.md``, print the verdicts; return the JSON.

    The JSON file has the date, the machine, the configuration, the verdicts, every table of the report
    (``tables``), and every measured number of every setting, as [mean, low, high, number of seeds, p]
    (``means``).
    """
    device = torch.device(results.config.get("device", "cpu"))
    about = machine.describe(device)
    names = [about["machine"]["cpu"], *([about["machine"]["device"]] if device.type != "cpu" else [])]
    results = replace(results, machine=f"{', '.join(names)}, torch {about['versions']['torch']}")
    blocks, quick = list(report(results)), bool(results.config.get("quick"))
    verdicts = [text for block in blocks if isinstance(block, Verdicts) for text in block.sentences]
    content = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **about,
        "quick": quick,
        **({"note": QUICK} if quick else {}),
        "config": dict(results.config),
        "verdicts": verdicts,
        "tables": _tables(blocks),
        "means": results.means(),
    }
    for block in blocks:
        if isinstance(block, Picture):
            _draw(block, out, quick)
    if quick:
        blocks.insert(1, f"**{QUICK}**")
    write_json(out / f"{name}.json", content)
    write_text(out / f"{name}.md", "\n".join(map(_markdown, blocks)))
    console.print(Markdown("\n".join(f"- {verdict}" for verdict in verdicts)))
    if quick:
        console.print(f"[bold]{QUICK}[/]")
    console.print(f"Report, figures and pictures: {out}/{name}.md, .json, .png", soft_wrap=True)
    return content


def _draw(picture: Picture, out: Path, quick: bool) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=picture.size, layout="constrained")
        picture.draw(figure)
        save(figure, out / picture.name, picture.dpi, quick)


def _markdown(block: Block) -> str:
    if isinstance(block, Verdicts):
        return "\n".join(f"- {sentence}" for sentence in block.sentences) + "\n"
    if isinstance(block, Table):
        return table(block.header, block.rows)
    return f"![{block.alt}]({block.name})\n" if isinstance(block, Picture) else f"{block}\n"


def _tables(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """Every table as its heading and a record for each of its rows, under the names of the columns."""
    heading, found = "", []
    for block in blocks:
        if isinstance(block, str) and block.startswith("#"):
            heading = block.lstrip("# ").partition("\n")[0]
        if isinstance(block, Table):
            rows = [[cell.value if isinstance(cell, Shown) else cell for cell in row] for row in block.rows]
            found.append(
                {"heading": heading, "rows": [dict(zip(block.header, row, strict=True)) for row in rows]}
            )
    return found
