"""`check_rows`: steps, readouts and heads that mix rows are refused, all others pass; it leaves no trace."""

import collections
import concurrent.futures
import copy
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import adaptcomp_ext as ac

B, D = 6, 8
X = torch.randn(B, D, generator=torch.Generator().manual_seed(0))
REFUSED = r"expected each row's (state|result) to depend on that row alone, .*compact=False"


class Block(nn.Module):
    """A layer under a name."""

    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, h):
        for layer in self.children():
            h = layer(h)
        return h


class OverRows(nn.Module):
    """The mistake: the rows of the batch are taken for the tokens of one sequence."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, h):
        h = h[None]
        return self.attention(h, h, h, need_weights=False)[0][0]


class WithinRows(nn.Module):
    def __init__(self, batch_first=True):
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, batch_first=batch_first)

    def forward(self, h):
        tokens = h.view(len(h), D // 2, 2)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0].reshape(h.shape)


class Centred(nn.Module):
    def forward(self, h):
        return h - h.mean(0)


NORM = nn.BatchNorm1d(D)
LINEAR = nn.Linear(D, D)
SIGNS = torch.tensor([1.0, -1.0]).repeat(D // 2)
MIXING = {
    "batch normalisation": Block(norm=nn.BatchNorm1d(D)),
    "batch normalisation in a function": lambda h: NORM(h),
    "batch normalisation without running statistics": nn.BatchNorm1d(D, track_running_stats=False).eval(),
    "attention over the batch": OverRows(),
    "attention without batch_first": WithinRows(batch_first=False),
    "mean": Centred(),
    "mean as a factor": lambda h: h * h.mean(0),
    "maximum": lambda h: h - h.amax(0),
    "sort": lambda h: torch.sort(h, 0).values,
    "cumsum": lambda h: h.cumsum(0),
    "cumsum from the end": lambda h: h.flip(0).cumsum(0).flip(0),
    "softmax": nn.Softmax(0),
    "neighbours": lambda h: torch.cat([h[1:], h[:1]]),
    "one number for the batch": lambda h: h / h.norm(),
    "terms whose sum is zero": lambda h: h + h.mean() * SIGNS,
    "pairs": lambda h: h.view(-1, 2, D).flip(1).reshape(h.shape),
    "rows of a certain number": lambda h: h - h.mean(0) * torch.ones(B, D),
}
APART = {
    "linear": nn.Linear(D, D),
    "layer normalisation": nn.LayerNorm(D),
    "group normalisation": nn.GroupNorm(2, D),
    "dropout": nn.Dropout(0.5),
    "batch normalisation in evaluation": Block(norm=nn.BatchNorm1d(D)).eval(),
    "attention within rows": WithinRows(),
    "softmax": nn.Softmax(1),
    "cumsum within rows": lambda h: h.cumsum(1),
    "random": lambda h: h + torch.randn_like(h),
    "infinite derivatives": lambda h: torch.sqrt(h.abs() * 0) + h,
    "rows of a certain number": lambda h: h + torch.ones(B, 1)[: len(h)],
}


def halting(step, steps=1, **options):
    options.setdefault("policy", ac.FixedSteps(steps))
    return ac.AdaptiveHalt(step, max_steps=steps, **options)


@pytest.fixture(params=["training", "no_grad", "inference_mode", "autocast", "reference"])
def mode(request):
    return {
        "training": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "reference": ac.reference_kernels,
    }[request.param]


@pytest.mark.promise("rows apart")
@pytest.mark.parametrize("name", MIXING)
def test_a_step_that_mixes_rows_is_refused(name, mode):
    if name == "pairs":
        rows = (X, torch.zeros(B, D))
    elif name == "rows of a certain number":
        rows = (X,)
    else:
        rows = (X, X[:2], X[:3], torch.zeros(B, D))
    for x in rows:
        with mode(), pytest.raises(ValueError, match=REFUSED):
            halting(MIXING[name])(x.clone())
    with mode():
        halting(MIXING[name], check_rows=False, compact=False)(X.clone())


@pytest.mark.promise("rows apart")
@pytest.mark.parametrize("name", APART)
def test_all_others_pass(name, mode):
    for rows in (B, 3, 2, 1, 0):
        with mode():
            halting(APART[name])(X[:rows].clone())
            halting(APART[name])(torch.zeros(rows, D))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_dtype_is_checked(dtype):
    halt = halting(lambda h: h - h.mean(0) if h.dtype == dtype else h)
    halt(X)
    with pytest.raises(ValueError, match=REFUSED):
        halt(X.to(dtype))


def test_rows_may_see_each_other_where_none_leaves():
    halt = halting(Centred(), compact=False)
    halt(X)
    for compact in ("auto", True):
        halt.compact = compact
        with pytest.raises(ValueError, match=REFUSED):
            halt(X)
    halt.check_rows = False
    halt(X)
    assert "check_rows=False" in repr(halt)
    for wrong in (None, 1, "yes"):
        with pytest.raises(TypeError, match=f"^check_rows: expected a bool, got {type(wrong).__name__}"):
            halt.check_rows = wrong


def test_one_row_is_nothing_to_check():
    halt = halting(Centred())
    halt(X[:1])
    halt(X[:0])
    with pytest.raises(ValueError, match=REFUSED):
        halt(X[:2])


@pytest.mark.promise("before")
def test_no_step_has_run():
    """The error comes before the first step of the run, and in a later stage before the second."""
    seen = []

    def step(h):
        seen.append(len(h))
        return h - h.mean(0)

    with pytest.raises(ValueError, match=REFUSED):
        halting(step)(X)
    assert seen == []


@pytest.mark.promise("rows apart")
@pytest.mark.parametrize("at", range(3))
def test_every_stage_is_checked(at):
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.inner = nn.Linear(D, D), Centred()

        def forward(self, h):
            return self.linear(self.inner(h))

    stages = nn.ModuleList([Stage() if i == at else nn.Linear(D, D) for i in range(3)])
    with pytest.raises(ValueError, match=rf"^step\[{at}\]: .* through {at}\.inner \(Centred\)\. "):
        ac.AdaptiveHalt(stages, ac.FixedSteps(1))(X)


@pytest.mark.promise("rows apart")
@pytest.mark.parametrize(
    ("step", "name"),
    [
        (Block(norm=nn.BatchNorm1d(D)), r"^step\.norm: .*BatchNorm1d takes its statistics"),
        (Block(first=nn.Linear(D, D), second=Centred()), r"^step: .*, through second \(Centred\)\. "),
        (OverRows(), r"^step: .*, through attention \(MultiheadAttention\)\. "),
        (WithinRows(batch_first=False), r"^step: .*, through attention \(MultiheadAttention\)\. "),
        (lambda h: NORM(h), r"^step: .*, through NORM \(BatchNorm1d\)\. "),
        (lambda h: nn.functional.linear(h - h.mean(0), torch.eye(D)), r"^step: .*depends on other rows\. "),
        (lambda h: LINEAR(h - h.mean(0)), r"^step: .*depends on other rows\. "),
        (lambda h: LINEAR(input=h - h.mean(0)), r"^step: .*depends on other rows\. "),
        (Centred(), r"^step: .*depends on other rows\. "),
    ],
    ids=[
        "norm",
        "second",
        "attention",
        "sequence first",
        "function",
        "no submodule",
        "before it",
        "before it, by name",
        "itself",
    ],
)
def test_the_submodule_is_named(step, name):
    with pytest.raises(ValueError, match=name) as raised:
        halting(step)(X)
    for way in ("LayerNorm", "GroupNorm", "batch_first=True", "compact=False", "check_rows=False"):
        assert way in str(raised.value)


def test_batch_normalisation_that_starts_at_zero_is_refused():
    """Its gradients are zero, so that they say nothing."""
    norm = nn.BatchNorm1d(D)
    nn.init.zeros_(norm.weight)
    with pytest.raises(ValueError, match=REFUSED):
        halting(Block(norm=norm))(X)


def test_the_submodule_is_found_by_a_second_call_on_the_same_rows():
    """The first call, which finds that the step mixes rows, may count in a tensor of integers."""

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.centred = Centred()

        def forward(self, h, count):
            count += 1
            return self.centred(h) if int(count[0]) == 1 else h

    with pytest.raises(ValueError, match=r"through centred \(Centred\)"):
        halting(Step())(X, torch.zeros(B, dtype=torch.long))


@pytest.mark.parametrize("where", ["input", "dict", "second tensor", "dict of states"])
def test_inputs_and_all_tensors_of_a_state_are_checked(where):
    step, arguments = {
        "input": (lambda h, x: h + x.mean(0), (X, X)),
        "dict": (lambda h, x, none: h + x["a"].mean(0), (X, {"a": X}, None)),
        "second tensor": (
            lambda s: (s[0] + 1, s[1] - s[1].mean(0)),
            ((torch.zeros(B, dtype=torch.long), X),),
        ),
        "dict of states": (lambda s: {"b": s["b"], "a": s["a"] - s["b"].mean(0)}, ({"a": X, "b": X},)),
    }[where]
    with pytest.raises(ValueError, match=REFUSED):
        halting(step)(*arguments)


@pytest.mark.promise("rows apart")
def test_readout_and_head_are_checked():
    linear = nn.Linear(D, D)
    with pytest.raises(ValueError, match="^readout: " + REFUSED):
        halting(linear, readout=lambda h: h - h.mean(0))(X)
    for policy in (ac.ACT, ac.PonderNet):
        head = Block(softmax=nn.Softmax(0), linear=nn.Linear(D, 1))
        with pytest.raises(ValueError, match=r"^head: .*, through softmax \(Softmax\)"):
            halting(linear, policy=policy(head))(X)
        halting(linear, policy=policy(nn.Linear(D, 1)), readout=nn.Linear(D, 2))(X)


def test_readout_and_head_get_the_step_s_result():
    """Where the derivatives of theirs are zero in the first state, those in the next one tell."""
    h = -X.abs() - 1
    with pytest.raises(ValueError, match="^readout: " + REFUSED):
        halting(lambda h: h + 10, readout=lambda h: h.relu().cumsum(0))(h)
    halting(lambda h: h, readout=lambda h: h.relu().cumsum(0))(h)


@pytest.mark.promise("rows apart")
def test_equal_rows_are_told_apart():
    """The state is zero, and a product's derivative with it, unless noise is added; integers get none."""
    with pytest.raises(ValueError, match=REFUSED):
        halting(lambda h, n: h * h.mean(0) * n)(torch.zeros(B, D), torch.ones(B, 1, dtype=torch.long))
    # Noise takes these rows out of the function's domain: then they are tried as they are.
    with pytest.raises(ValueError, match=REFUSED):
        halting(lambda h, x: (h - h.mean(0)) * (1 + (1 - x).sqrt().sum(1, keepdim=True)))(
            X, torch.ones(B, 64)
        )


