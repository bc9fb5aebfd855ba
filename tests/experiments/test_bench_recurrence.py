"""The recurrence benchmark on tiny sizes: forms agree, rows halt as often as wanted, runs resume."""

from __future__ import annotations

import json
from functools import partial
from itertools import groupby

import pytest
import torch
from torch import nn

from adaptcomp_ext.experiments.bench import bench_recurrence, harness, machine, recurrence
from adaptcomp_ext.experiments.bench.halting_forms import active_counts, loss
from adaptcomp_ext.experiments.bench.harness import DisagreementError, kept_and_peak, kept_on_heap
from adaptcomp_ext.experiments.bench.recurrence import (
    BATCHES,
    LABELS,
    SIZES,
    WIDTHS,
    RecurrenceBenchmark,
    best_of_others,
    check_ways,
    configs_of,
    linear_rows,
    memory_rows,
    ratios,
    scaling,
)
from adaptcomp_ext.experiments.bench.recurrence_forms import (
    CELLS,
    NEAR,
    Config,
    Hoisted,
    act_steps,
    bias_for,
    forms,
    halting_logits,
    looped,
    make_problem,
    matmul,
    steps_alone,
)
from adaptcomp_ext.experiments.bench.timing import interleave

CPU = torch.device("cpu")
FORMS = {"ours", "loop", "hoisted", "layer", "masked"}


def tiny(**changes):
    return Config(**{"batch": 12, "dim": 8, "compiled": False, **changes})


def benchmark(out="results", **options):
    options = {"seconds": 0.1, "compiled": False, "memory": False, "linear": False, **options}
    return RecurrenceBenchmark(RecurrenceBenchmark.Options(out=str(out), progress=False, **options))


@pytest.fixture(autouse=True)
def quick_rounds(monkeypatch):
    def few(calls, clock, seconds, block=0.0):
        return interleave(calls, clock, 0.0, few=3, fewest=3)

    monkeypatch.setattr(harness, "interleave", few)
    monkeypatch.setattr(recurrence, "interleave", few)


@pytest.mark.parametrize("training", [False, True], ids=["infer", "train"])
@pytest.mark.parametrize("cell", CELLS)
def test_forms_agree(cell, training):
    row = benchmark().measure(tiny(cell=cell, training=training))
    assert row["error"] is None
    assert set(row["times_ms"]) == {*FORMS, "alone", "product"}
    assert row["rows"]["mean_steps"] == 4
    assert ("gradient" in row["agreement"]) == training
    assert row["agreement"].get("gradient", 0.0) < 1e-5
    assert set(row["gflops"]) == {"ours", "product"}


def test_the_kernel_is_what_inference_times():
    problem = make_problem(tiny(), CPU, 0)
    with torch.inference_mode():
        _, ways = forms(problem, None)
    assert (ways["ours"].way, ways["loop"].way) == ("kernel", "loop")
    check_ways(ways)
    with pytest.raises(DisagreementError, match=r"loop: expected the way to be a loop, got kernel: "):
        check_ways({"loop": ways["ours"]})


@pytest.mark.parametrize("cell", CELLS)
def test_the_loop_has_the_cell_s_own_parameters(cell):
    problem = make_problem(tiny(cell=cell), CPU, 0)
    loop = looped(problem)
    assert all(p is getattr(problem.cell, name) for name, p in loop.named_parameters())
    assert type(loop) is not type(problem.cell) and type(loop).forward is type(problem.cell).forward


@pytest.mark.parametrize("batch", [1, 5, 16, 200])
def test_rows_take_a_quarter_of_the_steps_and_keep_clear_of_the_threshold(batch):
    problem = make_problem(tiny(batch=batch, dim=16), CPU, 3)
    logits = halting_logits(problem.cell, problem.head, problem.state[0], problem.x, 16)
    steps, distance = act_steps(logits, float(problem.head.bias.detach()))
    assert torch.equal(steps, problem.steps) and distance.min() > 0.99 * NEAR
    assert steps.double().mean() == pytest.approx(4, abs=1e-9 if batch == 1 else 1 / batch)


def test_a_row_that_rounding_could_decide_is_drawn_anew(monkeypatch):
    monkeypatch.setattr("adaptcomp_ext.experiments.bench.recurrence_forms.NEAR", 0.02)
    problem = make_problem(tiny(batch=64, dim=16), CPU, 0)
    logits = halting_logits(problem.cell, problem.head, problem.state[0], problem.x, 16)
    assert act_steps(logits, float(problem.head.bias.detach()))[1].min() > 0.0199
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(64, 16, generator=generator)
    assert 0 < int((drawn != problem.x).any(dim=1).sum()) < 32


