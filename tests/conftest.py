"""Fixtures for every test: the devices, poisoned allocations, the number of threads."""

from __future__ import annotations

import re
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

# `python -m pytest` puts the root first in the search path, where sources without a compiled module would
# hide the installed package.
ROOT = Path(__file__).resolve().parents[1]
if not any((ROOT / "adaptcomp_ext" / f"_C{ending}").exists() for ending in EXTENSION_SUFFIXES):
    sys.path[:] = [*(entry for entry in sys.path if Path(entry).resolve() != ROOT), str(ROOT)]

pytest.register_assert_rewrite("tests.helpers")

import adaptcomp_ext as ac
from adaptcomp_ext import _C
from tests.helpers import covering, science

# The tensors are small: on a busy machine a second thread waits for its turn longer than it works. Tests of
# threads ask for them.
torch.set_num_threads(1)

GUARD = 256  # bytes on either side of a poisoned allocation
GUARD_BYTE = 0xA5


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "run the tests of the science over all their seeds, and grids of parameters in all their cases"
    parser.addoption("--full", action="store_true", help=help)


def pytest_configure(config: pytest.Config) -> None:
    science.set_full(config.getoption("--full"))
    # `pytest -n 2` deals the tests out in halves. A process that has finished its own takes over tests of the
    # other.
    if getattr(config.option, "dist", None) == "load":
        config.option.dist = "worksteal"


def long_ones_apart(items: list[pytest.Item]) -> list[pytest.Item]:
    """Let the second half begin with the experiments, as the first does with the emulated kernels.

    These two take as long as all others together. Tests that share networks stay on one process, and what the
    processes take from each other at the end is short.
    """
    experiments = [item for item in items if item.path.parent.name == "experiments"]
    others = [item for item in items if item.path.parent.name != "experiments"]
    half = len(items) // 2
    return [*others[:half], *experiments, *others[half:]]


@pytest.hookimpl(trylast=True)  # after the choice of -k and -m, of which all pairs remain
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out most cases of large grids. A name that differs from process to process stops pytest-xdist."""
    if not science.full():
        items[:], left_out = covering.split(items)
        if left_out:
            config.hook.pytest_deselected(items=left_out)
    unstable = sorted({item.nodeid for item in items if re.search(r" at 0x|tensor\(", item.nodeid)})
    if unstable:
        raise pytest.UsageError(f"give these parameters names of their own (ids=...): {unstable[:3]}")
    items[:] = long_ones_apart(items)


def missing_cuda() -> str | None:
    if not ac.build_info()["cuda"]:
        return "adaptcomp_ext was built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Run a test on each device; CUDA is skipped where it cannot run."""
    if request.param == "cuda" and (reason := missing_cuda()):
        pytest.skip(reason)
    return request.param


class Poison:
    """Fills allocations of the ops with NaN or improbable numbers, and checks the bytes around them."""

    def __init__(self, empty) -> None:
        self._empty = empty
        self._buffers: list[torch.Tensor] = []

    def replace(self, fresh: torch.Tensor) -> torch.Tensor:
        size = fresh.numel() * fresh.element_size()
        buffer = self._empty((2 * GUARD + size,), dtype=torch.uint8, device=fresh.device)
        buffer.fill_(GUARD_BYTE)
        self._buffers.append(buffer)
        body = buffer[GUARD : GUARD + size].view(fresh.dtype).view(fresh.shape)
        if fresh.dtype.is_floating_point or fresh.dtype.is_complex:
            return body.fill_(float("nan"))
        return body.fill_(1 if fresh.dtype == torch.bool else 101)

    def check(self) -> None:
        """Require that something was allocated, and that nothing was written outside of it."""
        assert self._buffers, "no allocation was seen: is the poison still where the ops allocate?"
        for buffer in self._buffers:
            assert bool((buffer[:GUARD] == GUARD_BYTE).all()), "written before the beginning of an output"
            assert bool((buffer[-GUARD:] == GUARD_BYTE).all()), "written past the end of an output"


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Poison:
    """From here on every allocation of the ops is poisoned and guarded."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty
    poison = Poison(empty)
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison.replace(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison.replace(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison.replace(new_empty(*a, **k)))
    return poison


@pytest.fixture(params=["small", "large"])
def block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compact small blocks as large ones: training compacts them differently, and tests have small ones."""
    if request.param == "large":
        monkeypatch.setattr("adaptcomp_ext.nn.halting.fused.SMALL", 0)


@pytest.fixture(params=["base", "avx2", "avx512"])
def instruction_set(request):
    """Run with each instruction set of the machine."""
    before = ac.build_info()["instruction_set"]
    try:
        _C.use_isa(request.param)
    except ValueError as reason:
        pytest.skip(str(reason))
    yield request.param
    _C.use_isa(before)


@pytest.fixture
def threads():
    """Return a function that sets the number of threads, which is restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
