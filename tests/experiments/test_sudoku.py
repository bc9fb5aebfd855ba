from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

for extra in ("matplotlib", "rich", "typer"):
    pytest.importorskip(extra)

from rich.console import Console

import adaptcomp_ext as ac
from adaptcomp_ext.experiments import cli
from adaptcomp_ext.experiments.runs import Cell, Results
from adaptcomp_ext.experiments.sudoku import measure as evaluation
from adaptcomp_ext.experiments.sudoku import sudoku
from adaptcomp_ext.experiments.sudoku.experiment import _sentences
from adaptcomp_ext.experiments.sudoku.measure import follow
from adaptcomp_ext.experiments.sudoku.model import Energy, FeedForward, Recurrent, units
from adaptcomp_ext.experiments.sudoku.nine import NINE_BLANKS, NineByNine, random_grid, singles_solve
from adaptcomp_ext.experiments.sudoku.puzzles import (
    BLANKS,
    FourByFour,
    Puzzles,
    all_grids,
    position_symmetries,
)
from adaptcomp_ext.experiments.sudoku.training import (
    EnergySolver,
    Recipe,
    first_answer,
    loss_of,
    train_energy,
    train_feed_forward,
    train_recurrent,
)
from tests.helpers.reports import check_one_seed_report


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def source() -> FourByFour:
    return FourByFour(0)


def solutions(puzzles: Puzzles, grids: Tensor) -> Tensor:
    """How many of the grids agree with what is given."""
    differs = (puzzles.solution[:, None] != grids) & puzzles.given[:, None]
    return (~differs.any(dim=2)).sum(dim=1)


def kinds_of(puzzles: Puzzles) -> set[int]:
    """A number for each puzzle, the same for whatever the symmetries make of it."""
    symmetries = position_symmetries()
    weights = torch.randint(2**60, (16, 17), generator=generator())
    solution, given = puzzles.solution[:, symmetries], puzzles.given[:, symmetries]
    # A digit is known by the first cell that holds it.
    same = (solution[..., :, None] == solution[..., None, :]) & given[..., None, :]
    names = same.int().argmax(dim=3).masked_fill(~given, 16)
    return set(weights[torch.arange(16), names].sum(dim=2).amin(dim=1).tolist())


def test_all_grids() -> None:
    grids = all_grids()
    assert grids.shape == (288, 16)
    assert len(grids.unique(dim=0)) == 288
    boards = grids.view(-1, 4, 4)
    boxes = boards.view(-1, 2, 2, 2, 2).transpose(2, 3).reshape(-1, 4, 4)
    for lines in (boards, boards.transpose(1, 2), boxes):
        assert (lines.sort(dim=2).values == torch.arange(4)).all()


def test_symmetries_make_grids_of_grids() -> None:
    symmetries = position_symmetries()
    assert len(symmetries.unique(dim=0)) == 128
    known = {tuple(grid) for grid in all_grids().tolist()}
    assert all(tuple(image) in known for image in all_grids()[::36][:, symmetries].flatten(0, 1).tolist())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("part", ["train", "test"])
def test_puzzles(seed: int, part: str) -> None:
    source = FourByFour(seed)
    puzzles = getattr(source, part)(800, generator(seed))
    assert (solutions(puzzles, source.grids) == 1).all()
    counts = puzzles.blanks.bincount(minlength=16)
    assert counts[BLANKS.start : BLANKS.stop].sum() == 800
    assert counts[BLANKS.start : BLANKS.stop].min() > 60
    if part == "test":
        assert (counts[BLANKS.start : BLANKS.stop] == 100).all()
    grids = source.grids[source.train_grids if part == "train" else source.test_grids]
    assert (solutions(Puzzles(puzzles.solution, torch.ones_like(puzzles.given)), grids) == 1).all()


def test_kinds_are_invariant(source: FourByFour) -> None:
    puzzles = source.train(3, generator())
    digits, symmetry = torch.tensor([2, 0, 3, 1]), position_symmetries()[77]
    twins = Puzzles(digits[puzzles.solution][:, symmetry], puzzles.given[:, symmetry])
    assert kinds_of(twins) == kinds_of(puzzles)
    assert len(kinds_of(puzzles)) == 3