def test_the_mode_of_a_step_counts():
    class Moody(nn.Module):
        def forward(self, h):
            return h - h.mean(0) if self.training else h

    step = Moody()
    for function in (step, lambda h: step(h)):
        halt = halting(function)
        step.eval()
        halt(X)
        step.train()
        for _ in range(2):
            with pytest.raises(ValueError, match=REFUSED):
                halt(X)
        step.eval()
        halt(X)
    norm = Block(norm=nn.BatchNorm1d(D))
    halt = halting(norm).eval()
    halt(X)
    norm.norm.train()  # the mode of the step itself is unchanged
    with pytest.raises(ValueError, match=REFUSED):
        halt(X)


@pytest.mark.parametrize("part", ["readout", "head"])
def test_the_mode_of_readout_and_head_counts(part):
    """The step has no mode: that of the AdaptiveHalt, which sets theirs, tells the calls apart."""

    class Moody(nn.Module):
        def forward(self, h):
            return (h - h.mean(0) if self.training else h)[:, :1]

    options = {"readout": Moody()} if part == "readout" else {"policy": ac.ACT(Moody())}
    halt = halting(lambda h: h * 2, **options).eval()
    halt(X)
    halt.train()
    with pytest.raises(ValueError, match=f"^{part}: {REFUSED}"):
        halt(X)


