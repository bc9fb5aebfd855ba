"""The ops at torch's boundary: registration, compilation, version counters, threads, processes, bad input."""

from __future__ import annotations

import copy
import math
import os
import textwrap
import threading

import pytest
import torch

import adaptcomp_ext as ac
from adaptcomp_ext.ops import halting
from tests.helpers.processes import run_python
from tests.helpers.tensors import assert_bitwise, generator, mask, on_cuda, values

raw = torch.ops.adaptcomp


# --- registration -------------------------------------------------------------------------------------------
def halt_rows_arguments(device, weighted=True, running=False):
    x = values((5, 3), device=device)
    row, halt = torch.tensor([4, 0, -1, 2, 6], device=device), mask("alternating", 5, device)
    weight = values((5,), device=device) if weighted else None
    output, results = torch.zeros(7, 3, device=device), [torch.zeros(7, 3, device=device)]
    totals, steps = [torch.zeros(7, device=device)], torch.zeros(7, dtype=torch.int64, device=device)
    status = torch.zeros(7, dtype=torch.int8, device=device)
    count = torch.tensor(4, device=device) if running else None
    return (
        row,
        halt,
        weight,
        x,
        output,
        [x * 2],
        results,
        [values((5,), device=device)],
        totals,
        steps,
        status,
        count,
        2,
        1,
        4,
    )


def raw_calls(device):
    """(op, arguments) for every op in the namespace."""
    z, keep = values((7,), device=device), mask("random", 7, device)
    x = [
        values((7, 3), device=device),
        values((7,), torch.int64, device),
        values((7, 2, 2), torch.bfloat16, device),
    ]
    index = torch.tensor([5, 0, -1, 3], device=device)
    act, ponder = (2, 1, 4, 0.9), (2, 1, 4, -1.5, -math.inf)
    grads = [values((7,), device=device, seed=s) for s in (1, 2)]
    calls = [
        ("act_step", (z, z.abs(), *act)),
        ("act_step", (z[::2].double(), z[::2].double(), *act)),
        ("act_step_backward", (z, z.abs(), *grads, None, *act)),
        ("pondernet_step", (z, -z.abs(), *ponder)),
        ("pondernet_step", (z.bfloat16(), -z.abs(), *ponder)),
        ("pondernet_step_backward", (z, -z.abs(), None, *grads, *ponder)),
        ("bernoulli_step", (z, x[1], None, None, 3, 2)),
        ("bernoulli_step", (z.double(), None, x[1], x[1].abs() + 1, 0, 0)),
        ("bernoulli_step_backward", (z, keep, grads[0])),
        ("uniform_draws", (x[1], None, None, 3, 2)),
        ("convergence_step", (x[0], x[0] * 1.5, x[1].abs(), 0, 0.1)),
        ("confidence", (x[0], 1)),
        ("confidence", (x[0].double().t().contiguous().t(), 2)),
        ("linear", (x[0], x[0][:4].clone(), z[:4].clone(), False)),
        ("linear", (x[0].double(), x[0][:3].double(), None, True)),
        ("descent_update", (x[0], x[0] * 2, z.abs(), None, None, 0.0, 1.5, -math.inf, 0.7)),
        (
            "descent_update",
            (
                x[2],
                x[2] * 2,
                z[0].abs(),
                *[values((7, 2, 2), device=device, seed=s) for s in (1, 2)],
                0.5,
                0.0,
                -1.0,
                1.0,
            ),
        ),
        ("descent_normals", (x[1], 9, 5, 3, False)),
        ("compact_index", (keep,)),
        ("compact_index_padded", (keep,)),
        ("gather_rows", (x, index)),
        ("gather_rows", ([], index)),
        ("scatter_rows", ([t[:4] for t in x], index, 9)),
        ("merge_rows", ([t[:2] for t in x], x, torch.tensor([1, 5], device=device))),
        ("merge_rows", ([], [], index)),
        ("split_rows", (x, torch.tensor([1, 5, -1], device=device), True)),
        ("split_rows", (x, torch.tensor([1, 5], device=device), False)),
        ("halt_rows", halt_rows_arguments(device)),
        ("halt_rows", halt_rows_arguments(device, weighted=False, running=True)),
    ]
    return [pytest.param(*call, id=f"{i}-{call[0]}") for i, call in enumerate(calls)]


