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

from adaptcomp_ext.experiments.data import ImageData, load_digits
from adaptcomp_ext.experiments.demo import demo
from adaptcomp_ext.experiments.demo.contenders import Outcome, active_rows, agreement, contenders, limit
from adaptcomp_ext.experiments.demo.model import GlimpseReader
from adaptcomp_ext.experiments.demo.report import recipe_for
from adaptcomp_ext.experiments.demo.training import Recipe, train


@pytest.fixture(scope="module")
def data() -> ImageData:
    whole = load_digits(test_rows=150)
    return ImageData(
        whole.name, whole.train_images[:300], whole.train_labels[:300], whole.test_images, whole.test_labels
    )


@pytest.fixture(scope="module")
def ran(data: ImageData, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    out = tmp_path_factory.mktemp("demo") / "made"
    console = Console(file=io.StringIO(), width=100)
    report = demo(data, out, epochs=1, threads=1, seconds=0.1, console=console)
    assert isinstance(console.file, io.StringIO)
    return report, out, console.file.getvalue()


def test_files(ran: tuple[dict[str, Any], Path, str]) -> None:
    report, out, _ = ran
    assert json.loads((out / "demo.json").read_text()) == report
    picture = (out / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def test_report(ran: tuple[dict[str, Any], Path, str]) -> None:
    report, _, _ = ran
    steps = report["steps"]
    assert 1 <= steps["min"] <= steps["mean"] <= steps["max"] <= steps["at_most"]
    assert 0 <= report["accuracy"] <= 1
    for groups in (report["by_steps"], report["by_class"]):
        assert sum(group["images"] for group in groups) == 150
        assert sum(group["images"] * group["mean_steps"] for group in groups) / 150 == pytest.approx(
            steps["mean"]
        )
        assert sum(group["images"] * group["accuracy"] for group in groups) / 150 == pytest.approx(
            report["accuracy"]
        )
    assert list(report["times_ms"]) == ["masked", "indexed", "adaptive", "limit"]
    for timing in report["times_ms"].values():
        assert 0 < timing["low"] <= timing["median"] <= timing["high"]
    assert report["times_ms"]["masked"]["over_masked"] == 1.0
    assert report["times_ms"]["limit"]["over_limit"] == 1.0
    assert report["machine"]["threads"] == 1
    assert report["versions"]["torch"] == torch.__version__


def test_contenders_agree(ran: tuple[dict[str, Any], Path, str]) -> None:
    report, _, printed = ran
    assert report["rows_that_differ"]["predictions"] == 0
    assert report["rows_that_differ"]["steps"] == 0
    assert report["rows_that_differ"]["logits"] < 1e-3
    assert "All ways give the same prediction" in printed


def test_printed(ran: tuple[dict[str, Any], Path, str]) -> None:
    report, _, printed = ran
    for label in ("masked", "boolean indexing", "AdaptiveHalt", "limit"):
        assert label in printed
    assert f"{report['accuracy']:.1%}" in printed
    assert "demo.png" in printed


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
def test_contenders(data: ImageData, rows: int) -> None:
    reader, images = varied_reader(), data.test_images[:rows]
    with torch.no_grad():
        outcomes = {name: call() for name, call in contenders(reader, images).items()}
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
