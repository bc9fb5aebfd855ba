"""Every experiment's models and data follow --device.

Cells run on a stand-in for a second device (`tests.helpers.standin`): whole ones, with as little training as
they can have, on the CPU's kernels; and up to a training update of each model on the CUDA kernels that are
compiled for the host (the part "experiments" of tests/cuda_host).
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for extra in ("matplotlib", "rich", "safetensors", "scipy", "sklearn", "typer"):
    pytest.importorskip(extra)
from rich.console import Console
from torch.optim.optimizer import register_optimizer_step_post_hook
from typer.testing import CliRunner

from adaptcomp_ext.experiments.app import EXPERIMENTS, app
from adaptcomp_ext.experiments.bench import machine
from adaptcomp_ext.experiments.data import ImageData, images
from adaptcomp_ext.experiments.device import device_named, here, seeded
from adaptcomp_ext.experiments.runs import Cell, Experiment, Results
from adaptcomp_ext.experiments.runs.cells import run_one
from adaptcomp_ext.ops import _backend
from tests.helpers import science
from tests.helpers.standin import NAME, StandIn, WrongDevice

NAMES = ("demo", *EXPERIMENTS)
NEEDS = {
    "maze": ("gymnasium",),
    **dict.fromkeys(("control", "horizon", "transfer"), ("gymnasium", "dm_control")),
}
LITTLE: dict[str, Any] = {
    "timing_seconds": 0.01,
    "seconds": 0.01,
    "timed_updates": 2,
    "puzzles": 8,
    "states": 8,
    "mazes": 6,
    "larger": 4,
    "timed": [[4, 11]],
    "episodes": 2,
    "check_episodes": 1,
    "length": 5,
    "recipe": {"epochs": 1, "updates": 1, "trials": 20},
    "pair_recipe": {"epochs": 1},
    "settings": {
        "updates": 1,
        "mazes": 6,
        "rounds": 2,
        "warm": 1,
        "episode": 8,
        "envs": 2,
        "first_updates": 2,
    },
}
"""Options that make cells short."""
IMAGES = {"train": 160, "test": 40}
TRAINED = {"sudoku": 3, **dict.fromkeys(("control", "horizon", "transfer"), 3)}
"""Which update of a cell trains the last of its models, or an agent from what it did itself; 1 elsewhere."""
WITHOUT_KERNELS = {"distill"}
"""In training habit and control both run on every row."""


def declared(name: str) -> Experiment:
    for module in NEEDS.get(name, ()):
        pytest.importorskip(module)
    return getattr(import_module(f"adaptcomp_ext.experiments.{name}"), name)


def shortened(options: dict[str, Any], less: dict[str, Any]) -> dict[str, Any]:
    known = {k: v for k, v in less.items() if k in options}
    return {
        **options,
        **{k: shortened(options[k], v) if isinstance(v, dict) else v for k, v in known.items()},
    }


def short_cells(name: str) -> list[Cell]:
    """The cells of a short run, one of each kind, on the stand-in."""
    experiment = declared(name)
    options = {} if name == "demo" else {"quick": True}
    cells = experiment.setup(**options).cells
    kinds: dict[Any, Cell] = {}
    for cell in cells:
        about = cell.options
        kind = (about.get("part"), about.get("form"), about.get("agent"), about.get("keep"))
        kinds.setdefault(kind, cell)
    return [
        cell._replace(options={**shortened(cell.options, LITTLE), "device": NAME}) for cell in kinds.values()
    ]


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of scikit-learn's digits stand for all."""
    load = images.load_digits

    def few() -> ImageData:
        whole = load()
        parts = {
            f"{half}_{kind}": getattr(whole, f"{half}_{kind}")[:rows]
            for half, rows in IMAGES.items()
            for kind in ("images", "labels")
        }
        return ImageData(whole.name, **parts)

    monkeypatch.setattr(images, "load_digits", few)


LONG = ("digits", "distill", "horizon", "maze", "stroop")
"""They go on after their first update with ``--full`` only."""


def _launches() -> int:
    return _backend._C.emulation.launches if _backend.EMULATED else 0


class _Enough(Exception):
    pass