def test_split(source: FourByFour) -> None:
    assert len(source.train_grids) == 220
    assert len(source.test_grids) == 68
    assert len(torch.cat((source.train_grids, source.test_grids)).unique()) == 288
    # A grid with a pattern in one part has no twin in the other, under any of the symmetries.
    train, test = source.train(600, generator()), source.test(300, generator())
    assert len(kinds_of(train)) > 400
    assert not kinds_of(train) & kinds_of(test)
    either = source.test_of_any_kind(300, generator())
    assert (solutions(either, source.grids) == 1).all()
    assert (either.solution[:, None] == source.grids[source.test_grids]).all(dim=2).any(dim=1).all()
    assert len(kinds_of(either) & kinds_of(train)) > 20
    again, other = FourByFour(0), FourByFour(1)
    assert torch.equal(again.test_grids, source.test_grids)
    assert not torch.equal(other.test_grids, source.test_grids)
    for ours, theirs in zip(again.train(64, generator()), source.train(64, generator()), strict=True):
        assert torch.equal(ours, theirs)


def legal(grids: Tensor) -> Tensor:
    """Whether every row, column and box of 9×9 grids [n, 81] holds all digits, [n]."""
    counts = torch.einsum("uc,ncd->nud", units(3), torch.nn.functional.one_hot(grids, 9).float())
    return (counts == 1).all(dim=2).all(dim=1)


def test_random_grids() -> None:
    shuffle = random.Random(0)
    grids = torch.tensor([random_grid(shuffle) for _ in range(40)])
    assert legal(grids).all()
    assert len(grids.unique(dim=0)) == 40
    again = random.Random(0)
    assert grids[0].tolist() == random_grid(again)


def test_singles() -> None:
    grid = torch.tensor([random_grid(random.Random(1))])
    given = torch.ones(4, 81, dtype=torch.bool)
    given[1, ::9] = False  # a column: naked singles
    given[2] = grid[0] != 0
    given[2, 0] = True  # all nines: hidden and naked singles
    given[3] = False  # nothing to go by
    assert singles_solve(Puzzles(grid.expand(4, -1), given)).tolist() == [True, True, True, False]
    # Two digits exchanged in two rows and two columns that share their boxes: two solutions.
    pair = deadly(grid[0])
    open_cells = torch.ones(1, 81, dtype=torch.bool)
    open_cells[0, pair] = False
    assert not singles_solve(Puzzles(grid, open_cells)).any()


