"""The halting benchmark on a tiny grid, and the harness: forms agree, rows are counted, runs resume."""

from __future__ import annotations

import json
import os

import pytest
import torch

import adaptcomp_ext as ac
from adaptcomp_ext.experiments.bench import BENCHMARKS, bench_halting, harness, machine
from adaptcomp_ext.experiments.bench.halting import (
    GRIDS,
    POLICIES,
    SIZES,
    HaltingBenchmark,
    is_required,
    select,
    verify,
)
from adaptcomp_ext.experiments.bench.halting_forms import (
    Config,
    active_counts,
    forms,
    loss,
    lower_bound,
    make_problem,
    scripted_steps,
)
from adaptcomp_ext.experiments.bench.harness import (
    DisagreementError,
    LiveBytes,
    Table,
    kept_and_peak,
)
from adaptcomp_ext.experiments.bench.timing import interleave
from tests.helpers.processes import ROOT, run_python

CPU = torch.device("cpu")
SCRIPTS = ROOT / "benchmarks"


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


def benchmark(out="results", **options):
    options = {"seconds": 0.1, "memory": False, "compiled": False, "progress": False, **options}
    return HaltingBenchmark(HaltingBenchmark.Options(out=str(out), **options))


def problem_of(config):
    return make_problem(config, CPU, 0)


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
def test_forms_agree_and_the_lower_bound_counts_the_true_rows(core, policy, training, quick_rounds):
    row = benchmark().measure(tiny(core=core, policy=policy, training=training))
    assert row["error"] is None
    assert {"masked", "boolean", "auto", "compact", "mask", "limit"} == set(row["times_ms"])
    assert row["rows"]["active"][0] == 12 and sum(row["rows"]["active"]) == row["rows"]["row_steps"]
    assert ("gradient" in row["agreement"]) == training


@pytest.mark.parametrize("policy", POLICIES)
def test_the_lower_bound_runs_core_and_head_once_per_step_on_the_active_rows(policy):
    problem = problem_of(tiny(policy=policy))
    seen = []
    problem.step.register_forward_hook(lambda module, args, out: seen.append(out[0].shape[0]))
    lower_bound(problem)()
    assert seen == active_counts(problem.steps)


def test_ours_steps_only_active_rows_when_compacting():
    problem = problem_of(tiny())
    seen = []
    problem.step.register_forward_hook(lambda module, args, out: seen.append(out[0].shape[0]))
    with torch.inference_mode():
        forms(problem, None)["compact"]()
    assert seen == active_counts(problem.steps)


def test_a_wrong_result_is_an_error():
    problem = problem_of(tiny())
    with torch.inference_mode():
        outcomes = {name: call() for name, call in forms(problem, None).items()}
        outcomes["boolean"] = outcomes["boolean"]._replace(output=outcomes["boolean"].output + 0.1)
        with pytest.raises(DisagreementError, match="boolean"):
            verify(problem, outcomes, {})


def test_live_bytes():
    before = torch.ones(100)
    with LiveBytes() as live:
        kept = before + 1
        view = kept[:10]
        before.mul_(2)
        assert live.now == 400
        del kept
        assert live.now == 400
        del view
        assert live.now == 0
        kept = torch.ones(1000) * 2
    assert live.now == 4000
    assert live.peak == 8000
    del kept


def test_ours_keeps_memory_for_the_steps_taken():
    problem = problem_of(tiny(batch=64, dim=32, max_steps=16, fraction=0.25, training=True))
    calls = forms(problem, None)
    kept = {name: kept_and_peak(lambda n=name: loss(calls[n]), problem.leaves)["kept"] for name in calls}
    assert kept["auto"] < 0.5 * kept["masked"]


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
    configs = set(GRIDS["default"])
    assert set(GRIDS["required"]) <= configs
    assert sum(is_required(c) for c in configs) == 3 * len(SIZES) + 4
    for axis, values in {
        "dim": {64, 128, 256, 1024},
        "max_steps": {8, 16, 32},
        "fraction": {0.1, 0.25, 0.5, 1.0},
    }.items():
        for value in values:
            assert sum(getattr(c, axis) == value for c in configs) >= 3, (axis, value)
    chosen, skipped = select(configs, ("gru",), flops=1e9, limit_seconds=0.01)
    assert all(is_required(c) for c in set(GRIDS["required"]) & set(chosen)) and skipped
    assert {c.core for c in chosen} == {"gru"}


