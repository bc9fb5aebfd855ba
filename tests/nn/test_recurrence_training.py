"""The gradients of whole runs of a cell: one kernel call backward, against the loop and the reference."""

from __future__ import annotations

import copy
import sys
import textwrap
import weakref
from collections.abc import Iterable

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import adaptcomp_ext as ac
from tests.helpers.processes import run_python
from tests.helpers.tensors import assert_bitwise, generator, values
from tests.nn.test_recurrence import PAIRS, arguments, make, pick


def leaves(tree) -> list[torch.Tensor]:
    return pytree.tree_leaves(tree)


def loss_of(result, seed=3):
    """A loss of everything that has a gradient, with other factors for each element."""
    draw = generator(seed)
    trace = [] if result.trace is None else list(result.trace[:2])
    parts = [t for t in (result.output, *leaves(result.state), result.cost, *trace) if t.requires_grad]
    return sum((t * torch.randn(t.shape, generator=draw, dtype=t.dtype)).sum() for t in parts)


def run(halt, given: Iterable, loop=False, **options):
    """The result and the gradients in the arguments and the parameters."""
    given = [pytree.tree_map(lambda t: t.detach().clone().requires_grad_(), g) for g in given]
    handle = halt.step.register_forward_hook(lambda *_: None) if loop else None
    try:
        assert (halt.plan(*given).way == "kernel") is not loop, halt.plan(*given)
        result = halt(*given, **options)
    finally:
        if handle is not None:
            handle.remove()
    wanted = [*leaves(given), *halt.parameters()]
    return result, torch.autograd.grad(loss_of(result), wanted, allow_unused=True)


def same(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape and a.dtype == b.dtype
            scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.promise("gradient")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("cell", "policy"), PAIRS)
def test_gradients_equal_the_loops(cell, policy, dtype):
    for dim, inner, rows in ((5, 3, 40), (16, 16, 33), (37, 20, 17), (64, 1, 3), (5, 3, 130)):
        halt = make(cell, policy, dim, inner, dtype)
        given = arguments(halt, rows, dim, inner, dtype)
        (result, got), (expected, want) = run(halt, given), run(halt, given, loop=True)
        assert torch.equal(result.steps, expected.steps)
        same(got, want, 1e-4 if dtype == torch.float32 else 1e-11)


@pytest.mark.promise("own memory")
@pytest.mark.parametrize(("cell", "policy"), PAIRS)
def test_every_gradient_is_written_and_nothing_else(cell, policy, poison):
    for dim, rows in ((5, 40), (64, 3)):
        halt = make(cell, policy, dim)
        _, got = run(halt, arguments(halt, rows, dim))
        assert all(t is None or bool(torch.isfinite(t).all()) for t in got)
    poison.check()


@pytest.mark.parametrize(
    ("cell", "policy"), [("gru", "act, readout"), ("lstm", "fixed"), ("mlp gelu", "act")]
)
def test_gradients_are_those_of_finite_differences(cell, policy, instruction_set):
    halt = make(cell, policy, 3, 2, torch.float64, max_steps=4)
    given = arguments(halt, 3, 3, 2, torch.float64)
    tensors = [t.requires_grad_() for t in [*leaves(given), *halt.parameters()]]
    structure = pytree.tree_structure(given)
    names = [name for name, _ in halt.named_parameters()]
    count = structure.num_leaves

    def function(*arguments):
        given = pytree.tree_unflatten(arguments[:count], structure)
        parameters = dict(zip(names, arguments[count:], strict=True))
        result = torch.func.functional_call(halt, parameters, tuple(given))
        return tuple(t for t in (result.output, *leaves(result.state), result.cost) if t.requires_grad)

    assert gradcheck(function, tensors, eps=1e-6, atol=1e-6)


@pytest.mark.promise("second derivative")
@pytest.mark.parametrize(("cell", "policy"), [("gru", "act, readout"), ("lstm", "fixed"), ("mlp", "act")])
def test_second_derivatives(cell, policy):
    halt = make(cell, policy, 3, 2, torch.float64, max_steps=3)
    given = [
        pytree.tree_map(lambda t: t.requires_grad_(), g) for g in arguments(halt, 2, 3, 2, torch.float64)
    ]
    structure = pytree.tree_structure(given)

    def function(*arguments):
        result = halt(*pytree.tree_unflatten(arguments, structure))
        return tuple(t for t in (result.output, *leaves(result.state), result.cost) if t.requires_grad)

    assert gradgradcheck(function, leaves(given), eps=1e-6, atol=1e-5)


