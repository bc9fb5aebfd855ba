"""Cells on Ray: the bits of a local run, and runs whose workers, cluster or driver are killed."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

for extra in ("rich", "typer", "safetensors"):
    pytest.importorskip(extra)
from rich.console import Console

import adaptcomp_ext as ac
from adaptcomp_ext.experiments import cli
from adaptcomp_ext.experiments.files import owned
from adaptcomp_ext.experiments.runs import Cell, Checkpoint, RunFolder, cluster, fit, run_cells
from tests.helpers.processes import ROOT

QUIET = Console(quiet=True)


# --- what runs there ----------------------------------------------------------------------------------------
def train(cell: Cell, folder: Path, tick) -> dict:
    """Train with dropout; the first time, be killed after the third epoch if the options say so."""
    torch.manual_seed(cell.seed)
    x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))

    def loss(index: Tensor, done: float) -> tuple[Tensor, dict[str, Tensor]]:
        return F.cross_entropy(net(x[index]), y[index]), {}

    def after(epoch: int) -> dict[str, float]:
        with (folder / "epochs.txt").open("a") as file:
            file.write(f"{epoch} ")
        if epoch == 2 and cell.options.get("kill") and not (folder / "killed").exists():
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {}

    history = fit(
        net,
        loss,
        torch.optim.AdamW(net.parameters(), 0.01),
        rows=64,
        batch=16,
        epochs=5,
        seed=cell.seed,
        checkpoint=Checkpoint(folder / "checkpoint.safetensors"),
        tick=lambda done: tick("training", done),
        after=after,
    )
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    return {"weights": weights.tolist(), "loss": [entry["loss"] for entry in history]}


def train_or_stay(cell: Cell, folder: Path, tick) -> dict:
    """Train; a cell whose options say so goes on until somebody allows it to end."""
    result = train(cell, folder, tick)
    while cell.options.get("stay") and not (folder / "leave").exists():
        tick("staying", 0.9)
        (folder / "alive.txt").write_text(f"{os.getpid()} {time.monotonic()}")
        time.sleep(0.05)
    return result


def train_or_fail(cell: Cell, folder: Path, tick) -> dict:
    if cell.options.get("fail"):
        raise FileNotFoundError(2, "No such file or directory", "data.idx")
    return train(cell, folder, tick)


def die(cell: Cell, folder: Path, tick) -> dict:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def cells(**options: Any) -> list[Cell]:
    return [Cell(f"c-{seed}", options if seed == 1 else {}, seed) for seed in (0, 1)]


def bits(results: dict[str, dict]) -> dict[str, dict]:
    return {name: {k: v for k, v in r.items() if k != "seconds"} for name, r in results.items()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = RunFolder.open(tmp_path_factory.mktemp("local"), "test", {})
    return bits(run_cells(folder, cells(), train, workers=1, threads=1, console=QUIET))


# --- a cluster of this machine ------------------------------------------------------------------------------
def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


@pytest.fixture(autouse=True)
def on_demand(request: pytest.FixtureRequest) -> None:
    """Starting Ray takes long, and half a gigabyte: those tests run with ``--full``."""
    if request.node.get_closest_marker("slow") and not request.config.getoption("--full"):
        pytest.skip("starts Ray, which --full asks for")


@pytest.fixture(scope="module", autouse=True)
def token() -> Iterator[None]:
    """A password for the clusters of these tests, which Ray opens to the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_AUTH_MODE", raising=False)
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        yield


