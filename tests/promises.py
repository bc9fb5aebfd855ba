"""The promises of the package, and the page about them: what holds where, by which tests.

A test says which promises it shows: ``@pytest.mark.promise("row alone", "compaction")``. The page is made
from these marks, so that a promise without a test cannot stand on it::

    python -m tests.promises docs/promises.md
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.cuda_host.test_kernels import PARTS

ROOT = Path(__file__).resolve().parents[1]


class Promise(NamedTuple):
    """What a user may rely on.

    Attributes
    ----------
    name : str
        What the marks call it.
    says : str
        The promise, in one sentence.
    asks : str
        What has to be true of the functions that the user writes.
    fails : str
        Where it is known not to hold, or is not shown.
    """

    name: str
    says: str
    asks: str = ""
    fails: str = ""


BLAS = "matrix products are not: torch's give a row other bits in batches of 1 to 7 rows than in larger ones"
NO_GPU = "Its tests need a GPU and have not run on one."

PROMISES: dict[str, tuple[Promise, ...]] = {
    "Rows": (
        Promise(
            "row alone",
            "A row's result has the same bits alone, in any batch and in any order.",
            f"They give a row these bits themselves ({BLAS}; `torch.sigmoid` and `softplus` of equal "
            "numbers are not one number in a batch of 17 to 63 rows). `ac.ops.linear` gives "
            "them.",
            "On the reference, which calls such operations.",
        ),
        Promise(
            "compaction",
            'The result has the same bits with `compact` on, off and `"auto"`.',
            "As above.",
        ),
        Promise(
            "with gradients",
            "The forward pass of a training run has the bits of the same run in inference.",
            "As above.",
            "PonderNet trains on an expectation and halts by a sample in evaluation.",
        ),
        Promise("threads", "The number of threads changes no bit.", "As above."),
        Promise(
            "no work",
            "A row that has halted costs no further step, forward or backward.",
            fails='`compact="auto"` leaves halted rows in the block for as long as moving the others costs '
            "more than they do. On CUDA the block shrinks up to `lag` steps late.",
        ),
        Promise("memory", "What training keeps grows with the sum of the rows' steps."),
        Promise("status", "`status` says why each row ended: halted, out of steps, not finite, rejected."),
        Promise(
            "not finite",
            "A NaN or an infinity ends its row with `Status.NONFINITE`, and reaches neither the values nor "
            "the gradients of another row.",
            "They keep rows apart.",
            "−∞ in class logits and in a halting logit masks, and is an ordinary value.",
        ),
        Promise(
            "seed",
            "The same seed on the same device gives the same result, whatever else is drawn; a draw belongs "
            "to its sample and its step, not to its place in the batch.",
            "They draw nothing themselves.",
        ),
        Promise(
            "rows apart",
            "A step, readout, head or energy in which one row reads another is refused at the first call.",
            fails="With `check_rows=False` or `compact=False`; for a policy's own `decide`; for what has no "
            "derivative.",
        ),
        Promise(
            "no trace",
            "That check changes no random number, buffer, result or tensor, and no hook sees it.",
            fails="What the functions change outside of the process's tensors, such as files, is not undone.",
        ),
        Promise("untouched", "State, inputs and what the user's functions keep are never written to."),
    ),
    "Numbers": (
        Promise(
            "formula",
            "The kernels give what the plain PyTorch reference gives, which is the specification, in every "
            "size and for every policy, energy and option.",
        ),
        Promise("gradient", "Gradients are those of the reference, and agree with finite differences."),
        Promise(
            "second derivative",
            "What has a second derivative can be differentiated twice.",
            fails='`gradient="implicit"` refuses a second derivative by name.',
        ),
        Promise("accumulation", "Sums over half-precision values are kept in float32 and rounded once."),
        Promise("layout", "Tensors of any memory layout work: strided, transposed, expanded, misaligned."),
        Promise("small", "An empty batch, a single row and `max_steps=1` work."),
        Promise("large", "Offsets beyond 2³¹ work."),
        Promise(
            "calibration",
            "The steps and outputs that `calibrate` and `compute_curve` report are those of runs with each "
            "threshold; a certified risk is exceeded no more often than asked for.",
            "They are row-independent, and the held-out rows are independent draws.",
        ),
        Promise(
            "race",
            "The winner of a race has the bits that its start has alone; no start of its row takes a step "
            "after it.",
            "They give a row the same bits in any batch.",
            "The losers of a descent in closed form, or on CUDA, go on to their own end.",
        ),
        Promise("own memory", "Every output is written in full, and nothing is written outside of it."),
    ),
    "Errors": (
        Promise(
            "bad input",
            "Bad input raises a TypeError or ValueError that names the argument, what was expected and what "
            "came.",
        ),
        Promise("before", "Bad input is refused before any of the user's functions has run."),
        Promise(
            "step's result",
            "A step, head, readout or energy that returns another number of rows, structure, shape or dtype "
            "is refused before the next step.",
        ),
    ),
    "At home in PyTorch": (
        Promise(
            "held",
            "A plain function that depends on parameters which no module holds warns once, and names them.",
        ),
        Promise(
            "modules",
            "`AdaptiveHalt` and `EnergyDescent` are modules: parameters, `state_dict`, `.to`, `deepcopy` "
            "and pickle work.",
            "They are modules, too.",
        ),
        Promise(
            "compile",
            "`torch.compile(fullgraph=True)` compiles the ops, and models with a loop or a descent in them, "
            "which is one operator of the graph; steps may be compiled.",
            fails="The graph is split, and `fullgraph=True` refused: where torch does not tell an "
            "export from a compilation (2.4); at a route; where a plain function uses parameters that the "
            "module does not hold; where a step, readout or head reads values; where stages change "
            "the state's shape; for states of other containers than tuples, lists and dictionaries. "
            "Such a run has no second derivative; parameters of step, readout or energy that "
            "it does not use get zeros, not None.",
        ),
        Promise(
            "export",
            "`torch.export` (`strict=False`) of a model with an `AdaptiveHalt` in it gives a program with "
            "the same answers, which stops with the last row, and runs where this package is not: by itself, "
            "packaged by AOTInductor, in ONNX Runtime.",
            "They can be exported; readout and head work on the rows of the block alone.",
            fails="Halted rows stay in the block. Gradients, traces, and stages that change the state's "
            "shape are not exported; nor is `EnergyDescent`. torch 2.13 cannot write the stages of a "
            "ModuleList for ONNX. `ac.export_notes` tells what a model gives up. Where torch does not tell "
            "an export from a compilation (2.4), it is refused.",
        ),
        Promise("autocast", "Autocast acts on the user's functions; the results keep the state's dtype."),
        Promise(
            "distributed",
            "`DistributedDataParallel` trains a model with a loop in it, and `fully_shard` with "
            "`process_group`: two processes whose rows halt at different steps have the gradients of one.",
            fails="`DistributedDataParallel` needs `find_unused_parameters=True` where a process may use "
            "fewer stages of a ModuleList than another.",
        ),
        Promise(
            "checkpoint",
            "`torch.utils.checkpoint` around a loop, or within its step, gives the same gradients.",
        ),
        Promise(
            "transforms",
            "`torch.func`, `vmap`, forward-mode derivatives and recording are refused in one sentence, or "
            "right.",
        ),
        Promise(
            "subclasses", "Subclasses of Tensor give the values of plain tensors, or are refused by name."
        ),
        Promise("processes", "Forked children and several Python threads do not disturb each other."),
    ),
    "CUDA": (
        Promise("capability", "A device that the build does not fit is refused at its first use."),
        Promise(
            "launches",
            "A step takes at most four launches forward and one backward, besides the user's own.",
            fails="Shown under emulation, by counting.",
        ),
        Promise("stale count", "How late the host learns the number of running rows changes no bit."),
        Promise("no wait", "The host never waits for the step that is running.", fails=NO_GPU),
        Promise("streams", "The tensors' own stream and device are used.", fails=NO_GPU),
        Promise("graphs", "A run can be captured in a CUDA graph and replayed.", fails=NO_GPU),
    ),
    "The package": (
        Promise(
            "light",
            "`import adaptcomp_ext` imports no extra and no compiler; pip brings torch and NumPy only.",
        ),
        Promise(
            "examples", "What README and documentation show runs, prints what stands below it, and trains."
        ),
        Promise("figures", "Every figure of README and of the page Measured is that of a committed report."),
        Promise(
            "systems",
            "Linux on x86-64 and aarch64 builds; other systems are refused by name.",
            fails="aarch64 has run under emulation of the processor only.",
        ),
        Promise(
            "device",
            "Models and data of every experiment follow `--device`.",
            fails="Shown on a stand-in that refuses what CUDA refuses; no experiment has run on a GPU.",
        ),
        Promise(
            "resume",
            "An experiment that was interrupted goes on, and ends with the bits of one that was not.",
        ),
        Promise("verdicts", "A report says that a claim holds only where the interval over seeds says so."),
    ),
}
NAMES = {promise.name: promise for group in PROMISES.values() for promise in group}

FIRST_SCREEN = {
    "Adaptive computation for PyTorch: rows of a batch that have halted leave it": ("no work", "figures"),
    "CPU: tested and measured": ("formula", "figures"),
    "CUDA: compiled and run under emulation, not yet on a GPU": ("formula", "stale count"),
    "[Promises](docs/promises.md) lists": ("examples",),
    "Adaptive-depth models count the steps": ("figures",),
    "Here the batch shrinks": ("no work",),
    "Step and head are modules, so one optimiser": ("examples", "modules"),
    "Each row took its own number of steps": ("no work", "status"),
}
"""The sentences of the README's first screen, by how they begin, and the promises behind each."""


