"""What importing the package brings along."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import OUTSIDE

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
