from __future__ import annotations

import io
import json
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

for extra in ("matplotlib", "rich", "safetensors", "scipy", "sklearn", "typer"):
    pytest.importorskip(extra)
from rich.console import Console
from typer.testing import CliRunner

from adaptcomp_ext.experiments.app import app
from adaptcomp_ext.experiments.runs import Results, RunFolder, run_cells
from adaptcomp_ext.experiments.runs.report import Verdicts
from adaptcomp_ext.experiments.stroop import stroop
from adaptcomp_ext.experiments.stroop.gates import Stream, call_by_truth
from adaptcomp_ext.experiments.stroop.measure import build_acc, build_baseline, build_habit, measure
from adaptcomp_ext.experiments.style import QUICK
from adaptcomp_ext.experiments.vision import build_cnn, multiply_adds, weights
from adaptcomp_ext.models.acc import Objective
from tests.helpers.reports import check_one_seed_report, run_over_seeds
from tests.helpers.science import seeds

QUIET = Console(quiet=True)
SEEDS = seeds(3)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The short version over a few seeds, on scikit-learn's digits."""
    folder = tmp_path_factory.mktemp("stroop")
    options = {"congruent": [0.8], "quick": True, "with_effort": False, "console": QUIET}
    run_over_seeds(lambda out, n: stroop(None, out, seeds=n, **options), folder, SEEDS)
    return folder


def cells(out: Path, part: str) -> list[dict[str, Any]]:
    found = sorted((out / "cells").glob(f"{part}*/result.json"))
    assert len(found) == SEEDS
    return [json.loads(path.read_text()) for path in found]


@pytest.mark.science
def test_control_is_called_for_incongruent_items(out: Path) -> None:
    for cell in cells(out, "main"):
        for gate in ("entropy", "kl"):
            for rate in ("0.1", "0.2", "0.3", "0.4"):
                mixed = cell["gates"]["mixed"][gate][rate]["mixed"]
                assert mixed["rate_incongruent"] > mixed["rate_congruent"]


@pytest.mark.science
def test_a_gate_is_worth_more_than_chance(out: Path) -> None:
    found = cells(out, "main")
    for rate in ("0.2", "0.3", "0.4"):
        gain = [
            cell["gates"]["mixed"]["entropy"][rate]["mixed"]["control"]
            - cell["gates"]["mixed"]["random"][rate]["mixed"]["control"]
            for cell in found
        ]
        assert statistics.fmean(gain) > 0.01


@pytest.mark.science
def test_control_is_better_where_habit_is_misled(out: Path) -> None:
    for cell in cells(out, "main"):
        accuracy = cell["accuracy"]
        assert accuracy["control"]["incongruent"] > accuracy["default"]["incongruent"] + 0.05
        assert accuracy["default"]["congruent"] > accuracy["default"]["incongruent"] + 0.1  # the ink misleads
        assert cell["entropy"]["incongruent"]["default"] > cell["entropy"]["congruent"]["default"]
        assert abs(cell["parameters"]["acc"] / cell["parameters"]["cnn"] - 1) < 0.02
        assert cell["timing"]["largest_difference"] < 1e-4 and cell["timing"]["saved"] > 0


@pytest.mark.science
def test_incongruent_items_take_more_steps(out: Path) -> None:
    high, low = cells(out, "reaction-congruent-0.8"), cells(out, "reaction-congruent-0.2")

    def effects(some: list[dict[str, Any]]) -> list[float]:
        return [c["final"]["read/incongruent/steps"] - c["final"]["read/congruent/steps"] for c in some]

    assert statistics.fmean(effects(high)) > 0.3
    assert statistics.fmean(effects(high)) > statistics.fmean(effects(low)) + 0.3
    for cell in high:
        assert cell["final"]["read/congruent/right"] > cell["final"]["read/incongruent/right"]


def test_the_report_is_whole(out: Path) -> None:
    report = json.loads((out / "stroop.json").read_text())
    text = (out / "stroop.md").read_text()
    assert report["config"]["data"] in text and "not MNIST" in text
    assert all(verdict in text for verdict in report["verdicts"]) and len(report["verdicts"]) >= 6
    for name in ("stroop.png", "stroop_beliefs.png", "stroop_reaction.png"):
        assert (out / name).stat().st_size > 10_000 and f"]({name})" in text
    cell = cells(out, "main")[0]
    mean = statistics.fmean(c["accuracy"]["cnn"]["neutral"] for c in cells(out, "main"))
    assert report["means"]["main-0.8"]["accuracy"]["cnn"]["neutral"][0] == pytest.approx(mean)
    assert cell["data"] == report["config"]["data"]


