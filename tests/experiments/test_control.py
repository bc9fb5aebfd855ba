from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

for extra in ("dm_control", "gymnasium", "matplotlib", "rich", "safetensors", "scipy"):
    pytest.importorskip(extra)
from matplotlib.figure import Figure
from rich.console import Console
from safetensors.torch import load_file

from adaptcomp_ext.experiments.control import control
from adaptcomp_ext.experiments.control.experiment import _cost, _episode, _Found
from adaptcomp_ext.experiments.control.learning import Replay
from adaptcomp_ext.experiments.control.measure import FRAMES, FRAMES_NAME, _Camera, _strip, run_episodes
from adaptcomp_ext.experiments.control.training import Settings, Trainer, preset, train
from adaptcomp_ext.experiments.environments.control import ControlVectorEnv
from adaptcomp_ext.experiments.horizon import horizon
from adaptcomp_ext.experiments.runs import Cell, Results, read_json
from adaptcomp_ext.experiments.style import QUICK
from adaptcomp_ext.experiments.transfer import successor, transfer
from tests.helpers.reports import check_one_seed_report

QUIET = Console(quiet=True)
TINY = {"samples": 32, "elites": 8, "habits": 4, "iterations": 2}


def tiny(**change: object) -> Settings:
    options = {
        "envs": 3,
        "rounds": 4,
        "episode": 12,
        "warm": 1,
        "updates": 1,
        "first_updates": 3,
        "latent": 16,
        "hidden": 16,
    }
    return Settings("pendulum-swingup", **{**options, "planner": TINY, "learning": {"batch": 16}, **change})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("control")
    control("pendulum-swingup", folder, quick=True, console=QUIET)
    return folder


def test_the_report_is_whole(out: Path) -> None:
    report = json.loads((out / "control.json").read_text())
    assert set(report["means"]) == {"always", "value", "never", "random"}
    tables = {table["heading"]: table["rows"] for table in report["tables"]}
    agents = {row["agent"]: row for row in tables["Agents"]}
    assert list(agents) == [
        "plans everywhere",
        "plans where it pays",
        "never plans",
        "plans as often at random",
    ]
    always, never = (agents[name]["planned in training, %"] for name in ("plans everywhere", "never plans"))
    assert always[0] == 1 and never[0] == 0
    gates = tables["The gated agent, made to plan by other gates"]
    assert {row["gate"] for row in gates} == {"value", "kl", "entropy", "random", "always", "never"}
    assert len(tables["The gated agent against others"]) == 2
    assert len(tables["Where the gated agent plans"]) == 2 * 3
    cell = json.loads((out / "cells" / "value-seed-0" / "result.json").read_text())
    settings = report["config"]["settings"]
    assert [p["price"] / settings["price"] for p in cell["prices"]] == [0.0625, 0.125, 0.25, 0.5, 1.0, 2.0]
    tested = next(p for p in cell["prices"] if p["price"] == settings["test_price"])
    assert (tested["return"], tested["rate"]) == (cell["own"]["return"], cell["own"]["rate"])
    assert cell["prices"][0]["rate"] >= cell["prices"][-1]["rate"]
    # What it is tested at is not what it learns at.
    assert (
        float(load_file(out / "cells" / "value-seed-0" / "agent.safetensors")["model.gate.thresholds"][0])
        == settings["price"]
    )
    text = (out / "control.md").read_text()
    for name in ("control.png", "control_episode.png"):
        assert name in text and (out / name).stat().st_size > 10_000
    assert "nan" not in text.lower().replace("planning", "")
    check_one_seed_report(text)
    assert report["quick"] is True and QUICK in text and "not decided: one seed" in text


@pytest.mark.science
def test_the_random_gate_plans_as_often_as_the_value_gate(out: Path) -> None:
    value, random = (
        json.loads((out / "cells" / f"{n}-seed-0" / "result.json").read_text()) for n in ("value", "random")
    )
    for ours, theirs in zip(value["history"], random["history"], strict=True):
        assert abs(ours["rate"] - theirs["rate"]) < 0.1


