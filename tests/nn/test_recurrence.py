"""Whole runs of a cell in one kernel call, against the loop that calls the cell step by step."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import adaptcomp_ext as ac
from adaptcomp_ext.ops._backend import EMULATED
from tests.helpers.tensors import assert_bitwise, generator, values

STEPS = 7


def linear(inner, columns, dtype, bias=True):
    return nn.Linear(inner, columns, bias=bias, dtype=dtype)


CELLS = {
    "gru": lambda d, i, t: ac.cells.GRU(i, d, dtype=t),
    "gru without biases": lambda d, i, t: ac.cells.GRU(i, d, bias=False, dtype=t),
    "lstm": lambda d, i, t: ac.cells.LSTM(i, d, dtype=t),
    "mlp": lambda d, i, t: ac.cells.MLP(d, i, 2 * d + 1, dtype=t),
    "mlp softplus": lambda d, i, t: ac.cells.MLP(d, i, d, "softplus", residual=False, dtype=t),
    "mlp gelu": lambda d, i, t: ac.cells.MLP(d, i, 5, "gelu", dtype=t),
    "mlp without input": lambda d, i, t: ac.cells.MLP(d, 0, d, "tanh", dtype=t),
}
# Each returns a policy and a readout; those with a Linear cannot read an LSTM's pair.
POLICIES = {
    "act": lambda d, t: (ac.ACT(linear(d, 1, t)), None),
    "act, readout": lambda d, t: (ac.ACT(linear(d, 1, t, bias=False), threshold=0.9), linear(d, 7, t)),
    "confidence": lambda d, t: (ac.Confidence(0.3, "max_prob"), linear(d, 7, t)),
    "margin": lambda d, t: (ac.Confidence(0.1, "margin"), linear(d, 19, t, bias=False)),
    "entropy": lambda d, t: (ac.Confidence(0.02, "entropy"), None),
    "fixed": lambda d, t: (ac.FixedSteps(4), None),
    "fixed, readout": lambda d, t: (ac.FixedSteps(3), linear(d, 2, t)),
    "convergence": lambda d, t: (ac.Convergence(0.3), None),
    "convergence, readout": lambda d, t: (ac.Convergence(0.2, "absolute", patience=2), linear(d, 3, t)),
    "ponder": lambda d, t: (ac.PonderNet(linear(d, 1, t), seed=5).eval(), None),
    "ponder, expected": lambda d, t: (ac.PonderNet(linear(d, 1, t)), None),
    "ponder, truncated": lambda d, t: (ac.PonderNet(linear(d, 1, t), "uniform", 0.2), linear(d, 3, t)),
}
OF_AN_LSTM = ("entropy", "fixed", "convergence")
OF_THE_HOST = ("ponder, expected", "ponder, truncated")
"""Those that only the CPU's kernel has: a trace has a length that on CUDA only the device knows."""
PAIRS = [
    (c, p)
    for c in CELLS
    for p in POLICIES
    if (c != "lstm" or p in OF_AN_LSTM) and not (EMULATED and p in OF_THE_HOST)
]


def make(cell, policy, dim=5, inner=3, dtype=torch.float32, **options):
    torch.manual_seed(1)
    step = CELLS[cell](dim, inner, dtype)
    made, readout = POLICIES[policy](dim, dtype)
    options = {"max_steps": STEPS, **options}
    return ac.AdaptiveHalt(step, made, readout=readout, **options)


def arguments(halt, rows, dim=5, inner=3, dtype=torch.float32):
    state = 2 * values((rows, dim), dtype)
    inputs = [values((rows, inner), dtype, seed=1)] if halt.step.input_size else []
    if isinstance(halt.step, ac.cells.LSTM):
        state = (state, values((rows, dim), dtype, seed=2))
    return [state, *inputs]


def pick(tree, rows):
    return pytree.tree_map_only(torch.Tensor, lambda t: t[rows], tree)