def test_a_finished_run_is_not_run_again_and_another_is_refused(out: Path) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    stroop(None, out, congruent=[0.8], seeds=SEEDS, quick=True, with_effort=False, console=QUIET)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("result.json")} == stamps
    with pytest.raises(
        ValueError, match=rf"seeds = {re.escape(str(list(range(SEEDS))))} there, \[0\] asked for"
    ):
        stroop(None, out, congruent=[0.8], seeds=1, quick=True, with_effort=False, console=QUIET)


class Interrupted(Exception):
    pass


def test_an_interrupted_run_ends_as_if_it_had_not_been(out: Path, tmp_path: Path) -> None:
    what = stroop.setup(None, congruent=[0.8], seeds=SEEDS, quick=True, with_effort=False)
    folder = RunFolder.open(tmp_path, "stroop", what.config)
    some = [cell for cell in what.cells if cell.seed == 0 and cell.options["part"] == "main"]

    def stops(cell, path, tick):
        def interrupt(what: str, done: float) -> None:
            if what == "ACC" and done > 0.25:
                raise Interrupted

        return measure(cell, path, interrupt)

    with pytest.raises(Interrupted):
        run_cells(folder, some, stops, workers=1, threads=1, console=QUIET)
    assert (folder.cell(some[0].name) / "acc.safetensors").is_file() and folder.result(some[0].name) is None
    found = run_cells(folder, some, measure, workers=1, threads=1, console=QUIET)[some[0].name]
    whole = json.loads((out / "cells" / some[0].name / "result.json").read_text())
    for key in ("accuracy", "gates", "entropy", "mcnemar", "beliefs"):
        assert found[key] == whole[key]


def test_every_number_of_the_old_summary_is_in_a_table(out: Path) -> None:
    """Differences at every call rate, and the effect after every epoch."""
    tables = {
        tuple(table["rows"][0]): table["rows"]
        for table in json.loads((out / "stroop.json").read_text())["tables"]
    }
    (against,) = (rows for header, rows in tables.items() if "− random" in header)
    (practice,) = (rows for header, rows in tables.items() if "250 updates" in header)
    found = cells(out, "main")
    for row, rate in zip(against, ("0.05", "0.1", "0.2", "0.3", "0.4"), strict=True):
        mixed = [cell["gates"]["mixed"] for cell in found]
        gains = [m["value"][rate]["mixed"]["control"] - m["entropy"][rate]["mixed"]["control"] for m in mixed]
        assert row["− entropy"][0] == pytest.approx(statistics.fmean(gains))
    high = [cell["history"][0] for cell in cells(out, "reaction-congruent-0.8")]
    effect = statistics.fmean(h["name/incongruent/steps"] - h["name/congruent/steps"] for h in high)
    (row,) = (row for row in practice if (row["practised"], row["task"]) == ("congruent 0.8", "name"))
    assert row["250 updates"][0] == pytest.approx(effect)


@pytest.mark.parametrize("congruent", [[0.8, 1.8], [0.8, 0.8], "0.8", [True, "x"]])
def test_proportions_are_checked_in_python_too(congruent: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="congruent: expected different numbers from 0 to 1, got"):
        stroop(None, tmp_path / "new", congruent=congruent, console=QUIET)
    assert not (tmp_path / "new").exists()


def test_the_parts_can_be_left_out() -> None:
    options = {"congruent": [0.8], "quick": True}
    whole = stroop.setup(None, **options)
    less = stroop.setup(None, **options, with_reaction=False, with_effort=False)
    assert [cell.name for cell in less.cells] == ["main-0.8-seed-0"]
    assert {cell.options["part"] for cell in whole.cells} == {"main", "reaction", "effort"}
    assert (less.config["reaction"], less.config["effort"]) == (None, False)
    help_text = CliRunner().invoke(app, ["run", "stroop", "--help"], env={"COLUMNS": "200"}).output
    for option in ("--no-reaction", "--no-effort", "--congruent", "--seed", "--seeds", "--download"):
        assert option in help_text


