"""The batcher's benchmark on a tiny grid: forms agree, requests and soak count what comes back."""

from __future__ import annotations

import json

import pytest
import torch

from adaptcomp_ext.experiments.bench import batcher
from adaptcomp_ext.experiments.bench.batcher import (
    BatcherBenchmark,
    Config,
    make_problem,
    measure_requests,
    measure_soak,
    ratios,
    run_batches,
)

TINY = Config(8, 2, 4, 100, 8)


def benchmark(out: str = "results", **options) -> BatcherBenchmark:
    return BatcherBenchmark(
        BatcherBenchmark.Options(out=str(out), seconds=0.1, progress=False, soak=100, **options)
    )


def test_steps_are_geometric_and_cut_at_the_bound():
    problem = make_problem(Config(4, 4, 16, 20_000, 64), 0)
    with torch.no_grad():
        steps = torch.cat([result.steps for result in run_batches(problem)])
    share = [float((steps == n).double().mean()) for n in (1, 2, 3)]
    assert share == pytest.approx([0.25, 0.1875, 0.140625], abs=0.01)
    assert int(steps.max()) == 16


def test_slow_samples_take_ten_times_as_many_steps():
    problem = make_problem(Config(4, 2, 1000, 20_000, 64, slow=0.05), 0)
    with torch.no_grad():
        steps = torch.cat([result.steps for result in run_batches(problem)]).double()
    slow = problem.x[:, 0] > 1.645
    assert float(slow.double().mean()) == pytest.approx(0.05, abs=0.005)
    assert float(steps[slow].mean()) == pytest.approx(20, rel=0.1)
    assert float(steps[~slow].mean()) == pytest.approx(2, rel=0.05)


def test_a_run_writes_its_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(batcher, "MOST_REQUESTS", 500.0)
    report = benchmark(tmp_path).run([TINY, Config(8, 2, 4, 100, 8, slow=0.1)])
    stored = json.loads((tmp_path / "bench_batcher.json").read_text())
    assert stored == json.loads(json.dumps(report))
    row, _ = stored["rows"]
    assert set(row["times_ms"]) == {"batcher", "batches", "steps"}
    assert row["ratios"]["steps/batcher"] > 0 and 0.5 < row["utilization"] <= 1
    assert 1 <= row["mean_steps"] <= 4
    requests, _ = stored["requests"]
    assert requests["requests"] >= 50 and requests["ratio"] > 0
    assert stored["soak"][0]["samples"] == 100 and stored["soak"][0]["lost"] == 0
    written = (tmp_path / "bench_batcher.md").read_text()
    assert written == BatcherBenchmark.markdown(stored)
    for title in ("## Streams", "## Requests", "## Soak"):
        assert title in written and title in capsys.readouterr().out + written


def test_forms_that_differ_are_refused(monkeypatch):
    monkeypatch.setattr(batcher, "TOLERANCE", -1.0)
    assert "differs from the batches form" in benchmark().measure(TINY)["error"]


def test_ratios():
    times = {"batcher": [2.0, 4.0, 8.0], "batches": [4.0, 4.0, 4.0], "steps": [1.0, 3.0, 4.0]}
    assert ratios(times) == {"steps/batcher": 0.5, "batches/batcher": 1.0, "steps/batches": 0.75}


def test_requests_are_answered(monkeypatch):
    monkeypatch.setattr(batcher, "MOST_REQUESTS", 500.0)
    found = measure_requests(make_problem(TINY, 0), 0.1, 0.5, 0)
    assert found["latency_ms"] >= found["own_ms"] > 0 and found["ratio"] >= 1


def test_the_soak_counts_every_sample():
    found = measure_soak(4000, slots=16)
    assert found["lost"] == 0 and found["counts_agree"]
    assert found["refused"] == 4 and found["failed"] > 0
    assert found["results"] + found["refused"] + found["failed"] == 4000
