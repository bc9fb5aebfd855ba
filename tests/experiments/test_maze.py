from __future__ import annotations

import io
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for extra in ("gymnasium", "matplotlib", "rich", "safetensors", "scipy"):
    pytest.importorskip(extra)
from rich.console import Console

from adaptcomp_ext.experiments.environments.maze import MazeVectorEnv
from adaptcomp_ext.experiments.maze import maze, training
from adaptcomp_ext.experiments.maze.measure import measure, run_trial, unseen_layouts
from adaptcomp_ext.experiments.style import QUICK
from adaptcomp_ext.models.agents import SWEEPS, MazeAgent
from tests.helpers.reports import check_one_seed_report, run_over_seeds
from tests.helpers.science import seeds

QUIET = Console(quiet=True)
SEEDS = seeds(3)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The short version over a few seeds."""
    folder = tmp_path_factory.mktemp("maze")
    run_over_seeds(lambda out, n: maze(out, seeds=n, workers=2, quick=True, console=QUIET), folder, SEEDS)
    return folder


def cells(out: Path, agent: str) -> list[dict[str, Any]]:
    found = sorted((out / "cells").glob(f"{agent}-seed-*/result.json"))
    assert len(found) == SEEDS
    return [json.loads(path.read_text()) for path in found]


@pytest.mark.science
def test_a_price_saves_sweeps(out: Path) -> None:
    for priced, free in zip(cells(out, "priced"), cells(out, "free"), strict=True):
        assert priced["own"]["sweeps_per_step"] < 0.5 * free["own"]["sweeps_per_step"]
        assert priced["own"]["efficiency"] > priced["fixed"]["0"]["efficiency"] + 0.1


@pytest.mark.science
def test_sweeps_go_where_the_goal_is_far(out: Path) -> None:
    for cell in cells(out, "priced"):
        assert cell["own"]["correlation"] > 0.2
        assert abs(cell["shuffled"]["correlation"]) < 0.2
    assert (
        statistics.fmean(
            cell["others"]["17 x 17, 0.3"]["own"]["correlation"] for cell in cells(out, "priced")
        )
        > 0.2
    )


@pytest.mark.science
def test_the_gate_beats_its_own_choices_dealt_at_random(out: Path) -> None:
    gain = [cell["own"]["efficiency"] - cell["shuffled"]["efficiency"] for cell in cells(out, "priced")]
    assert min(gain) > 0 and statistics.fmean(gain) > 0.01


@pytest.mark.science
def test_effort_falls_with_practice(out: Path) -> None:
    for cell in cells(out, "priced"):
        sweeps = [point["sweeps"] for point in cell["curve"]]
        assert sweeps[0] > 25 and sweeps[-1] < 0.6 * sweeps[0]


def test_the_report_is_whole(out: Path) -> None:
    report = json.loads((out / "maze.json").read_text())
    assert report["config"]["seeds"] == list(range(SEEDS)) and len(report["verdicts"]) >= 5
    text = (out / "maze.md").read_text()
    for name in ("maze.png", "maze_example.png"):
        assert name in text and (out / name).stat().st_size > 10_000
    assert "nan" not in text


def test_the_example_is_a_walk(out: Path) -> None:
    example = cells(out, "priced")[0]["example"]
    places = torch.tensor([*example["positions"], example["goal"]])
    assert example["positions"][0] == example["start"]
    assert bool(((places[1:] - places[:-1]).abs().sum(1) == 1).all())
    walls = torch.tensor(example["walls"])
    assert int(walls[places[:, 0], places[:, 1]].sum()) == 0
    assert len(example["sweeps"]) == len(example["positions"]) and set(example["sweeps"]) <= set(SWEEPS)


def test_a_finished_folder_is_not_run_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maze, "measure", None)
    before = (out / "maze.json").read_text()
    maze(out, seeds=SEEDS, quick=True, console=QUIET)
    after = json.loads((out / "maze.json").read_text())
    assert {k: v for k, v in after.items() if k != "date"} == {
        k: v for k, v in json.loads(before).items() if k != "date"
    }


def test_another_configuration_is_refused(out: Path) -> None:
    with pytest.raises(ValueError, match="holds another configuration"):
        maze(out, seeds=SEEDS, quick=True, price=0.1, console=QUIET)


def test_a_trial_is_repeatable_and_counts_right() -> None:
    torch.manual_seed(0)
    agent = MazeAgent()
    layouts = unseen_layouts(64, 9, 0.3)
    with torch.no_grad():
        first, second = (run_trial(agent, layouts, 0.3, 5) for _ in range(2))
        fixed = run_trial(agent, layouts, 0.3, 5, 24)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(fixed.sweeps, 24 * fixed.steps) and fixed.correlation() == 0
    arrived = fixed.success
    assert bool((fixed.efficiency[~arrived] == 0).all()) and bool((fixed.efficiency[arrived] <= 1).all())
    assert bool((fixed.steps[arrived].numpy() >= layouts.shortest[arrived.numpy()]).all())
    for i in range(64):
        assert int((fixed.at_maze == i).sum()) == int(fixed.steps[i])


def test_a_cell_is_the_same_twice(tmp_path: Path) -> None:
    what = maze.setup(seeds=1, first_seed=3, updates=2, price=0.001, quick=True)
    results = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        torch.manual_seed(what.cells[0].seed)
        found = measure(what.cells[0], tmp_path / name, lambda *_: None)
        results.append(found)
    assert results[0] == results[1]


def test_an_episode_that_time_cuts_goes_on_from_its_last_observation(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    agent = MazeAgent()
    settings = training.Settings(size=3, density=0.0, mazes=64, updates=1, horizon=20, sweeps=0, price=0.0)
    outcomes: list[tuple[np.ndarray, ...]] = []
    learned: list[training._Step] = []
    real = MazeVectorEnv.step

    def step(env: MazeVectorEnv, action: np.ndarray):
        outcomes.append(real(env, np.zeros_like(action)))  # all walk up, and most of them never arrive
        return outcomes[-1]

    def improve(*arguments: object) -> dict[str, float]:
        learned.extend(arguments[3])  # type: ignore[call-overload]
        return {}

    monkeypatch.setattr(MazeVectorEnv, "step", step)
    monkeypatch.setattr(training, "_improve", improve)
    training.train(agent, settings, 0)
    cut = 0
    for (_, gained, terminated, truncated, info), kept in zip(outcomes, learned, strict=True):
        expected = torch.from_numpy(gained).float()
        for i in np.flatnonzero(truncated):
            last = {name: value[None] for name, value in info["final_obs"][i].items()}
            with torch.no_grad():
                features = agent.features(*training.observe(last))
                worth = agent.value(features, torch.from_numpy(info["final_info"]["distance"][i : i + 1]))
            expected[i] += settings.discount * worth[0]
            cut += 1
        assert torch.allclose(kept.reward, expected, atol=1e-6)
        assert torch.equal(kept.ended, torch.from_numpy(terminated | truncated))
    assert cut > 10


def test_one_seed_decides_nothing(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "cells", tmp_path / "cells", ignore=shutil.ignore_patterns("*-seed-1", "*-seed-2"))
    shown = io.StringIO()
    report = maze(tmp_path, quick=True, console=Console(file=shown))
    text = (tmp_path / "maze.md").read_text()
    check_one_seed_report(text)
    assert (
        report["quick"] is True
        and QUICK in text
        and json.loads((tmp_path / "maze.json").read_text())["note"] == QUICK
    )
    assert " ".join(shown.getvalue().split()).count(QUICK) == 2