def by_kernel(halt, *arguments, **options):
    with torch.no_grad():
        plan = halt.plan(*arguments, **options)
        assert plan.way == "kernel", plan
        return halt(*arguments, **options)


def by_loop(halt, *arguments, **options):
    """The same run, with a hook that does nothing: a module with hooks has to be called."""
    handle = halt.step.register_forward_hook(lambda *_: None)
    try:
        with torch.no_grad():
            assert halt.plan(*arguments, **options).way in ("loop", "python")
            return halt(*arguments, **options)
    finally:
        handle.remove()


def same_results(got, want, rtol, atol):
    for a, b in zip(pytree.tree_leaves(got[:5]), pytree.tree_leaves(want[:5]), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.is_contiguous()
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    assert type(got.state) is type(want.state) and got.log_prob is None
    assert (got.trace is None) == (want.trace is None)
    if got.trace is not None:
        assert torch.equal(got.trace.row, want.trace.row) and torch.equal(got.trace.step, want.trace.step)
        for a, b in zip(got.trace[:2], want.trace[:2], strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.promise("formula", "own memory")
@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("cell", "policy"), PAIRS)
def test_equals_the_loop(cell, policy, dtype, poison):
    tolerance = 2e-5 if dtype == torch.float32 else 1e-13
    for dim, inner, rows in ((5, 3, 40), (16, 16, 33), (37, 20, 17), (64, 1, 3)):
        halt = make(cell, policy, dim, inner, dtype)
        given = arguments(halt, rows, dim, inner, dtype)
        got, want = by_kernel(halt, *given), by_loop(halt, *given)
        same_results(got, want, tolerance, tolerance)
    poison.check()


@pytest.mark.parametrize("policy", ["act, readout", "confidence", "ponder"])
def test_bounds_and_sample_ids(policy):
    for min_steps, max_steps in ((1, 1), (3, 3), (4, 6)):
        halt = make("gru", policy, min_steps=min_steps, max_steps=max_steps)
        given = arguments(halt, 25)
        ids = torch.arange(25).flip(0) * 7
        got, want = by_kernel(halt, *given, sample_ids=ids), by_loop(halt, *given, sample_ids=ids)
        same_results(got, want, 2e-5, 2e-5)
        assert int(got.steps.min()) >= min_steps and int(got.steps.max()) <= max_steps


def test_numbers_of_steps_of_each_row():
    halt = make("mlp", "fixed", max_steps=6)
    halt.policy = ac.FixedSteps(torch.tensor([1, 9, 3, 6, 2]))
    given = arguments(halt, 5)
    got = by_kernel(halt, *given)
    assert got.steps.tolist() == [1, 6, 3, 6, 2]
    assert [ac.Status(s).name for s in got.status.tolist()] == [
        "HALTED",
        "MAX_STEPS",
        "HALTED",
        "HALTED",
        "HALTED",
    ]
    same_results(got, by_loop(halt, *given), 2e-5, 2e-5)


@pytest.mark.promise("row alone", "threads")
@pytest.mark.parametrize(
    ("cell", "policy"), [("gru", "act, readout"), ("lstm", "entropy"), ("mlp gelu", "confidence")]
)
def test_a_row_has_the_same_bits_alone_in_any_batch_and_with_any_threads(
    cell, policy, threads, instruction_set
):
    """The products included, which is more than a loop over a matrix product of torch's can promise."""
    halt = make(cell, policy, 24, 9, max_steps=12)
    given = arguments(halt, 300, 24, 9)
    threads(1)
    whole = by_kernel(halt, *given)
    shuffled = torch.randperm(300, generator=generator(3))
    for chosen in ([7], [299, 0], list(range(17)), shuffled.tolist(), shuffled[:33].tolist()):
        some = by_kernel(halt, *pick(given, chosen))
        for a, b in zip(pytree.tree_leaves(some[:5]), pytree.tree_leaves(whole[:5]), strict=True):
            assert_bitwise(a, b[chosen])
    threads(2)
    again = by_kernel(halt, *pytree.tree_map(lambda t: t.repeat(20, 1), given))
    for a, b in zip(pytree.tree_leaves(again[:5]), pytree.tree_leaves(whole[:5]), strict=True):
        assert_bitwise(a[-300:], b)


@pytest.mark.promise("not finite")
@pytest.mark.parametrize(("cell", "policy"), PAIRS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_ends_alone(cell, policy, value):
    halt = make(cell, policy)
    given = arguments(halt, 20)
    expected = by_kernel(halt, *given)
    state = given[0][0] if isinstance(given[0], tuple) else given[0]
    state[4, 2] = value
    if len(given) > 1:
        given[1][11, 0] = float("nan")
    got, want = by_kernel(halt, *given), by_loop(halt, *given)
    assert torch.equal(got.status, want.status) and torch.equal(got.steps, want.steps)
    keep = torch.tensor([r not in (4, 11) for r in range(20)])
    for a, b in zip(pytree.tree_leaves(got[:5]), pytree.tree_leaves(expected[:5]), strict=True):
        assert_bitwise(a[keep], b[keep])
    assert got.status[11] == ac.Status.NONFINITE or len(given) == 1


@pytest.mark.promise("not finite")
@pytest.mark.parametrize(("cell", "policy"), [("gru", "act"), ("gru", "ponder"), ("lstm", "fixed")])
def test_an_infinite_input_that_leaves_the_state_finite_is_no_failure(cell, policy, instruction_set):
    """The gates saturate. The lanes beyond the last unit must not make something else of it."""
    for dim in (5, 16, 17):
        halt = make(cell, policy, dim)
        given = arguments(halt, 9, dim)
        given[1][4, 2] = torch.inf
        got, want = by_kernel(halt, *given), by_loop(halt, *given)
        assert not bool((want.status == ac.Status.NONFINITE).any())
        same_results(got, want, 2e-5, 2e-5)


@pytest.mark.parametrize(
    "policy", ["act, readout", "confidence", "margin", "fixed, readout", "convergence, readout"]
)
def test_masked_classes_are_ordinary(policy):
    halt = make("gru", policy)
    halt.readout.bias = nn.Parameter(torch.zeros(halt.readout.out_features))
    with torch.no_grad():
        halt.readout.bias[1] = -torch.inf
    given = arguments(halt, 20)
    got = by_kernel(halt, *given)
    assert bool((got.output[:, 1] == -torch.inf).all()) and not bool(
        (got.status == ac.Status.NONFINITE).any()
    )
    same_results(got, by_loop(halt, *given), 2e-5, 2e-5)


@pytest.mark.promise("small")
@pytest.mark.parametrize("cell", CELLS)
def test_an_empty_batch_and_a_single_row(cell):
    for policy in OF_AN_LSTM:
        halt = make(cell, policy)
        given = arguments(halt, 1)
        same_results(by_kernel(halt, *given), by_loop(halt, *given), 2e-5, 2e-5)
        with torch.no_grad():
            nothing = halt(*arguments(halt, 0))
        assert nothing.steps.shape == (0,) and nothing.output.shape == (0, 5)


@pytest.mark.promise("untouched")
def test_nothing_that_was_given_is_written_to():
    halt = make("lstm", "entropy")
    given = arguments(halt, 20)
    before = copy.deepcopy(given)
    result = by_kernel(halt, *given)
    for a, b in zip(pytree.tree_leaves(given), pytree.tree_leaves(before), strict=True):
        assert torch.equal(a, b)
    result.state[0].zero_()
    assert bool(by_kernel(halt, *given).state[0].any())


def test_parameters_that_changed_count():
    halt = make("gru", "act")
    given = arguments(halt, 20)
    before = by_kernel(halt, *given)
    with torch.no_grad():
        halt.step.weight_hh.mul_(-1)
    got = by_kernel(halt, *given)
    assert not torch.equal(before.state, got.state)
    same_results(got, by_loop(halt, *given), 2e-5, 2e-5)
    other = {name: p.detach() * 0.5 for name, p in halt.named_parameters()}
    with torch.no_grad():
        called = torch.func.functional_call(halt, other, tuple(given))
        halt.load_state_dict(other)
        for a, b in zip(called[:5], halt(*given)[:5], strict=True):
            assert_bitwise(a, b)


class _Subclass(ac.cells.GRU):
    pass


class _Still(ac.Convergence):
    pass


def _decides_alone():
    policy = ac.Convergence(1e-3)
    policy.decide = lambda view: ac.FixedSteps(2).decide(view)
    return policy


def hooked(part):
    def change(halt, given):
        module = {"head": halt.policy.head, "step": halt.step}[part]
        module.register_forward_hook(lambda *_: None)

    return change


def replaced(**attributes):
    def change(halt, given):
        for name, value in attributes.items():
            setattr(halt, name, value)

    return change


def converted(index, convert):
    def change(halt, given):
        given[index] = convert(given[index])

    return change


def with_head(head):
    def change(halt, given):
        halt.policy.head = head

    return change


def function(halt, given):
    del halt.step
    halt.step = lambda s, x: s * 0.5


OTHERWISE = {
    "a subclass": (replaced(step=_Subclass(3, 5)), "the step is no cell"),
    "a function": (function, "the step is no cell"),
    "a hook on the step": (hooked("step"), "the step has hooks"),
    "a hook on the head": (hooked("head"), "the head has hooks"),
    "a head of one's own": (with_head(nn.Sequential(nn.Linear(5, 1))), "the head is no torch.nn.Linear"),
    "a policy in Python": (replaced(policy=_Still(1e-3)), "_Still decides in Python"),
    "a decision of its own": (replaced(policy=_decides_alone()), "Convergence decides in Python"),
    "a readout of one's own": (replaced(readout=torch.tanh), "the readout is no torch.nn.Linear"),
    "a strided input": (converted(1, lambda x: x.t().contiguous().t()), "not all plain contiguous"),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_the_kernel_does_not_know_goes_through_the_loop(name):
    change, reason = OTHERWISE[name]
    halt = make("gru", "act")
    given = arguments(halt, 9)
    change(halt, given)
    with torch.no_grad():
        plan = halt.plan(*given)
        assert plan.way in ("loop", "python") and reason in plan.why, plan
        assert halt(*given).output.shape == (9, 5)


def test_modes_go_through_the_loop():
    halt = make("gru", "act")
    given = arguments(halt, 9)
    assert halt.plan(*given).way == "kernel" and halt(*given).output.requires_grad
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in halt.plan(*given).why
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert "mode" in halt.plan(*given).why
        halt(*given)
    assert counter.get_total_flops() > 0
    with torch.inference_mode():
        assert halt.plan(*given).way == "kernel"
        assert halt(*given).output.is_inference()
    with torch.no_grad(), ac.reference_kernels():
        assert halt.plan(*given).way == "reference"


def test_a_plan_is_one_line_and_runs_nothing():
    halt = make("gru", "act")
    given = arguments(halt, 9)
    with torch.no_grad():
        plan = halt.plan(*given)
    assert str(plan).startswith("kernel: ") and "\n" not in str(plan) and plan.microseconds > 0
    with pytest.raises(ValueError, match="inputs"):
        halt.plan(given[0], given[1][:3])


@pytest.mark.promise("step's result")
def test_wrong_shapes_are_told_by_the_cell():
    halt = make("gru", "act")
    with torch.no_grad(), pytest.raises(ValueError, match=r"x: expected .*\[n, 3\]"):
        halt(torch.zeros(4, 5), torch.zeros(4, 2))
    with torch.no_grad(), pytest.raises(ValueError, match=r"state: expected .*\[n, 5\]"):
        halt(torch.zeros(4, 6), torch.zeros(4, 3))


class _HalvedGRU(ac.cells.GRU):
    def forward(self, state, x):
        return super().forward(state, x) * 0.5


class _OtherACT(ac.ACT):
    def decide(self, view):
        return super().decide(view)._replace(weight=view.state[:, 0] * 0 + 1)


CHANGES = {
    "another class of the step": lambda halt: setattr(halt.step, "__class__", _HalvedGRU),
    "another class of the policy": lambda halt: setattr(halt.policy, "__class__", _OtherACT),
    "max_steps": lambda halt: setattr(halt, "max_steps", 2),
    "min_steps": lambda halt: setattr(halt, "min_steps", 5),
    "threshold": lambda halt: setattr(halt.policy, "threshold", 0.3),
    "another head": lambda halt: setattr(halt.policy, "head", linear(5, 1, torch.float32)),
    "another step": lambda halt: setattr(halt, "step", ac.cells.GRU(3, 5)),
    "another policy": lambda halt: setattr(halt, "policy", ac.FixedSteps(2)),
    "a readout": lambda halt: setattr(halt, "readout", linear(5, 4, torch.float32)),
    "a hook on the step": lambda halt: halt.step.register_forward_hook(lambda m, a, out: out * 0.5),
    "a hook before the head": lambda halt: halt.policy.head.register_forward_pre_hook(
        lambda m, a: (a[0] * 0 + 5,)
    ),
    "a forward of the step's own": lambda halt: setattr(halt.step, "forward", lambda s, x: s * 0.5),
    "a decision of the policy's own": lambda halt: setattr(
        halt.policy,
        "decide",
        lambda view: ac.FixedSteps(3).decide(view)._replace(weight=view.state[:, 0] * 0 + 1),
    ),
    "weights in place": lambda halt: halt.step.weight_hh.data.mul_(-1),
    "other weights": lambda halt: setattr(halt.step, "weight_hh", nn.Parameter(-halt.step.weight_hh)),
    "no bias": lambda halt: setattr(halt.policy.head, "bias", None),
    "double": lambda halt: halt.double(),
    "a parametrization": lambda halt: torch.nn.utils.parametrizations.weight_norm(halt.policy.head),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_a_run_that_is_known_is_forgotten_when_something_changes(name, gradients):
    """The second call of a module skips the checks of the first: what it finds changed, it checks again."""
    halt = make("gru", "act")
    given = arguments(halt, 9)
    with torch.set_grad_enabled(gradients):
        for _ in range(3):
            halt(*given)
        assert halt._known_run is not None
        CHANGES[name](halt)
        fresh = copy.deepcopy(halt)
        assert fresh._known_run is None
        if name == "double":
            given = [g.double() for g in given]
        for _ in range(2):
            got, want = halt(*given), fresh(*given)
            for a, b in zip(pytree.tree_leaves(got[:5]), pytree.tree_leaves(want[:5]), strict=True):
                assert_bitwise(a.detach(), b.detach())


class _Scheduled(ac.AdaptiveHalt):
    most = 7

    @property
    def max_steps(self):
        return _Scheduled.most

    @max_steps.setter
    def max_steps(self, value):
        pass


class _FusedAnew(ac.ACT):
    limit = 0.99

    def fuse(self):
        return super().fuse()._replace(threshold=_FusedAnew.limit)


@pytest.mark.parametrize("changed", ["a property of the halt", "a policy's own fuse"])
def test_what_a_subclass_computes_anew_counts_in_every_call(changed, monkeypatch):
    halt = make("gru", "act")
    given = arguments(halt, 9)
    if changed == "a property of the halt":
        halt = _Scheduled(halt.step, halt.policy)
    else:
        halt.policy = _FusedAnew(halt.policy.head)
    for _ in range(2):
        before = by_kernel(halt, *given)
    monkeypatch.setattr(_Scheduled, "most", 2)
    monkeypatch.setattr(_FusedAnew, "limit", 0.1)
    got = by_kernel(halt, *given)
    assert int(got.steps.max()) <= 2 < int(before.steps.max())


@pytest.mark.parametrize("of", [ac.cells.GRU, nn.GRUCell, nn.Linear, nn.Module], ids=lambda c: c.__name__)
@pytest.mark.parametrize("known", [False, True])
def test_a_method_that_is_assigned_to_a_class_is_called(of, known, monkeypatch):
    halt = make("gru", "act, readout")
    given = arguments(halt, 9)
    if known:
        by_kernel(halt, *given)
    name = "__call__" if of is nn.Module else "forward"
    before, called = getattr(of, name), []

    def watched(self, *arguments, **options):
        called.append(self)
        return before(self, *arguments, **options)

    monkeypatch.setattr(of, name, watched)
    with torch.no_grad():
        plan = halt.plan(*given)
        halt(*given)
    assert plan.way == "loop" and f"{name} was assigned to" in plan.why and called


@pytest.mark.promise("memory")
def test_a_module_that_leads_back_to_its_halt_is_collected():
    halt = make("gru", "act")
    given = arguments(halt, 9)
    for _ in range(2):
        by_kernel(halt, *given)
    halt.step.owner = [halt]
    halt.policy.report = halt.extra_repr
    by_kernel(halt, *given)
    assert halt._known_run is not None
    gone = weakref.ref(halt)
    del halt
    gc.collect()
    assert gone() is None


class _Watched(torch.Tensor):
    pass


ARGUMENTS = {
    "another batch": lambda s, x: (s[:4], x[:4]),
    "no rows": lambda s, x: (s[:0], x[:0]),
    "strided": lambda s, x: (s.t().contiguous().t(), x),
    "a subclass": lambda s, x: (s.as_subclass(_Watched), x),
    "expanded": lambda s, x: (s[:1].expand(9, 5), x),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_known_run_looks_at_its_tensors(name):
    halt = make("gru", "act, readout")
    given = arguments(halt, 9)
    with torch.no_grad():
        halt(*given)
        other = ARGUMENTS[name](*given)
        got = halt(*other)
        want = copy.deepcopy(halt)(*other)
    for a, b in zip(pytree.tree_leaves(got[:5]), pytree.tree_leaves(want[:5]), strict=True):
        torch.testing.assert_close(a, b)
        assert type(a) is type(b)


def test_a_known_run_refuses_what_a_first_run_refuses():
    halt = make("gru", "act")
    given = arguments(halt, 9)
    with torch.no_grad():
        halt(*given)
        for wrong, error in (
            ((given[0], given[1][:4]), ValueError),
            ((given[0],), (TypeError, ValueError)),
            ((given[0].double(), given[1]), (TypeError, ValueError, RuntimeError)),
            ((given[0].tolist(), given[1]), TypeError),
        ):
            with pytest.raises(error):
                halt(*wrong)


def test_sample_ids_count_in_every_call():
    halt = make("gru", "ponder", max_steps=12)
    given = arguments(halt, 40)
    with torch.no_grad():
        first = halt(*given)
        again = halt(*given)
        other = halt(*given, sample_ids=torch.arange(40) + 1000)
    assert torch.equal(first.steps, again.steps) and not torch.equal(first.steps, other.steps)


def test_a_module_that_ran_is_freed_copied_and_pickled(tmp_path):
    halt = make("lstm", "fixed")
    given = arguments(halt, 9)
    with torch.no_grad():
        want = halt(*given)
        for other in (copy.deepcopy(halt), pickle.loads(pickle.dumps(halt))):
            assert_bitwise(other(*given).output, want.output)
    gone = weakref.ref(halt)
    del halt, other
    assert gone() is None  # without the cycle collector