OF_ONE_TENSOR = {
    "the same tensor": lambda p: (p, p),
    "a state of the input": lambda p: (torch.tanh(p), p),
    "an input of the state": lambda p: ((state := torch.sin(p)), torch.exp(state)),
}


@pytest.mark.promise("second derivative")
@pytest.mark.parametrize("name", OF_ONE_TENSOR)
def test_second_derivatives_where_an_argument_depends_on_another(name):
    """The gradient in one argument stops there: what lies behind it is the caller's graph."""
    halt = make("gru", "act", 4, 4, torch.float64, max_steps=4)
    start = (0.5 * values((3, 4), torch.float64)).requires_grad_()

    def function(start):
        result = halt(*OF_ONE_TENSOR[name](start))
        return result.output, result.state, result.cost

    loss = sum(t.square().sum() for t in function(start))
    (first,) = torch.autograd.grad(loss, start, retain_graph=True)
    (again,) = torch.autograd.grad(loss, start, create_graph=True)
    torch.testing.assert_close(again, first)
    assert gradgradcheck(function, [start], eps=1e-6, atol=1e-5)


def test_second_derivatives_where_an_argument_depends_on_a_parameter():
    halt = make("gru", "act, readout", 4, 4, torch.float64, max_steps=4)
    start = 0.5 * values((3, 4), torch.float64)
    loss = loss_of(halt(start @ halt.step.weight_hh[:4], start))
    weight = halt.step.weight_hh
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (again,) = torch.autograd.grad(loss, weight, create_graph=True)
    torch.testing.assert_close(again, first)


def test_second_derivatives_are_in_the_dtype_of_the_run_under_autocast():
    halt = make("gru", "act, readout", 6, 4)
    given = [g.requires_grad_() for g in arguments(halt, 19, 6, 4)]
    want = torch.autograd.grad(loss_of(halt(*given)), given)
    loss = loss_of(halt(*given))
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(loss, given, create_graph=True)
    same(got, want, 1e-4)


@pytest.mark.parametrize(("cell", "policy"), PAIRS)
def test_gradients_of_the_reference_equal_the_kernels(cell, policy):
    halt = make(cell, policy, 6, 4, torch.float64)
    given = [
        pytree.tree_map(lambda t: t.requires_grad_(), g) for g in arguments(halt, 19, 6, 4, torch.float64)
    ]
    wanted = [*leaves(given), *halt.parameters()]
    first = torch.autograd.grad(loss_of(halt(*given)), wanted, allow_unused=True)
    again = torch.autograd.grad(loss_of(halt(*given)), wanted, allow_unused=True, create_graph=True)
    same(again, first, 1e-11)


@pytest.mark.promise("row alone", "threads")
@pytest.mark.parametrize(
    ("cell", "policy"), [("gru", "act, readout"), ("lstm", "entropy"), ("mlp gelu", "confidence")]
)
def test_a_rows_gradient_has_the_same_bits_alone_and_in_any_batch(cell, policy, threads, instruction_set):
    halt = make(cell, policy, 24, 9, max_steps=12)
    given = arguments(halt, 130, 24, 9)
    factor = values((130, 1), seed=9)

    def of(rows):
        chosen = [pytree.tree_map(lambda t: t[rows].clone().requires_grad_(), g) for g in given]
        result = halt(*chosen)
        (result.output * factor[rows]).sum().backward()
        return [t.grad for t in leaves(chosen)]

    threads(1)
    whole = of(list(range(130)))
    shuffled = torch.randperm(130, generator=generator(3)).tolist()
    for rows in ([7], [129, 0], shuffled, shuffled[:33]):
        for a, b in zip(of(rows), whole, strict=True):
            assert_bitwise(a, b[rows])
    threads(2)
    many = list(range(130)) * 8
    for a, b in zip(of(many), whole, strict=True):
        assert_bitwise(a, b[many])