class _AnyCPU:
    def __eq__(self, other: object) -> bool:
        return isinstance(other, torch.device) and other.type == "cpu"

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.promise("device")
@pytest.mark.parametrize("name", NAMES)
def test_models_and_data_follow_the_device(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_images: None
) -> None:
    experiment, steps, launches = declared(name), 0, _launches()
    first_update = _backend.EMULATED or (name in LONG and not science.full())

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if first_update and steps == TRAINED.get(name, 1):
            raise _Enough

    if not _backend.EMULATED:  # the CUDA kernels of the emulation ask for no device
        monkeypatch.setattr(_backend, "_CPU_DEVICE", _AnyCPU())
    for cell in short_cells(name):
        folder = tmp_path / cell.name
        folder.mkdir()
        steps = 0
        hook = register_optimizer_step_post_hook(count)
        try:
            with StandIn() as device:
                result = run_one(experiment.measure, cell, folder, 1, lambda what, done: None)
        except _Enough:
            result = None
        finally:
            hook.remove()
        assert steps and device.made
        assert (result is None) == first_update
        json.dumps(result)
    if _backend.EMULATED:
        assert (_launches() > launches) is (name not in WITHOUT_KERNELS)


def test_the_stand_in_refuses_what_cuda_refuses() -> None:
    with StandIn():
        left, moved = torch.ones(3), torch.ones(3).to(NAME)
        layer = torch.nn.Linear(3, 2)
        assert (str(left.device), str(moved.device), str(moved.cpu().device)) == ("cpu", NAME, "cpu")
        for wrong in (
            lambda: left + moved,
            lambda: moved.numpy(),
            lambda: layer(moved),
            lambda: torch.rand(3, generator=torch.Generator(), device=NAME),
            lambda: torch.cat((moved, torch.from_numpy(np.ones(3, np.float32)))),
        ):
            with pytest.raises(WrongDevice):
                wrong()
        assert str(layer.to(NAME)(moved).device) == NAME
        with torch.device(NAME):
            drawn = torch.rand(3, generator=seeded(0))
            assert str((drawn + torch.arange(3) + here(left)).device) == NAME


@pytest.mark.promise("device")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("device", "expected"),
    [("gpu", "device: expected cpu, cuda or cuda:N, got 'gpu'"), ("cuda", "device: expected cpu, since ")],
)
def test_a_device_that_is_not_there_is_refused_in_a_sentence(
    name: str, device: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=expected):
        declared(name)(out=tmp_path / "new", device=device, console=Console(quiet=True))
    words = ["demo"] if name == "demo" else ["run", name]
    result = CliRunner().invoke(app, [*words, "--device", device, "--out", str(tmp_path / "new")])
    assert result.exit_code == 2 and " ".join(expected.split()[:4]) in " ".join(result.output.split())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("name", "type_"), [(0, TypeError), ("meta", ValueError), ("cuda:x", ValueError)])
def test_names_of_devices_are_checked(name: Any, type_: type[Exception]) -> None:
    with pytest.raises(type_, match=r"^device: expected "):
        device_named(name)


def test_a_gpu_that_is_one_too_many_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for compiled, expected in (
        (True, "one of cuda:0 to cuda:1, got 'cuda:2'"),
        (False, "built without CUDA"),
    ):
        monkeypatch.setattr("adaptcomp_ext.experiments.device.HAS_CUDA", compiled)
        with pytest.raises(ValueError, match=expected):
            device_named("cuda:2")


def test_only_another_device_than_the_cpu_is_part_of_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders that were written before there was the option are gone on with."""
    seen: list[Cell] = []

    def measure(cell: Cell, folder: Path, tick: Any) -> dict[str, Any]:
        seen.append(cell)
        return {"made on": str(torch.get_default_device())}

    digits = declared("digits")
    monkeypatch.setattr(digits, "measure", measure)
    monkeypatch.setattr(digits, "report", lambda results: ["# Nothing"])
    for folder, device in (("a", "cpu"), ("b", "cpu:0")):
        digits(None, tmp_path / folder, quick=True, device=device, console=Console(quiet=True))
    first, second = (json.loads((tmp_path / f / "config.json").read_text())["config"] for f in "ab")
    assert "device" not in first and second == {**first, "device": "cpu:0"}
    assert {cell.options.get("device") for cell in seen} == {None, "cpu:0"}
    with pytest.raises(ValueError, match="device = "):
        digits(None, tmp_path / "a", quick=True, device="cpu:0", console=Console(quiet=True))


def test_a_report_names_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adaptcomp_ext.experiments.runs import report

    about = machine.describe(torch.device("cpu"))
    about["machine"]["device"] = "A GPU"
    monkeypatch.setattr(report.machine, "describe", lambda device: about)
    cell = Cell("a-seed-0", {}, 0)
    for config, named in (({}, False), ({"device": "cuda"}, True)):
        results = Results([cell], {cell.name: {"x": 1.0}}, config, folder=tmp_path)
        report.publish("it", tmp_path, results, lambda r: [f"# {r.opening}"], Console(quiet=True))
        assert ("A GPU" in (tmp_path / "it.md").read_text()) is named
