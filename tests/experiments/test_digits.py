from __future__ import annotations

import io
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

for extra in ("matplotlib", "rich", "safetensors", "scipy", "sklearn"):
    pytest.importorskip(extra)
from rich.console import Console

import adaptcomp_ext as ac
from adaptcomp_ext.experiments.digits import MAX_STEPS, Reader, digits
from adaptcomp_ext.experiments.runs import RunFolder
from adaptcomp_ext.experiments.style import QUICK
from tests.helpers.reports import check_one_seed_report, run_over_seeds
from tests.helpers.science import seeds

QUIET = Console(quiet=True)
SEEDS = seeds(3)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The short version over a few seeds, on scikit-learn's digits."""
    folder = tmp_path_factory.mktemp("digits")
    run_over_seeds(lambda out, n: digits(None, out, seeds=n, quick=True, console=QUIET), folder, SEEDS)
    return folder


def cells(out: Path, part: str) -> list[dict[str, Any]]:
    found = sorted((out / "cells").glob(f"{part}-seed-*/result.json"))
    assert len(found) == SEEDS
    return [json.loads(path.read_text()) for path in found]


@pytest.mark.science
def test_dearer_steps_are_fewer(out: Path) -> None:
    for free, dear in zip(cells(out, "act-0"), cells(out, "act-0.1"), strict=True):
        assert dear["own"]["steps"] < free["own"]["steps"] - 0.5
        assert dear["own"]["accuracy"] > 0.8


@pytest.mark.science
def test_steps_go_where_they_are_needed(out: Path) -> None:
    gain = []
    for cell in cells(out, "depth"):
        for threshold in ("0.8", "0.9"):
            found = cell["confidence"][threshold]
            assert found["rank_correlation"] > 0.1
            gain.append(found["accuracy"] - found["shuffled"])
        steps = [found["steps"] for found in cell["confidence"].values()]
        assert steps == sorted(steps) and steps[0] >= 1 and steps[-1] <= MAX_STEPS
    assert statistics.fmean(gain) > 0.005


@pytest.mark.science
def test_fewer_calls_are_less_compute(out: Path) -> None:
    report = json.loads((out / "digits.json").read_text())
    rows = next(t["rows"] for t in report["tables"] if "habit and control" in t["rows"][0])
    for gate in ("value", "entropy"):
        some = [row for row in rows if f"{gate} gate" in row["habit and control"]]
        adds = [row["multiply–adds"][0] for row in some]
        assert adds == sorted(adds) and some[0]["called, %"][0] == 0 and some[-1]["called, %"][0] == 1
        assert some[-1]["right, %"][0] > some[0]["right, %"][0]
    adds = report["means"]["acc"]["multiply_adds"]
    assert adds["control"][0] > 4 * adds["default"][0]


def test_the_report_is_whole(out: Path) -> None:
    report = json.loads((out / "digits.json").read_text())
    text = (out / "digits.md").read_text()
    assert all(verdict in text for verdict in report["verdicts"]) and "not MNIST" in text
    for name in ("digits.png", "digits_examples.png"):
        assert (out / name).stat().st_size > 5_000


def test_another_configuration_is_refused(out: Path) -> None:
    with pytest.raises(ValueError, match="another configuration of 'digits'"):
        digits(None, out, seeds=1, quick=True, console=QUIET)
    with pytest.raises(ValueError, match="expected a folder of 'stroop', found one of 'digits'"):
        RunFolder.open(out, "stroop", {})


def test_the_reader_runs_as_deep_as_it_is_told() -> None:
    torch.manual_seed(0)
    reader = Reader(8, "depth").eval()
    images = torch.rand(5, 8, 8)
    with torch.no_grad():
        each = reader.every_step(images)
        for n in (1, 4, MAX_STEPS):
            result = reader.read(images, ac.FixedSteps(n))
            torch.testing.assert_close(result.output, each[n - 1])
            assert result.steps.tolist() == [n] * 5


def test_multiply_adds_are_those_of_the_layers() -> None:
    """What torch counts of matrix products in one look, and in the readout after it."""
    from torch.utils.flop_counter import FlopCounterMode

    reader = Reader(9, "depth").eval()
    images = torch.rand(1, 9, 9)
    with FlopCounterMode(display=False) as counter:
        reader.readout(reader.look(reader.start(1), images))
    assert counter.get_total_flops() == 2 * reader.multiply_adds(False)
    assert reader.multiply_adds(True) - reader.multiply_adds(False) == reader.dim


def test_one_seed_decides_nothing(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "cells", tmp_path / "cells", ignore=shutil.ignore_patterns("*-seed-1", "*-seed-2"))
    shown = io.StringIO()
    report = digits(None, tmp_path, quick=True, console=Console(file=shown))
    text = (tmp_path / "digits.md").read_text()
    check_one_seed_report(text)
    assert (
        report["quick"] is True
        and QUICK in text
        and json.loads((tmp_path / "digits.json").read_text())["note"] == QUICK
    )
    assert " ".join(shown.getvalue().split()).count(QUICK) == 2