@pytest.mark.promise("compile")
@pytest.mark.parametrize(("name", "arguments"), raw_calls("cpu"))
def test_opcheck_with_all_its_utilities(device, name, arguments):
    if name == "halt_rows" and not on_cuda(device) and arguments[11] is not None:
        arguments = (
            *arguments[:11],
            None,
            *arguments[12:],
        )  # the count lives on the device; the host has its own
    arguments = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), arguments)
    utilities = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if name == "halt_rows" and torch.__version__ < (2, 5):
        utilities.pop()  # torch 2.4 cannot trace an op that writes to several tensors of a list
    torch.library.opcheck(getattr(raw, name).default, arguments, test_utils=utilities)


def test_every_op_of_the_namespace_is_checked():
    registered = {
        schema.name.split("::")[1]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("adaptcomp::")
    }
    assert registered
    # A run in a compiled graph is checked by tests/nn/test_compiled_graphs.py: it calls a module.
    runs = {"run_opaque", "run_opaque_backward"}
    assert registered - runs <= {parameter.values[0] for parameter in raw_calls("cpu")}


def test_the_halting_op_bumps_the_version_of_what_it_writes_and_of_nothing_else(device):
    arguments = halt_rows_arguments(device, running=on_cuda(device))
    _, _, weight, readout, output, leaves, results, increments, totals, steps, status, running = arguments[
        :12
    ]
    written = [t for t in (output, *results, *totals, steps, status, running) if t is not None]
    read = [weight, readout, *leaves, *increments, arguments[0], arguments[1]]
    before = [t._version for t in written], [t._version for t in read]
    raw.halt_rows(*arguments)
    assert all(t._version > v for t, v in zip(written, before[0], strict=True))
    assert [t._version for t in read] == before[1]


def test_autograd_notices_that_a_result_was_overwritten_by_the_next_step(device):
    x = values((5, 3), device=device).requires_grad_()
    results = halting.Results(
        steps=torch.zeros(5, dtype=torch.int64, device=device),
        status=torch.zeros(5, dtype=torch.int8, device=device),
        leaves=[torch.zeros(5, 3, device=device)],
    )
    row, halt = torch.arange(5, device=device), torch.ones(5, dtype=torch.bool, device=device)
    bounds = {"step": 1, "min_steps": 1, "max_steps": 2}

    def step():
        flag, _ = halting.halt_rows(results, row, halt, [x], **bounds)
        halting.pack_rows(results, row, flag, None, [x], [])

    step()
    squared = results.leaves[0].square().sum()
    step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


@pytest.mark.parametrize("op", ["act", "pondernet", "compact", "scatter"])
def test_functional_ops_leave_versions_alone(device, op):
    x, keep = values((7,), device=device), mask("random", 7, device)
    versions = [t._version for t in (x, keep)]
    call(op, x, keep)
    assert [t._version for t in (x, keep)] == versions


def call(op, x, keep):
    """Return one op as a function of a float tensor [B] and a mask [B]."""
    if op == "act":
        done = ac.ops.act_step(x, x.sigmoid() / 2, step=2, max_steps=5, threshold=0.9)
        return done.weight, done.accumulated, done.cost
    if op == "pondernet":
        done = ac.ops.pondernet_step(x, -x.abs(), step=2, max_steps=5, log_prior=-1.5)
        return done.weight, done.log_survival, done.cost
    if op == "confidence":
        return (ac.ops.confidence(torch.stack([x, x.square()], dim=1), "entropy"),)
    if op == "padded":
        rows, index, count = ac.ops.compact_padded(keep, [x, x[:, None] * 2])
        return (*rows, index, count)
    if op == "compact":
        rows, index = ac.ops.compact(keep, [x, x[:, None] * 2])
        return (*rows, index)
    if op == "linear":
        pair = torch.stack([x, x * 2], 1)
        return (ac.ops.linear(pair, torch.ones(3, 2, device=x.device), torch.arange(3.0, device=x.device)),)
    assert op == "scatter"
    return ac.ops.scatter_rows(
        [x, x[:, None] * 2], torch.arange(x.shape[0], device=x.device).flip(0) - 1, x.shape[0] + 2
    )


