"""What the build refuses, by name, before it compiles anything; and the other builds that CI makes."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CMAKE = shutil.which("cmake")

MATRIX = ROOT / ".ci" / "matrix"

needs_checkout = pytest.mark.skipif(not MATRIX.is_file(), reason="needs a checkout")


@pytest.mark.skipif(
    CMAKE is None or not (ROOT / "CMakeLists.txt").is_file(), reason="needs cmake and the sources"
)
@pytest.mark.promise("systems")
@pytest.mark.parametrize(
    ("define", "sentence"),
    [
        (
            ["CMAKE_SYSTEM_NAME=Linux", "CMAKE_SYSTEM_PROCESSOR=riscv64"],
            "Linux on riscv64 is not supported yet",
        ),
        (
            ["CMAKE_SYSTEM_NAME=FreeBSD", "CMAKE_SYSTEM_PROCESSOR=x86_64"],
            "FreeBSD on x86_64 is not supported yet",
        ),
        (["ADAPTCOMP_CUDA=PERHAPS"], "ADAPTCOMP_CUDA=PERHAPS: expected AUTO, ON or OFF"),
        (
            ["ADAPTCOMP_CUDA=OFF", "ADAPTCOMP_OPENMP=PERHAPS"],
            "ADAPTCOMP_OPENMP=PERHAPS: expected AUTO, ON or OFF",
        ),
    ],
)
def test_what_cannot_be_built_is_named(tmp_path, define, sentence):
    import pybind11

    options = [f"-D{option}" for option in (*define, f"pybind11_DIR={pybind11.get_cmake_dir()}")]
    assert CMAKE is not None
    run = subprocess.run(
        [CMAKE, "-S", str(ROOT), "-B", str(tmp_path), *options], capture_output=True, text=True, timeout=120
    )
    assert run.returncode != 0
    assert sentence in " ".join(run.stderr.split())


@needs_checkout
@pytest.mark.parametrize(
    ("part", "missing"),
    [("clang", "clang++"), ("gcc-serial", "g++"), ("aarch64", "aarch64-linux-gnu-g++")],
)
def test_a_build_whose_tools_are_missing_is_skipped_in_a_sentence(tmp_path, part, missing):
    for tool in ("bash", "dirname", "mktemp", "rm"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    path = {"PATH": str(tmp_path)}
    run = subprocess.run([MATRIX, part], env=path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"skipped: {missing} is not installed\n"


@needs_checkout
def test_a_build_that_does_not_exist_is_refused_with_those_that_do():
    run = subprocess.run([MATRIX, "msvc"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert run.stderr.startswith("no part of the matrix: msvc; there are oldest newest")


@pytest.mark.promise("systems")
@needs_checkout
def test_the_oldest_versions_that_are_declared_are_those_that_are_built_and_named():
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    patterns = (r'requires-python = ">=([\d.]+)"', r'"torch>=([\d.]+)"')
    python, torch = (re.findall(pattern, declared)[0] for pattern in patterns)
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    assert f'python: "{python}", torch: torch=={torch} ' in workflow
    for page in ("README.md", "docs/install.md"):
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        assert f"Python ≥ {python}, PyTorch ≥ {torch}," in text
    assert f"Python {python}, torch {torch} |" in text
