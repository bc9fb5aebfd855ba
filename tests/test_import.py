"""What importing the package brings along."""

import subprocess
import sys

import pytest

from tests.helpers.processes import OUTSIDE

HEAVY = ("rich", "typer", "matplotlib", "pandas", "sklearn", "scipy", "safetensors", "gymnasium", "ray")


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
