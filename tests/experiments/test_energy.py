from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

for extra in ("matplotlib", "rich", "sklearn", "typer"):
    pytest.importorskip(extra)

from rich.console import Console

import adaptcomp_ext as ac
from adaptcomp_ext.experiments import cli
from adaptcomp_ext.experiments.data import ImageData, load_digits
from adaptcomp_ext.experiments.energy import energy
from adaptcomp_ext.experiments.energy.evaluation import (
    Reading,
    add_noise,
    by_budget,
    by_tolerance,
    changes,
    corrupt,
    hardness,
    occlude,
    parts,
    read,
    setting,
    spread,
    under_corruption,
)
from adaptcomp_ext.experiments.energy.experiment import recipe_for
from adaptcomp_ext.experiments.energy.landscape import choose, load, save, survey
from adaptcomp_ext.experiments.energy.measure import hold_out
from adaptcomp_ext.experiments.energy.training import (
    Batch,
    Recipe,
    batches,
    build_classifier,
    build_model,
    compare,
    every_step_loss,
    plain_loss,
    practising,
    train,
    train_classifier,
)
from adaptcomp_ext.models import LatentEnergyClassifier
from tests.helpers.reports import check_one_seed_report

MNIST = Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist"
NAMES = ("energy.json", "energy.png", "energy_descents.png")


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_digits()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """What the one cell measured, the folder, and what was printed."""
    out = tmp_path_factory.mktemp("energy") / "made"
    console = Console(file=io.StringIO(), width=130)
    energy(out=out, quick=True, console=console)
    assert isinstance(console.file, io.StringIO)
    return json.loads((out / "cells" / "seed-0" / "result.json").read_text()), out, console.file.getvalue()


def reading(
    right: list[bool], steps: list[int], predicted: list[int] | None = None, status: int = 1
) -> Reading:
    n = len(right)
    return Reading(
        torch.tensor(predicted or [0] * n),
        torch.tensor(steps),
        torch.full((n,), status),
        torch.zeros(n),
        torch.tensor(right),
    )


@pytest.fixture(scope="module")
def model(data: ImageData) -> LatentEnergyClassifier:
    """Trained for a moment, so that the landscape is not flat."""
    torch.manual_seed(0)
    model = build_model(8)
    train(
        model, data.train_images, data.train_labels, Recipe(epochs=3, batch=64), 0, lambda loss, right: None
    )
    return model


def test_files(ran: tuple[dict[str, Any], Path, str]) -> None:
    found, out, _ = ran
    report = json.loads((out / NAMES[0]).read_text())
    assert {path.name for path in out.iterdir()} == {*NAMES, "energy.md", "config.json", "cells"}
    assert report["means"]["all"]["accuracy"][0] == found["accuracy"]
    check_one_seed_report((out / "energy.md").read_text())
    for name in NAMES[1:]:
        picture = (out / name).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 20_000


