from __future__ import annotations

import io
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

for extra in ("matplotlib", "rich", "safetensors", "scipy", "sklearn"):
    pytest.importorskip(extra)
from rich.console import Console

from adaptcomp_ext.experiments.distill import distill
from adaptcomp_ext.experiments.style import QUICK
from tests.helpers.reports import check_one_seed_report, run_over_seeds
from tests.helpers.science import seeds

QUIET = Console(quiet=True)
SEEDS = seeds(3)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The short version over a few seeds, on scikit-learn's digits."""
    folder = tmp_path_factory.mktemp("distill")
    run_over_seeds(
        lambda out, n: distill(None, out, seeds=n, epochs=6, quick=True, console=QUIET), folder, SEEDS
    )
    return folder


def cells(out: Path, part: str) -> list[dict[str, Any]]:
    found = sorted((out / "cells").glob(f"{part}*/result.json"))
    assert len(found) == SEEDS
    return [json.loads(path.read_text()) for path in found]


@pytest.mark.science
def test_fewer_units_are_faster_and_tuning_mends_them(out: Path) -> None:
    for cell in cells(out, "online-units"):
        shrunk = cell["shrunk"]
        adds = [shrunk[name]["multiply_adds"] for name in ("as it is", "0.3", "0.5", "0.6")]
        assert adds == sorted(adds, reverse=True) and adds[2] < 0.35 * adds[0]
        assert shrunk["0.5"]["units"] == [16, 16, 32, 10]
        assert shrunk["0.5"]["faster"] > 1.3
        assert shrunk["as it is"]["accuracy"] == pytest.approx(
            cell["default"], abs=0.002
        )  # shrinking alone changes nothing
    gained = [
        c["shrunk"]["0.5"]["accuracy"] - c["shrunk"]["0.5"]["before tuning"]
        for c in cells(out, "online-units")
    ]
    assert statistics.fmean(gained) > 0


@pytest.mark.science
def test_calling_control_more_often_is_never_worse(out: Path) -> None:
    for cell in cells(out, "online-units"):
        by_rate = cell["gated"]["by_rate"]
        rates = [found["rate"] for found in by_rate.values()]
        assert rates == sorted(rates)
        assert by_rate["0.4"]["accuracy"] > by_rate["0"]["accuracy"]
        assert by_rate["0.4"]["accuracy"] > cell["gated"]["control"] - 0.01
        assert cell["gated"]["timing"]["saved"] > 0.2


@pytest.mark.science
def test_students_learn_from_either(out: Path) -> None:
    for cell in cells(out, "after"):
        assert set(cell["students"]) == {"labels", "1", "2", "4", "8"}
        assert min(cell["students"].values()) > 0.85 and cell["teacher"] > 0.93
    for cell in cells(out, "online-dense-1"):
        assert cell["default"] > 0.85 and cell["control"] > 0.93 and cell["sparsity"] == 0


def test_the_report_is_whole(out: Path) -> None:
    report = json.loads((out / "distill.json").read_text())
    text = (out / "distill.md").read_text()
    assert all(verdict in text for verdict in report["verdicts"]) and "not MNIST" in text
    assert (out / "distill.png").stat().st_size > 10_000
    faster = statistics.fmean(c["shrunk"]["0.5"]["faster"] for c in cells(out, "online-units"))
    assert report["means"]["online-units-4"]["shrunk"]["0.5"]["faster"][0] == pytest.approx(faster)


def test_another_configuration_is_refused(out: Path) -> None:
    with pytest.raises(ValueError, match="another configuration of 'distill'"):
        distill(None, out, seeds=SEEDS, epochs=7, quick=True, console=QUIET)
    with pytest.raises(FileNotFoundError, match="expected a folder with the four MNIST files"):
        distill(Path("/nowhere"), out / "new", console=QUIET)
    assert not (out / "new").exists()


def test_one_seed_decides_nothing(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "cells", tmp_path / "cells", ignore=shutil.ignore_patterns("*-seed-1", "*-seed-2"))
    shown = io.StringIO()
    report = distill(None, tmp_path, epochs=6, quick=True, console=Console(file=shown))
    text = (tmp_path / "distill.md").read_text()
    check_one_seed_report(text)
    assert "Not decided: one seed; in it, within 0.1 points" in text
    assert (
        report["quick"] is True
        and QUICK in text
        and json.loads((tmp_path / "distill.json").read_text())["note"] == QUICK
    )
    assert " ".join(shown.getvalue().split()).count(QUICK) == 2
    assert "**Not decided: one seed.**" in text
