"""Child processes that import the package under test."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = ROOT / "tests"
"""The folder in which a child process starts: in the root it would import the sources instead of the
installed package."""


def run_python(*words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run Python in a child process."""
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=OUTSIDE)


def run_cases(cases: str, preamble: str = "") -> dict[str, str]:
    """Run lines "name: expression" in a child process, which a signal may end; return what each printed."""
    script = textwrap.dedent("""
        import sys, torch, warnings, adaptcomp_ext as ac
        from torch import nn
        warnings.simplefilter("ignore")
        def attempt(name, f):
            try:
                value = f()
            except (TypeError, ValueError, RuntimeError) as error:
                value = f"{type(error).__name__}: {error}"
            print(name, "->", value, flush=True)
    """)
    lines = [line.strip() for line in cases.strip().splitlines()]
    calls = [f"attempt({line.split(':', 1)[0]!r}, lambda: {line.split(':', 1)[1]})" for line in lines]
    done = run_python("-c", script + textwrap.dedent(preamble) + "\n".join(calls))
    said = dict(line.split(" -> ", 1) for line in done.stdout.splitlines() if " -> " in line)
    assert done.returncode == 0, (done.returncode, said, done.stderr[-2000:])
    assert len(said) == len(lines), done.stdout
    return said
