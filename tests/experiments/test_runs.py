from __future__ import annotations

import errno
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

for extra in ("rich", "safetensors", "scipy"):
    pytest.importorskip(extra)
from rich.console import Console
from scipy import stats

from adaptcomp_ext.experiments.files import owned, owns, watched, write_tensors, write_text
from adaptcomp_ext.experiments.runs import Cell, Checkpoint, Later, RunFolder, fit, run_cells, shuffled
from adaptcomp_ext.experiments.runs.page import find_runs, write_page
from adaptcomp_ext.experiments.runs.statistics import (
    Claim,
    counted,
    interval,
    judged,
    mcnemar,
    mean_interval,
    measured_over,
    paired,
    points,
    rank_correlation,
    said,
    table,
    wilson,
)
from adaptcomp_ext.experiments.style import save as save_figure
from tests.helpers.processes import ROOT

QUIET = Console(quiet=True)


# --- folders ------------------------------------------------------------------------------------------------
def test_a_folder_is_resumed_by_its_own_configuration_only(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    folder = RunFolder.open(out, "stroop", {"seeds": [0, 1], "epochs": 3, "old": 1})
    folder.finish("one", {"x": 1.5})
    again = RunFolder.open(out, "stroop", {"epochs": 3, "seeds": (0, 1), "old": 1})
    assert again.result("one") == {"x": 1.5} and again.result("two") is None
    before = (out / "config.json").read_bytes()
    with pytest.raises(ValueError, match="another configuration of 'stroop'") as raised:
        RunFolder.open(out, "stroop", {"seeds": [0, 1, 2], "epochs": 3, "new": True})
    message = str(raised.value)
    assert (
        "seeds = [0, 1] there, [0, 1, 2] asked for" in message
        and "new = None there, True" in message
        and "old = 1 there" in message
    )
    assert "choose another" in message and message.startswith(str(out))
    assert "epochs" not in str(raised.value)
    with pytest.raises(ValueError, match="expected a folder of 'digits', found one of 'stroop'"):
        RunFolder.open(out, "digits", {"epochs": 3})
    assert (out / "config.json").read_bytes() == before
    (out / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: expected JSON"):
        RunFolder.open(out, "stroop", {})


# --- training that resumes ----------------------------------------------------------------------------------
X = torch.randn(70, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (70,), generator=torch.Generator().manual_seed(1))


def train(
    path: Path | None, epochs: int = 4, stop_after: int | None = None, pause: float = 0.0
) -> tuple[nn.Module, list]:
    """A network with dropout and batch statistics; stops by an exception after so many epochs."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=epochs * 5)

    def loss(index: Tensor, done: float) -> tuple[Tensor, dict[str, Tensor]]:
        time.sleep(pause)
        return F.cross_entropy(net(X[index]), Y[index]), {"done": torch.tensor(done)}

    def after(epoch: int) -> dict[str, float]:
        assert not net.training
        if stop_after is not None and epoch == stop_after:
            raise KeyboardInterrupt
        return {"norm": float(net[0].weight.detach().norm())}

    history = fit(
        net,
        loss,
        optimizer,
        rows=70,
        batch=16,
        epochs=epochs,
        seed=7,
        schedule=schedule,
        checkpoint=None if path is None else Checkpoint(path),
        after=after,
    )
    return net, history


def comparable(history: list) -> list:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.promise("resume")
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_an_interrupted_training_ends_as_if_it_had_not_been(tmp_path: Path, stop: int) -> None:
    whole, history = train(None)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "c.safetensors", stop_after=stop)
    assert (tmp_path / "c.safetensors").is_file() == (stop > 0)
    net, resumed = train(tmp_path / "c.safetensors")
    assert equal(net, whole) and comparable(resumed) == comparable(history)
    assert history[-1]["done"] == pytest.approx(
        (15 / 20 * 16 + 16 / 20 * 16 + 17 / 20 * 16 + 18 / 20 * 16 + 19 / 20 * 6) / 70
    )
    again, unchanged = train(tmp_path / "c.safetensors")  # nothing left to do
    assert equal(again, whole) and unchanged == resumed


@pytest.mark.promise("resume")
def test_a_killed_training_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    code = f"import sys; sys.path.append({str(ROOT)!r}); "
    code += f"from pathlib import Path; from {__name__} import train; "
    code += f"import torch; torch.set_num_threads(1); train(Path({str(path)!r}), pause=0.05)"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not path.is_file() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL  # it was still at work
    net, history = train(path)
    whole, expected = train(None)
    assert equal(net, whole) and comparable(history) == comparable(expected)


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    train(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"c\.safetensors: expected a checkpoint of this model"):
        train(path)
    path.write_bytes(content)
    other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="expected a checkpoint of this model"):
        Checkpoint(path).load(other, torch.optim.AdamW(other.parameters()), None)
    assert not list(tmp_path.glob("*.part"))


def test_orders_depend_on_seed_and_epoch() -> None:
    orders = {(s, e): torch.cat(shuffled(50, 8, s, e)).tolist() for s in (0, 1) for e in (0, 1)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 4
    assert [len(part) for part in shuffled(50, 8, 0, 0)] == [8] * 6 + [2]


# --- cells --------------------------------------------------------------------------------------------------
def work(cell: Cell, folder: Path, tick) -> dict:
    tick("drawing", 0.5)
    with (folder / "runs.txt").open("a") as file:
        file.write("x")
    if cell.options.get("fail") and not (folder / "mended").exists():
        raise RuntimeError(f"cell {cell.name} failed")
    return {"value": float(torch.rand(())) + cell.options["add"]}


def cells(count: int = 3, **extra) -> list[Cell]:
    return [Cell(f"c-{i}", {"add": 10 * i, **extra}, seed=i) for i in range(count)]


@pytest.mark.parametrize("workers", [1, 2])
def test_cells_run_once_and_alike_however_many_workers(tmp_path: Path, workers: int) -> None:
    folder = RunFolder.open(tmp_path, "test", {})
    before = torch.get_rng_state()
    found = run_cells(folder, cells(), work, workers=workers, threads=1, console=QUIET)
    assert torch.equal(torch.get_rng_state(), before)
    expected = []
    for i in range(3):
        torch.manual_seed(i)
        expected.append(float(torch.rand(())) + 10 * i)
    assert [found[f"c-{i}"]["value"] for i in range(3)] == expected
    assert all(result["seconds"] >= 0 for result in found.values())
    again = run_cells(folder, cells(), work, workers=workers, threads=1, console=QUIET)
    assert again == found
    assert [(folder.cell(f"c-{i}") / "runs.txt").read_text() for i in range(3)] == ["x"] * 3


def test_a_worker_is_imported_where_its_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = pickle.loads(pickle.dumps(Later("simulated.measure")))
    assert worker.__module__ == "simulated.measure"  # what the machines of a cluster are asked for
    with pytest.raises(ModuleNotFoundError, match="simulated"):
        worker(cells()[0], tmp_path, None)
    (tmp_path / "simulated").mkdir()
    (tmp_path / "simulated" / "measure.py").write_text(
        "import os\ndef measure(cell, folder, tick): return {'seed': cell.seed, 'process': os.getpid()}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    folder = RunFolder.open(tmp_path / "out", "test", {})
    found = run_cells(folder, cells(), worker, workers=2, threads=1, console=QUIET)
    assert [result["seed"] for result in found.values()] == [0, 1, 2]
    assert os.getpid() not in {result["process"] for result in found.values()}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failing_cell_raises_and_the_rest_can_go_on(tmp_path: Path, workers: int) -> None:
    folder = RunFolder.open(tmp_path, "test", {})
    some = [*cells(1), Cell("bad", {"add": 0, "fail": True}, 5)]
    with pytest.raises(RuntimeError, match="cell bad failed"):
        run_cells(folder, some, work, workers=workers, threads=1, console=QUIET)
    assert folder.result("bad") is None
    (folder.cell("bad") / "mended").touch()
    found = run_cells(folder, some, work, workers=workers, threads=1, console=QUIET)
    assert set(found) == {"c-0", "bad"}


def endless(cell: Cell, folder: Path, tick) -> dict:
    while True:
        tick("going on", 0.5)
        (folder / "alive.txt").write_text(f"{os.getpid()} {time.monotonic()}")
        time.sleep(0.02)


def test_nobody_goes_on_when_the_run_is_killed(tmp_path: Path) -> None:
    code = f"import sys; sys.path.append({str(ROOT)!r}); from {__name__} import *; "
    code += f"folder = RunFolder.open({str(tmp_path)!r}, 'test', {{}}); "
    code += "run_cells(folder, cells(2), endless, workers=2, threads=1, console=QUIET)"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    signs = [tmp_path / "cells" / f"c-{i}" / "alive.txt" for i in range(2)]
    deadline = time.monotonic() + 120
    while not all(sign.is_file() for sign in signs) and parent.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(parent.pid, signal.SIGKILL)
    assert parent.wait() == -signal.SIGKILL  # they were at work
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        before = [sign.read_text() for sign in signs]
        time.sleep(0.5)
        if [sign.read_text() for sign in signs] == before:
            break
    else:
        raise AssertionError("the cells are still being worked on")


def test_one_run_at_a_time_writes_into_a_folder(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path, "test", {})
    with owned(folder.cells) as token:
        assert owns(folder.cells, token) and not owns(folder.cells, "another") and not owns(tmp_path, token)
        with pytest.raises(
            BlockingIOError, match=f"found process {os.getpid()} on .* at work since"
        ) as raised:
            run_cells(folder, cells(1), work, workers=1, threads=1, console=QUIET)
        assert str(raised.value).startswith(str(tmp_path)) and owns(folder.cells, token)
    assert not owns(folder.cells, token) and folder.result("c-0") is None
    found = run_cells(folder, cells(1), work, workers=1, threads=1, console=QUIET)
    with owned(folder.cells):  # a folder in which nothing is left to do can be read by anyone
        assert run_cells(folder, cells(1), work, workers=1, threads=1, console=QUIET) == found


def test_the_folder_of_a_killed_run_is_free(tmp_path: Path) -> None:
    code = f"import sys, time; sys.path.append({str(ROOT)!r}); from pathlib import Path; "
    code += "from adaptcomp_ext.experiments.files import owned\n"
    code += f"with owned(Path({str(tmp_path)!r})) as token: print(token, flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    token = child.stdout.readline().strip()
    with pytest.raises(BlockingIOError, match=f"found process {child.pid} on"), owned(tmp_path):
        pass
    ended: list[str] = []
    with watched(tmp_path, token, lambda: ended.append("those of the killed run")):
        child.kill()
        child.communicate()
        with owned(tmp_path) as other:
            assert owns(tmp_path, other)
            deadline = time.monotonic() + 30
            while not ended and time.monotonic() < deadline:
                time.sleep(0.05)
    assert ended


def kill_itself(cell: Cell, folder: Path, tick) -> dict:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_a_killed_process_ends_the_run_in_one_sentence(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path, "test", {})
    with pytest.raises(ChildProcessError, match="was killed from outside; the same command goes on"):
        run_cells(folder, cells(2), kill_itself, workers=2, threads=1, console=QUIET)


# --- statistics ---------------------------------------------------------------------------------------------
def test_intervals() -> None:
    values = [0.91, 0.93, 0.90, 0.95]
    mean, low, high, n, p = mean_interval(values)
    assert p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    expected = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert (low, high) == pytest.approx(expected) and n == 4 and mean == pytest.approx(0.9225)
    assert mean_interval([0.5]) == (0.5, None, None, 1, None)
    other = [0.90, 0.90, 0.89, 0.92]
    difference = paired(values, other)
    assert difference.p == pytest.approx(stats.ttest_rel(values, other).pvalue)
    assert difference.above and not difference.below
    assert paired(other, values).below
    assert paired([1.0], [0.5]) == (0.5, None, None, 1, None)
    assert paired([1.0, 2.0], [1.0, 2.0]).p == 1 and paired([2.0, 3.0], [1.0, 2.0]).p == 0
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_mcnemar() -> None:
    a = torch.tensor([True] * 9 + [False] * 2 + [True] * 5)
    b = torch.tensor([False] * 9 + [True] * 2 + [True] * 5)
    assert mcnemar(a, b) == pytest.approx(2 * sum(math.comb(11, k) for k in range(3)) / 2**11)
    assert mcnemar(a, a) == 1


def test_tables() -> None:
    assert (
        interval(mean_interval([0.5, 0.5])) == "50.0 ± 0.0" and interval(mean_interval([0.123]), 2) == "12.30"
    )
    assert points(paired([0.5], [0.4])) == "+10.00"
    assert points(paired([0.5, 0.6], [0.4, 0.4])).startswith("+15.00 [")
    assert (
        counted(1, "seed") == "1 seed"
        and counted(0, "seed") == "0 seeds"
        and counted(1200, "seed") == "1,200 seeds"
    )
    assert table(["a", "b"], [["x", "1"]]) == "| a | b |\n|---|---:|\n| x | 1 |\n"


# --- the page -----------------------------------------------------------------------------------------------
@pytest.fixture
def results(tmp_path: Path) -> Path:
    import base64

    png = base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    )
    for name in ("one", "two"):
        folder = RunFolder.open(tmp_path / "out" / name, name, {"seeds": [0], "note": "<b>&"})
        (folder.path / "figure.png").write_bytes(png)
        table = "| a | b |\n|---|---:|\n| x | 1 |\n"
        text = f"# Title {name}\n\n![picture](figure.png)\n\n- **Holds.** 1 < 2 <script>\n\n{table}"
        (folder.path / f"{name}.md").write_text(text, encoding="utf-8")
    RunFolder.open(tmp_path / "out" / "unfinished", "three", {})
    return tmp_path / "out"


def test_the_html_page_stands_alone(results: Path, tmp_path: Path) -> None:
    runs = find_runs([results])
    assert [run.experiment for run in runs] == ["one", "two"]
    write_page(runs, tmp_path / "page" / "report.html")
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 2 and 'src="figure.png"' not in page
    assert "<h1>Title one</h1>" in page and "<strong>Holds.</strong>" in page and "<table>" in page
    assert (
        "<script>" not in page
        and "&lt;script&gt;" in page
        and "<b>&" not in page
        and '"seeds"' in page.replace("&quot;", '"')
    )


def test_the_markdown_page_points_to_the_pictures(results: Path, tmp_path: Path) -> None:
    write_page(find_runs([results / "one", results / "two"]), tmp_path / "page" / "report.md")
    page = (tmp_path / "page" / "report.md").read_text(encoding="utf-8")
    assert "![picture](../out/one/figure.png)" in page and "![picture](../out/two/figure.png)" in page
    assert (tmp_path / "page" / "../out/one/figure.png").is_file()


def test_the_page_says_what_is_missing(tmp_path: Path, results: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: expected a folder with results"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match="expected finished experiments"):
        find_runs([results / "unfinished"])
    with pytest.raises(ValueError, match=r"out: expected a file that ends in \.html or \.md"):
        write_page(find_runs([results]), tmp_path / "page.pdf")


def test_json_is_written_whole(tmp_path: Path) -> None:
    from adaptcomp_ext.experiments.runs import write_json

    write_json(tmp_path / "x.json", {"a": [1, 2]})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1, 2]}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_rank_correlations() -> None:
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert rank_correlation(a, a.exp()) == pytest.approx(1) and rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(a, torch.ones(2, 2)) == 0


# --- verdicts -----------------------------------------------------------------------------------------------
@pytest.mark.promise("verdicts")
@pytest.mark.parametrize(
    ("claims", "verdict"),
    [
        ([Claim(paired([0.3, 0.4, 0.35], [0.1, 0.1, 0.1]))], "Holds"),
        ([Claim(paired([0.1, 0.1, 0.1], [0.3, 0.4, 0.35]))], "Does not hold"),
        (
            [Claim(paired([0.1, 0.2, 0.5], [0.2, 0.1, 0.3]))],
            "Not decided: met by the mean, not by the whole interval",
        ),
        (
            [Claim(paired([0.2, 0.1, 0.3], [0.1, 0.2, 0.5]))],
            "Not decided: missed by the mean, not by the whole interval",
        ),
        (
            [Claim(mean_interval([0.95, 0.96, 0.97]), 0.94)],
            "Not decided: met by the mean, not by the whole interval",
        ),
        ([Claim(mean_interval([0.95, 0.951, 0.952]), 0.94)], "Holds"),
        ([Claim(mean_interval([0.5]), 0.1)], "Not decided: one seed"),
        ([Claim(paired([0.5], [0.1]))], "Not decided: one seed"),
        # At most a bound.
        ([Claim(paired([0.105, 0.106], [0.1, 0.1]), 0.02, most=True)], "Holds"),
        ([Claim(paired([0.2, 0.201], [0.1, 0.1]), 0.02, most=True)], "Does not hold"),
        # Several: all hold, or one fails.
        (
            [Claim(mean_interval([2.0, 2.1]), 0.5), Claim(mean_interval([0.1, 0.9]), 0.5)],
            "Not decided: met by the mean",
        ),
        ([Claim(mean_interval([2.0, 2.1]), 0.5), Claim(mean_interval([0.1, 0.11]), 0.5)], "Does not hold"),
        # No difference at all is not above 0.
        ([Claim(paired([0.1, 0.2], [0.1, 0.2]))], "Not decided: met by the mean"),
    ],
)
def test_a_claim_holds_where_its_whole_interval_does(claims: list[Claim], verdict: str) -> None:
    assert judged("It does.", *claims).startswith(f"**{verdict}")


def test_what_an_interval_says() -> None:
    assert said(paired([0.5], [0.1]), "more", "less") == "not decided: one seed"
    assert said(paired([3.0, 3.1], [1.0, 1.0]), "more", "less") == "more"
    assert said(paired([1.0, 1.0], [3.0, 3.1]), "more", "less") == "less"
    assert said(paired([1.0, 3.0], [3.0, 1.0]), "more", "less") == "not decided: the interval holds 0"
    assert "±" not in measured_over(1) and "±" in measured_over(2)


def test_a_picture_of_a_quick_run_says_so(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from adaptcomp_ext.experiments.style import save, span_at_least

    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    axes.plot([0, 1], [904.0, 904.8])
    span_at_least(axes, "y", 100)
    low, high = axes.get_ylim()
    assert high - low == pytest.approx(100) and low < 904 < high
    save(figure, tmp_path / "a.png", 50)
    assert not figure.texts
    save(figure, tmp_path / "b.png", 50, quick=True)
    assert [text.get_text() for text in figure.texts] == ["quick run"]
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


# --- full disks ---------------------------------------------------------------------------------------------
def _full(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("what", ["text", "tensors", "picture"])
def test_a_full_disk_leaves_the_file_that_was_there(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result"
    path.write_text("the one before")
    if what == "text":
        monkeypatch.setattr(Path, "write_text", lambda self, *a, **k: (self.write_bytes(b"half"), _full()))
        write = lambda: write_text(path, "the next one")  # noqa: E731
    elif what == "tensors":
        monkeypatch.setattr(os, "fsync", _full)
        write = lambda: write_tensors(path, {"x": torch.ones(3)})  # noqa: E731
    else:
        figure = pytest.importorskip("matplotlib.figure").Figure()
        monkeypatch.setattr(
            figure, "savefig", lambda where, **options: (Path(where).write_bytes(b"half"), _full())
        )
        write = lambda: save_figure(figure, path, 50)  # noqa: E731
    with pytest.raises(OSError, match="No space left") as raised:
        write()
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(path)
    monkeypatch.undo()
    assert path.read_text() == "the one before" and [p.name for p in tmp_path.iterdir()] == ["result"]


def _out_of_space(cell: Cell, folder: Path, tick: object) -> dict[str, object]:
    from adaptcomp_ext.experiments import files

    files.os.fsync = _full  # type: ignore[assignment]
    files.write_tensors(folder / "x.safetensors", {"x": torch.ones(3)})
    return {}


def test_a_full_disk_is_told_by_another_process(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path, "x", {})
    with pytest.raises(OSError, match="No space left") as raised:
        run_cells(folder, [Cell("a", {}, 0)], _out_of_space, workers=2, threads=1, console=QUIET)
    assert raised.value.errno == errno.ENOSPC and str(raised.value.filename).endswith("x.safetensors")
    assert folder.result("a") is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seeds": 0}, ValueError, "seeds: expected an int >= 1, got 0"),
        ({"seeds": 1.5}, TypeError, "seeds: expected an int, got float 1.5"),
        ({"first_seed": -1}, ValueError, "first_seed: expected an int >= 0, got -1"),
        ({"workers": 0}, ValueError, "workers: expected an int >= 1, got 0"),
        ({"threads": 0}, ValueError, "threads: expected an int >= 1, got 0"),
    ],
)
def test_bad_numbers_of_an_experiment_are_named(
    change: dict[str, object], error: type, message: str, tmp_path: Path
) -> None:
    pytest.importorskip("sklearn")
    from adaptcomp_ext.experiments.digits import digits

    with pytest.raises(error, match=message):
        digits(None, tmp_path, quick=True, console=QUIET, **change)  # type: ignore[arg-type]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_page_passes_over_other_programs_configurations(results: Path) -> None:
    other = results / "model"
    other.mkdir()
    (other / "config.json").write_text('{"hidden_size": 3}')
    assert [run.experiment for run in find_runs([results])] == ["one", "two"]
    (other / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"model/config\.json: expected JSON"):
        find_runs([results])