@pytest.mark.parametrize("count", [1, 2])
def test_the_sums_over_rows_are_the_same_in_every_call(count, threads):
    halt = make("gru", "act, readout", 24, 9)
    given = arguments(halt, 600, 24, 9)
    threads(count)
    _, first = run(halt, given)
    _, second = run(halt, given)
    for a, b in zip(first, second, strict=True):
        assert_bitwise(a, b)


@pytest.mark.promise("not finite")
@pytest.mark.parametrize(("cell", "policy"), PAIRS)
def test_a_row_that_is_not_finite_passes_no_gradient(cell, policy):
    halt = make(cell, policy)
    given = arguments(halt, 20)
    rest = [r for r in range(20) if r != 4]
    leaves(given)[0][4, 2] = torch.nan
    result, got = run(halt, given)
    assert result.status[4] == ac.Status.NONFINITE
    _, want = run(halt, pick(given, rest))
    count = len(leaves(given))
    # `loss_of` has other factors for the rest, so that only what does not depend on them is compared.
    for t in got[:count]:
        assert not bool(t[4].any()) and bool(torch.isfinite(t).all())
    for t in got[count:]:
        assert t is None or bool(torch.isfinite(t).all())
    assert [t is None for t in got] == [t is None for t in want]


INPUT_WEIGHTS = {"gru": "step.weight_ih", "lstm": "step.weight_ih", "mlp": "step.weight_input"}


@pytest.mark.promise("not finite")
@pytest.mark.parametrize(("cell", "policy"), [("gru", "act"), ("lstm", "fixed"), ("mlp", "fixed")])
def test_gates_that_are_saturated_by_an_infinite_input_have_no_gradient(cell, policy, instruction_set):
    for dim in (5, 16, 17):
        halt = make(cell, policy, dim)
        if cell == "mlp":
            halt.step.activation, halt.step.residual = "tanh", False
        given = arguments(halt, 9, dim)
        given[1][4, 2] = torch.inf
        (result, got), (_, want) = run(halt, given), run(halt, given, loop=True)
        assert not bool((result.status == ac.Status.NONFINITE).any())
        at = len(leaves(given)) + [n for n, _ in halt.named_parameters()].index(INPUT_WEIGHTS[cell])
        for a, b in zip(got, want, strict=True):  # the input's weight has zero times infinity
            finite = torch.isfinite(b)
            torch.testing.assert_close(a[finite], b[finite], rtol=1e-4, atol=1e-4)
            assert a is got[at] or bool(finite.all())


def test_masked_classes_have_no_gradient():
    halt = make("gru", "act, readout")
    halt.readout.bias = nn.Parameter(torch.zeros(7))
    with torch.no_grad():
        halt.readout.bias[1] = -torch.inf
    given = arguments(halt, 20)
    given = [g.requires_grad_() for g in given]
    result = halt(*given)
    assert halt.plan(*given).way == "kernel" and bool((result.output[:, 1] == -torch.inf).all())
    result.output.logsumexp(dim=1).sum().backward()
    for t in (*given, *halt.parameters()):
        assert bool(torch.isfinite(t.grad).all()) and bool(t.grad.any())
    assert not bool(halt.readout.weight.grad[1].any())


@pytest.mark.parametrize("wanted", ["x", "state", "weight_hh", "head.weight", "readout.weight"])
def test_one_gradient_alone(wanted):
    halt = make("gru", "act, readout")
    given = arguments(halt, 20)
    _, all_of_them = run(halt, given)
    names = ["state", "x", *(name for name, _ in halt.named_parameters())]
    at = next(i for i, name in enumerate(names) if name.endswith(wanted))
    tensors = [*given, *halt.parameters()]
    for i, t in enumerate(tensors):
        t.requires_grad_(i == at)
    loss_of(halt(*given)).backward()
    assert_bitwise(tensors[at].grad, all_of_them[at])
    assert all(t.grad is None for i, t in enumerate(tensors) if i != at)


def test_backward_twice_and_a_result_that_is_written_to():
    halt = make("gru", "act")
    given = [g.requires_grad_() for g in arguments(halt, 20)]
    result = halt(*given)
    loss = loss_of(result)
    first = torch.autograd.grad(loss, given, retain_graph=True)
    result.state.detach().zero_()
    second = torch.autograd.grad(loss, given)
    for a, b in zip(first, second, strict=True):
        assert_bitwise(a, b)