# --- torch.compile ------------------------------------------------------------------------------------------
def check_compiled(op, device, backend):
    torch._dynamo.reset()
    shapes = []

    def counting(*arguments, **options):
        shapes.append(1)
        return compiler(*arguments, **options)

    compiler = torch._dynamo.lookup_backend(backend)
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counting)
    for rows in (5, 12, 33):
        x, keep = values((rows,), device=device, seed=rows), mask("random", rows, device, seed=rows)
        for g, w in zip(compiled(op, x, keep), call(op, x, keep), strict=True):
            torch.testing.assert_close(g, w)
        if op == "confidence":
            continue
        found = []
        for function in (call, compiled):
            leaf = x.clone().requires_grad_()
            out = [t for t in function(op, leaf, keep) if t.is_floating_point()]
            found += torch.autograd.grad(
                out, leaf, [values(t.shape, device=device, seed=i) for i, t in enumerate(out)]
            )
        torch.testing.assert_close(*found)
    assert len(shapes) <= 2, "compiled anew for each batch size"


@pytest.mark.promise("compile")
@pytest.mark.parametrize("op", ["padded", "act", "pondernet", "confidence", "linear", "scatter"])
def test_compiles_into_one_graph_for_all_batch_sizes(device, op):
    check_compiled(op, device, "aot_eager")


def test_compact_compiles_with_a_size_that_the_data_decide(device):
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        check_compiled("compact", device, "aot_eager")


def test_a_compiled_function_runs_inside_reference_kernels_too():
    torch._dynamo.reset()
    x, keep = values((5,)), mask("random", 5)
    with ac.reference_kernels():
        for g, w in zip(
            torch.compile(call, fullgraph=True, backend="aot_eager")("act", x, keep),
            call("act", x, keep),
            strict=True,
        ):
            torch.testing.assert_close(g, w)


@pytest.mark.slow
@pytest.mark.parametrize("op", ["padded", "act"])
def test_compiles_with_the_default_compiler(device, op):
    check_compiled(op, device, "inductor")


# --- threads and processes ----------------------------------------------------------------------------------
LARGE = 4096  # rows; at 512 bytes each enough for several threads


def everything_large(device="cpu"):
    """Return results and gradients of every op, at a size that runs on several threads."""
    x = values((LARGE, 128), device=device).requires_grad_()
    keep, z = mask("random", LARGE, device), values((LARGE,), device=device).requires_grad_()
    (rows,), index = ac.ops.compact(keep, x)
    (back,) = ac.ops.scatter_rows(rows, index, LARGE)
    (padded,), *_ = ac.ops.compact_padded(keep, x)
    act = ac.ops.act_step(z, z.sigmoid() / 2, step=2, max_steps=5, threshold=0.9)
    ponder = ac.ops.pondernet_step(z, -z.abs(), step=2, max_steps=5, log_prior=-1.5)
    out = [rows, back, padded, *act[:3], *ponder[:3], *halting_outputs(x, z, keep)]
    grads = torch.autograd.grad(
        out, [x, z], [values(t.shape, device=device, seed=i) for i, t in enumerate(out)]
    )
    confidences = [ac.ops.confidence(x, m) for m in ("max_prob", "margin", "entropy")]
    return [*out, *grads, *confidences]


def halting_outputs(x, z, keep):
    rows = x.shape[0]
    row = torch.randperm(rows, generator=generator(1)).to(x.device)
    results = halting.Results(
        steps=torch.zeros(rows, dtype=torch.int64, device=x.device),
        status=torch.zeros(rows, dtype=torch.int8, device=x.device),
        leaves=[torch.zeros_like(x, requires_grad=False)],
        totals=[torch.zeros(rows, device=x.device)],
        output=torch.zeros_like(x, requires_grad=False),
    )
    extra = {"weight": z, "readout": x, "increments": [z]}
    flag, _ = halting.halt_rows(results, row, keep, [x], step=2, min_steps=1, max_steps=4, **extra)
    plan = halting.plan_packing(flag, row, rows)
    leaves, carried = halting.pack_rows(results, row, flag, plan, [x], [z], **extra)
    return results.output, results.leaves[0], results.totals[0], *leaves, *carried


def test_one_thread_and_several_give_the_same_bits(threads):
    threads(1)
    alone = everything_large()
    for count in (2, 3):
        threads(count)
        for got, want in zip(everything_large(), alone, strict=True):
            assert_bitwise(got, want)