def test_a_killed_training_ends_as_one_that_was_not(tmp_path: Path) -> None:
    settings = tiny()

    def run(folder: Path, stops: tuple[int, ...]) -> dict[str, torch.Tensor]:
        folder.mkdir(exist_ok=True)
        torch.manual_seed(3)
        for stop in stops:
            # What happens after the last save is lost with the process, and done again.
            trainer = Trainer(settings, 3, folder)
            while len(trainer.history) < stop:
                trainer.round()
                trainer.save()
            if stop < settings.rounds:
                trainer.round()
            torch.manual_seed(99)  # whatever another process would have
        return load_file(folder / "agent.safetensors")

    whole, pieces = run(tmp_path / "whole", (4,)), run(tmp_path / "pieces", (1, 2, 4))
    assert set(whole) == set(pieces)
    for name in whole:
        assert torch.equal(whole[name], pieces[name]), name
    parts = [load_file(tmp_path / which / "past-00003.safetensors") for which in ("whole", "pieces")]
    assert all(torch.equal(parts[0][k].nan_to_num(9.0), parts[1][k].nan_to_num(9.0)) for k in parts[0])


def test_what_was_written_halfway_does_not_count(tmp_path: Path) -> None:
    settings = tiny()
    torch.manual_seed(0)
    trainer = Trainer(settings, 0, tmp_path)
    for _ in range(2):
        trainer.round()
        trainer.save()
    # The past of a third round is there, its checkpoint is not: as if killed between the two.
    shutil.copy(tmp_path / "past-00002.safetensors", tmp_path / "past-00003.safetensors")
    again = Trainer(settings, 0, tmp_path)
    assert len(again.history) == 2 and again.replay.length == 2 * settings.episode
    for _ in range(2):
        again.round()
    again.save()  # both rounds in one part, where the one before was cut after the first of them
    last = Trainer(settings, 0, tmp_path)
    assert len(last.history) == 4 and last.replay.length == 4 * settings.episode
    assert torch.equal(last.replay.observation, again.replay.observation)


def test_training_is_saved_and_counted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trainer = Trainer(tiny(gate="always"), 0, tmp_path)
    seen: list[int] = []
    history = train(trainer, seen.append, every=0.0)
    assert seen == [1, 2, 3, 4] and len(history) == 4
    assert [record["rate"] for record in history] == [0, 1, 1, 1]
    assert (tmp_path / "agent.safetensors").is_file() and len(list(tmp_path.glob("past-*.safetensors"))) == 4
    assert history[1]["iterations"] > 0 and all(record["broken"] == 0 for record in history)


def test_a_broken_episode_is_counted_and_the_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    trainer = Trainer(tiny(), 0)
    trainer.round()
    real, calls = trainer.env._advance, 0

    def advance(i: int, action):
        nonlocal calls
        calls += 1
        return (None, 0.0) if calls == 5 else real(i, action)

    monkeypatch.setattr(trainer.env, "_advance", advance)
    record = trainer.round()
    assert record["broken"] == 1
    assert int(trainer.replay.ended[trainer.settings.episode : 2 * trainer.settings.episode].sum()) == 3 + 1
    assert torch.isfinite(trainer.replay.observation[: trainer.replay.length]).all()
    assert trainer.round()["broken"] == 0


def test_stretches_stay_within_episodes() -> None:
    replay = Replay(60, 2, 1, 1)
    for t in range(60):
        at = torch.full((2, 1), float(t))
        blank = torch.zeros(2)
        replay.add(
            observation=at,
            following=at + 1,
            action=at,
            reward=blank + t,
            ended=torch.tensor([t % 7 == 6, t % 11 == 10]),
            mean=at,
            std=at,
            gain=blank + torch.nan if t % 2 else blank + t,
            divergence=blank,
            glance=2 * at[:, 0],
        )
    torch.manual_seed(0)
    piece = replay.sample(500, 4)
    steps = piece.observation[:, :, 0]
    assert bool((steps.diff(dim=1) == 1).all())
    begin = piece.reward[:, 0]
    cut = {7: (begin % 7 > 3), 11: (begin % 11 > 7)}
    # A start fits at least one of the two environments that it may come from.
    assert not bool((cut[7] & cut[11]).any()) and begin.unique().numel() > 30
    some = replay.planned(20, 100)
    assert (
        some is not None
        and bool((some.observation[:, 0] == some.gain).all())
        and float(some.gain.min()) >= 40
    )
    assert torch.equal(some.mean[:, 0], some.gain) and torch.equal(some.std, some.mean)
    assert torch.equal(some.glance, 2 * some.gain)
    assert Replay(5, 2, 1, 1).planned(5, 10) is None


