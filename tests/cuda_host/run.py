"""Run tests of the suite on the CUDA kernels, compiled for the host. Start it in the root of the checkout.

    python -m tests.cuda_host.run [--order random --seed 3 --late 2 ...] [--sanitize address] [arguments of
    pytest]

The first run builds the module (a minute on one core). CPU tensors then go every way that CUDA tensors go.
For example::

    python -m tests.cuda_host.run tests/ops/test_act.py -q
    python -m tests.cuda_host.run --order random --seed 7 tests/nn/test_row_independence.py -q -k act
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from tests.cuda_host.host_build import ROOT, Build, compiler, unavailable

ORDERS = ("up", "down", "together", "random")
NUMBERS = ("seed", "multiprocessors", "resident_blocks", "shared_memory", "late")


def environment(module: Path, settings: Mapping[str, object], sanitize: str | None = None) -> dict[str, str]:
    """Return the environment in which a child imports the package with the emulated module."""
    extra = {}
    if (
        sanitize == "address"
    ):  # which has to come before everything that allocates; Python's own leaks are not ours
        extra = {"LD_PRELOAD": sanitizer_library(), "ASAN_OPTIONS": "detect_leaks=0"}
    paths = list(filter(None, [os.environ.get("PYTHONPATH")]))
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    if PathFinder.find_spec("adaptcomp_ext", elsewhere) is None:
        paths.append(str(ROOT))  # not installed: what the tests themselves start finds the sources
    return {
        **os.environ,
        "ADAPTCOMP_EMULATED": str(module),
        "ADAPTCOMP_EMULATION": " ".join(f"{k}={v}" for k, v in settings.items()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        **extra,
    }


def sanitizer_library() -> str:
    """Return AddressSanitizer's library, of the compiler that instruments the kernels."""
    command = [compiler() or "c++", "-print-file-name=libasan.so"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def pytest_command(arguments: Sequence[str]) -> list[str]:
    """Return a pytest command for the root: the child imports the sources, with the emulated module."""
    return [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.cuda_host.host_plugin",
        "-p",
        "no:cacheprovider",
        *arguments,
    ]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--order", choices=ORDERS, help="in which order the threads run between two meetings")
    for name in NUMBERS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--sanitize", choices=["address"])
    options, rest = parser.parse_known_args(arguments)
    if reason := unavailable():
        print(f"the kernels cannot be compiled for the host: {reason}", file=sys.stderr)
        return 2
    module = Build(sanitize=options.sanitize).module()
    settings = {k: v for k in ("order", *NUMBERS) if (v := getattr(options, k)) is not None}
    return subprocess.run(
        pytest_command(rest), env=environment(module, settings, options.sanitize), cwd=ROOT
    ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
