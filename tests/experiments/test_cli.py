from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import adaptcomp_ext as ac
from adaptcomp_ext.experiments import cli
from tests.helpers.processes import OUTSIDE, run_python

EXTRAS = ("matplotlib", "rich", "sklearn", "typer")


def run(*words: str) -> int:
    try:
        cli.main(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def without(gone: tuple[str, ...], *commands: tuple[str, ...]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each command where the packages `gone` are not installed."""
    script = (
        "import contextlib, io, json, sys\n"
        "gone, commands = json.loads(sys.argv[1])\n"
        "sys.modules.update(dict.fromkeys(gone))\n"
        "from adaptcomp_ext.experiments import cli\n"
        "for words in commands:\n"
        "    out, err, code = io.StringIO(), io.StringIO(), 0\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):\n"
        "        try:\n"
        "            cli.main(words)\n"
        "        except SystemExit as stop:\n"
        "            code = stop.code\n"
        "    print(json.dumps([code, out.getvalue(), err.getvalue()]))\n"
    )
    given = json.dumps([gone, commands])
    done = run_python("-c", script, given)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture
def extras() -> None:
    for extra in EXTRAS:
        pytest.importorskip(extra)


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info") == 0
    printed = capsys.readouterr().out
    assert ac.__version__ in printed
    for name, value in ac.build_info().items():
        assert name.replace("_", " ") in printed
        if isinstance(value, str):
            assert value in printed


def test_without_extras() -> None:
    info, *others = without(EXTRAS, ("info",), ("demo",), ("bench", "halting"), ("bench", "energy"), ())
    assert info[0] == 0
    assert ac.__version__ in info[1]
    for code, out, err in others:
        assert (code, out) == (1, "")
        assert 'pip install "adaptcomp_ext[demo]"' in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("gone", ["matplotlib", "sklearn"])
def test_without_one_extra(extras: None, gone: str, tmp_path: Path) -> None:
    ((code, _, err),) = without((gone,), ("demo", "--out", str(tmp_path)))
    assert code == 1
    assert f"needs {gone}; install the extras with" in err


@pytest.mark.parametrize(
    ("gone", "experiments", "install"),
    [
        (("gymnasium",), ("maze",), "demo,maze"),
        (("dm_control",), ("control", "horizon", "transfer"), "demo,control"),
        (("dm_control", "gymnasium"), ("control",), "demo,control"),
    ],
)
def test_without_what_an_experiment_needs(
    extras: None, gone: tuple[str, ...], experiments: tuple[str, ...], install: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    answers = without(gone, *(("run", name, "--quick", "--out", str(out)) for name in experiments))
    assert len(answers) == len(experiments)
    for code, _, err in answers:
        assert code == 1
        assert err.endswith(
            f'needs {gone[0]}; install the extras with: pip install "adaptcomp_ext[{install}]"\n'
        )
    assert not out.exists()


def test_experiments_are_listed_without_what_some_of_them_need(extras: None) -> None:
    simulators = ("dm_control", "gymnasium", "mujoco")
    ((code, out, err),) = without(simulators, ("run", "--help"))
    assert (code, err) == (0, "")
    for name, told in (("digits", "Decide when to stop"), ("control", "Learn to control"), ("maze", "mazes")):
        assert name in out and told in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("run", "digitz"), "unknown experiment 'digitz'; expected one of digits, "),
        (("run", "digits", "--seedz", "3"), "No such option: --seedz. Options: --data, "),
        (("bench", "halt"), "unknown benchmark 'halt'; expected one of halting, "),
    ],
)
def test_what_is_unknown_is_told_with_what_is_known(
    extras: None, words: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 2
    err = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert expected in err and "Possible options" not in err  # typer's, which repeats some of them


def test_an_option_without_its_value_is_not_called_unknown(
    extras: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("run", "digits", "--seeds") == 2
    err = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "Option '--seeds' requires an argument." in err and "Options:" not in err


def test_the_help_of_an_experiment_says_that_it_resumes(
    extras: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("run", "--help") == 0
    assert capsys.readouterr().out.count("interrupted") == 1  # once for all experiments
    assert run("run", "digits", "--help") == 0
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["control", "horizon"])
def test_an_unknown_task_lists_the_known_ones(
    extras: None, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("dm_control")
    assert run("run", command, "--task", "walker-swim", "--out", str(tmp_path / "out")) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "cheetah-run" in err and "walker-run" in err and "walker-swim" in err
    assert not (tmp_path / "out").exists()


def test_bench_planning(extras: None, tmp_path: Path) -> None:
    assert run("bench", "planning", "--rows", "6", "--seconds", "0.1", "--out", str(tmp_path)) == 0
    report = json.loads((tmp_path / "bench_planning.json").read_text())
    for found in report["rows"]:
        assert 0.3 < found["each its own / limit"] < 3 and found["all to the end / each its own"] > 1
    assert "each its own" in (tmp_path / "bench_planning.md").read_text()


def test_other_missing_modules_are_not_hidden(extras: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**kwargs: Any) -> None:
        raise ModuleNotFoundError("No module named 'elsewhere'", name="elsewhere")

    monkeypatch.setattr("adaptcomp_ext.experiments.bench.bench_halting", broken)
    with pytest.raises(ModuleNotFoundError, match="elsewhere"):
        cli.main(["bench", "halting"])


def test_help(extras: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("demo", "bench", "info"))


def test_module_form() -> None:
    done = run_python("-m", "adaptcomp_ext.experiments.cli", "info")
    assert done.returncode == 0, done.stderr
    assert ac.__version__ in done.stdout


def test_demo(extras: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adaptcomp_ext.experiments.demo import demo

    cells: list[Any] = []

    def measure(cell: Any, folder: Path, tick: Any) -> None:
        cells.append(cell)
        raise ValueError("enough")

    monkeypatch.setattr(demo, "measure", measure)
    out = tmp_path / "a" / "b"
    assert run("demo", "--out", str(out), "--seed", "3", "--threads", "1", "--epochs", "2") == 2
    assert out.is_dir()
    assert [(cell.seed, cell.options["recipe"]["epochs"]) for cell in cells] == [(3, 2)]
    config = json.loads((out / "config.json").read_text())["config"]
    assert config["data"] == "scikit-learn digits (embedded, not MNIST)"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--epochs", "0"), "--epochs"),
        (("--threads", "0"), "--threads"),
        (("--seed", "-1"), "--seed"),
        (("--data", "no-such-folder"), "no-such-folder: expected a folder with the four MNIST files"),
        (("--data", "."), "missing train-images-idx3-ubyte, "),
        (("--out", "taken"), "taken"),
    ],
)
def test_demo_bad_input(
    extras: None,
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("a file")
    assert run("demo", *words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_bench(extras: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        "adaptcomp_ext.experiments.bench.bench_halting", lambda **options: given.update(options)
    )
    assert run("bench", "halting", "--quick", "--out", str(tmp_path), "--cores", "gru", "--no-compiled") == 0
    assert given["quick"] is True
    assert given["compiled"] is False
    assert (given["out"], given["cores"], given["device"]) == (str(tmp_path), "gru", "cpu")


def test_bench_energy(extras: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        "adaptcomp_ext.experiments.bench.bench_energy", lambda **options: given.update(options)
    )
    assert (
        run(
            "bench",
            "energy",
            "--quick",
            "--out",
            str(tmp_path),
            "--seconds",
            "2",
            "--no-compiled",
            "--no-memory",
        )
        == 0
    )
    assert (given["quick"], given["compiled"], given["memory"], given["seconds"]) == (True, False, False, 2.0)
    assert (given["out"], given["device"], given["seed"]) == (str(tmp_path), "cpu", 0)


def test_bench_bad_input(extras: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "halting", "--cores", "lstm", "--out", str(tmp_path)) == 2
    assert "cores: expected names out of" in capsys.readouterr().err
    assert run("bench", "nothing") == 2


@pytest.mark.parametrize("words", [("--version",), ("info",)])
def test_version(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 0
    printed = capsys.readouterr().out
    assert (ac.__version__ in printed and "adaptcomp" in printed.lower()) or words == ("info",)


def test_version_without_extras() -> None:
    ((code, out, err),) = without(EXTRAS, ("--version",))
    assert (code, out, err) == (0, f"adaptcomp_ext {ac.__version__}\n", "")


RESUMED = "the same command goes on where this run ended"


@pytest.mark.parametrize(
    ("words", "end"),
    [
        (("run", "digits", "--quick"), RESUMED),
        (("run", "stroop", "--quick"), RESUMED),
        (("run", "sudoku", "--quick"), RESUMED),
        (("demo",), RESUMED),
    ],
)
def test_a_full_disk_is_one_sentence(
    extras: None,
    words: tuple[str, ...],
    end: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(path: Path, *arguments: Any, **options: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    assert run(*words, "--out", str(tmp_path / "out")) == 2
    err = capsys.readouterr().err
    assert (
        err.startswith("adaptcomp: the disk is full: ")
        and "could not be written; free some space, then" in err
    )
    assert end in err and "Traceback" not in err and err.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("words", "begun", "end"),
    [
        (("run", "digits", "--quick", "--epochs", "1"), "cells/*/*.safetensors", RESUMED),
        (
            ("run", "digits", "--quick", "--epochs", "1", "--workers", "2", "--seeds", "2"),
            "cells/*/*.safetensors",
            RESUMED,
        ),
        (("run", "sudoku"), "cells", RESUMED),
    ],
)
def test_an_interrupted_run_is_one_sentence(
    extras: None, words: tuple[str, ...], begun: str, end: str, tmp_path: Path
) -> None:
    # A background process may have been started with the signal ignored.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from adaptcomp_ext.experiments.cli import main; main()"
    )
    command = [sys.executable, "-c", program, *words, "--out", str(tmp_path / "out")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(command, **pipes, start_new_session=True, cwd=OUTSIDE)
    try:
        deadline = time.monotonic() + 120
        while not any(tmp_path.glob(f"out/{begun}")) and time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.1)
        time.sleep(0.0 if begun else 2.0)
        os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to all of its processes
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130 and "Traceback" not in err
    assert [line for line in err.splitlines() if line.startswith("adaptcomp:")] == err.splitlines()[-1:]
    assert err.splitlines()[-1].startswith("adaptcomp: interrupted; ") and end in err
    assert not list(tmp_path.rglob("*.part"))