def test_an_episode_shorter_than_a_stretch_is_drawn_whole() -> None:
    replay = Replay(40, 2, 1, 1)
    for t in range(40):
        at = torch.full((2, 1), float(t + 1))
        blank = torch.zeros(2)
        # One environment has episodes of three steps, one of forty; in the last step of an episode lies its
        # reward.
        ended = torch.tensor([t % 3 == 2, t == 39])
        rest = {"mean": at, "std": at, "gain": blank, "divergence": blank, "glance": blank}
        replay.add(observation=at, following=at + 100, action=at, reward=ended.float(), ended=ended, **rest)
    torch.manual_seed(0)
    piece = replay.sample(400, 5)
    short = piece.length < 5
    assert set(piece.length.tolist()) == {3, 5} and 40 < int(short.sum()) < 200
    first = piece.observation[short, :, 0]
    begin = first[:, 0]
    assert bool(((begin - 1) % 3 == 0).all()) and begin.unique().numel() > 8
    # Three steps, then what was seen last, after which nothing was done and nothing came.
    assert torch.equal(first - begin[:, None], torch.tensor([0.0, 1, 2, 102, 102, 102]).expand(len(first), 6))
    assert torch.equal(piece.action[short][:, 3:], torch.zeros(len(first), 2, 1))
    assert torch.equal(piece.reward[short], torch.tensor([0.0, 0, 1, 0, 0]).expand(len(first), 5))
    # The last reward of the long episode is learned from as well.
    assert bool((piece.reward[~short].sum(1) <= 1).all()) and bool((piece.reward[~short][:, 4] == 1).any())


def test_episodes_of_two_steps_are_learned_from() -> None:
    torch.manual_seed(0)
    trainer = Trainer(tiny(episode=2, rounds=6, warm=3), 0)
    for _ in range(4):
        record = trainer.round()
    assert (
        trainer.learner.settings.horizon > 2
        and record["consistency"] > 0
        and np.isfinite(record["value error"])
    )