@pytest.mark.promise("processes")
def test_several_python_threads_may_call_at_once():
    expected, failures = everything_large(), []

    def work():
        try:
            for got, want in zip(everything_large(), expected, strict=True):
                assert_bitwise(got, want)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert not failures
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.promise("processes")
def test_the_reference_is_asked_for_in_one_thread_only():
    from adaptcomp_ext.ops._backend import on_reference

    seen = []
    with ac.reference_kernels():
        assert on_reference()
        worker = threading.Thread(target=lambda: seen.append(on_reference()))
        worker.start()
        worker.join()
    assert seen == [False]
    assert not on_reference()


FORK = """
import os, signal
import torch
import adaptcomp_ext as ac
from adaptcomp_ext import _C

def work():
    x = torch.ones(8192, 128)
    keep = torch.arange(8192) % 2 == 0
    (rows,), index = ac.ops.compact(keep, x)
    ac.ops.scatter_rows(rows, index, 8192)
    ac.ops.confidence(x)
    halt = ac.AdaptiveHalt(lambda s: s + 1, ac.ACT(lambda s: s[:, :1]), max_steps=4)
    with torch.no_grad():
        return float(halt(x).output.sum())

torch.set_num_threads({before})
expected = work()
child = os.fork()
if child == 0:
    signal.alarm(20)
    torch.set_num_threads({after})
    os._exit(0 if work() == expected else 1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
"""


@pytest.mark.promise("processes")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 1)])
def test_a_forked_child_works_and_does_not_hang(before, after):
    """Two threads on both sides hang in the OpenMP runtime itself; torch's own workers continue with one."""
    script = textwrap.dedent(FORK).format(before=before, after=after)
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr


# --- what a PyTorch user expects ----------------------------------------------------------------------------
@pytest.mark.parametrize("op", ["act", "pondernet", "padded", "scatter", "confidence"])
def test_meta_tensors_give_shapes_and_dtypes(op):
    x, keep = values((7,)), mask("random", 7)
    for got, want in zip(call(op, x.to("meta"), keep.to("meta")), call(op, x, keep), strict=True):
        assert got.is_meta
        assert (got.shape, got.dtype) == (want.shape, want.dtype)


@pytest.mark.parametrize("op", ["act", "pondernet", "padded", "compact", "scatter"])
def test_no_graph_where_none_is_wanted(device, op):
    x, keep = values((7,), device=device).requires_grad_(), mask("random", 7, device)
    assert any(t.requires_grad for t in call(op, x, keep))
    with torch.no_grad():
        assert not any(t.requires_grad for t in call(op, x, keep))
    with torch.inference_mode():
        assert not any(t.requires_grad for t in call(op, x, keep))
    assert not any(t.requires_grad for t in call(op, x.detach(), keep))


@pytest.mark.parametrize("op", ["act", "pondernet", "padded", "compact", "scatter"])
def test_gradients_of_the_reference_are_the_kernels(device, op):
    x, keep = values((33,), torch.float64, device).requires_grad_(), mask("random", 33, device)
    found = []
    for context in (ac.reference_kernels(), torch.enable_grad()):
        with context:
            out = [t for t in call(op, x, keep) if t.is_floating_point()]
            found += torch.autograd.grad(
                out, x, [values(t.shape, t.dtype, device, seed=i) for i, t in enumerate(out)]
            )
    torch.testing.assert_close(*found)


def test_named_results_survive_copying():
    out = ac.ops.act_step(values((3,)), torch.zeros(3), step=1, max_steps=2)
    again = copy.deepcopy(out)
    assert isinstance(again, ac.ops.ActStep)
    assert_bitwise(again.weight, out.weight)


def test_build_info_tells_what_was_built_and_what_runs():
    info = ac.build_info()
    assert info["version"] == ac.__version__
    assert info["torch"] == torch.__version__
    assert isinstance(info["cuda"], bool)
    assert info["compiler"]


# --- bad arguments ------------------------------------------------------------------------------------------
FLOATS, INTS = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
KEEP, X = torch.tensor([True, False, True]), torch.zeros(3, 2)


def act(logits=FLOATS, accumulated=FLOATS, step=1, min_steps=1, max_steps=4, threshold=0.9):
    return ac.ops.act_step(
        logits, accumulated, step=step, min_steps=min_steps, max_steps=max_steps, threshold=threshold
    )


def ponder(
    logits=FLOATS, log_survival=FLOATS, step=1, min_steps=1, max_steps=4, log_prior=-1.0, log_epsilon=-9.0
):
    return ac.ops.pondernet_step(
        *(logits, log_survival),
        **{
            "step": step,
            "min_steps": min_steps,
            "max_steps": max_steps,
            "log_prior": log_prior,
            "log_epsilon": log_epsilon,
        },
    )


