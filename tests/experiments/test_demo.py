from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

for extra in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(extra)

from rich.console import Console
from safetensors.torch import load_file

from adaptcomp_ext.experiments.data import ImageData, load_digits
from adaptcomp_ext.experiments.demo import demo
from adaptcomp_ext.experiments.demo.baselines import Outcome, active_rows, agreement, limit, ways
from adaptcomp_ext.experiments.demo.experiment import recipe_for
from adaptcomp_ext.experiments.demo.measure import PER_CLASS, SHOWN
from adaptcomp_ext.experiments.demo.model import GlimpseReader, Recipe, train
from tests.helpers.reports import check_one_seed_report


@pytest.fixture(scope="module")
def data() -> ImageData:
    whole = load_digits(test_rows=150)
    return ImageData(
        whole.name, whole.train_images[:300], whole.train_labels[:300], whole.test_images, whole.test_labels
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """What the one cell measured, the folder, and what was printed."""
    out = tmp_path_factory.mktemp("demo") / "made"
    console = Console(file=io.StringIO(), width=100)
    demo(out=out, epochs=1, threads=1, seconds=0.1, console=console)
    assert isinstance(console.file, io.StringIO)
    return json.loads((out / "cells" / "seed-0" / "result.json").read_text()), out, console.file.getvalue()


def test_files(ran: tuple[dict[str, Any], Path, str]) -> None:
    found, out, _ = ran
    report = json.loads((out / "demo.json").read_text())
    assert report["means"]["all"]["accuracy"][0] == found["accuracy"]
    assert report["versions"]["torch"] == torch.__version__
    picture = (out / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
    check_one_seed_report((out / "demo.md").read_text())


def test_cell(ran: tuple[dict[str, Any], Path, str]) -> None:
    found, _, _ = ran
    steps = found["steps"]
    assert 1 <= steps["min"] <= steps["mean"] <= steps["max"] <= steps["at_most"]
    assert 0 <= found["accuracy"] <= 1
    for groups in (found["by_steps"], found["by_class"]):
        assert sum(group["images"] for group in groups) == 500
        assert sum(group["images"] * group["mean_steps"] for group in groups) / 500 == pytest.approx(
            steps["mean"]
        )
        assert sum(group["images"] * group["accuracy"] for group in groups) / 500 == pytest.approx(
            found["accuracy"]
        )
    assert list(found["times_ms"]) == ["masked", "indexed", "adaptive", "limit"]
    for timing in found["times_ms"].values():
        assert 0 < timing["low"] <= timing["median"] <= timing["high"]
    assert found["times_ms"]["masked"]["over_masked"] == 1.0
    assert found["times_ms"]["limit"]["over_limit"] == 1.0
    assert found["batch"]["threads"] == 1


def test_a_finished_folder_is_not_run_again(
    ran: tuple[dict[str, Any], Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = ran
    before = json.loads((out / "demo.json").read_text())["tables"]
    monkeypatch.setattr(demo, "measure", None)
    again = demo(out=out, epochs=1, seconds=0.1, console=Console(file=io.StringIO()))
    assert json.loads(json.dumps(again["tables"])) == before


def test_the_digits_of_the_picture(ran: tuple[dict[str, Any], Path, str]) -> None:
    _, out, _ = ran
    shown = load_file(out / "cells" / "seed-0" / SHOWN)
    assert len(shown["label"]) == 10 * 2 * PER_CLASS == len(shown["path"])
    assert shown["label"].bincount().tolist() == [2 * PER_CLASS] * 10
    looks = (~shown["path"][:, :, 0].isnan()).sum(1)
    assert torch.equal(looks, shown["steps"])
    for label in range(10):
        steps = shown["steps"][shown["label"] == label]
        assert steps[:PER_CLASS].max() <= steps[PER_CLASS:].min()


def test_ways_agree(ran: tuple[dict[str, Any], Path, str]) -> None:
    found, _, printed = ran
    assert found["rows_that_differ"]["predictions"] == 0
    assert found["rows_that_differ"]["steps"] == 0
    assert found["rows_that_differ"]["logits"] < 1e-3
    assert "All ways give the same prediction" in " ".join(printed.split())


def test_printed(ran: tuple[dict[str, Any], Path, str]) -> None:
    found, _, printed = ran
    words = " ".join(printed.split())
    for label in ("masked", "boolean indexing", "AdaptiveHalt", "lower bound"):
        assert label in words
    assert f"{100 * found['accuracy']:.1f} % of the test images" in words
    assert "demo.md" in words


def varied_reader() -> GlimpseReader:
    """A reader whose rows halt at different steps without any training."""
    torch.manual_seed(0)
    reader = GlimpseReader(8, window=4, dim=32, max_steps=10).eval()
    with torch.no_grad():
        reader.head.weight.mul_(10)
        reader.head.bias.fill_(-4)
        reader.step.encode.weight.mul_(4)
    return reader


@pytest.mark.parametrize("rows", [1, 2, 150])
def test_ways(data: ImageData, rows: int) -> None:
    reader, images = varied_reader(), data.test_images[:rows]
    with torch.no_grad():
        outcomes = {name: call() for name, call in ways(reader, images).items()}
    found = agreement(outcomes)
    assert found["steps"] == found["predictions"] == 0
    assert found["logits"] < 1e-4
    if rows > 2:
        assert len(outcomes["masked"].steps.unique()) > 2


def test_agreement_counts() -> None:
    one = Outcome(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 2, 3]))
    other = Outcome(torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 2, 4]))
    assert agreement({"masked": one, "indexed": one}) == {"predictions": 0, "steps": 0, "logits": 0.0}
    assert agreement({"masked": one, "indexed": other, "adaptive": one}) == {
        "predictions": 1,
        "steps": 1,
        "logits": 1.0,
    }


def test_limit_runs_the_active_rows(data: ImageData) -> None:
    steps = torch.tensor([3, 1, 2, 3])
    assert active_rows(steps) == [4, 3, 2]
    assert active_rows(steps[:0]) == []
    reader, seen = varied_reader(), []
    handle = reader.step.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    with torch.no_grad():
        limit(reader, data.test_images[:4], steps)()
    handle.remove()
    assert seen == [4, 3, 2]


def test_path_is_where_the_steps_look(data: ImageData) -> None:
    reader, image = varied_reader(), data.test_images[0]
    path = reader.path(image, 3)
    assert path.shape == (3, 2)
    assert path.abs().max() <= 1
    with torch.no_grad():
        state = reader.step(reader.start(1), image[None])
        torch.testing.assert_close(path[1], reader.step.where(state)[0])


def test_training_learns_and_repeats(data: ImageData) -> None:
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        reader = GlimpseReader(8, window=4, dim=32, max_steps=4)
        calls: list[float] = []
        recipe = Recipe(window=4, epochs=8, dim=32, max_steps=4, batch=64)
        history = train(reader, data, recipe, 0, lambda loss, right, steps, calls=calls: calls.append(loss))
        assert len(calls) == 8 * 5
        assert len(history) == 8
        assert history[-1].loss < 0.8 * history[0].loss
        assert not reader.training
        losses.append(calls)
    assert losses[0] == losses[1]


def test_recipes(data: ImageData) -> None:
    assert recipe_for(data).window == 5
    large = ImageData("large", torch.zeros(1, 28, 28), torch.zeros(1), torch.zeros(1, 28, 28), torch.zeros(1))
    assert recipe_for(large).window == 14
