"""One set of codes for what has become of a row: in C++, in Python and in the reference."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import adaptcomp_ext as ac
from adaptcomp_ext import _C
from adaptcomp_ext.ops import halting
from adaptcomp_ext.reference import halting as reference

SOURCES = Path(__file__).parents[2] / "csrc"
BOTH_LOOPS = """
#include "descent/rows.h"
#include "halting/rows.h"
using namespace adaptcomp;
static_assert(std::is_same_v<decltype(outcome(true, true, 1, 1, 1)), decltype(Verdict::status)>);
"""


@pytest.mark.promise("status")
def test_the_codes_are_those_of_the_compiled_module():
    assert {status.name: int(status) for status in ac.Status} == {
        name: code for name, code in _C.STATUS.items() if code > 0
    }
    assert {name: code for name, code in _C.STATUS.items() if code <= 0} == {"PADDING": -1, "RUNNING": 0}
    for name in ("PADDING", "RUNNING", "HALTED", "MAX_STEPS", "NONFINITE"):
        assert getattr(reference, name) == _C.STATUS[name]
    assert _C.STATUS["RUNNING"] == halting.RUNNING


def test_both_loops_can_be_included_in_one_file():
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None or not SOURCES.is_dir():
        pytest.skip("no C++ compiler, or no sources")
    command = [compiler, "-std=c++17", "-Wall", "-Werror", "-fsyntax-only", f"-I{SOURCES}", "-xc++", "-"]
    done = subprocess.run(command, input=BOTH_LOOPS, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