INTRODUCTION = """\
What you may rely on, where it was tested, and where it does not hold. This page is made from marks on the
tests (`python -m tests.promises docs/promises.md`), so that a promise without a test cannot stand here.

- *Your functions* are the step, the readout, the policy's head, the energy, the branch: what must be true of
  them.
- *Where*: on the CPU the tests run in CI. "CUDA, emulated" means that tests of the promise pass on the CUDA
  sources, compiled for the CPU with blocks, warps and barriers emulated. No kernel has run on a GPU yet.
- *Dtypes* are those that the tests name. The others use float32, and float64 where they compare derivatives.
"""


class Shown:
    """The tests that show one promise: which, on what, in which dtypes."""

    def __init__(self) -> None:
        self.tests: dict[str, set[str]] = {}
        self.dtypes: set[str] = set()
        self.cpu = self.cuda = self.emulated = False

    def add(self, item: pytest.Function) -> None:
        """Count a test: a function with one choice of its parameters."""
        file, name = item.location[0], getattr(item, "originalname", None) or item.name
        self.tests.setdefault(file.removeprefix("tests/"), set()).add(name)
        chosen = item.callspec.params if hasattr(item, "callspec") else {}
        self.dtypes |= {str(v).removeprefix("torch.") for v in chosen.values() if isinstance(v, torch.dtype)}
        if item.get_closest_marker("cuda"):
            self.cuda = True
        else:
            self.cpu = True
            self.emulated |= any(selects(part, item) for part in PARTS.values())

    @property
    def where(self) -> str:
        """On which devices."""
        places = ["CPU"] * self.cpu + ["CUDA, emulated"] * self.emulated
        return "; ".join(places) or "not run: needs a GPU"