def test_a_cut_episode_goes_on_from_its_last_observation() -> None:
    # All that is to come is worth 1 by the slow values, and nothing is rewarded: values are worth what is
    # discounted to the end.
    trainer = Trainer(tiny(episode=3), 0)
    trainer.round()
    trainer.round()
    replay, learner, world = trainer.replay, trainer.learner, trainer.agent.world
    replay.reward.zero_()
    seen: list[torch.Tensor] = []
    real, cut = world.value, world.encode(replay.following[replay.ended]).detach()

    def value(z: torch.Tensor, action: torch.Tensor, slow: bool = False) -> torch.Tensor:
        if slow:
            seen.append(z)
            return torch.ones(2, len(z))
        out = real(z, action)
        discounts = learner.settings.discount ** torch.tensor([3.0, 2, 1, 1, 1])
        return 0 * out + discounts.repeat(len(z) // 5)

    world.value = value  # type: ignore[method-assign]
    errors = learner.update(replay)
    assert float(errors[2]) < 1e-12
    # The states from which it goes on are those in which the episodes were cut, not the next ones' first.
    assert len(seen[0]) == 16 and all(bool((cut - z).abs().amax(1).min() < 1e-5) for z in seen[0])


def test_planning_and_evaluation_leave_the_environments_random_numbers_alone() -> None:
    torch.manual_seed(0)
    trainer = Trainer(tiny(gate="always"), 0)
    trainer.round()
    before = trainer.env.random_state()
    observation = torch.from_numpy(trainer.env._observation)
    trainer.agent.act(observation, explore=True)
    run_episodes(trainer.agent, "pendulum-swingup", 2, 7, length=5)
    assert trainer.env.random_state() == before


def test_evaluation_takes_mean_actions(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    trainer = Trainer(tiny(gate="never"), 0)
    trainer.round()
    taken: list[np.ndarray] = []
    real = ControlVectorEnv.step
    monkeypatch.setattr(
        ControlVectorEnv, "step", lambda env, action: (taken.append(action.copy()), real(env, action))[1]
    )
    run_episodes(trainer.agent, "pendulum-swingup", 2, 7, length=4)
    world, env = trainer.agent.world, ControlVectorEnv("pendulum-swingup", 2, max_steps=4)
    observation, _ = env.reset(seed=7)
    for action in taken:
        mean = (
            world.habit.parameters_of(world.encode(torch.from_numpy(observation)))[0].tanh().detach().numpy()
        )
        assert np.array_equal(action, mean)
        observation = real(env, mean)[0]


def test_episodes_are_repeatable_and_leave_the_agent_alone() -> None:
    torch.manual_seed(0)
    trainer = Trainer(tiny(), 0)
    trainer.round()
    before = torch.get_rng_state()
    first, second = (run_episodes(trainer.agent, "pendulum-swingup", 2, 7, "random", 80) for _ in range(2))
    assert torch.equal(first.returns, second.returns) and torch.equal(first.called, second.called)
    assert torch.equal(before, torch.get_rng_state()) and trainer.agent.gate.kind == "value"
    assert first.called.shape == (80, 2) and 0.35 < first.rate < 0.65
    assert bool((first.iterations[~first.called] == 0).all()) and bool(
        (first.iterations[first.called] > 0).all()
    )
    assert bool(first.gain[~first.called].isnan().all()) and bool(first.gain[first.called].isfinite().all())


def test_pictures_where_rendering_is_possible(tmp_path: Path) -> None:
    strip = {"reward": [0.0, 1.0] * 20, "iterations": [0, 3] * 20}
    frames = np.random.default_rng(0).integers(0, 255, (8, 18, 24, 3), dtype=np.uint8)
    for name, pictures in (("with.png", list(frames)), ("without.png", [])):
        figure = Figure(layout="constrained")
        _episode(figure, strip, pictures)
        figure.savefig(tmp_path / name)
    assert (tmp_path / "with.png").stat().st_size > (tmp_path / "without.png").stat().st_size


def test_the_episode_that_is_drawn_is_the_one_planned_most(tmp_path: Path) -> None:
    trainer = Trainer(tiny(), 0)
    camera = _Camera(80)
    episodes = run_episodes(trainer.agent, "pendulum-swingup", 3, 7, "random", 80, camera)
    iterations = torch.zeros_like(episodes.iterations)
    iterations[5:7, 1] = 3
    strip = _strip(episodes._replace(iterations=iterations), camera, tmp_path)
    assert strip["episode"] == 1 and strip["iterations"] == iterations[:, 1].tolist()
    assert strip["reward"] == episodes.reward[:, 1].tolist()
    if camera.pictures:
        assert len(camera.pictures) == FRAMES
        assert np.array_equal(np.load(tmp_path / FRAMES_NAME)[3], camera.pictures[3][1])


def test_steps_become_whole_rounds() -> None:
    assert preset("walker-walk", steps=1).rounds == preset("walker-walk").warm + 1
    settings = preset("pendulum-swingup", steps=100_000)
    assert (
        (settings.rounds - 1) * settings.envs * settings.episode * 2
        < 100_000
        <= settings.rounds * settings.envs * 200
    )


def test_a_price_is_that_of_evaluations_too_unless_these_have_their_own() -> None:
    def prices(**given: float) -> tuple[float, float | None]:
        what = control.setup("pendulum-swingup", agents=["value"], quick=True, **given)
        return what.config["settings"]["price"], what.config["settings"]["test_price"]

    own = preset("pendulum-swingup")
    assert prices() == (own.price, own.test_price)
    assert prices(price=0.5) == (0.5, None) and prices(price=0.5, test_price=0.2) == (0.5, 0.2)
    assert prices(test_price=0.2) == (own.price, 0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "walker-swim"}, "task: expected one of cheetah-run"),
        ({"agents": ["sometimes"]}, "agents: expected some of always, value, never, random, got sometimes"),
        ({"agents": ["random"]}, "agents: expected value with random"),
    ],
)
def test_bad_options_are_named(change: dict[str, object], message: str, tmp_path: Path) -> None:
    options = {"task": "pendulum-swingup", "agents": ["value"], **change}
    with pytest.raises(ValueError, match=message):
        control(**options, out=tmp_path / "out", quick=True, console=QUIET)
    assert not (tmp_path / "out").exists()


def test_horizons(tmp_path: Path) -> None:
    report = horizon("pendulum-swingup", tmp_path, quick=True, console=QUIET)
    found = report["means"]["all"]
    assert list(found["fixed"]) == ["0", "1", "2", "4", "8"]
    for name, row in found["fixed"].items():
        assert row["horizon"].mean == int(name) and row["share"][name].mean == 1
    cheap, dear = (found["adaptive"][p]["steps imagined"].mean for p in list(found["adaptive"])[:2])
    assert cheap >= dear
    # The report shows what was measured: every horizon, and what each level gains.
    horizons, levels, _ = (table["rows"] for table in report["tables"])
    assert [row["mean H"].mean for row in horizons[:5]] == [0, 1, 2, 4, 8]
    assert [row["return"] for row in horizons[5:]] == [row["return"] for row in found["adaptive"].values()]
    assert [row["mean gain"] for row in levels] == found["mean gain"]
    assert (tmp_path / "horizon.png").stat().st_size > 10_000 and "nan" not in (
        tmp_path / "horizon.md"
    ).read_text()
    check_one_seed_report((tmp_path / "horizon.md").read_text())


