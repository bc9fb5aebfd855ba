"""The energy benchmark on a tiny grid: forms agree, rows stop, ratios are right, files are written."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch

import adaptcomp_ext as ac
from adaptcomp_ext.experiments.bench import bench_energy, energy, harness
from adaptcomp_ext.experiments.bench.energy import (
    DEFAULT,
    LEAST,
    PRODUCT_FLOPS,
    QUICK,
    SIZES,
    TOLERANCE,
    EnergyBenchmark,
    at,
    judge,
    memory_rows,
    ratios,
    verify,
)
from adaptcomp_ext.experiments.bench.energy_forms import (
    STEP_SIZE,
    Config,
    Outcome,
    forms,
    make_problem,
    training_calls,
    training_losses,
)
from adaptcomp_ext.experiments.bench.halting_forms import scripted_steps
from adaptcomp_ext.experiments.bench.harness import (
    CompileCache,
    DisagreementError,
    compare_gradients,
    kept_and_peak,
)
from adaptcomp_ext.reference.mlp_energy import ACTIVATIONS

CPU = torch.device("cpu")


@pytest.fixture
def small_product(monkeypatch):
    monkeypatch.setattr(energy, "PRODUCT", 32)


def benchmark(out="results", **options):
    options = {"seconds": 0.1, "memory": False, "compiled": False, "progress": False, **options}
    return EnergyBenchmark(EnergyBenchmark.Options(out=str(out), **options))


def tiny(mode="all", **changes):
    return Config(
        **{"mode": mode, "batch": 12, "context": 5, "dim": 6, "hidden": (24,), "steps": 8, **changes}
    )


def outcomes_of(config, cache=None):
    problem = make_problem(config, CPU, 0)
    return problem, {name: Outcome(*call()) for name, call in forms(problem, cache).items()}


@pytest.mark.parametrize(
    "config",
    [
        *(tiny(activation=activation) for activation in ACTIVATIONS),
        *(tiny(activation=activation, hidden=(16, 9)) for activation in ACTIVATIONS),
        tiny(kind="hopfield", context=0, hidden=(11,)),
        tiny(kind="quadratic", context=6, hidden=()),
        *(tiny("stop", activation=activation, batch=40) for activation in ACTIVATIONS),
        tiny("stop", hidden=(16, 9)),
    ],
    ids=lambda config: config.label,
)
def test_forms_agree_with_the_float64_descent(config):
    problem, outcomes = outcomes_of(config)
    assert verify(problem, outcomes) < 1e-5
    assert {"eager", "analytic", "generic", "kernel"} <= set(outcomes)
    with ac.reference_kernels(), torch.no_grad():
        double = problem.energy.double()
        stop = "gradient" if config.mode == "stop" else "energy"
        descent = ac.EnergyDescent(double, STEP_SIZE, config.steps, problem.tol, stop)
        want = descent(problem.y0.double(), *(c.double() for c in problem.context))
    torch.testing.assert_close(outcomes["eager"].y.double(), want.y, rtol=1e-4, atol=1e-4)
    if config.mode == "stop":
        assert torch.equal(want.steps, problem.steps)
        assert torch.equal(problem.steps, scripted_steps(config.batch, config.steps, 0.25, 0))


def test_training_forms_agree():
    problem = make_problem(tiny("train"), CPU, 0)
    gradients = {name: call() for name, call in training_calls(problem).items()}
    assert set(gradients) == {"eager", "analytic", "generic", "kernel"}
    assert compare_gradients(gradients, "eager", TOLERANCE) < 1e-5
    assert len(gradients["eager"]) == len(list(problem.energy.parameters())) + 2
    gradients["generic"] = tuple(g * 1.01 for g in gradients["generic"])
    with pytest.raises(DisagreementError, match="generic: a gradient"):
        compare_gradients(gradients, "eager", TOLERANCE)


def test_a_wrong_result_is_refused(monkeypatch, small_product):
    problem, outcomes = outcomes_of(tiny("stop"))
    with pytest.raises(DisagreementError, match="kernel: y differs"):
        verify(problem, {**outcomes, "kernel": outcomes["kernel"]._replace(y=outcomes["kernel"].y * 1.001)})
    with pytest.raises(DisagreementError, match="generic: rows converged"):
        verify(
            problem,
            {**outcomes, "generic": outcomes["generic"]._replace(steps=outcomes["generic"].steps + 1)},
        )
    wrong = {**outcomes, "eager": outcomes["eager"]._replace(y=outcomes["eager"].y * float("nan"))}
    monkeypatch.setattr(energy, "forms", lambda *_: {name: lambda o=o: o for name, o in wrong.items()})
    row = benchmark().measure(tiny("stop"))
    assert "differs from the eager form by nan" in row["error"]
    assert "times_ms" not in row


def test_ratios_are_medians_over_the_rounds():
    times = {
        "eager": [10.0, 40.0, 90.0],
        "generic": [5.0, 80.0, 45.0],
        "kernel": [1.0, 2.0, 3.0],
        "matmul": [4.0, 4.0, 3.0],
    }
    found = ratios(times, PRODUCT_FLOPS / 4)
    assert found == {"eager/kernel": 20.0, "generic/kernel": 15.0, "eager/generic": 2.0, "kernel/matmul": 0.5}
    del times["matmul"]
    assert "kernel/matmul" not in ratios(times, 1.0)


def test_flops():
    assert at("all", 0).flops == 4 * 16 * 32 * 128 * 20
    assert at("all", 0, hidden=(128, 64)).flops == 4 * 16 * (32 * 128 + 128 * 64) * 20
    assert at("all", 0, kind="quadratic", hidden=()).flops == 2 * 16 * 32 * 32 * 20


def row_of(config, **found):
    return {
        "config": asdict(config),
        "label": config.label,
        "error": None,
        "ratios": {"eager/generic": 1.5, **found},
    }


def test_bars():
    rows = [
        row_of(at("all", 0), **{"eager/kernel": 20.0, "compiled/kernel": 2.9}),
        row_of(at("all", 0, activation="tanh"), **{"eager/kernel": 1.0}),
        row_of(at("all", 2), **{"kernel/matmul": 0.7, "eager/generic": 0.9}),
        row_of(at("train", 1), **{"eager/kernel": 6.0, "eager/generic": 0.1}),
        {**row_of(at("stop", 0)), "error": "kernel: y differs"},
    ]
    memory = [
        {"size": list(SIZES[1]), "steps": n, "points": 100 * n, "bytes": {"kernel": {"kept": 50 + 110 * n}}}
        for n in (5, 40)
    ]
    verdicts = judge(rows, memory)
    assert [(v["found"], v["passed"]) for v in verdicts] == [
        *((20.0, True), (2.9, False), (0.7, True), (6.0, True)),  # in the order of the bars
        (0.9, False),  # of the generic form, training apart
        (1.1, False),  # bytes kept per byte of points
    ]
    assert verdicts[4]["where"] == at("all", 2).label
    assert [sum(least is not None for least in bars) for bars in LEAST.values()] == [4, 2, 2, 3, 3, 2]


def test_the_kernel_keeps_the_points_and_the_loop_its_graph():
    configs = [tiny("train", batch=32, dim=16, hidden=(32,), steps=steps) for steps in (5, 10, 20)]
    rows = list(memory_rows(CPU, 0, configs))
    assert [row["points"] for row in rows] == [4 * 32 * 16 * n for n in (5, 10, 20)]
    for few, many in pairwise(rows):
        points = many["points"] - few["points"]
        more = {name: many["bytes"][name]["kept"] - few["bytes"][name]["kept"] for name in many["bytes"]}
        assert points <= more["kernel"] <= 1.1 * points
        assert more["eager"] > 5 * points
    problem = make_problem(tiny("train"), CPU, 0)
    found = kept_and_peak(training_losses(problem)["kernel"], problem.leaves)
    assert found["peak"] >= found["kept"] >= 4 * problem.y0.numel() * 8


def test_grids():
    configs = DEFAULT
    barred = {
        at(mode, size) for (_, mode, _), bars in LEAST.items() for size, least in enumerate(bars) if least
    }
    assert barred <= set(configs)
    assert {config.kind for config in configs} == {"mlp", "hopfield", "quadratic"}
    assert {config.activation for config in configs} == set(ACTIVATIONS)
    assert sum(config.compiled and config.mode != "train" for config in QUICK) == 1


def test_run_writes_json_markdown_and_figure_and_resumes(tmp_path, capsys, small_product):
    pytest.importorskip("matplotlib")
    configs = [tiny(), tiny("stop"), tiny("train"), tiny(kind="quadratic", context=6, hidden=())]
    report = benchmark(tmp_path).run(configs)
    stored = json.loads((tmp_path / "bench_energy.json").read_text())
    assert stored == json.loads(json.dumps(report))
    assert stored["compiler"] == "not wanted"
    assert [row["config"]["mode"] for row in stored["rows"]] == ["all", "stop", "train", "all"]
    assert stored["rows"][1]["steps"]["mean"] == pytest.approx(2, abs=0.1)
    for row in stored["rows"]:
        assert set(row["times_ms"]) >= {"eager", "analytic", "generic", "kernel"}
        assert row["agreement"] < 1e-4
        assert row["ratios"]["eager/kernel"] > 0
    written = (tmp_path / "bench_energy.md").read_text()
    assert written == EnergyBenchmark.markdown(stored) == EnergyBenchmark.markdown(report)
    assert stored["versions"]["build"]["instruction_set"] == ac.build_info()["instruction_set"]
    assert "; kernels with " in written.splitlines()[2]
    assert f", torch with {torch.backends.cpu.get_cpu_capability()}" in written.splitlines()[2]
    for heading in (
        "All rows, all steps",
        "Rows that stop",
        "Training",
        "Rate of the arithmetic",
        "The bars",
    ):
        assert f"## {heading}" in written
    assert "The compiled baseline was left out: not wanted." in written
    assert (tmp_path / "bench_energy.png").stat().st_size > 1000
    again = benchmark(tmp_path, resume=True).run([*configs, tiny(batch=3)])
    assert again["rows"][:4] == stored["rows"] and len(again["rows"]) == 5
    assert "eager autograd / kernel" in capsys.readouterr().out


def test_disagreement_ends_in_an_error_after_writing(tmp_path, monkeypatch, small_product):
    monkeypatch.setattr(energy, "TOLERANCE", -1.0)
    with pytest.raises(
        RuntimeError, match=r"results disagree:\nall mlp silu B=12 .* differs from the eager form"
    ):
        benchmark(tmp_path).run([tiny()])
    assert "## Errors" in (tmp_path / "bench_energy.md").read_text()


def test_without_a_compiler(tmp_path, monkeypatch, small_product):
    def broken(function):
        raise RuntimeError("no C++ compiler\nhere is how to get one")

    monkeypatch.setattr(torch, "compile", broken)
    assert harness.no_compiler(CPU) == "RuntimeError: no C++ compiler"
    report = benchmark(tmp_path, compiled=True).run([tiny()])
    assert "compiled" not in report["rows"][0]["times_ms"]
    assert "left out: RuntimeError: no C++ compiler." in (tmp_path / "bench_energy.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["all", "stop"])
def test_the_compiled_form_agrees(mode):
    problem, outcomes = outcomes_of(tiny(mode), CompileCache())
    assert "compiled" in outcomes
    assert verify(problem, outcomes) < 1e-5


def test_bad_options_are_named(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="device"):
        bench_energy(out=str(tmp_path / "out"), device="cuda")
    assert not (tmp_path / "out").exists()
