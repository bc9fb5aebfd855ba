"""The halting benchmark on a tiny grid: it verifies its contenders, counts its rows, and writes its files."""

from __future__ import annotations

import json

import pytest
import torch

import adaptcomp_ext as ac

pytest.importorskip("rich")

from adaptcomp_ext.experiments.bench import bench_halting
from adaptcomp_ext.experiments.bench.agreement import DisagreementError
from adaptcomp_ext.experiments.bench.compiling import CompileCache
from adaptcomp_ext.experiments.bench.contenders import forward_contenders, limit
from adaptcomp_ext.experiments.bench.grid import GRIDS, REQUIRED_SIZES, is_required, select
from adaptcomp_ext.experiments.bench.halting import run
from adaptcomp_ext.experiments.bench.measure import measure, verify
from adaptcomp_ext.experiments.bench.memory import saved_bytes
from adaptcomp_ext.experiments.bench.problem import POLICIES, Config, make_model, make_problem
from adaptcomp_ext.experiments.bench.report import markdown
from adaptcomp_ext.experiments.bench.schedule import active_counts, scripted_steps
from adaptcomp_ext.experiments.bench.timing import interleave

CPU = torch.device("cpu")


def tiny(**changes):
    return Config(
        **{
            "core": "gru",
            "batch": 12,
            "dim": 8,
            "max_steps": 4,
            "fraction": 0.5,
            "compiled": False,
            **changes,
        }
    )


def problem_of(config):
    return make_problem(config, make_model(config, CPU, 0), CPU, 0)


@pytest.mark.parametrize("fraction", [0.125, 0.25, 0.5, 0.9, 1.0])
def test_scripted_steps_have_the_wanted_mean(fraction):
    steps = scripted_steps(1024, 16, fraction, seed=3)
    assert steps.min() >= 1 and steps.max() <= 16
    assert steps.double().mean() / 16 == pytest.approx(fraction, rel=0.01)
    assert torch.equal(steps, scripted_steps(1024, 16, fraction, seed=3))


def test_scripted_steps_refuse_less_than_one_step():
    with pytest.raises(ValueError, match="fraction"):
        scripted_steps(8, 8, 0.1)


def test_active_counts():
    assert active_counts(torch.tensor([1, 3, 3, 2])) == [4, 3, 2]