def bad(function, arguments, error, match):
    return pytest.param(function, arguments, error, match, id=f"{function.__name__}-{match[:60]}")


BAD = [
    # The name of the argument, what was expected, and what came.
    *(
        case
        for function in (ac.ops.compact, ac.ops.compact_padded)
        for case in (
            bad(function, ([True], X), TypeError, r"keep: expected a Tensor, got list \[True\]"),
            bad(function, (INTS, X), TypeError, r"keep: expected dtype torch.bool, got torch.int64"),
            bad(function, (KEEP[None], X), ValueError, r"keep: expected shape \[B\], got \[1, 3\]"),
            bad(function, (KEEP[0], X), ValueError, r"keep: expected shape \[B\], got \[\]"),
            bad(
                function,
                (KEEP.to_sparse(), X),
                TypeError,
                r"keep: expected a dense tensor, got layout torch.sparse_coo",
            ),
            bad(
                function,
                (KEEP, 5),
                TypeError,
                r"tensors: expected a Tensor or a sequence of Tensors, got int 5",
            ),
            bad(
                function, (KEEP, [X, None]), TypeError, r"tensors\[1\]: expected a Tensor, got NoneType None"
            ),
            bad(
                function,
                (KEEP, [X, X[:2]]),
                ValueError,
                r"tensors\[1\]: expected 3 rows .* got shape \[2, 2\]",
            ),
            bad(function, (KEEP, X[0, 0]), ValueError, r"tensors\[0\]: expected 3 rows .* got shape \[\]"),
            bad(
                function,
                (KEEP, X.to_sparse()),
                TypeError,
                r"tensors\[0\]: expected a dense tensor, got layout",
            ),
            bad(
                function,
                (KEEP, X.to("meta")),
                ValueError,
                r"tensors\[0\]: expected a tensor on cpu, got one on meta",
            ),
        )
    ),
    bad(ac.ops.scatter_rows, (X, [0, 1, 2], 3), TypeError, r"index: expected a Tensor, got list"),
    bad(
        ac.ops.scatter_rows,
        (X, INTS.int(), 3),
        TypeError,
        r"index: expected int64 of shape \[K\], got .* torch.int32",
    ),
    bad(
        ac.ops.scatter_rows,
        (X, INTS[None], 3),
        TypeError,
        r"index: expected int64 of shape \[K\], got .* \[1, 3\]",
    ),
    bad(
        ac.ops.scatter_rows,
        (X, INTS[:2], 3),
        ValueError,
        r"tensors\[0\]: expected 2 rows .* got shape \[3, 2\]",
    ),
    bad(
        ac.ops.scatter_rows,
        (X, INTS + 3, 3),
        ValueError,
        r"index: expected entries less than size = 3, got 3",
    ),
    bad(ac.ops.scatter_rows, (X, INTS, 3.0), TypeError, r"size: expected an int, got float 3.0"),
    bad(ac.ops.scatter_rows, (X, INTS, True), TypeError, r"size: expected an int, got bool True"),
    bad(ac.ops.scatter_rows, (X, INTS, -1), ValueError, r"size: expected an int >= 0, got -1"),
    bad(
        ac.ops.scatter_rows,
        (None, INTS, 3),
        TypeError,
        r"tensors: expected a Tensor or a sequence of Tensors, got NoneType",
    ),
    bad(ac.ops.confidence, (None,), TypeError, r"logits: expected a Tensor, got NoneType None"),
    bad(
        ac.ops.confidence,
        (INTS[None],),
        TypeError,
        r"logits: expected float32, float64, bfloat16 or float16, got torch.int64",
    ),
    bad(
        ac.ops.confidence, (FLOATS,), ValueError, r"logits: expected shape \[rows, C\] with C >= 2, got \[3\]"
    ),
    bad(
        ac.ops.confidence,
        (X[:, :1],),
        ValueError,
        r"logits: expected shape \[rows, C\] with C >= 2, got \[3, 1\]",
    ),
    bad(
        ac.ops.confidence,
        (X, "max"),
        ValueError,
        r"measure: expected one of 'max_prob', 'margin', 'entropy', got 'max'",
    ),
    bad(ac.ops.confidence, (X, 0), ValueError, r"measure: expected one of .* got 0"),
    *(
        case
        for function, second in ((act, "accumulated"), (ponder, "log_survival"))
        for case in (
            bad(function, {"logits": 1.0}, TypeError, r"logits: expected a Tensor, got float 1.0"),
            bad(function, {"logits": INTS}, TypeError, r"logits: expected float32, .* got torch.int64"),
            bad(function, {"logits": X}, ValueError, r"logits: expected shape \[rows\], got \[3, 2\]"),
            bad(
                function,
                {"logits": FLOATS.to("meta")},
                ValueError,
                rf"{second}: expected a tensor on meta, got one on cpu",
            ),
            bad(function, {second: None}, TypeError, rf"{second}: expected a Tensor, got NoneType"),
            bad(function, {second: FLOATS[:2]}, ValueError, rf"{second}: expected shape \[3\], got \[2\]"),
            bad(
                function,
                {second: FLOATS.half()},
                TypeError,
                rf"{second}: expected float32 or float64, got torch.float16",
            ),
            bad(function, {second: INTS}, TypeError, rf"{second}: expected float32, .* got torch.int64"),
            bad(function, {"step": 0}, ValueError, r"step: expected an int >= 1, got 0"),
            bad(function, {"step": 1.5}, TypeError, r"step: expected an int, got float 1.5"),
            bad(function, {"step": 5}, ValueError, r"step: expected at most max_steps = 4, got 5"),
            bad(function, {"min_steps": 5}, ValueError, r"min_steps: expected at most max_steps = 4, got 5"),
            bad(function, {"min_steps": None}, TypeError, r"min_steps: expected an int, got NoneType None"),
            bad(function, {"max_steps": 0}, ValueError, r"max_steps: expected an int >= 1, got 0"),
            bad(function, {"max_steps": True}, TypeError, r"max_steps: expected an int, got bool True"),
        )
    ),
    bad(act, {"threshold": 0.0}, ValueError, r"threshold: expected a number in \(0, 1\], got 0.0"),
    bad(act, {"threshold": 1.5}, ValueError, r"threshold: expected a number in \(0, 1\], got 1.5"),
    bad(act, {"threshold": math.nan}, ValueError, r"threshold: expected a number in \(0, 1\], got nan"),
    bad(act, {"threshold": "0.9"}, TypeError, r"threshold: expected a number, got str '0.9'"),
    *(
        case
        for name in ("log_prior", "log_epsilon")
        for case in (
            bad(ponder, {name: "a"}, TypeError, rf"{name}: expected a number, got str 'a'"),
            bad(ponder, {name: None}, TypeError, rf"{name}: expected a number, got NoneType None"),
            bad(
                ponder,
                {name: math.nan},
                ValueError,
                rf"{name}: expected the logarithm of a probability, at most 0, got nan",
            ),
            bad(
                ponder,
                {name: 0.2},
                ValueError,
                rf"{name}: expected the logarithm of a probability, at most 0, got 0.2",
            ),
        )
    ),
]