def test_a_parameter_that_changes_before_the_backward_pass_is_noticed():
    halt = make("gru", "act")
    result = halt(*arguments(halt, 20))
    with torch.no_grad():
        halt.step.weight_hh.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.output.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    halt = make("gru", "act, readout")
    given = [g.requires_grad_() for g in arguments(halt, 20)]
    loss_of(halt(*given)).backward()
    want = [t.grad.clone() for t in (*given, *halt.parameters())]
    for t in (*given, *halt.parameters()):
        t.grad = None
    output, state, cost = checkpoint(lambda *a: _parts(halt(*a)), *given, use_reentrant=reentrant)
    loss_of(ac.HaltResult(output, state, None, cost, None, None, None)).backward()
    same([t.grad for t in (*given, *halt.parameters())], want, 1e-4)


def _parts(result):
    return result.output, result.state, result.cost


def test_hooks_of_saved_tensors_see_everything():
    halt = make("gru", "act")
    given = arguments(halt, 20)
    with torch.autograd.graph.save_on_cpu():
        plan = halt.plan(*given)
        halt(*given).output.sum().backward()
    assert plan.way == "loop" and "saved tensors" in plan.why
    assert bool(halt.step.weight_hh.grad.any())


def test_an_empty_batch_trains():
    halt = make("gru", "act")
    halt(*arguments(halt, 0)).output.sum().backward()
    for p in halt.parameters():
        assert p.grad is None or not bool(p.grad.any())


@pytest.mark.promise("memory")
def test_what_is_kept_grows_with_the_steps_that_were_taken():
    halt = make("gru", "fixed", 64, 8, max_steps=64)
    given = arguments(halt, 256, 64, 8)
    kept = {}
    for n in (2, 8):
        halt.policy.n = n
        kept[n] = halt(*given).output.grad_fn.saved_tensors[-1].tape.bytes
    row = 64 * 4 + 24
    for n, size in kept.items():
        assert 256 * (n * row) <= size <= 256 * (n + 1) * row * 1.5 + 2**16


@pytest.mark.promise("memory")
def test_what_is_kept_is_freed_by_the_backward_pass_and_not_with_the_result():
    halt = make("gru", "act")
    result = halt(*arguments(halt, 20))
    tape = weakref.ref(result.output.grad_fn.saved_tensors[-1])
    result.output.sum().backward(retain_graph=True)
    assert tape() is not None
    result.output.sum().backward()
    assert tape() is None
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        result.output.sum().backward()


def test_training_reaches_what_the_loop_reaches():
    def train(loop):
        halt = make("gru", "act, readout", 8, 4)
        halt = copy.deepcopy(halt)
        if loop:
            halt.step.register_forward_hook(lambda *_: None)
        optimizer = torch.optim.SGD(halt.parameters(), 0.05)
        given = arguments(halt, 30, 8, 4)
        for _ in range(20):
            result = halt(*given)
            loss = (result.output - 1).square().mean() + 0.01 * result.cost.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert train(loop=False) == pytest.approx(train(loop=True), rel=1e-3)


OUT_OF_MEMORY = """
    import resource, sys, torch, adaptcomp_ext as ac
    torch.set_num_threads(int(sys.argv[1]))
    halt = ac.AdaptiveHalt(ac.cells.GRU(16, 64), ac.FixedSteps(3), max_steps=100_000)
    state, x = torch.zeros(256, 64), torch.zeros(256, 16)
    halt(state, x).output.sum().backward()
    halt.policy.n = 100_000
    with open("/proc/self/statm") as pages:
        used = int(pages.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
    raised = False
    try:
        halt(state, x)
    except MemoryError:
        raised = True  # after the handler, since the exception keeps the frames and with them the tape
    halt.policy.n = 3
    halt(state, x).output.sum().backward()
    print("still works" if raised else "raised nothing")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is one of Linux")
@pytest.mark.promise("memory")
@pytest.mark.parametrize("count", ["1", "2"])
def test_a_run_that_needs_too_much_memory_raises(count):
    """In a team, too, whose threads must not end the process."""
    done = run_python("-c", textwrap.dedent(OUT_OF_MEMORY), count)
    assert (done.returncode, done.stdout.strip()) == (0, "still works"), done.stderr[-2000:]