@pytest.mark.parametrize("training", [False, True], ids=["infer", "train"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("core", ["gru", "mlp", "transformer"])
def test_contenders_agree_and_the_limit_counts_the_true_rows(core, policy, training):
    row = measure(
        tiny(core=core, policy=policy, training=training),
        make_model(tiny(core=core, policy=policy, training=training), CPU, 0),
        *(CPU, 0, 0.0, None),
    )
    assert row["error"] is None
    assert {"masked", "boolean", "auto", "compact", "mask", "limit"} == set(row["times_ms"])
    assert row["rows"]["active"][0] == 12 and sum(row["rows"]["active"]) == row["rows"]["row_steps"]
    assert "gradient" in row["agreement"] or not training


@pytest.mark.parametrize("policy", POLICIES)
def test_the_limit_runs_core_and_head_once_per_step_on_the_active_rows(policy):
    problem = problem_of(tiny(policy=policy))
    seen = []
    problem.step.register_forward_hook(lambda module, args, out: seen.append(out[0].shape[0]))
    call, counts = limit(problem)
    call()
    assert seen == counts == active_counts(problem.steps)


def test_ours_steps_only_active_rows_when_compacting():
    problem = problem_of(tiny())
    seen = []
    problem.step.register_forward_hook(lambda module, args, out: seen.append(out[0].shape[0]))
    with torch.inference_mode():
        forward_contenders(problem, None)["compact"]()
    assert seen == active_counts(problem.steps)


def test_a_wrong_result_is_an_error():
    problem = problem_of(tiny())
    with torch.inference_mode():
        outcomes = {name: call() for name, call in forward_contenders(problem, None).items()}
        outcomes["boolean"] = outcomes["boolean"]._replace(output=outcomes["boolean"].output + 0.1)
        with pytest.raises(DisagreementError, match="boolean"):
            verify(problem, outcomes, {})


def test_saved_bytes_counts_distinct_storages():
    w = torch.ones(10, requires_grad=True)
    x = torch.ones(10)
    assert saved_bytes(lambda: (w * x) * x, ignore=[w]) == 40
    assert saved_bytes(lambda: w.exp().exp()) == 80


def test_ours_keeps_memory_for_the_steps_taken():
    problem = problem_of(tiny(batch=64, dim=32, max_steps=16, fraction=0.25, training=True))
    calls = forward_contenders(problem, None)
    ignore = [*problem.leaves, problem.steps]
    masked, ours = (saved_bytes(calls[name], ignore) for name in ("masked", "auto"))
    assert ours < 0.5 * masked


def test_interleave_gives_as_many_repeats_to_all():
    order = []
    times = interleave(
        {name: lambda name=name: order.append(name) for name in "abc"},
        lambda call: (call(), 1.0)[1],
        0.0,
        fewest=4,
    )
    assert {len(values) for values in times.values()} == {4}
    # A short call is made twice, the first time untimed; and the order is drawn anew for each repeat.
    known = order[3:]  # nothing is known to be short before it has run once
    assert known[::2] == known[1::2]
    rounds = ["".join(known[i : i + 6 : 2]) for i in range(0, len(known), 6)]
    assert {"".join(sorted(r)) for r in rounds} == {"abc"} and len(set(rounds[-4:])) > 1


def test_grids_hold_the_required_points_and_every_axis():
    configs = set(GRIDS["default"]())
    assert set(GRIDS["required"]()) <= configs
    assert sum(is_required(c) for c in configs) == 3 * len(REQUIRED_SIZES) + 4
    for axis, values in {
        "dim": {64, 128, 256, 1024},
        "max_steps": {8, 16, 32},
        "fraction": {0.1, 0.25, 0.5, 1.0},
    }.items():
        for value in values:
            assert sum(getattr(c, axis) == value for c in configs) >= 3, (axis, value)
    chosen, skipped = select(configs, ("gru",), flops=1e9, limit_seconds=0.01)
    assert all(is_required(c) for c in set(GRIDS["required"]()) & set(chosen)) and skipped
    assert {c.core for c in chosen} == {"gru"}


def test_run_writes_json_markdown_and_figure_and_resumes(tmp_path):
    pytest.importorskip("matplotlib")
    configs = [Config("gru", 32, 64, fraction=f, compiled=False) for f in (0.25, 1.0)]
    settings = {"seconds": 0.0, "memory": False, "progress": False}
    run(configs[:1], tmp_path, CPU, **settings)
    first = json.loads((tmp_path / "bench_halting.json").read_text())
    report = run(configs, tmp_path, CPU, resume=True, **settings)
    stored = json.loads((tmp_path / "bench_halting.json").read_text())
    assert len(stored["rows"]) == 2 and stored["rows"][0] == first["rows"][0]
    assert stored["versions"]["torch"] == torch.__version__
    assert stored["versions"]["build"]["version"] == ac.__version__
    for key in ("auto/limit", "auto/best", "masked/auto"):
        assert stored["rows"][1]["ratios"][key] > 0
    assert (tmp_path / "bench_halting.md").read_text() == markdown(report)
    assert (tmp_path / "bench_halting.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_compiled_contenders_agree(tmp_path):
    config = tiny(policy="act", dim=16, batch=32)
    cache = CompileCache()
    row = measure(config, make_model(config, CPU, 0), CPU, 0, 0.0, cache)
    assert row["error"] is None
    assert {"masked_compile", "auto_compile"} <= set(row["times_ms"])
    assert set(cache.seconds) == {"gru/16/act/infer/masked_compile", "gru/16/act/infer/auto_compile"}


@pytest.mark.parametrize("bad", [{"cores": "gru,lstm"}, {"grid": "huge"}, {"device": "cuda"}])
def test_bad_options_are_named(bad, tmp_path):
    if bad == {"device": "cuda"} and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=next(iter(bad))):
        bench_halting(out=str(tmp_path / "out"), **bad)
    assert not (tmp_path / "out").exists()