# --- what cannot be checked ---------------------------------------------------------------------------------
def test_what_has_no_derivative_passes():
    halting(lambda h: h + 1)(torch.zeros(B, 2, dtype=torch.long))
    halting(lambda h: (h - h.mean(0) > 0).float())(X)
    halting(lambda h: h - h.detach().mean(0))(X)


def test_an_iterator_is_not_used_up():
    factors = iter([1.0, 2.0, 3.0])
    halting(lambda h: h * next(factors), steps=2)(X)
    assert next(factors) == 3.0


def test_a_function_that_raises_is_left_to_the_run():
    def raises(h):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        halting(raises)(X)
    for step in (lambda h: h[:-1], lambda h: h.repeat(2, 1)):
        with pytest.raises(ValueError, match="keep the state's shape"):
            halting(step)(X)

    def interrupted(h):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        halting(interrupted)(X)


def test_a_lazy_step_is_checked_at_the_next_call():
    torch.manual_seed(0)
    linear = nn.LazyLinear(D)
    halt = halting(Block(linear=linear, softmax=nn.Softmax(0)))
    halt(X)
    torch.manual_seed(0)
    expected = nn.LazyLinear(D)
    expected(X)
    assert torch.equal(linear.weight, expected.weight)
    with pytest.raises(ValueError, match=REFUSED):
        halt(X)