@pytest.fixture
def quick_rounds(monkeypatch):
    def few(calls, clock, seconds, block=0.0):
        return interleave(calls, clock, 0.0, block=0.0)

    monkeypatch.setattr("adaptcomp_ext.experiments.bench.harness.interleave", few)


def test_a_cell_is_a_format_of_the_row_or_a_function():
    rows = [{"a": {"b/c": 0.256, "n": None}, "kept": 2_500_000}, {"a": {"n": "≥ 60 %"}, "kept": 1234.0}]
    columns = {
        "x": "{a[b/c]:.2f}",
        "y": "{a[n]}",
        "z": "{a[b/c]:.0%}",
        "MB": "{kept:MB2}",
        "f": lambda r: "!",
    }
    table = Table("title", "text", rows, columns)
    assert table.lines() == [["0.26", "–", "26 %", "2.50", "!"], ["–", "≥ 60 %", "–", "0.00", "!"]]
    assert str(table).splitlines()[:2] == [
        "| x    | y      | z    | MB   | f |",
        "|------|--------|------|------|---|",
    ]


def test_run_writes_json_markdown_and_figure_and_resumes(tmp_path, capsys, quick_rounds):
    pytest.importorskip("matplotlib")
    configs = [Config("gru", 32, 64, fraction=f, compiled=False) for f in (0.25, 1.0)]
    benchmark(tmp_path).run(configs[:1])
    first = json.loads((tmp_path / "bench_halting.json").read_text())
    report = benchmark(tmp_path, resume=True).run(configs)
    stored = json.loads((tmp_path / "bench_halting.json").read_text())
    assert len(stored["rows"]) == 2 and stored["rows"][0] == first["rows"][0]
    assert stored["versions"]["torch"] == torch.__version__
    assert stored["versions"]["build"]["version"] == ac.__version__
    for key in ("auto/limit", "auto/best", "masked/auto"):
        assert stored["rows"][1]["ratios"][key] > 0
    written = (tmp_path / "bench_halting.md").read_text()
    assert written == HaltingBenchmark.markdown(stored) == HaltingBenchmark.markdown(report)
    assert "quick" not in written and "- *lower bound*: core and head alone" in written
    assert (tmp_path / "bench_halting.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "## Where auto loses" in printed and "## All configurations" not in printed
    # Rows of another seed are not kept.
    again = benchmark(tmp_path, resume=True, seed=1).run(configs[:1])
    assert again["rows"][0]["times_ms"] != first["rows"][0]["times_ms"]


def test_a_quick_report_says_so(tmp_path, monkeypatch, capsys, quick_rounds):
    monkeypatch.setattr(HaltingBenchmark, "configs", lambda self: [tiny(), tiny(fraction=1.0)])
    report = benchmark(tmp_path, quick=True).run()
    assert report["quick"] and report["note"].startswith("Quick run (--quick)")
    assert f"**{report['note']}**" in (tmp_path / "bench_halting.md").read_text()
    assert report["note"] in capsys.readouterr().out


def test_disagreement_ends_in_an_error_after_writing(tmp_path, monkeypatch):
    monkeypatch.setattr("adaptcomp_ext.experiments.bench.halting.TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match=r"results disagree:\ngru B=12 .* differs from the masked form"):
        benchmark(tmp_path).run([tiny()])
    assert "## Errors" in (tmp_path / "bench_halting.md").read_text()
    assert "times_ms" not in json.loads((tmp_path / "bench_halting.json").read_text())["rows"][0]


@pytest.mark.slow
def test_the_compiled_forms_agree(quick_rounds):
    timed = benchmark(compiled=True)
    row = timed.measure(tiny(policy="act", dim=16, batch=32, compiled=True))
    assert row["error"] is None
    assert {"masked_compile", "auto_compile"} <= set(row["times_ms"])
    assert set(timed.cache.seconds) == {
        "gru/16/act/infer/masked_compile",
        "gru/16/act/infer/auto_compile",
    }


@pytest.mark.parametrize(
    "bad", [{"cores": "gru,lstm"}, {"grid": "huge"}, {"seconds": 0.0}, {"threads": 0}, {"device": "cuda"}]
)
def test_bad_options_are_named(bad, tmp_path):
    if bad == {"device": "cuda"} and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=next(iter(bad))):
        bench_halting(out=str(tmp_path / "out"), **bad)
    assert not (tmp_path / "out").exists()


def test_an_option_of_another_type_is_named(tmp_path):
    with pytest.raises(TypeError, match="seconds: expected a number, got 'long'"):
        bench_halting(str(tmp_path / "out"), seconds="long")
    assert not (tmp_path / "out").exists()


def test_every_benchmark_has_a_command_and_a_script():
    pytest.importorskip("typer")
    from adaptcomp_ext.experiments import app, bench

    assert tuple(kind.name for kind in BENCHMARKS) == app.BENCHMARKS
    assert all(getattr(bench, f"bench_{kind.name}") == kind.bench for kind in BENCHMARKS)
    assert all((SCRIPTS / f"bench_{kind.name}.py").exists() for kind in BENCHMARKS) or not SCRIPTS.exists()


def test_every_option_has_a_help_sentence():
    for kind in BENCHMARKS:
        for option in kind.Options.declared():
            assert option.help[0].isupper() and option.help.endswith("."), (kind.name, option.name)


ON_A_GPU_MACHINE = """
import runpy, sys
from importlib.machinery import ModuleSpec

class Refuse:
    def find_spec(self, name, path=None, target=None):
        gone = ("typer", "rich", "matplotlib", "sklearn", "safetensors", "pandas")
        return ModuleSpec(name, self) if name.partition(".")[0] in gone else None

    def create_module(self, spec):
        raise ModuleNotFoundError(f"No module named {spec.name!r}", name=spec.name)

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Refuse())
from adaptcomp_ext.experiments.bench import BENCHMARKS, batcher, energy, equilibrium, halting
from adaptcomp_ext.experiments.bench import planning, recurrence, route

energy.PRODUCT = 32
batcher.SOAKED = 200
few = {
    "halting": [halting.Config("gru", 32, 64, fraction=f, compiled=False) for f in (0.25, 1.0)],
    "recurrence": [recurrence.Config(32, 64, compiled=False)],
    "energy": [energy.Config("all", 12, 5, 6, (24,), 8)],
    "route": [route.Config("infer", 20, 8, 0.25)],
    "planning": [planning.Config(3, 1, 8, 16)],
    "batcher": [batcher.Config(8, 2, 4, 64, 8)],
    "equilibrium": [equilibrium.Config("rotating", 20, 6, 0.2, 0.9)],
}
for kind in BENCHMARKS:
    kind.configs = lambda self: few[self.name]
    left_out = [name for name in ("compiled", "memory", "linear") if hasattr(kind.Options, name)]
    without = [f"--no-{name}" for name in left_out]
    sys.argv = ["bench", "--out", sys.argv[-1], "--seconds", "0.1", "--threads", "1", *without, sys.argv[-1]]
    out = sys.argv.pop()
    runpy.run_path(f"SCRIPTS/bench_{kind.name}.py", run_name="__main__")
    sys.argv.append(out)
"""


@pytest.mark.skipif(not SCRIPTS.exists(), reason="needs the repository, not only its tests")
def test_the_scripts_need_none_of_the_extras(tmp_path):
    done = run_python("-c", ON_A_GPU_MACHINE.replace("SCRIPTS", str(SCRIPTS)), str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("rich is not installed: no progress bar is shown.") == len(BENCHMARKS)
    assert done.stderr.count("matplotlib is not installed: the figure is left out.") == 3
    written = {f"bench_{kind.name}.{ending}" for kind in BENCHMARKS for ending in ("json", "md")}
    assert {path.name for path in tmp_path.iterdir()} == written


def test_compiled_code_for_another_instruction_set_is_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    machine.separate_compiled_code()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    folders = []
    for capability in ("avx2", "default"):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
        harness.CompileCache()
        folders.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert len(set(folders)) == 2
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    machine.separate_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"