@pytest.fixture(scope="module")
def head(token: None, request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """The addresses of a cluster with two cores: for a machine of it, and for a client from outside."""
    if not request.config.getoption("--full"):  # a fixture of a module comes before `on_demand`
        pytest.skip("starts Ray, which --full asks for")
    pytest.importorskip("ray", reason="the extra cluster is not installed")
    pytest.importorskip("grpc", reason="the extra cluster is not installed")
    port, client = free_port(), free_port()
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # a short path: sockets are in it
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
    command += ["--disable-usage-stats", "--include-dashboard=false", "--object-store-memory=80000000"]
    command += [f"--port={port}", f"--ray-client-server-port={client}", f"--temp-dir={folder}"]
    # The package that these tests import, installed or not, and then the tests, which the workers import too.
    path = os.pathsep.join((str(Path(ac.__file__).parents[1]), str(ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, "RAY_AUTH_MODE": "token"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    # Not in the checkout: the server of ray:// is `python -m ...`, which finds modules there first.
    process = subprocess.Popen(command, env=environment, cwd=folder, **quiet)
    try:
        for place in (port, client):
            await_that(lambda place=place: answers(place), process)
        yield f"127.0.0.1:{port}", f"ray://127.0.0.1:{client}"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def await_that(condition, process: subprocess.Popen | None = None, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.05)


def stops(sign: Path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        before = sign.read_text()
        time.sleep(0.5)
        if sign.read_text() == before:
            return
    raise AssertionError("the cell is still being worked on")


@pytest.mark.slow
def test_a_killed_worker_runs_again_with_the_bits_of_a_local_run(
    head: tuple[str, str], tmp_path: Path, expected: dict
) -> None:
    folder = RunFolder.open(tmp_path, "test", {})
    console = Console(file=(tmp_path / "said.txt").open("w"), force_terminal=False)
    found = run_cells(folder, cells(kill=True), train, workers=2, threads=1, console=console, cluster=head[0])
    assert bits(found) == expected
    assert (folder.cell("c-1") / "killed").exists()
    assert (folder.cell("c-1") / "epochs.txt").read_text() == "0 1 2 2 3 4 "  # from its checkpoint on
    console.file.close()
    assert "c-1: its worker was lost" in (tmp_path / "said.txt").read_text()


@pytest.mark.slow
def test_what_a_cell_raises_is_raised_here_and_not_tried_again(
    head: tuple[str, str], tmp_path: Path, expected: dict
) -> None:
    folder = RunFolder.open(tmp_path, "test", {})
    options: dict[str, Any] = {"workers": 2, "threads": 1, "console": QUIET, "cluster": head[1]}
    with pytest.raises(FileNotFoundError, match="No such file") as raised:
        run_cells(folder, cells(fail=True), train_or_fail, **options)
    assert raised.value.filename == "data.idx" and "train_or_fail" in str(raised.value.__cause__)
    assert bits({"c-0": folder.result("c-0") or {}})["c-0"] == expected["c-0"]  # it ran to its end
    assert folder.result("c-1") is None
    assert not (folder.cells / ".owner.json").exists()


@pytest.mark.slow
def test_a_worker_that_always_dies_ends_the_run(head: tuple[str, str], tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path, "test", {})
    with pytest.raises(ChildProcessError, match="c-0: its worker was lost 3 times"):
        run_cells(folder, cells()[:1], die, workers=1, threads=1, console=QUIET, cluster=head[0])


@pytest.mark.slow
def test_unsuitable_machines_are_named(head: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "ask.py").write_text(
        f"""
import sys; sys.path.append({str(ROOT)!r})
import os; os.environ["RAY_AUTH_MODE"] = "token"
import ray
from pathlib import Path
from adaptcomp_ext.experiments.runs import cluster_driver as driver
from tests.experiments.test_cluster import train
from adaptcomp_ext.experiments.files import owned
driver._join(ray, {head[0]!r}, 2)
with owned(Path("cells")) as token:
    job = driver.Job.here(Path("cells"), token, train, 1)
    def nowhere(): pass
    nowhere.__module__ = "not_there"
    for other in (job, job._replace(token="another"), job._replace(cells=Path("/not/there")),
                  job._replace(versions={{**job.versions, "torch": "1.0"}}), job._replace(worker=nowhere),
                  job._replace(threads=3)):
        try:
            driver._check_machines(ray, other)
            print("suitable")
        except ValueError as error:
            print(error)
"""
    )
    done = subprocess.run(
        [sys.executable, "ask.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    said = done.stdout.splitlines()
    assert len(said) == 6, done.stderr
    assert said[0] == "suitable"
    for line in said[1:3]:
        assert "expected a folder on a file system that all machines of the cluster share" in line
    assert "/not/there" in said[2]
    assert "torch 1.0 on" in said[3] and f"torch {torch.__version__}" in said[3].split("got")[1]
    assert "No module named 'not_there'" in said[4]
    assert said[5].startswith("threads: expected at most 2") and said[5].endswith("got 3")


@pytest.mark.slow
def test_a_cluster_that_goes_away_leaves_a_folder_that_resumes(
    tmp_path: Path, expected: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="the extra cluster is not installed")
    if not Path("/proc").is_dir():
        pytest.skip("finds Ray's head in /proc")
    monkeypatch.setattr(cluster, "SILENCE", 6.0)
    folder = RunFolder.open(tmp_path, "test", {})
    sign = folder.cell("c-1") / "alive.txt"

    def kill_head() -> None:
        await_that(lambda: sign.is_file() and folder.result("c-0") is not None)
        (driver,) = {process.pid for process in multiprocessing.active_children()} - before
        heads = [pid for pid in children(driver) if "gcs_server" in Path(f"/proc/{pid}/cmdline").read_text()]
        os.kill(heads[0], signal.SIGKILL)

    before = {process.pid for process in multiprocessing.active_children()}
    killer = threading.Thread(target=kill_head)
    killer.start()
    with pytest.raises(
        ConnectionError, match="the Ray of this machine went away; what is done is kept in"
    ) as e:
        run_cells(
            folder, cells(stay=True), train_or_stay, workers=2, threads=1, console=QUIET, cluster="local"
        )
    killer.join()
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)
    stops(sign)
    (folder.cell("c-1") / "leave").touch()
    assert folder.result("c-1") is None
    again = run_cells(folder, cells(stay=True), train_or_stay, workers=1, threads=1, console=QUIET)
    assert bits(again) == expected


def children(pid: int) -> list[int]:
    result = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if stat.read_text().rpartition(")")[2].split()[1] == str(pid):
                result.append(int(stat.parent.name))
        except (OSError, IndexError):  # it has just ended
            continue
    return result


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_no_worker_goes_on_without_its_run(
    head: tuple[str, str], tmp_path: Path, how: signal.Signals
) -> None:
    (tmp_path / "run.py").write_text(
        f"""
import sys; sys.path.append({str(ROOT)!r})
from pathlib import Path
from adaptcomp_ext.experiments.app import guarded
from tests.experiments.test_cluster import *
@guarded("the same command goes on")
def command():
    folder = RunFolder.open(Path("out"), "test", {{}})
    options = dict(workers=1, threads=1, console=QUIET, cluster={head[1]!r})
    run_cells(folder, cells(stay=True)[1:], train_or_stay, **options)
if __name__ == "__main__":
    try:
        command()
    except BaseException as error:
        sys.exit(error.exit_code)
"""
    )
    run = subprocess.Popen(
        [sys.executable, "run.py"], cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    sign = tmp_path / "out" / "cells" / "c-1" / "alive.txt"
    await_that(sign.is_file, run)
    run.send_signal(how)
    _, err = run.communicate(timeout=30)
    if how == signal.SIGINT:
        assert run.returncode == 130 and err.strip() == "adaptcomp: interrupted; the same command goes on"
    stops(sign)
    with owned(tmp_path / "out" / "cells"):  # nobody's any more
        pass


# --- without a cluster --------------------------------------------------------------------------------------
def test_an_address_where_nothing_answers_is_refused_at_once(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra cluster is not installed")
    folder = RunFolder.open(tmp_path, "test", {})
    address = f"127.0.0.1:{free_port()}"
    begin = time.monotonic()
    with pytest.raises(ConnectionError, match=f"cluster: nothing answers at {address}"):
        run_cells(folder, cells(), train, workers=1, threads=1, console=QUIET, cluster=address)
    assert time.monotonic() - begin < 20


def test_an_address_where_something_else_answers_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="the extra cluster is not installed")
    monkeypatch.setattr(cluster, "START", 3.0)
    monkeypatch.setattr(cluster, "GRACE", 0.1)
    folder = RunFolder.open(tmp_path, "test", {})
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"{address} did not answer within 3 seconds"):
            run_cells(folder, cells(), train, workers=1, threads=1, console=QUIET, cluster=address)


@pytest.mark.parametrize(
    "address", ["", "here", "http://host:80", "host:", "host:99999", "ray://host", "a b:1"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"cluster: expected local, auto, ray://HOST:PORT or HOST:PORT, got"):
        cluster.check_cluster(address)


def test_an_address_is_a_string() -> None:
    with pytest.raises(TypeError, match="cluster: expected a str or None, got int 3"):
        cluster.check_cluster(3)  # type: ignore[arg-type]


def test_without_ray_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"expected ray, .*adaptcomp_ext\[cluster\]"):
        cluster.check_cluster("local")
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "digits", "--cluster", "local", "--out", str(tmp_path / "out")])
    assert ended.value.code == 1
    assert 'pip install "adaptcomp_ext[cluster]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
