"""The suite's own tests, on the CUDA kernels compiled for the host: a selection that touches every family, in every order.

Each runs in a child, whose package is imported with the emulated module. ``python tests/cuda_host/run.py tests`` runs them all.
"""

from __future__ import annotations

import subprocess

import pytest
from run import ROOT, environment, pytest_command

OPS = ["act", "confidence", "pondernet", "route"]

# name: settings of the emulator, arguments of pytest
SELECTIONS = {
    "ops": ({"order": "random"}, [*(f"tests/ops/test_{name}.py" for name in OPS), "-k", "not cuda"]),
    "masked classes": (
        {"order": "random"},
        [
            "tests/nn/test_masked_logits.py",
            "tests/ops/test_halting.py",
            "-k",
            "not cuda and (as_good or masked_like or minus_infinity)",
        ],
    ),
    "whole descents": ({"order": "together"}, ["tests/nn/test_closed_forms.py"]),
    "late counts": ({"order": "up"}, ["tests/nn/test_lag.py", "-k", "not cuda"]),
    "halting loop": ({"order": "down", "late": 1}, ["tests/nn/test_random_programs.py", "-k", "not cuda"]),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_the_cuda_kernels_pass_the_tests_of_the_suite(name, emulated_module):
    settings, arguments = SELECTIONS[name]
    done = subprocess.run(
        pytest_command(["-q", "--tb=short", *arguments]),
        env=environment(emulated_module, settings),
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