@pytest.mark.promise("bad input")
@pytest.mark.parametrize(("function", "arguments", "error", "match"), BAD)
def test_a_bad_argument_is_named_with_what_was_expected_and_what_came(function, arguments, error, match):
    with pytest.raises(error, match=match):
        function(**arguments) if isinstance(arguments, dict) else function(*arguments)


@pytest.mark.promise("bad input")
@pytest.mark.skipif(ac.build_info()["cuda"], reason="built with CUDA")
def test_without_cuda_compiled_in_the_error_is_one_clear_sentence():
    from adaptcomp_ext.ops._checks import check_device

    with pytest.raises(
        RuntimeError, match=r"logits is on cuda:0, but adaptcomp_ext was built without CUDA: reinstall"
    ):
        check_device("logits", torch.device("cuda:0"))


@pytest.mark.cuda
def test_tensors_on_two_devices_are_refused():
    if not (ac.build_info()["cuda"] and torch.cuda.is_available()):
        pytest.skip("no CUDA device, or built without CUDA")
    with pytest.raises(ValueError, match=r"tensors\[0\]: expected a tensor on cpu, got one on cuda:0"):
        ac.ops.compact(KEEP, X.cuda())
    with pytest.raises(ValueError, match=r"accumulated: expected a tensor on cpu, got one on cuda:0"):
        act(accumulated=FLOATS.cuda())