def test_what_is_kept() -> None:
    torch.manual_seed(0)
    trainer = Trainer(tiny(), 0)
    trainer.round()
    old = trainer.agent
    torch.manual_seed(1)
    habit, everything, nothing = (successor(old, tiny(), keep) for keep in ("habit", "everything", "nothing"))

    def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
        return all(
            torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
        )

    assert same(old, everything)
    assert same(old.world.habit, habit.world.habit) and same(old.world.encoder, habit.world.encoder)
    for part in ("dynamics", "q"):
        assert not same(getattr(old.world, part), getattr(habit.world, part))
    assert not same(old.world.habit, nothing.world.habit)


def test_transfer(tmp_path: Path) -> None:
    report = transfer(tmp_path, steps=500, orders=2, quick=True, console=QUIET)
    cells = {path.parent.name: read_json(path)["tasks"] for path in tmp_path.glob("cells/*/result.json")}
    assert len(cells) == 3 + 2 * 2
    # What the orders begin with was learned once, and is what they go on from.
    for keep in ("habit", "everything"):
        assert cells[f"{keep}-stand-walk-run-seed-0"][0] == cells["scratch-walker-stand-seed-0"][0]
        assert cells[f"{keep}-walk-run-stand-seed-0"][0] == cells["scratch-walker-walk-seed-0"][0]
    assert cells["habit-stand-walk-run-seed-0"][1] != cells["everything-stand-walk-run-seed-0"][1]
    # The regret is that of both orders; the differences are those from the same tasks, learned from scratch.
    scratch, *kept = report["tables"][0]["rows"]
    alone = {task: cells[f"scratch-walker-{task}-seed-0"][0] for task in ("stand", "walk", "run")}
    assert scratch["regret"].mean == pytest.approx(np.mean([task["regret"] for task in alone.values()]))
    for keep, row in zip(("habit", "everything"), kept, strict=True):
        orders = {name: cells[f"{keep}-{name}-seed-0"] for name in ("stand-walk-run", "walk-run-stand")}
        assert row["regret"].mean == pytest.approx(
            np.mean([task["regret"] for tasks in orders.values() for task in tasks])
        )
        assert row["− scratch"].mean == pytest.approx(row["regret"].mean - scratch["regret"].mean)
        for header, key in (("2nd and 3rd task", "regret"), ("their first quarter", "early regret")):
            differences = [
                task[key] - alone[word][key]
                for name, tasks in orders.items()
                for word, task in list(zip(name.split("-"), tasks, strict=True))[1:]
            ]
            assert row[header].mean == pytest.approx(np.mean(differences))
    assert (tmp_path / "transfer.png").stat().st_size > 10_000 and "nan" not in (
        tmp_path / "transfer.md"
    ).read_text()
    check_one_seed_report((tmp_path / "transfer.md").read_text())
    with pytest.raises(ValueError, match="orders: expected a number <= 6, got 7"):
        transfer(tmp_path / "other", orders=7, quick=True, console=QUIET)
    assert not (tmp_path / "other").exists()


def test_values_learn_from_targets_in_their_bounds() -> None:
    # No reward, and slow values that disagree about nothing: the least of them, and anything below 0, would
    # be learned as a loss.
    trainer = Trainer(tiny(), 0)
    trainer.round()
    trainer.replay.reward.zero_()
    world = trainer.agent.world
    with torch.no_grad():
        for member, bias in enumerate((-0.5, 0.4)):
            world.slow_q.biases[-1][member] = bias
    assert float(trainer.learner.update(trainer.replay)[2]) == 0.0


def test_the_gate_learns_only_where_it_is_asked_to() -> None:
    trainer = Trainer(tiny(), 0)
    trainer.round()
    trainer.round()
    gate, habit = trainer.agent.gate.net[0].weight, trainer.agent.world.habit.out.weight
    before, other = gate.clone(), habit.clone()
    found = trainer.learner.update(trainer.replay, gate_too=False)
    assert torch.equal(gate, before) and not torch.equal(habit, other)
    assert found.isnan().tolist() == [False, False, False, False, True]
    found = trainer.learner.update(trainer.replay)
    assert not torch.equal(gate, before) and bool(found.isfinite().all())


def test_returns_that_hardly_differ_are_drawn_close_together() -> None:
    def agent(value: float) -> dict[str, object]:
        training = {"act": value, "simulate": 0.0, "learn": 0.0}
        return {"own": {"return": value}, "training": training, "checks": []}

    cells = [Cell(name, {"settings": {"gate": name}}, 0) for name in ("always", "never")]
    found = {"always": agent(904.0), "never": agent(904.8)}
    axes = Figure().subplots()
    _cost(axes, _Found(Results(cells, found, {"agents": list(found)})))
    low, high = axes.get_ylim()
    assert low == 0 and 1000 < high < 1100
