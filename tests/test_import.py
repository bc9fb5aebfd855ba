"""What importing the package brings along, and what it says where nothing is compiled."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import adaptcomp_ext as ac
from tests.helpers.processes import OUTSIDE, ROOT

HEAVY = ("rich", "typer", "matplotlib", "pandas", "sklearn", "scipy", "safetensors", "gymnasium", "ray")


@pytest.mark.promise("light")
@pytest.mark.parametrize("names", [HEAVY, ("torch._dynamo", "torch._inductor")], ids=["extras", "compiler"])
def test_importing_brings_nothing_that_torch_alone_does_not(names):
    """Dynamo alone takes about as long to import as torch."""
    program = (
        "import sys, torch; before = set(sys.modules)\n"
        "import adaptcomp_ext\n"
        f"print(*(name for name in {names!r} if name in sys.modules and name not in before))"
    )
    child = subprocess.run(
        [sys.executable, "-c", program], cwd=OUTSIDE, capture_output=True, text=True, timeout=240, check=True
    )
    assert child.stdout.split() == []


@pytest.mark.promise("light")
def test_nothing_but_torch_and_numpy_is_installed_with_it():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    (needed,) = re.findall(r"^dependencies = \[(.*?)\]", text, re.M | re.S)
    assert sorted(re.findall(r'"([a-z]+)', needed)) == ["numpy", "torch"]


@pytest.fixture
def checkout(tmp_path):
    """Make a folder with uncompiled sources and a test, and say how a child finds the package under test."""
    for name in ("pyproject.toml", "tests/__init__.py", "tests/conftest.py", "tests/helpers"):
        if not (ROOT / name).exists():
            pytest.skip("needs the sources")
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (tmp_path / name).parent.mkdir(exist_ok=True)
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "adaptcomp_ext").mkdir()
    shutil.copy(Path(ac.__file__), tmp_path / "adaptcomp_ext")
    (tmp_path / "tests" / "test_it.py").write_text(
        "import adaptcomp_ext\n\n\ndef test_it():\n    print(adaptcomp_ext.build_info())\n"
    )
    return tmp_path, {**os.environ, "PYTHONPATH": str(Path(ac.__file__).parents[1])}


def test_a_checkout_that_is_not_compiled_says_what_to_do(checkout):
    folder, environment = checkout
    command = [sys.executable, "-c", "import adaptcomp_ext"]
    child = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert child.returncode == 1
    assert child.stderr.splitlines()[-1] == (
        f"ImportError: adaptcomp_ext in {folder / 'adaptcomp_ext'} has no module compiled for this Python: "
        "install the package with `pip install .`, and start Python outside the source folder, which hides "
        "the installed package."
    )
    assert child.stderr.count("Traceback") == 1


def test_pytest_as_a_module_in_a_checkout_tests_the_installed_package(checkout):
    folder, environment = checkout
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"]
    child = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert child.returncode == 0, child.stdout + child.stderr
    assert str(ac.build_info()["compiler"]) in child.stdout


def _import_with(instruction_set):
    """Import in a child process, with the environment variable; print the instruction set in use."""
    return subprocess.run(
        [sys.executable, "-c", "import adaptcomp_ext as ac; print(ac.build_info()['instruction_set'])"],
        cwd=OUTSIDE,
        env={**os.environ, "ADAPTCOMP_INSTRUCTION_SET": instruction_set},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_variable_chooses_the_instruction_set(instruction_set):
    child = _import_with(instruction_set)
    assert child.stdout.split() == [instruction_set], child.stderr


@pytest.mark.skipif(
    "ADAPTCOMP_INSTRUCTION_SET" in os.environ, reason="the widest instruction set is not known here"
)
def test_an_empty_variable_chooses_the_widest_instruction_set():
    child = _import_with("")
    assert child.stdout.split() == [ac.build_info()["instruction_set"]], child.stderr


@pytest.mark.parametrize("name", ["AVX2", "sse", "avx512 ", "avx1024"])
def test_another_instruction_set_is_refused(name):
    child = _import_with(name)
    assert child.returncode == 1
    assert re.fullmatch(
        r"ImportError: ADAPTCOMP_INSTRUCTION_SET: expected an instruction set that the kernels are compiled "
        rf"for and this machine has \(base(, avx2(, avx512)?)?\), got '{name}'",
        child.stderr.splitlines()[-1],
    ), child.stderr