def deadly(grid: Tensor) -> list[int]:
    """Four cells of two boxes that may hold their two digits either way."""
    for top in range(81):
        for right in range(top + 1, top // 9 * 9 + 9):
            for below in range(top + 9, 81, 9):
                cells = [top, right, below, below + right - top]
                same_band, same_stack = top // 27 == below // 27, top % 9 // 3 == right % 9 // 3
                if (
                    same_band != same_stack
                    and grid[cells[0]] == grid[cells[3]]
                    and grid[cells[1]] == grid[cells[2]]
                ):
                    return cells
    raise AssertionError("no such cells in this grid")


def test_nine_by_nine() -> None:
    source = NineByNine(0, grids=16, per_blanks=12)
    assert legal(torch.cat((source.train_grids, source.test_grids))).all()
    train, test = source.train(200, generator()), source.test(24, generator())
    assert set(train.blanks.tolist()) <= set(NINE_BLANKS)
    assert test.blanks.tolist() == [blanks for blanks in NINE_BLANKS for _ in range(3)]
    assert singles_solve(train).all()
    for puzzles, ours, others in (
        (train, source.train_grids, source.test_grids),
        (test, source.test_grids, source.train_grids),
    ):
        assert (puzzles.solution[:, None] == ours).all(dim=2).any(dim=1).all()
        assert not (puzzles.solution[:, None] == others).all(dim=2).any()
    assert puzzles.board().shape == (24, 81, 10)
    torch.manual_seed(0)
    board = test.board()
    assert Energy(3, 8)(first_answer(board, generator()), board).shape == (24,)
    assert (
        FeedForward(3, 8)(board).shape
        == Recurrent(3, 8)(first_answer(board, generator()), board).shape
        == (24, 81, 9)
    )


def test_board() -> None:
    solution = torch.tensor([[0, 1, 2, 3] * 4])
    given = torch.zeros(1, 16, dtype=torch.bool)
    given[0, 2] = True
    board = Puzzles(solution, given).board()
    assert board.shape == (1, 16, 5)
    assert board.dtype == torch.float32
    assert board[0, 2].tolist() == [0, 0, 1, 0, 0]
    assert board[0, 3].tolist() == [0, 0, 0, 0, 1]
    assert board.sum() == 16


@pytest.mark.parametrize("box", [2, 3])
def test_units(box: int) -> None:
    side = box * box
    groups = units(box)
    assert groups.shape == (3 * side, side * side)
    assert (groups.sum(dim=1) == side).all()
    assert (groups.sum(dim=0) == 3).all()
    corner = groups[2 * side].view(side, side)
    assert corner[:box, :box].all()


def test_energy_rows_are_independent(source: FourByFour) -> None:
    torch.manual_seed(0)
    energy = Energy(2, 16).double()
    board = source.train(9, generator()).board().double()
    answer = first_answer(board, generator()).double()
    together = energy(answer, board)
    assert together.shape == (9,)
    alone = torch.cat([energy(answer[i : i + 1], board[i : i + 1]) for i in range(9)])
    torch.testing.assert_close(together, alone)
    # What the answer says about given cells does not enter.
    other = answer + 5 * (1 - board[..., 4:])
    torch.testing.assert_close(energy(other, board), together)


def test_energy_sees_no_places(source: FourByFour) -> None:
    """Exchanged rows or columns within a band, bands and stacks leave the energy as it is."""
    torch.manual_seed(0)
    energy = Energy(2, 16).double()
    board = source.train(5, generator()).board().double()
    answer = first_answer(board, generator()).double()
    for symmetry in position_symmetries()[
        ::2
    ]:  # every other one reflects the board as well: rows are no columns
        torch.testing.assert_close(energy(answer[:, symmetry], board[:, symmetry]), energy(answer, board))


def test_energy_descends_in_any_batch(source: FourByFour) -> None:
    torch.manual_seed(0)
    solver = EnergySolver(2, Recipe(width=16, step_size=1.0))
    solver.descend.max_steps, solver.descend.tol = 6, 1e-3
    board = source.train(7, generator()).board()
    answer = first_answer(board, generator())
    with torch.no_grad():
        together = solver(answer, board)
        alone = [solver(answer[i : i + 1], board[i : i + 1]) for i in range(7)]
    torch.testing.assert_close(together.y, torch.cat([each.y for each in alone]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        together.energy, torch.cat([each.energy for each in alone]), rtol=1e-4, atol=1e-4
    )


def test_stepwise_gradient_is_that_of_a_loop(source: FourByFour) -> None:
    """Detached between steps, the second-order graph of each step, the loss after every step."""
    torch.manual_seed(0)
    solver = EnergySolver(2, Recipe(width=16, step_size=1.0))
    puzzles = source.train(5, generator())
    board, answer = puzzles.board(), first_answer(puzzles.board(), generator())
    jitter = 1 + 0.3 * (2 * torch.rand(5, generator=generator()) - 1)

    solver.descend.max_steps, solver.descend.tol, solver.descend.keep_trace = 3, 0.0, True
    trace = solver(answer, board, jitter).trace
    assert isinstance(trace, ac.Trace)
    seen = Puzzles(puzzles.solution[trace.row], puzzles.given[trace.row])
    loss = loss_of(trace.outputs, seen)
    got = torch.autograd.grad(loss, list(solver.parameters()))

    size = (solver.log_step.exp() * jitter)[:, None, None]
    total = torch.zeros(())
    for _ in range(3):
        answer = answer.detach().requires_grad_()
        (slope,) = torch.autograd.grad(solver.energy(answer, board).sum(), answer, create_graph=True)
        answer = answer - size * slope
        total = total + loss_of(answer, puzzles) / 3
    torch.testing.assert_close(loss, total)
    for ours, plain in zip(got, torch.autograd.grad(total, list(solver.parameters())), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["feed_forward", "recurrent", "energy"])
def test_training_lowers_the_loss_and_repeats(source: FourByFour, kind: str) -> None:
    recipe = Recipe(width=16, updates=60, batch=32, learning_rate=1e-2, warm_up=10, steps=2)
    kinds: dict[str, Any] = {
        "feed_forward": (lambda: FeedForward(2, 16), train_feed_forward),
        "recurrent": (lambda: Recurrent(2, 16), train_recurrent),
        "energy": (lambda: EnergySolver(2, recipe), train_energy),
    }
    make, train = kinds[kind]
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        solver, losses = make(), []
        assert train(solver, source, recipe, 0, losses.append) > 0
        assert len(losses) == 60
        assert not solver.training
        runs.append(losses)
    assert runs[0] == runs[1]
    assert sum(runs[0][-10:]) < 0.85 * sum(runs[0][:10])


def test_solvers_see_the_same_puzzles(source: FourByFour) -> None:
    recipe = Recipe(width=8, updates=3, batch=4, steps=2)
    seen: list[list[Tensor]] = []

    class Watched(FourByFour):
        def train(self, rows: int, generator: torch.Generator) -> Puzzles:
            puzzles = super().train(rows, generator)
            seen[-1].append(puzzles.given)
            return puzzles

    watched = Watched(0)
    for solver, train in ((FeedForward(2, 8), train_feed_forward), (EnergySolver(2, recipe), train_energy)):
        seen.append([])
        train(solver, watched, recipe, 5, lambda loss: None)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_loss_counts_blank_cells_only() -> None:
    solution = torch.zeros(2, 16, dtype=torch.int64)
    given = torch.ones(2, 16, dtype=torch.bool)
    given[0, :4] = False
    given[1, 5] = False
    answer = torch.zeros(2, 16, 4)
    answer[given] = 100.0 * torch.tensor([0.0, 1, 0, 0])
    answer[1, 5, 0] = torch.tensor(3.0).log()
    expected = (torch.tensor(4.0).log() + torch.tensor(2.0).log()) / 2
    torch.testing.assert_close(loss_of(answer, Puzzles(solution, given)), expected)


def test_solved() -> None:
    solution = torch.tensor([[0, 1, 2, 3] * 4]).repeat(3, 1)
    given = torch.zeros(3, 16, dtype=torch.bool)
    given[1, 0] = True
    answer = torch.nn.functional.one_hot(solution, 4).float()
    answer[1:, 0] = torch.tensor(
        [0.0, 9.0, 0.0, 0.0]
    )  # wrong, in a given cell of the second and in a blank one of the third
    assert evaluation.solved(answer, Puzzles(solution, given)).tolist() == [True, True, False]


def test_by_blanks() -> None:
    attempt = evaluation.Attempt(torch.tensor([True, False, True]), torch.tensor([2, 4, 7]))
    few, many = evaluation.by_blanks(attempt, torch.tensor([4, 4, 9]))
    assert few == {
        "blanks": 4,
        "puzzles": 2,
        "solved": 0.5,
        "steps": 3.0,
        "sd": 1.0,
        "quartiles": [2.5, 3.0, 3.5],
    }
    assert (many["blanks"], many["solved"], many["steps"], many["sd"]) == (9, 1.0, 7.0, 0.0)


def test_best_of() -> None:
    energy = torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 0.0]])
    right = torch.tensor([[False, True, False], [True, False, False]])
    assert [evaluation.best_of(energy, right, n) for n in (1, 2, 3)] == [0.5, 1.0, 0.5]


