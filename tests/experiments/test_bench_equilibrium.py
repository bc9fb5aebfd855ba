"""The benchmark of deep equilibria on a tiny batch: the exact solution is one, and errors are equal."""

from __future__ import annotations

import json
import math

import pytest
import torch

from adaptcomp_ext.experiments.bench.equilibrium import (
    LADDER,
    Config,
    EquilibriumBenchmark,
    batch,
    error,
    make_problem,
    own,
    solve_exactly,
    tolerances,
)

TINY = Config("rotating", 20, 6, 0.2, 0.9)


@pytest.fixture
def problem():
    return make_problem(TINY, torch.device("cpu"), 0)


@pytest.mark.parametrize("matrix", ["rotating", "symmetric"])
def test_the_exact_solution_is_one(matrix):
    problem = make_problem(Config(matrix, 30, 8, 0.2, 0.9), torch.device("cpu"), 1)
    weight = problem.step.weight.detach().double()
    torch.testing.assert_close(
        torch.linalg.matrix_norm(weight, 2), torch.tensor(1.0).double(), rtol=1e-6, atol=0
    )
    x, rho, upstream = (t.detach().double() for t in (problem.x, problem.rho, problem.upstream))
    assert int((rho > 0.8).sum()) == 6
    z, _ = problem.exact
    torch.testing.assert_close(torch.tanh(rho * (z @ weight.T) + x), z, rtol=1e-12, atol=1e-14)
    far = x.clone()
    far[3, 2] += 1e-6
    moved = ((solve_exactly(weight, far, rho, upstream)[0] - z) * upstream).sum() / 1e-6
    torch.testing.assert_close(moved, problem.exact[1][3, 2], rtol=1e-5, atol=1e-8)


def test_solvers_find_it(problem):
    for solve in (own(problem), batch(problem)):
        z, gradient, of_weight = solve(LADDER[-1], LADDER[-1])
        assert error(z, problem.exact[0]) < 1e-4 and error(gradient, problem.exact[1]) < 1e-4
        assert of_weight.shape == (6, 6)


def test_the_largest_tolerances_within_the_error(problem):
    solve = batch(problem)
    found, errors = tolerances(solve, problem, (1e-3, 1e-2))
    assert found is not None and errors[0] <= 1e-3 and errors[1] <= 1e-2
    looser = LADDER[LADDER.index(found[1]) - 1]
    assert looser == LADDER[-1] or error(solve(found[0], looser)[1], problem.exact[1]) > 1e-2
    assert tolerances(solve, problem, (0.0, 0.0))[0] is None


def test_run_writes_the_report(tmp_path):
    benchmark = EquilibriumBenchmark(
        EquilibriumBenchmark.Options(out=str(tmp_path), seconds=0.1, progress=False)
    )
    assert [config.matrix for config in benchmark.configs()] == ["rotating", "symmetric"]
    report = benchmark.run([TINY])
    assert json.loads((tmp_path / "bench_equilibrium.json").read_text()) == json.loads(json.dumps(report))
    (row,) = report["rows"]
    assert {"own", "batch"} <= set(row["times_ms"]) and row["ratios"]["batch/own"] > 0
    own_errors, *others = row["reached"]
    for one in others:
        if one["forward"] is not None:
            assert all(a <= b for a, b in zip(one["errors"], own_errors["errors"], strict=True))
    assert math.isfinite(row["steps"]["mean"]) and row["steps"]["most"] > row["steps"]["mean"]
    assert "## Forward and backward" in (tmp_path / "bench_equilibrium.md").read_text()