def test_networks_are_as_described() -> None:
    assert weights(build_cnn(28, 3)) == 896 + 18496 + 1600 * 128 + 128 + 1290
    acc = build_acc(28, Objective())
    assert multiply_adds(build_habit(28), (3, 28, 28)) * 15 < multiply_adds(acc.control, (3, 28, 28))
    assert abs(weights(build_baseline(28, weights(acc))) - weights(acc)) < 1000
    for net in (build_habit(8), build_cnn(8, 3)):
        assert net(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


def test_the_gate_that_knows_the_truth_calls_what_control_mends_first() -> None:
    right, wrong = [0.0, 1.0], [1.0, 0.0]
    digits = torch.ones(8, dtype=torch.int64)
    default = torch.tensor([wrong, wrong, wrong, right, right, right, right, wrong])
    control = torch.tensor([right, right, right, right, right, wrong, wrong, wrong])
    stream = Stream(digits, digits, default, control)
    mends, spoils = {0, 1, 2}, {5, 6}
    correct = []
    for count in range(9):
        called = call_by_truth(stream, count, seed=count)
        chosen = set(called.nonzero()[:, 0].tolist())
        assert called.sum() == count
        assert chosen <= mends if count <= 3 else mends <= chosen
        assert not chosen & spoils if count <= 6 else chosen & spoils
        answers = torch.where(called[:, None], control, default)
        correct.append(int((answers.argmax(1) == digits).sum()))
    assert correct == [4, 5, 6, 7, 7, 7, 7, 6, 5]
    many = [frozenset(call_by_truth(stream, 2, seed).nonzero()[:, 0].tolist()) for seed in range(20)]
    assert len(set(many)) == 3  # ties are drawn, and repeat with the seed
    assert torch.equal(call_by_truth(stream, 2, 5), call_by_truth(stream, 2, 5))


def test_no_gate_beats_the_one_that_knows_the_truth(out: Path) -> None:
    for cell in cells(out, "main"):
        truth, mixed = cell["truth"], cell["gates"]["mixed"]
        for gate in ("value", "entropy"):
            for rate, found in truth[gate].items():
                assert found["rate"] == mixed[gate][rate]["mixed"]["rate"]
                assert found["control"] >= mixed[gate][rate]["mixed"]["control"]
        never, always = cell["never"]["mixed"]["control"], cell["always"]["mixed"]["control"]
        assert always - never == pytest.approx(truth["helped"] - truth["spoiled"])


def test_the_weighted_cnn_learns_as_control_does(out: Path) -> None:
    text = (out / "stroop.md").read_text()
    assert "CNN, its rows weighted as control's" in text and "a gate that knows who is right" in text
    for cell in cells(out, "main"):
        assert cell["parameters"]["cnn_by_need"] == cell["parameters"]["cnn"]
        assert cell["accuracy"]["cnn_by_need"] != cell["accuracy"]["cnn"]


def test_verdicts_follow_the_figures(out: Path) -> None:
    what = stroop.setup(None, congruent=[0.8], seeds=SEEDS, quick=True, with_effort=False)
    found = {
        cell.name: json.loads((out / "cells" / cell.name / "result.json").read_text()) for cell in what.cells
    }
    for cell in found.values():
        if "timing" in cell and "saved" in cell["timing"]:
            cell["timing"]["saved"] = 0.1
    assert stroop.report is not None
    blocks = stroop.report(Results(what.cells, found, what.config))
    (said,) = (block.sentences for block in blocks if isinstance(block, Verdicts))
    assert any("takes 10.0 ± 0.0 % less time" in v and v.startswith("**Does not hold.**") for v in said)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "stroop", "--congruent", "0.8,x"], "--congruent: expected numbers"),
        (["run", "stroop", "--congruent", "0.8,1.8"], "congruent: expected different numbers from 0 to 1"),
        (["run", "digits", "--download"], "--download: expected a folder"),
        (["run", "distill", "--data", "/nowhere"], "/nowhere: expected a folder with the four MNIST files"),
        (["report", "/nowhere"], "/nowhere: expected a folder with results"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and message in result.output
    assert not list(tmp_path.iterdir())


def test_the_command_line_reports(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "stroop", ignore=shutil.ignore_patterns("cells"))
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", str(tmp_path), "--out", str(page)])
    assert result.exit_code == 0 and "1 experiment on" in result.output
    assert page.read_text().count("data:image/png;base64") == 3


def test_one_seed_decides_nothing(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "cells", tmp_path / "cells", ignore=shutil.ignore_patterns("*-seed-1", "*-seed-2"))
    shown = io.StringIO()
    report = stroop(
        None, tmp_path, congruent=[0.8], quick=True, with_effort=False, console=Console(file=shown)
    )
    text = (tmp_path / "stroop.md").read_text()
    check_one_seed_report(text)
    assert (
        report["quick"] is True
        and QUICK in text
        and json.loads((tmp_path / "stroop.json").read_text())["note"] == QUICK
    )
    assert " ".join(shown.getvalue().split()).count(QUICK) == 2
    assert "**Not decided: one seed.**" in text