def test_auc() -> None:
    right = torch.tensor([True, True, False, False])
    assert evaluation.auc(torch.tensor([0.0, 1.0, 2.0, 3.0]), right) == 1.0
    assert evaluation.auc(torch.tensor([2.0, 3.0, 0.0, 1.0]), right) == 0.0
    assert evaluation.auc(torch.tensor([0.0, 2.0, 2.0, 1.0]), right) == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert evaluation.auc(torch.zeros(4), torch.ones(4, dtype=torch.bool)) is None


def test_auc_within_and_alike() -> None:
    # Within either puzzle the right answer lies lower; across them the easy one's wrong answer lies lower
    # than all.
    energy = torch.tensor([[0.0, 1.0], [10.0, 11.0], [5.0, 6.0]])
    right = torch.tensor([[True, False], [True, False], [True, True]])
    assert evaluation.auc_within(energy, right) == 1.0
    assert evaluation.auc_within(energy, torch.ones_like(right)) is None
    flat, flags = torch.tensor([0.0, 3.0, 1.0, 2.0]), torch.tensor([True, False, False, True])
    assert evaluation.auc(flat, flags) == 0.75
    assert evaluation.auc_alike(flat, flags, torch.tensor([4, 4, 9, 9])) == 0.5
    assert evaluation.auc_alike(flat, flags, torch.tensor([4, 5, 6, 7])) is None


