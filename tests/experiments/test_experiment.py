from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch

for extra in ("matplotlib", "pandas", "rich", "safetensors", "scipy", "typer"):
    pytest.importorskip(extra)
import typer
from rich.console import Console

from adaptcomp_ext.experiments.runs import Cell, FirstSeed, Quick, Results, Seeds, Setup, experiment, grid
from adaptcomp_ext.experiments.runs.options import Listed
from adaptcomp_ext.experiments.runs.report import Block, Column, Picture, Table, Verdicts, panels, tabulate
from adaptcomp_ext.experiments.runs.statistics import Claim, form, interval, judged, paired, points
from adaptcomp_ext.experiments.style import QUICK, curve

QUIET = Console(quiet=True)


def measure(cell: Cell, folder: Path, tick: Any) -> dict[str, Any]:
    value = float(torch.rand(())) + cell.options["add"]
    return {
        "value": value,
        "by": {"0.5": {"twice": 2 * value}},
        "curve": [{"x": value}, {"x": -value}],
        "text": "a",
    }


@experiment(measure, out="out-{kind}")
def tiny(
    kind: Annotated[str, typer.Option(help="Kind of the cells.")] = "a",
    *,
    seeds: Seeds = 1,
    first_seed: FirstSeed = 0,
    names: Annotated[Sequence[str], Listed(), typer.Option(help="Names.")] = ("x", "y"),
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share.")] = 0.5,
    quick: Quick = False,
) -> Setup:
    """Draw a number.

    Only the first paragraph is the help.
    """
    every = range(first_seed, first_seed + seeds)
    parts = {name: {"name": name, "add": 10 * i} for i, name in enumerate(names)}
    return Setup(
        {"kind": kind, "seeds": list(every), "names": list(names), "share": share, "quick": quick},
        grid(parts, every),
        then=lambda results: [
            Cell(f"last-seed-{s}", {"name": "last", "add": results.where(name="x")["value"][s]}, s)
            for s in every
        ],
    )


@tiny.reports
def report(results: Results) -> list[Block]:
    x, y = results.where(name="x"), results.where(name="y")
    return [
        "# Tiny",
        results.opening,
        Verdicts([judged(f"y is {interval(y['value'], 2, 1.0)}.", Claim(y["value"] - x["value"], 9.0))]),
        Picture(
            "tiny.png",
            "A curve",
            panels(x, lambda axes, x: curve(axes, [0, 1], x.each("curve", "x"))),
            (3, 2),
        ),
        "## Values",
        tabulate(
            ("name", "again"),
            {(name, name): results.where(name=name) for name in results.options("name")},
            Column("value", "value", form(2, 1.0)),
            Column("twice", "by/0.5/twice", form(2, 1.0)),
            Column("− x", lambda row: row["value"] - x["value"] if row is not x else None, points),
            Column("missing", "no/such", form()),
        ),
        Table(["a", "b"], [["1", "2"]]),
    ]


def test_an_experiment_is_run_reported_and_resumed(tmp_path: Path) -> None:
    content = tiny("a", tmp_path, seeds=3, quick=True, console=QUIET)
    again = tiny("a", tmp_path, seeds=3, quick=True, console=QUIET)
    assert {k: v for k, v in again.items() if k != "date"} == {
        k: v for k, v in content.items() if k != "date"
    }
    cells = {p.parent.name: json.loads(p.read_text()) for p in tmp_path.glob("cells/*/result.json")}
    assert set(cells) == {f"{name}-seed-{seed}" for name in ("x", "y", "last") for seed in range(3)}
    x, y = ([cells[f"{name}-seed-{seed}"]["value"] for seed in range(3)] for name in "xy")
    assert [cells[f"last-seed-{s}"]["value"] - v for s, v in enumerate(x)] == pytest.approx(
        [v % 1 for v in x]
    )
    saved = json.loads((tmp_path / "tiny.json").read_text())
    rows = saved["tables"][0]["rows"]
    assert saved["tables"][0]["heading"] == "Values" and [row["name"] for row in rows] == ["x", "y", "last"]
    assert rows[1]["− x"] == pytest.approx(list(paired(y, x))) and rows[0]["missing"] == "–"
    assert saved["means"]["y"]["value"][0] == pytest.approx(sum(y) / 3)
    assert saved["means"]["x"]["by"]["0.5"]["twice"][3] == 3 and saved["means"]["x"]["text"] == "a"
    text = (tmp_path / "tiny.md").read_text()
    assert text.startswith(f"# Tiny\n\n**{QUICK}**\n\n3 seeds; ") and "![A curve](tiny.png)" in text
    assert "- **Holds.** y is" in text and saved["verdicts"][0].startswith("**Holds.**")
    assert (tmp_path / "tiny.png").stat().st_size > 1_000 and saved["note"] == QUICK


def test_one_seed_has_no_intervals(tmp_path: Path) -> None:
    tiny("a", tmp_path, console=QUIET)
    text = (tmp_path / "tiny.md").read_text()
    assert "±" not in text and "p = " not in text and "**Not decided: one seed.**" in text


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    tiny("a", tmp_path, console=QUIET)
    with pytest.raises(
        ValueError, match=r"another configuration of 'tiny': share = 0\.5 there, 0\.25 asked for"
    ):
        tiny("a", tmp_path, share=0.25, console=QUIET)


def test_the_default_folder_follows_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny("b", console=QUIET)
    assert (tmp_path / "out-b" / "tiny.md").is_file()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seeds": 0}, ValueError, "seeds: expected an int >= 1, got 0"),
        ({"seeds": True}, TypeError, "seeds: expected an int, got"),
        ({"share": 1.5}, ValueError, "share: expected a number <= 1, got 1.5"),
        ({"share": float("nan")}, ValueError, "share: expected a number >= 0, got nan"),
        ({"share": "much"}, TypeError, "share: expected a number, got"),
        ({"workers": 0}, ValueError, "workers: expected an int >= 1, got 0"),
        ({"colour": "red"}, TypeError, "unexpected keyword argument 'colour'"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        tiny("a", tmp_path / "out", console=QUIET, **options)
    assert not (tmp_path / "out").exists()


def test_the_command_line_follows_from_the_signature() -> None:
    assert tiny.help == "Draw a number."
    assert list(inspect.signature(tiny).parameters)[:2] == ["kind", "out"]
    ran: dict[str, Any] = {}
    command = tiny.command
    parameters = inspect.signature(command).parameters
    assert "console" not in parameters and parameters["names"].default == "x,y"
    tiny_call = type(tiny).__call__
    try:
        type(tiny).__call__ = lambda self, **options: ran.update(options)  # type: ignore[assignment, method-assign]
        command(names="x,z", seeds=2)
    finally:
        type(tiny).__call__ = tiny_call  # type: ignore[method-assign]
    assert ran == {"names": ["x", "z"], "seeds": 2}


def test_results_say_what_is_missing() -> None:
    cells = grid({"x": {"name": "x"}, "y": {"name": "y"}}, range(2))
    found = {cell.name: {"value": cell.seed, "list": [1, 2]} for cell in cells}
    results = Results(cells, found, {})
    with pytest.raises(KeyError, match="expected one cell for each seed, got x-seed-0, y-seed-0"):
        results["value"]
    x = results.where(name="x")
    assert x["value"].to_dict() == {0: 0, 1: 1} and x["list/1"].to_dict() == {0: 2, 1: 2}
    for path in ("nothing", "list/7", "value/deeper"):
        with pytest.raises(KeyError, match="no '"):
            x[path]
        assert path not in x
    with pytest.raises(KeyError, match="no cell with"):
        results.where(name="z")
