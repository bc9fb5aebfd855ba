"""The routing benchmark on a tiny grid: forms agree, ratios are right, options reach the command."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from adaptcomp_ext.experiments.bench import bench_route, route
from adaptcomp_ext.experiments.bench.harness import DisagreementError
from adaptcomp_ext.experiments.bench.route import (
    LABELS,
    Config,
    RouteBenchmark,
    backward,
    forms,
    lower_bound,
    make_problem,
    ratios,
    verify,
)

CPU = torch.device("cpu")


def benchmark(out="results", **options):
    return RouteBenchmark(RouteBenchmark.Options(out=str(out), seconds=0.1, progress=False, **options))


def gradients_of(problem):
    calls = {n: partial(backward, f, problem.leaves, problem.upstream) for n, f in forms(problem).items()}
    return {name: call() for name, call in calls.items()}


def tiny(mode="infer", **changes):
    return Config(**{"mode": mode, "batch": 20, "hidden": 8, "share": 0.25, "dim": 6, **changes})


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_forms_agree_in_float64(mode, share):
    problem = make_problem(tiny(mode, share=share), CPU, 0)
    assert int(problem.mask.sum()) == problem.config.routed == round(20 * share)
    problem.branch.double()
    for name in ("x", "otherwise", "upstream"):
        tensor = getattr(problem, name).detach().double()
        setattr(problem, name, tensor.requires_grad_(mode == "train" and name != "upstream"))
    outputs = {name: (call(),) for name, call in forms(problem).items()}
    assert set(outputs) == set(LABELS)
    found = verify(outputs, gradients_of(problem) if mode == "train" else {})
    assert found["output"] < 1e-12
    assert ("gradient" in found) == (mode == "train")
    assert found.get("gradient", 0.0) < 1e-12


def test_the_lower_bound_is_the_branch_on_the_routed_rows():
    problem = make_problem(tiny(), CPU, 0)
    assert torch.equal(lower_bound(problem)(), problem.branch(problem.x[problem.mask]))
    problem = make_problem(tiny("train"), CPU, 0)
    grads = lower_bound(problem)()
    assert [g.shape for g in grads] == [*(p.shape for p in problem.branch.parameters()), (5, 6)]


def test_a_wrong_result_is_refused(monkeypatch):
    problem = make_problem(tiny("train"), CPU, 0)
    outputs = {name: (call(),) for name, call in forms(problem).items()}
    gradients = gradients_of(problem)
    with pytest.raises(DisagreementError, match="route: the result differs from the masking form"):
        verify({**outputs, "route": (outputs["route"][0] * 1.001,)}, gradients)
    with pytest.raises(DisagreementError, match=r"indexed: a gradient of shape \[8, 6\]"):
        verify(outputs, {**gradients, "indexed": (None, *gradients["indexed"][1:])})
    monkeypatch.setattr(route, "TOLERANCE", -1.0)
    row = benchmark().measure(tiny())
    assert "differs from the masking form" in row["error"]
    assert "times_ms" not in row


def test_ratios_are_medians_over_the_rounds():
    times = {"route": [2.0, 4.0, 9.0], "masking": [4.0, 12.0, 36.0], "limit": [1.0, 2.0, 3.0]}
    assert ratios(times) == {"route/limit": 2.0, "masking/limit": 6.0, "masking/route": 3.0}


def test_grids():
    configs, quick = list(benchmark().configs()), benchmark(quick=True).configs()
    assert {config.batch for config in configs} == {64, 1024, 16384}
    assert {config.share for config in configs} == {0.1, 0.25, 0.5, 1.0}
    assert {config.mode for config in configs} == {"infer", "train"} == {c.mode for c in quick}


def test_run_writes_json_and_markdown(tmp_path, capsys):
    report = benchmark(tmp_path).run([tiny(), tiny("train", share=1.0), tiny()])
    stored = json.loads((tmp_path / "bench_route.json").read_text())
    assert stored == json.loads(json.dumps(report))
    assert [row["config"]["mode"] for row in stored["rows"]] == ["infer", "train"]
    assert [row["routed"] for row in stored["rows"]] == [5, 20]
    for row in stored["rows"]:
        assert set(row["times_ms"]) == {*LABELS, "limit"}
        assert row["ratios"]["masking/route"] > 0
    written = (tmp_path / "bench_route.md").read_text()
    assert written == RouteBenchmark.markdown(stored) == RouteBenchmark.markdown(report)
    assert "## Inference" in written and "## Training" in written and "| 20 | 8      | 25 %   |" in written
    assert "boolean indexing / route" in capsys.readouterr().out


def test_disagreement_ends_in_an_error_after_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(route, "TOLERANCE", -1.0)
    with pytest.raises(
        RuntimeError, match=r"results disagree:\ninfer B=20 hidden=8 share=0.25: route: the result differs"
    ):
        benchmark(tmp_path).run([tiny()])
    assert "## Errors" in (tmp_path / "bench_route.md").read_text()


def test_the_command_passes_its_options(tmp_path, monkeypatch):
    pytest.importorskip("typer")
    from adaptcomp_ext.experiments import cli

    given = {}
    monkeypatch.setattr(
        "adaptcomp_ext.experiments.bench.bench_route", lambda **options: given.update(options)
    )
    with pytest.raises(SystemExit) as done:
        cli.main(["bench", "route", "--quick", "--out", str(tmp_path), "--seconds", "2", "--threads", "1"])
    assert done.value.code == 0
    assert given == {
        "out": str(tmp_path),
        "device": "cpu",
        "quick": True,
        "threads": 1,
        "seconds": 2.0,
        "seed": 0,
        "resume": False,
        "progress": True,
    }


def test_bad_options_are_named(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="device"):
        bench_route(out=str(tmp_path / "out"), device="cuda")
    assert not (tmp_path / "out").exists()