def test_a_checkpointed_step_is_checked():
    linear = nn.Linear(D, D)
    halt = halting(lambda h: checkpoint(lambda x: linear(x - x.mean(0)), h, use_reentrant=False))
    with pytest.raises(ValueError, match=REFUSED):
        halt(X)


def test_what_all_processes_have_to_call_together_is_not_called():
    calls = []

    class Wrapper(nn.Module):
        def forward(self, h):
            calls.append(len(h))
            return h - h.mean(0)

    Wrapper.__module__ = "torch.nn.parallel.distributed"
    halting(Block(wrapper=Wrapper()))(X)
    assert calls == [B]


def test_parameters_on_several_processes_are_not_called_for():
    """DTensor is a subclass with a ``__torch_dispatch__``, which may communicate."""
    calls = []

    class Spread(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            assert function is torch.ops.aten.detach.default, "the step does not use its parameter"
            return torch.Tensor._make_wrapper_subclass(cls, (D, D))

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            weight = torch.Tensor._make_wrapper_subclass(Spread, (D, D))
            self.register_parameter("weight", nn.Parameter(weight, requires_grad=False))

        def forward(self, h):
            calls.append(len(h))
            return h - h.mean(0)

    halting(Step())(X)
    assert calls == [B]


def test_threads_do_not_wait_for_each_other_for_ever():
    inner = halting(nn.Tanh())

    def step(h):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return h + pool.submit(lambda: inner(h.detach()).output).result(30)

    halt = halting(step)
    halt(X)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        halts = [halting(Centred()) for _ in range(4)]
        for future in [pool.submit(halt, X) for halt in halts]:
            with pytest.raises(ValueError, match=REFUSED):
                future.result(30)


def test_transforms_and_counters_see_no_check():
    with ac.reference_kernels():
        torch.func.grad(lambda x: halting(Centred())(x).output.sum())(X)
    with FlopCounterMode(display=False) as counter:
        halting(nn.Linear(D, D))(X)
    with FlopCounterMode(display=False) as expected:
        halting(nn.Linear(D, D), check_rows=False)(X)
    assert counter.get_total_flops() == expected.get_total_flops() > 0


def test_a_compiled_step_is_not_compiled_for_the_check():
    sizes = []

    def backend(graph, examples):
        sizes.extend(len(t) for t in examples if isinstance(t, torch.Tensor) and t.shape[1:] == X.shape[1:])
        return graph.forward

    halt = halting(torch.compile(nn.ReLU(), backend=backend, dynamic=False))
    halt(X)
    assert sizes == [B]
    with pytest.raises(ValueError, match=REFUSED):
        halting(torch.compile(Centred(), backend=backend))(X)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.halt = halting(torch.compile(nn.Linear(D, D), backend=backend))

        def forward(self, x):
            return self.halt(x * 2).output + 1

    torch.compile(Model(), backend=backend)(X).sum().backward()


# --- traces -------------------------------------------------------------------------------------------------
COUNT = 0


@pytest.mark.promise("no trace")
def test_what_a_step_counts_counts_no_check():
    seen, bag, queue, counts = [], set(), collections.deque(), collections.Counter()
    total = 0

    class Counting(nn.Module):
        calls, all_calls, all_sizes, cache = 0, 0, [], None

        def __init__(self):
            super().__init__()
            self.register_buffer("used", torch.zeros(()))
            self.log = {}

        def forward(self, h):
            self.calls += 1
            Counting.all_calls += 1
            self.all_sizes.append(len(h))
            self.used += 1
            self.log[len(self.log)] = len(h)
            if self.cache is None:
                self.cache = torch.ones(len(h), 1)
            return h * self.cache

    def step(h):
        global COUNT
        nonlocal total
        COUNT += 1
        total += 1
        seen.append(len(h))
        bag.add(len(h))
        queue.append(len(h))
        counts[len(h)] += 1
        return module(h)

    module = Counting()
    already = COUNT
    for use in (step, module):
        halting(use)(X)
    assert already + 1 == COUNT
    assert total == 1
    assert seen == [B]
    assert bag == {B}
    assert list(queue) == [B]
    assert counts == {B: 1}
    assert module.calls == Counting.all_calls == 2
    assert Counting.all_sizes == [B, B]
    assert module.used == 2
    assert module.log == {0: B, 1: B}
    assert len(module.cache) == B


@pytest.mark.promise("no trace")
def test_random_numbers_go_on_as_if_there_were_no_check():
    own = torch.Generator()

    def step(h):
        noise = random.random() + np.random.rand() + torch.rand(1, generator=own)
        return nn.functional.dropout(h, 0.5) + noise.to(h)

    found = []
    for check_rows in (True, False):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        own.manual_seed(0)
        result = halting(step, steps=3, check_rows=check_rows)(X)
        found.append([result.output, torch.rand(3), random.random(), np.random.rand(), own.get_state()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.promise("no trace")
def test_buffers_and_results_have_the_same_bits():
    steps = []
    for _ in range(2):
        torch.manual_seed(1)
        steps.append(nn.utils.parametrizations.spectral_norm(nn.Linear(D, D)))
    steps[1].load_state_dict(steps[0].state_dict())
    results = [
        halting(step, steps=3, check_rows=check)(X) for step, check in zip(steps, (True, False), strict=True)
    ]
    assert torch.equal(results[0].output, results[1].output)
    for a, b in zip(steps[0].state_dict().values(), steps[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_memory_that_a_step_writes_to_gets_no_graph():
    buffer, view = torch.full((B, D), 5.0), torch.full((B + 1, D), 5.0)[1:]

    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(D, D)
            self.register_buffer("last", torch.zeros(B, D))

        def forward(self, h):
            for memory in (buffer, view, self.last):
                memory[: len(h)] = self.linear(h)
            return self.last[: len(h)]

    step = Buffered()
    with torch.no_grad():
        result = halting(step)(X)
    for memory in (buffer, view, step.last):
        assert not memory.requires_grad
        assert memory._version == 1
        assert torch.equal(memory, result.output)


@pytest.mark.promise("no trace")
def test_large_memory_is_copied_only_where_it_is_a_buffer():
    """A table of a function may be as large as the data; a module's buffers are the module's to change."""
    size = 2**22 + 1
    table, address, same = torch.zeros(size), [], []
    address.append(table.data_ptr())
    record = np.frompyfunc(same.append, 1, 1)  # holds the list where the check does not put it back

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("memory", torch.zeros(size))

        def forward(self, h):
            record(table.data_ptr() == address[0])
            self.memory[:2] += 1
            return h

    step = Counting()
    halting(step)(X)
    assert same == [True, True]
    assert step.memory[:3].tolist() == [1, 1, 0]


@pytest.mark.promise("no trace")
def test_hooks_see_no_check():
    linear, seen = nn.Linear(D, D), []
    linear.register_forward_pre_hook(lambda module, given: seen.append("pre"))
    linear.register_forward_hook(lambda module, given, result: seen.append("forward"))
    linear.register_full_backward_hook(lambda module, *gradients: seen.append("backward"))
    linear.weight.register_hook(lambda gradient: seen.append("weight"))
    halt = halting(Block(linear=linear))
    output = halt(X).output
    assert seen == ["pre", "forward"]
    output.sum().backward()
    assert sorted(seen) == ["backward", "forward", "pre", "weight"]
    assert linear.weight.grad is not None
    assert len(linear._forward_hooks) == len(linear._backward_hooks) == 1


@pytest.mark.promise("no trace", "untouched")
def test_the_callers_tensors_stay_as_they_are():
    def step(h, x):
        x.add_(1)
        return h.mul_(2)

    state, x = X.clone(), X.clone()
    with torch.no_grad():
        halting(step)(state, x)
    assert torch.equal(state, X * 2)
    assert torch.equal(x, X + 1)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_run_counts_the_same_tensors(reentrant):
    halt = halting(nn.Sequential(nn.Linear(D, D), nn.Tanh()), steps=2)
    x = X.clone().requires_grad_()
    checkpoint(lambda x: halt(x).output, x, use_reentrant=reentrant).sum().backward()
    gradient, x.grad = x.grad, None
    halt(x).output.sum().backward()
    torch.testing.assert_close(x.grad, gradient)


def test_the_first_call_can_be_differentiated_twice():
    x = X.clone().requires_grad_()
    halt = halting(nn.Sequential(nn.Linear(D, D), nn.Tanh()), steps=2)
    (first,) = torch.autograd.grad(halt(x).output.pow(2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x)
    assert second.abs().sum() > 0


def test_autocast_keeps_no_weight_of_the_check():
    linear = nn.Linear(D, D)
    halt = halting(linear)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            halt(X)
        halt(X).output.sum().backward()
    assert linear.weight.grad.abs().sum() > 0


def test_autocast_sees_a_weight_that_changes_after_the_check():
    """Inference leaves no weight in the cache of autocast, and neither does the check."""
    linear = nn.Linear(D, D)
    halt = halting(linear)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            halt(X)
        with torch.no_grad():
            linear.weight.zero_()
        result = halt(X)
    assert torch.equal(result.output, linear.bias.bfloat16().expand(B, D))


def test_a_step_is_checked_once():
    calls = []
    record = np.frompyfunc(calls.append, 1, 1)  # holds the list where the check does not put it back

    class Recording(nn.Module):
        def forward(self, h):
            record(len(h))
            return h

    halt = halting(Recording())
    halt(X)
    assert calls == [4, B]
    checked = len(calls)
    halt(X)
    halt(X[:3])
    assert len(calls) == checked + 2
    halt(X.double())
    assert len(calls) > checked + 3
    checked = len(calls)
    for again in (X, X.double(), X):
        halt(again)
    assert len(calls) == checked + 3
    halt.step = Recording()
    halt(X)
    assert len(calls) == checked + 5


def test_copies_and_pickles_are_checked():
    halt = halting(nn.Tanh())
    halt(X)
    for other in (copy.deepcopy(halt), pickle.loads(pickle.dumps(halt))):
        other(X)
        other.step = Centred()
        with pytest.raises(ValueError, match=REFUSED):
            other(X)


def test_an_old_pickle_is_checked():
    halt = halting(Centred())
    del halt.__dict__["check_rows"]
    with pytest.raises(ValueError, match=REFUSED):
        halt(X)


def test_the_check_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        halting(nn.Sequential(nn.Linear(D, D), nn.Dropout()), policy=ac.ACT(nn.Linear(D, 1)))(X)


# --- energies -----------------------------------------------------------------------------------------------
@pytest.mark.promise("rows apart")
@pytest.mark.parametrize("name", ["cumsum", "mean", "neighbours", "cumsum from the end"])
@pytest.mark.parametrize("rows", [2, 3, B])
def test_an_energy_that_mixes_rows_is_refused(name, rows):
    with pytest.raises(ValueError, match=r"^energy: expected each row's energy to depend on that row alone"):
        ac.EnergyDescent(lambda y: MIXING[name](y).square().sum(1), max_steps=2)(X[:rows])