def selects(part, item: pytest.Item) -> bool:
    """Whether a part of the emulated tests holds a test (its expressions have words, and, or, not)."""
    if item.location[0] not in part.files:
        return False
    name = item.nodeid.lower()
    which = re.sub(
        r"\b(?!and\b|or\b|not\b)\w+", lambda word: str(word[0].lower() in name), part.which or "True"
    )
    sanitized = "sanitizer" not in part.marked or item.get_closest_marker("sanitizer") is not None
    return sanitized and eval(which)


class Collector:
    """The plugin of pytest that looks at the marks."""

    def __init__(self) -> None:
        self.shown = {name: Shown() for name in NAMES}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Look at each test that was collected."""
        for item in session.items:
            for mark in item.iter_markers("promise"):
                for name in mark.args:
                    if name not in NAMES:
                        raise pytest.UsageError(f"{item.nodeid}: no promise is called {name!r}")
                    self.shown[name].add(item)


def collect() -> dict[str, Shown]:
    """Collect the tests and return what shows each promise."""
    marked = [
        path
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.promise(" in path.read_text("utf-8")
    ]
    plugin, said = Collector(), io.StringIO()
    with contextlib.redirect_stdout(said):
        arguments = ["--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *map(str, marked)]
        status = pytest.main([f"--rootdir={ROOT}", *arguments], plugins=[plugin])
    if status != pytest.ExitCode.OK:
        raise RuntimeError(said.getvalue()[-2000:])
    return plugin.shown


def spoken(name: str) -> str:
    """The name of a test as words."""
    return name.removeprefix("test_").replace("_", " ")


def lines(shown: dict[str, Shown]) -> Iterable[str]:
    """The page, line by line."""
    yield "# Promises\n"
    yield INTRODUCTION
    for group, promises in PROMISES.items():
        yield f"## {group}\n"
        yield "| promise | your functions | does not hold | where | dtypes |"
        yield "|---|---|---|---|---|"
        for promise in promises:
            found = shown[promise.name]
            order = ("float64", "float32", "float16", "bfloat16")
            real = [dtype for dtype in order if dtype in found.dtypes]
            rest = sorted(found.dtypes - set(order))
            dtypes = ", ".join([*real, *(["integers, bool, complex"] if rest else [])])
            yield f"| {promise.says} | {promise.asks} | {promise.fails} | {found.where} | {dtypes} |"
        yield ""
    yield "## The tests\n"
    for group in PROMISES.values():
        for promise in group:
            tests = shown[promise.name].tests
            yield f"**{promise.says}**\n"
            for file, names in sorted(tests.items()):
                yield f"- `{file}`: {'; '.join(sorted(map(spoken, names)))}"
            yield ""


def page() -> str:
    """Return the page; a promise that no test shows raises ValueError."""
    shown = collect()
    if bare := [name for name, found in shown.items() if not found.tests]:
        raise ValueError(f"no test shows these promises: {', '.join(bare)}")
    return "\n".join(lines(shown)).rstrip() + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
