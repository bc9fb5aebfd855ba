"""A selection of the tests, on the CUDA kernels compiled for the host: every family, in several orders.

Each part runs in a child, whose package is imported with the emulated module. The whole suite, on demand::

    python -m tests.cuda_host.run tests/ops tests/nn -q
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import pytest

from tests.cuda_host.host_build import Build, unavailable
from tests.cuda_host.mutations import MUTATIONS, apply, caught
from tests.cuda_host.run import ROOT, environment, pytest_command


class Part(NamedTuple):
    """Settings of the emulator; files, and which of their tests; what the kernels are instrumented for."""

    settings: dict[str, object]
    files: tuple[str, ...]
    which: str = ""
    marked: str = "not cuda"
    sanitize: str | None = None


def of(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/{folder}/test_{name}.py" for name in names)


PARTS = {
    "rows": Part(
        {"order": "random"}, of("ops", "act", "bernoulli", "pondernet", "confidence", "convergence")
    ),
    "what rows remember": Part({"order": "down"}, of("nn", "convergence"), "wide or alone or every or many"),
    "moves": Part({"order": "down"}, of("ops", "compaction", "linear", "route")),
    "halting": Part(
        {"order": "together"},
        of("ops", "halting", "halting_gradients"),
        "small or whole_block or plan or gradients_match or as_good or masked_like or minus_infinity",
    ),
    "masked classes": Part({"order": "random"}, of("nn", "masked_logits")),
    "late counts": Part({"order": "up"}, of("nn", "lag")),
    "descent": Part({"order": "random", "seed": 2}, of("ops", "descent"), "not compiles"),
    "whole descents": Part(
        {"order": "random"}, of("nn", "whole_descent"), "one_step or gradient_modes or no_slot"
    ),
    "other whole descents": Part(
        {"order": "down"}, of("nn", "whole_descent"), "bitwise or neighbours or layouts"
    ),
    "recurrences": Part(
        {"order": "random", "multiprocessors": 1, "resident_blocks": 1}, of("nn", "recurrence_device")
    ),
    "recurrences in little memory": Part(
        {"order": "together", "shared_memory": 9000},
        of("nn", "recurrence_device"),
        "bits or sums or gradients",
    ),
    "closed forms": Part({"order": "together"}, of("nn", "closed_forms")),
    "halting loop": Part(
        {"order": "up", "late": 2}, of("nn", "row_independence", "random_programs"), "act or ponder or random"
    ),
    "descent loop": Part({"order": "down", "late": -1}, of("nn", "energy_descent")),
    "rejected steps": Part(
        {"order": "random"}, of("nn", "energy_descent_gradients"), "those_of_the_reference and lower"
    ),
    "a training update of each experiment": Part({"order": "up"}, of("experiments", "devices"), "follow"),
    "addresses": Part(
        {},
        (
            *of(
                "ops",
                "act",
                "bernoulli",
                "confidence",
                "convergence",
                "halting",
                "descent",
                "linear",
                "route",
            ),
            *of("nn", "recurrence_device"),
        ),
        "",
        "sanitizer and not cuda",
        "address",
    ),
}
# One mutation that only rows wider than a warp show, and one of the tile.
SHOWN = (
    "sum over a block: the barrier before the warps' sums are read, backward",
    "hopfield: the barrier between scores",
)


def run(part: Part) -> subprocess.CompletedProcess[str]:
    module = Build(sanitize=part.sanitize).module()
    selected = ["-m", part.marked, *(["-k", part.which] if part.which else [])]
    child = environment(module, part.settings, part.sanitize)
    command = pytest_command(["-q", "--tb=short", *part.files, *selected])
    return subprocess.run(command, env=child, cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def started(request: pytest.FixtureRequest) -> Iterator[dict[str, Future]]:
    """Start the collected parts, one per core at a time; workers of xdist run their own parts."""
    if reason := unavailable():
        pytest.skip(reason)
    Build().module()
    tests = [
        i
        for i in request.session.items
        if getattr(i, "originalname", "") == test_the_kernels_pass_the_tests.__name__
    ]
    names = [] if "PYTEST_XDIST_WORKER" in os.environ else [i.callspec.params["name"] for i in tests]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(run, PARTS[name]) for name in names}


@pytest.mark.parametrize("name", PARTS)
def test_the_kernels_pass_the_tests(name, started):
    done = started[name].result() if name in started else run(PARTS[name])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[m.name for m in MUTATIONS])
def test_a_mutation_finds_its_text(mutation, tmp_path):
    """A file that was reformatted would leave it without effect."""
    apply(mutation, tmp_path)


@pytest.mark.parametrize("shown", SHOWN)
def test_a_removed_barrier_is_noticed(shown, emulated_module):
    """Two mutations are caught; ``python -m tests.cuda_host.mutations`` tries all of them."""
    (mutation,) = (m for m in MUTATIONS if m.name.startswith(shown))
    noticed, last = caught(mutation)
    assert noticed, last