def test_the_bias_is_the_middle_of_those_that_give_the_mean():
    # One row with a constant logit of 0: it halts after step n where n σ(bias) reaches the threshold first.
    bias = bias_for(torch.zeros(16, 1, dtype=torch.float64), 4.0)
    edges = [torch.logit(torch.tensor(0.99 / n, dtype=torch.float64)).item() for n in (4, 3)]
    assert bias == pytest.approx(sum(edges) / 2, abs=1e-6)


@pytest.mark.parametrize("cell", CELLS)
def test_the_hoisted_step_is_the_cell(cell):
    module = CELLS[cell][0](5, 7).double()
    hoisted = Hoisted(module)
    x, *state = (torch.randn(3, n, dtype=torch.float64) for n in (5, 7, 7)[: 2 + (cell == "lstm")])
    want = module(state[0] if cell == "gru" else tuple(state), x)
    got = hoisted(tuple(state), hoisted.product(x))
    for a, b in zip(got, (want,) if cell == "gru" else want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_steps_alone_run_on_the_active_rows():
    problem = make_problem(tiny(), CPU, 0)
    seen = []
    handle = problem.cell.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    steps_alone(problem)()
    handle.remove()
    assert seen == active_counts(problem.steps)


def test_the_product_has_the_shape_of_a_step():
    problem = make_problem(tiny(), CPU, 0)
    out = matmul(problem)()
    torch.testing.assert_close(out, problem.x @ problem.cell.weight_hh.detach().t())


def test_operations_are_those_of_the_products():
    x, h = torch.randn(5, 8), torch.randn(20, 8)
    weights = torch.randn(24, 8)
    counted = 2 * weights.numel() * (len(x) + len(h))
    assert tiny(batch=5).operations(row_steps=20) == counted
    assert tiny(batch=5, training=True).operations(row_steps=20) == 3 * counted
    assert tiny(batch=5, cell="lstm").operations(row_steps=20) == pytest.approx(4 / 3 * counted)


def test_ratios_are_medians_over_the_rounds():
    times = {"ours": [2.0, 4.0, 8.0], "loop": [4.0, 12.0, 40.0], "product": [1.0, 1.0, 4.0]}
    assert ratios(times, operations=30.0, of_product=10.0) == {"loop/ours": 3.0, "ours/product": 1.5}


def test_a_wrong_result_is_refused(monkeypatch):
    def broken(problem, compiled):
        calls, ways = forms(problem, compiled)
        hoisted = calls["hoisted"]

        def off():
            outcome = hoisted()
            return outcome._replace(output=outcome.output + 0.1)

        return {**calls, "hoisted": off}, ways

    monkeypatch.setattr(recurrence, "forms", broken)
    row = benchmark().measure(tiny())
    assert row["error"].startswith("hoisted: output differs from the masked form")
    assert "times_ms" not in row


def test_grids():
    default, required = configs_of("default", (1, 2)), configs_of("required", (1, 2))
    for configs in (default, required, configs_of("quick", (1,))):
        assert len(set(configs)) == len(configs)
        keys = [key for key, _ in groupby(configs, key=lambda c: c.model_key)]
        assert len(set(keys)) == len(keys), "a model is compiled once"
    gru = {(c.batch, c.dim, c.mode, c.threads) for c in default if c.cell == "gru"}
    sizes = {(batch, dim) for batch in BATCHES for dim in WIDTHS} | set(SIZES)
    assert gru == {(*size, mode, n) for size in sizes for mode in ("infer", "train") for n in (1, 2)}
    assert {(c.batch, c.dim) for c in required} == set(SIZES)
    assert {c.threads for c in required if c.compiled} == {2} and len(required) == 4 * len(SIZES)
    assert benchmark(threads=1).threads == (1,) and benchmark().threads == (1, 2)


def test_run_writes_its_report_and_resumes(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(recurrence, "LINEAR", ((1, 5), (8,)))
    configs = [Config(32, 64, threads=n, compiled=False) for n in (1, 2)]
    before = torch.get_num_threads()
    benchmark(tmp_path).run(configs[:1])
    first = json.loads((tmp_path / "bench_recurrence.json").read_text())
    report = benchmark(tmp_path, resume=True, linear=True).run(configs)
    assert torch.get_num_threads() == before
    stored = json.loads((tmp_path / "bench_recurrence.json").read_text())
    assert stored["rows"][0] == first["rows"][0] and len(stored["rows"]) == 2
    written = (tmp_path / "bench_recurrence.md").read_text()
    assert written == RecurrenceBenchmark.markdown(stored) == RecurrenceBenchmark.markdown(report)
    assert " cores, 1 and 2 threads, device cpu; kernels with " in written
    for title in ("Inference", "Rate of the arithmetic", "Two threads", "The price of the same bits"):
        assert f"## {title}\n" in written
    assert "## Training" not in written and "The compiled baseline was left out: not wanted." in written
    (speedup,) = scaling(stored["rows"])
    medians = [row["times_ms"]["ours"]["median"] for row in stored["rows"]]
    assert speedup["ours"] == medians[0] / medians[1] and speedup["batch"] == 32
    found = {row["form"]: row["least"] for row in best_of_others(stored["rows"])}
    assert found["loop"] == min(row["ratios"]["loop/ours"] for row in stored["rows"])
    assert set(found) == set(LABELS.values()) - {"masked compile"}
    assert (tmp_path / "bench_recurrence.png").stat().st_size > 1000
    assert "## Inference" in capsys.readouterr().out


def test_the_price_of_the_invariant_product(monkeypatch):
    monkeypatch.setattr(recurrence, "LINEAR", ((1, 5), (8,)))
    rows = list(linear_rows(CPU, 0, (1,), 0.0))
    sizes = [(row["mode"], row["rows"], row["width"], row["threads"]) for row in rows]
    assert sizes == [("infer", 1, 8, 1), ("infer", 5, 8, 1), ("train", 1, 8, 1), ("train", 5, 8, 1)]
    assert all(row["price"] > 0 and set(row["ms"]) == {"ours", "torch"} for row in rows)


@pytest.mark.skipif(machine.heap_bytes() is None, reason="another allocator than glibc's")
class TestTheHeap:
    def test_what_the_graph_keeps_is_seen(self):
        x = torch.ones(500_000, requires_grad=True)
        kept = kept_on_heap(lambda: (x * 2).square().sum())
        assert 1_999_000 <= kept < 2_100_000

    def test_it_is_what_the_tensors_take_and_the_nodes(self):
        problem = make_problem(tiny(batch=256, dim=64, training=True), CPU, 0)
        call = partial(loss, forms(problem, None)[0]["loop"])
        tensors = kept_and_peak(call, problem.leaves)["kept"]
        assert tensors <= kept_on_heap(call) < tensors + 400_000

    def test_blocks_that_are_used_again_are_seen(self):
        problem = make_problem(tiny(batch=64, dim=32, training=True), CPU, 0)
        calls, ways = forms(problem, None)
        assert ways["ours"].way == "kernel"
        states = 4 * 32 * int(problem.steps.sum())
        for _ in range(2):
            assert states <= kept_on_heap(partial(loss, calls["ours"])) < 3 * states

    def test_all_forms_are_measured(self, monkeypatch):
        monkeypatch.setattr(recurrence, "KEPT_SIZES", ((6, 8),))
        monkeypatch.setattr(harness, "HELD", 8)
        (row,) = memory_rows(CPU, 0)
        assert set(row["bytes"]) == FORMS and row["bytes"]["layer"] > row["bytes"]["loop"] > 0


@pytest.mark.slow
def test_the_compiled_form_agrees():
    timed = benchmark(compiled=True)
    row = timed.measure(tiny(compiled=True))
    assert row["error"] is None and "masked_compile" in row["times_ms"]
    assert set(timed.cache.seconds) <= {tiny().label}


@pytest.mark.parametrize("bad", [{"grid": "huge"}, {"threads": 0}, {"seconds": 0.0}])
def test_bad_options_are_named(bad, tmp_path):
    with pytest.raises(ValueError, match=next(iter(bad))):
        bench_recurrence(out=str(tmp_path / "out"), **bad)
    assert not (tmp_path / "out").exists()


def test_torch_s_layer_shares_the_weights():
    problem = make_problem(tiny(training=True), CPU, 0)
    calls, _ = forms(problem, None)
    (of_weight,) = torch.autograd.grad(calls["layer"]().output.sum(), [problem.cell.weight_hh])
    assert of_weight.abs().max() > 0
    assert isinstance(problem.cell, nn.GRUCell)