def test_the_recurrent_network_stops_where_it_settles(source: FourByFour) -> None:
    """The active rows alone are computed, and get what they get alone."""
    torch.manual_seed(0)
    solver = Recurrent(2, 8)
    puzzles = source.train(20, generator())
    rows: list[int] = []
    handle = solver.register_forward_hook(lambda module, given, output: rows.append(len(output)))
    with torch.no_grad():
        start = first_answer(puzzles.board(), generator())
        attempt = evaluation._settle(solver, start, puzzles, 0.02, 12)
    handle.remove()
    assert rows == [int((attempt.steps >= n).sum()) for n in range(1, len(rows) + 1)]
    assert len(attempt.steps.unique()) > 1


def test_the_descent_that_is_followed(source: FourByFour) -> None:
    torch.manual_seed(0)
    solver = EnergySolver(2, Recipe(width=8, step_size=1.0))
    solver.descend.max_steps = 9
    puzzles = source.test(40, generator())
    descent = follow(solver, puzzles, 0)
    assert descent["given"].count(False) == puzzles.blanks.max()
    assert descent["step"][0] == 0 and descent["step"] == sorted(descent["step"])
    assert (
        len(descent["step"]) == len(descent["energy"]) == len(descent["digit"]) and descent["step"][-1] <= 9
    )
    assert all(0.25 <= chance <= 1 for board in descent["probability"] for chance in board)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    out = tmp_path_factory.mktemp("sudoku") / "made"
    console = Console(file=io.StringIO(), width=100)
    report = sudoku(out=out, quick=True, first_seed=3, console=console)
    assert isinstance(console.file, io.StringIO)
    return report, out, console.file.getvalue()


