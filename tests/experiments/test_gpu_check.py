"""What is meant for a machine with a GPU, as far as one without can run it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from adaptcomp_ext.experiments.bench import gpu
from adaptcomp_ext.experiments.bench.harness import DisagreementError
from tests.helpers.processes import run_python

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "gpu_check.sh"
PARTS = ["build", "prebuilt", "tests", "sanitize", "bench", "all"]

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs the repository, not only its tests")


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )


def stub(folder: Path, says: str) -> str:
    """A Python that prints, for whatever it is asked to do, and fails where `says` is empty."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{'echo ' + says if says else 'exit 3'}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("words", [(), ("tests",), ("everything", "out")])
def test_it_says_how_it_is_used(words: tuple[str, ...], tmp_path: Path) -> None:
    done = run(*words[:1], *(str(tmp_path / word) for word in words[1:]))
    assert done.returncode == 2
    assert all(f"gpu_check.sh {part} " in done.stderr for part in PARTS)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_gets_no_package_says_so_and_fails(part: str, tmp_path: Path) -> None:
    out, wheels = tmp_path / "out", tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "adaptcomp_ext-0-cp0-cp0-any.whl").touch()
    done = run(part, str(out), PYTHON=stub(tmp_path, ""), SITE=str(tmp_path / "site"), WHEEL_DIR=str(wheels))
    assert done.returncode == 1
    assert "FAILED" in (out / "summary.txt").read_text()
    assert len(list(out.iterdir())) <= 8


@pytest.mark.parametrize("part", ["tests", "bench", "all"])
def test_a_machine_without_a_device_fails(part: str, tmp_path: Path) -> None:
    (tmp_path / "site" / "adaptcomp_ext").mkdir(parents=True)
    out = tmp_path / "out"
    done = run(part, str(out), "--quick", PYTHON=stub(tmp_path, '""'), SITE=str(tmp_path / "site"))
    assert done.returncode == 1
    assert "FAILED  no CUDA device" in (out / "summary.txt").read_text()
    assert len(list(out.iterdir())) <= 8


def test_the_first_look_checks_before_it_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "REQUIRED", {(64, 16): 1e9})
    gpu.run(torch.device("cpu"), tmp_path / "bench.json", 0.0, small=True)
    record = json.loads((tmp_path / "bench.json").read_text())
    sections = [row["what"].split(",")[0] for row in record["rows"]]
    # What matters most comes first.
    whole = ["whole descent"] * 3 + ["whole recurrence"] * 2
    assert sections == ["bandwidth"] * 6 + whole + ["halting"] * 2
    assert len(record["short"]) == 2 and all("not 1e+09" in line for line in record["short"])
    assert all(time > 0 for row in record["rows"] for time in row["ms"].values())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(sections)
    assert all(" = " in line for line in lines[1:])  # which is what gpu_check.sh puts into its summary
    with pytest.raises(DisagreementError, match="it: the descent differs from the loop form"):
        gpu.agree({"loop": torch.ones(3), "it": torch.ones(3) * 1.1}, "the descent")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_the_first_look_needs_none_of_the_extras_and_names_a_missing_device() -> None:
    gone = ["rich", "typer", "matplotlib", "sklearn", "scipy", "pandas"]
    code = f"import sys, runpy; sys.modules.update(dict.fromkeys({gone})); sys.argv = ['bench_gpu']; "
    code += f"runpy.run_path({str(BENCHMARKS / 'bench_gpu.py')!r}, run_name='__main__')"
    done = run_python("-c", code, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("bench_gpu: device: expected cpu, since torch finds no GPU here, got")