def test_a_finished_folder_is_not_run_again(
    ran: tuple[dict[str, Any], Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = ran
    before = json.loads((out / NAMES[0]).read_text())["tables"]
    monkeypatch.setattr(energy, "measure", None)
    again = energy(out=out, quick=True, console=Console(file=io.StringIO()))
    assert json.loads(json.dumps(again["tables"])) == before


@pytest.mark.science
def test_it_works(ran: tuple[dict[str, Any], Path, str]) -> None:
    report, _, _ = ran
    assert report["accuracy"] > 0.93
    assert report["classifier"]["accuracy"] > 0.93
    assert report["hardest_over_easiest"] > 1.2
    assert report["rank_correlation"] > 0.3
    assert report["corrupted"]["noise"][-1]["mean_steps"] > report["steps"]["mean"]


def test_report(ran: tuple[dict[str, Any], Path, str]) -> None:
    report, _, _ = ran
    steps = report["steps"]
    assert steps["min"] <= steps["mean"] <= steps["max"] <= steps["at_most"]
    assert sum(steps["counts"]) == 500
    assert sum(n * count for n, count in enumerate(steps["counts"], 1)) / 500 == pytest.approx(steps["mean"])
    groups = report["by_difficulty"]
    assert [group["images"] for group in groups] == [50] * 10
    assert sum(group["mean_steps"] for group in groups) / 10 == pytest.approx(steps["mean"])
    assert sum(group["accuracy"] for group in groups) / 10 == pytest.approx(report["accuracy"])
    assert [group["hardness"] for group in groups] == sorted(group["hardness"] for group in groups)
    first = report["after_the_first_step"]
    assert report["accuracy"] - first["accuracy"] == pytest.approx((first["mended"] - first["spoilt"]) / 500)
    assert report["by_budget"][0]["accuracy"] == pytest.approx(first["accuracy"])
    assert report["by_budget"][-1]["accuracy"] == pytest.approx(report["accuracy"])
    (chosen,) = (group for group in report["by_tolerance"] if group["tol"] == report["tol"])
    assert chosen["mean_steps"] == pytest.approx(steps["mean"])
    assert chosen["hardest_over_easiest"] == pytest.approx(report["hardest_over_easiest"])
    for ways in report["corrupted"].values():
        assert ways[0]["accuracy"] == pytest.approx(report["accuracy"])
    assert report["timing"]["difference_of_losses"] < 1e-4
    for name in ("kernels", "plain"):
        expected = report["timing"]["update_ms"][name] * report["timing"]["updates_per_epoch"] / 1e3
        assert report["timing"]["seconds_per_epoch"][name] == pytest.approx(expected)


def test_printed(ran: tuple[dict[str, Any], Path, str]) -> None:
    found, _, printed = ran
    words = " ".join(printed.split())
    assert f"{100 * found['accuracy']:.2f} % of the images" in words
    assert f"{found['hardest_over_easiest']:.2f} times as many" in words
    assert "energy.md" in words


def test_nothing_outside_changes(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    report = energy(out=tmp_path, quick=True, epochs=1, held_out=50, console=Console(file=io.StringIO()))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    expected = {"train": 1247, "test": 50, "tested_on": "held-out", "side": 8}
    assert {key: report["config"][key] for key in expected} == expected


def test_data_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "energy", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "nowhere: expected a folder with the four MNIST files" in capsys.readouterr().err


def test_too_many_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "energy", "--held-out", "1297", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "held out: expected 1 to 1296 images, got 1297" in capsys.readouterr().err


def test_hold_out(data: ImageData) -> None:
    held = hold_out(data, 297)
    assert held.train_images.shape == (1000, 8, 8)
    assert held.test_images.shape == (297, 8, 8)
    together = torch.cat((held.train_images, held.test_images)).flatten(1).sum(dim=1).sort().values
    torch.testing.assert_close(
        together, data.train_images.flatten(1).sum(dim=1).sort().values, rtol=0, atol=0
    )


def test_recipes(data: ImageData) -> None:
    large = ImageData("large", torch.zeros(1, 28, 28), torch.zeros(1), torch.zeros(1, 28, 28), torch.zeros(1))
    assert recipe_for(large).epochs > recipe_for(large, quick=True).epochs
    assert recipe_for(data).batch < recipe_for(large).batch


def test_hardness_is_the_margin() -> None:
    logits = torch.tensor(
        [[2.0, 2.0, -20.0], [0.0, math.log(3.0), -60.0], [80.0, 0.0, -9.0], [79.0, 0.0, -9.0]]
    )
    hard = hardness(nn.Identity(), logits)
    torch.testing.assert_close(hard[:2], torch.tensor([1.0, 0.5], dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert 0 < hard[2] < hard[3] < 1e-30


def test_parts_and_spread() -> None:
    hard = torch.tensor([0.4, 0.1, 0.9, 0.2, 0.5])
    groups = parts(reading([True, True, False, True, False], [3, 1, 8, 2, 6]), hard, count=2)
    assert [group["images"] for group in groups] == [3, 2]
    assert [group["mean_steps"] for group in groups] == [2.0, 7.0]
    assert [group["accuracy"] for group in groups] == [1.0, 0.0]
    assert [group["hardness"] for group in groups] == pytest.approx([0.7 / 3, 0.7])
    assert spread(groups) == 3.5


def test_changes() -> None:
    first = reading([True, False, False, False, True], [1] * 5, predicted=[0, 1, 1, 2, 0])
    last = reading([True, True, False, False, False], [1] * 5, predicted=[0, 0, 1, 1, 3])
    assert changes(first, last) == {"mended": 1, "spoilt": 1, "other": 1}


def test_summary() -> None:
    some = reading([True, False, True, True], [1, 2, 3, 6], status=int(ac.Status.MAX_STEPS))
    assert some.summary() == {"accuracy": 0.75, "mean_steps": 3.0, "ended_by_the_limit": 4}


def test_choose() -> None:
    hard = torch.arange(40) / 40
    steps = torch.arange(1, 41)
    right = torch.ones(40, dtype=torch.bool)
    right[38] = False
    some = Reading(torch.zeros(40), steps, torch.ones(40), torch.zeros(40), right)
    assert choose(some, some, hard) == {"easy": 1, "hard": 37}
    first = Reading(torch.zeros(40), steps, torch.ones(40), torch.zeros(40), torch.arange(40) % 7 != 0)
    assert choose(some, first, hard) == {"easy": 1, "hard": 37, "turned": 35}
    limited = Reading(
        torch.zeros(40), steps, torch.full((40,), int(ac.Status.MAX_STEPS)), torch.zeros(40), right
    )
    assert choose(limited, first, hard) == {"easy": 1}


def test_read_follows_the_settings(model: LatentEnergyClassifier, data: ImageData) -> None:
    images, labels = data.test_images, data.test_labels
    whole = read(model, images, labels)
    assert whole.right.tolist() == (whole.predicted == labels).tolist()
    with setting(model.descend, max_steps=2):
        short = read(model, images, labels)
    assert short.steps.max() == 2
    assert model.descend.max_steps == 50
    again = read(model, images[100:], labels[100:])
    assert (again.steps == whole.steps[100:]).float().mean() > 0.99  # matrix products may round otherwise
    hard = torch.rand(len(images))
    budgets = by_budget(model, images, labels, hard, (2, 50))
    assert [group["mean_steps"] for group in budgets] == [short.mean_steps, whole.mean_steps]
    tolerances = by_tolerance(model, images, labels, hard, (1e-1, 1e-3))
    assert tolerances[0]["mean_steps"] < tolerances[1]["mean_steps"] == whole.mean_steps
    corrupted = under_corruption(model, images, labels, seed=0)
    assert corrupted["noise"][0]["mean_steps"] == corrupted["patch"][0]["mean_steps"] == whole.mean_steps
    assert model.descend.tol == 1e-3


def test_plain_loop_is_the_same_training(data: ImageData) -> None:
    torch.manual_seed(0)
    model = build_model(8).double().eval()  # no dropout
    rows = slice(0, 20)
    factors = torch.linspace(0.7, 1.3, 20, dtype=torch.float64)
    batch = Batch(data.train_images[rows].double(), data.train_labels[rows], 4, factors)
    with practising(model.descend):
        loss, _ = every_step_loss(model, batch)
    parameters = [parameter for name, parameter in model.named_parameters() if name != "energy.out_bias"]
    expected = plain_loss(model, batch)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)
    )


def test_training_learns_and_repeats(data: ImageData) -> None:
    histories = []
    for _ in range(2):
        torch.manual_seed(0)
        model, calls = build_model(8), []
        before = dict(vars(model.descend))
        recipe = Recipe(epochs=4, batch=64)
        history = train(
            model,
            data.train_images,
            data.train_labels,
            recipe,
            0,
            lambda *seen, calls=calls: calls.append(seen),
        )
        assert len(calls) == 4 * math.ceil(1297 / 64)
        assert len(history) == 4
        assert history[-1].loss < 0.85 * history[0].loss
        assert not model.training
        for name in ("max_steps", "tol", "keep_trace", "accept", "backtracking", "gradient"):
            assert getattr(model.descend, name) == before[name]
        histories.append([epoch._replace(seconds=0.0) for epoch in history])
    assert histories[0] == histories[1]


def test_classifier_learns(data: ImageData) -> None:
    torch.manual_seed(0)
    classifier = build_classifier(8)
    assert (
        train_classifier(classifier, data.train_images, data.train_labels, Recipe(epochs=10, batch=64), 0) > 0
    )
    assert not classifier.training
    with torch.no_grad():
        predicted = classifier(data.test_images).argmax(dim=1)
    assert (predicted == data.test_labels).float().mean() > 0.85


def test_batches(data: ImageData) -> None:
    recipe = Recipe(epochs=1, batch=100, steps=3, jitter=0.2, corrupted=0.0)
    seen = list(batches(data.train_images, data.train_labels, recipe, torch.Generator().manual_seed(0)))
    assert [len(batch.labels) for batch in seen] == [100] * 12 + [97]
    assert {batch.steps for batch in seen} == {1, 2, 3}
    factors = torch.cat([batch.factors for batch in seen])
    assert 0.8 <= factors.min() < 0.82
    assert 1.18 < factors.max() <= 1.2
    labels = torch.cat([batch.labels for batch in seen])
    assert labels.bincount().tolist() == data.train_labels.bincount().tolist()
    assert torch.cat([batch.images for batch in seen]).sum() == pytest.approx(
        float(data.train_images.sum()), rel=1e-5
    )


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_noise() -> None:
    images = torch.full((400, 8, 8), 0.5)
    noisy = add_noise(images, 0.1, generator())
    assert float((noisy - images).std()) == pytest.approx(0.1, rel=0.05)
    assert (
        0
        <= float(add_noise(images, 2.0, generator()).min())
        <= float(add_noise(images, 2.0, generator()).max())
        <= 1
    )
    torch.testing.assert_close(add_noise(images, 0.0, generator()), images, rtol=0, atol=0)


@pytest.mark.parametrize("side", [8, 28])
def test_patch(side: int) -> None:
    images = torch.ones(300, side, side)
    hidden = occlude(images, 0.5, generator()) == 0
    rows, columns = hidden.any(dim=2), hidden.any(dim=1)
    torch.testing.assert_close(hidden, rows[:, :, None] & columns[:, None, :])  # a rectangle
    for edges in (rows, columns):
        assert set(edges.sum(dim=1).tolist()) <= {side // 2, side // 2 + 1}
        assert bool(edges.any(dim=0).all())  # anywhere
    assert not (occlude(images, 0.0, generator()) == 0).any()
    assert bool((images == 1).all())


def test_corrupt_a_share() -> None:
    images = torch.full((2000, 8, 8), 0.5)
    changed = (corrupt(images, 0.3, 0.4, 0.6, generator()) != images).flatten(1)
    assert float(changed.any(dim=1).double().mean()) == pytest.approx(1 - 0.7 * 0.7, abs=0.05)
    torch.testing.assert_close(corrupt(images, 0.0, 0.4, 0.6, generator()), images, rtol=0, atol=0)


def test_landscape(model: LatentEnergyClassifier, data: ImageData) -> None:
    image = data.test_images[0]
    found = survey(model, image, int(data.test_labels[0]))
    with torch.no_grad():
        result = model(image[None])
        context = model.encoder(image[None])
        first = model.energy(model.start(context), context)
    steps = int(result.steps)
    assert found.energies.shape == (steps + 1,)
    torch.testing.assert_close(
        found.energies[[0, -1]], torch.cat((first, result.energy)), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        found.probabilities[-1], model.logits(result.y)[0].softmax(dim=0), rtol=1e-4, atol=1e-5
    )
    assert len(found.whole.path) == steps + 1
    assert len(found.close.path) == steps
    assert float(found.whole.path[-1, 0]) == pytest.approx(float(result.y.norm()), rel=1e-4)
    for plane in (found.whole, found.close):
        torch.testing.assert_close(plane.path[0], torch.zeros(2))
        assert abs(float(plane.path[-1, 1])) < 1e-4
        assert 0.5 < plane.explained <= 1 + 1e-6
        for k, axis in enumerate((plane.x, plane.y)):
            assert axis[0] < plane.path[:, k].min()
            assert axis[-1] > plane.path[:, k].max()
        # The energy at the grid's point next to the end of the path is about the energy there.
        column = int((plane.x - plane.path[-1, 0]).abs().argmin())
        row = int((plane.y - plane.path[-1, 1]).abs().argmin())
        drop = float(plane.grid.max() - found.energies[-1])
        assert abs(float(plane.grid[row, column] - found.energies[-1])) < 0.02 * drop


def test_landscapes_are_read_as_they_were_written(
    model: LatentEnergyClassifier, data: ImageData, tmp_path: Path
) -> None:
    written = {name: survey(model, data.test_images[i], i) for i, name in enumerate(("easy", "turned"))}
    save(tmp_path / "some.safetensors", written)
    read_again = load(tmp_path / "some.safetensors")
    assert list(read_again) == ["easy", "turned"]
    for name, landscape in written.items():
        assert read_again[name].label == landscape.label
        assert torch.equal(read_again[name].probabilities, landscape.probabilities)
        assert all(
            torch.equal(a, b) for a, b in zip(read_again[name].close[:4], landscape.close[:4], strict=True)
        )
        assert read_again[name].whole.explained == pytest.approx(landscape.whole.explained)


class Rest(nn.Module):
    """Features that lead nowhere."""

    def forward(self, images: Tensor) -> Tensor:
        return images.new_zeros(len(images), 128)


def test_landscape_of_a_straight_path() -> None:
    model = build_model(8)
    model.encoder = Rest()
    with torch.no_grad():
        model.energy.weight_y.zero_()
        model.energy.weight_y[:, 3] = 1.0
    found = survey(model, torch.zeros(8, 8), 3)
    assert bool(found.whole.grid.isfinite().all())
    assert found.whole.explained == pytest.approx(1.0)


def test_compare(model: LatentEnergyClassifier, data: ImageData) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = compare(
        model, data.train_images, data.train_labels, Recipe(epochs=1, batch=500), updates=4, seed=0
    )
    assert (found["updates"], found["updates_per_epoch"]) == (4, 3)
    assert found["difference_of_losses"] < 1e-4
    for what in ("update_ms", "descent_ms"):
        assert min(found[what].values()) > 0
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert model.descend.tol == 1e-3


@pytest.mark.science
@pytest.mark.slow
@pytest.mark.skipif(not MNIST.is_dir(), reason="needs the MNIST files")
def test_mnist_in_one_epoch(tmp_path: Path) -> None:
    report = energy(MNIST, tmp_path, quick=True, held_out=5000, console=Console(file=io.StringIO()))
    assert report["means"]["all"]["accuracy"][0] > 0.9
    assert report["config"]["train"] == 55_000