def test_files(ran: tuple[dict[str, Any], Path, str]) -> None:
    report, out, _ = ran
    assert json.loads((out / "sudoku.json").read_text()) == json.loads(json.dumps(report))
    picture = (out / "sudoku.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def test_cell(ran: tuple[dict[str, Any], Path, str]) -> None:
    report, out, _ = ran
    (folder,) = (out / "cells").glob("seed-*")
    assert folder.name == "seed-3"
    run = json.loads((folder / "result.json").read_text())
    count = report["config"]["puzzles"]
    sizes = [run[name]["parameters"] for name in ("feed_forward", "recurrent", "energy")]
    assert max(sizes) < 1.06 * min(sizes)
    for name in ("recurrent", "energy"):
        assert list(run[name]["allowed"]) == ["1", "2", "3", "5", "9", "16", "32", "64"]
        for stopped in run[name]["stopped"]:
            groups = stopped["by_blanks"]
            assert [group["blanks"] for group in groups] == list(BLANKS)
            assert sum(group["puzzles"] for group in groups) == count
            mean = sum(group["puzzles"] * group["steps"] for group in groups) / count
            assert mean == pytest.approx(stopped["steps"])
            assert 1 <= stopped["steps"] <= 64
    by_tolerance = {stopped["tolerance"]: stopped["steps"] for stopped in run["energy"]["stopped"]}
    assert by_tolerance[min(by_tolerance)] >= by_tolerance[max(by_tolerance)]
    for few in run["energy"]["few_steps"].values():
        assert list(few["best_of"]) == ["1", "2", "4", "8"]
        assert few["best_of"]["1"] == pytest.approx(1 - few["wrong"] / count)
    assert 0 < run["kinds"]["test"] < run["kinds"]["train"]
    assert list(run["of_any_kind"]) == ["feed_forward", "recurrent", "energy"]


def test_report(ran: tuple[dict[str, Any], Path, str]) -> None:
    report, out, _ = ran
    run = json.loads(next((out / "cells").glob("*/result.json")).read_text())
    tables = {table["heading"]: table["rows"] for table in report["tables"]}
    feed_forward, recurrent, energy = tables["Held-out puzzles"]
    assert feed_forward["solved, %"][0] == run["feed_forward"]["solved"] and feed_forward["steps"] == "–"
    assert energy["solved, %"][:2] == (run["energy"]["stopped"][0]["solved"], None)
    assert recurrent["at 11 blanks"][0] == run["recurrent"]["stopped"][0]["by_blanks"][-1]["steps"]
    assert len(tables["Where the stop rule stops"]) == len(
        run["energy"]["stopped"] + run["recurrent"]["stopped"]
    )
    assert report["config"]["recipe"]["updates"] == 20 and report["config"]["size"] == 4
    check_one_seed_report((out / "sudoku.md").read_text())


def test_printed(ran: tuple[dict[str, Any], Path, str]) -> None:
    printed = " ".join(ran[2].split())
    assert "Held out: 68 of the 288 grids" in printed and "sudoku.md" in printed
    assert "The energy solves" in printed and printed.count("Not decided: one seed") == 2
    assert "±" not in printed and "does better" not in printed and "Quick run (--quick)" in printed


def test_a_finished_folder_is_not_run_again(
    ran: tuple[dict[str, Any], Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report, out, _ = ran
    monkeypatch.setattr(sudoku, "measure", None)
    again = sudoku(out=out, quick=True, first_seed=3, console=Console(file=io.StringIO()))
    assert again["tables"] == report["tables"]


def test_what_is_better_is_what_the_seeds_agree_on() -> None:
    def solver(solved: float, steps: float, seconds: float) -> dict[str, Any]:
        blanks = [{"steps": 2.0}, {"steps": 2.0 * steps}]
        stopped = {"solved": solved, "steps": steps, "correlation": 0.5, "by_blanks": blanks}
        return {"seconds": seconds, "milliseconds": 10.0, "solved": solved, "stopped": [stopped]}

    cells = [Cell(f"seed-{i}", {}, i) for i in range(3)]
    results = {
        f"seed-{i}": {
            "energy": solver(0.95 + 0.01 * i, 5.0, 50.0 + i),
            "recurrent": solver(0.97 - 0.01 * i, 3.0 + 0.1 * i, 20.0),
            "feed_forward": solver(0.80, 1.0, 5.0),
        }
        for i in range(3)
    }
    every = Results(cells, results, {})
    first, *rest = _sentences({name: every.at(name) for name in ("feed_forward", "recurrent", "energy")})
    assert first.startswith(
        "The energy solves 96.0 %, the feed-forward network 80.0 %: +16.0 ["
    ) and first.endswith("(more).")
    said = {line.partition(":")[0]: line for line in rest}
    assert "steps on the hardest" in said["The energy does better"]
    assert all(
        what in said["The recurrent network does better"]
        for what in ("steps (5.0 against 3.1)", "time to train")
    )
    undecided = said["Not decided, the interval holds 0"]
    assert (
        "share solved, % (96.0 against 96.0)" in undecided
        and "time to solve, ms (10 against 10)" in undecided
    )


def test_no_random_state_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptcomp_ext.experiments.sudoku.experiment.QUICK_UPDATES", 1)
    monkeypatch.setattr("adaptcomp_ext.experiments.sudoku.experiment.QUICK_PUZZLES", 8)
    before = torch.get_rng_state()
    report = sudoku(out=tmp_path, seeds=2, quick=True, console=Console(file=io.StringIO()))
    assert torch.equal(torch.get_rng_state(), before)
    assert report["config"]["seeds"] == [0, 1]


@pytest.mark.parametrize("words", [["--out", "taken"], ["--seeds", "0"], ["--size", "5"]])
def test_bad_options(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("a file")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "sudoku", *words])
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
