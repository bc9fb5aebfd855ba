"""A call that is set up from an earlier one gives what a module gives that has not run before."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptcomp_ext as ac
from adaptcomp_ext.nn.halting.known_loop import KnownLoop
from tests.helpers.tensors import bits

WIDTH, ROWS = 6, 9


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


class Rows(Tensor):
    """A subclass that behaves as a plain tensor."""


class Step(nn.Module):
    """A step that is no cell of the package's."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        return self.cell(x, state)


class PairStep(Step):
    """The same with a counter in the state."""

    def forward(self, state: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cell(x, state[0]), state[1] + 1


def head(classes: int = 1, bias: float = -1.0) -> nn.Linear:
    layer = nn.Linear(WIDTH, classes)
    nn.init.constant_(layer.bias, bias)
    return layer


POLICIES: dict[str, Callable[[], ac.Policy]] = {
    "act": lambda: ac.ACT(head()),
    "confidence": lambda: ac.Confidence(0.3),
    "fixed": lambda: ac.FixedSteps(torch.arange(ROWS) % 5 + 1),
    "ponder": lambda: ac.PonderNet(head(), seed=3).eval(),
}


def make(policy: str = "act", step: Callable[[], nn.Module] = Step, **options: Any) -> ac.AdaptiveHalt:
    torch.manual_seed(0)
    if policy == "confidence":
        options.setdefault("readout", head(4))
    return ac.AdaptiveHalt(step(), POLICIES[policy](), max_steps=6, **options)


def rows(count: int = ROWS, seed: int = 1, **options: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, WIDTH, generator=generator).to(**options)
    return torch.zeros(count, WIDTH, **options), x


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call that asked was a known one."""
    answers: list[bool] = []
    run = KnownLoop.run

    def asked(*arguments: Any) -> Any:
        result = run(*arguments)
        answers.append(result is not None)
        return result

    monkeypatch.setattr(KnownLoop, "run", asked)
    return answers


def tensors(result: ac.HaltResult) -> list[Tensor]:
    state = result.state if isinstance(result.state, tuple) else (result.state,)
    return [result.output, *state, result.steps, result.cost, result.status]


def assert_same(a: ac.HaltResult, b: ac.HaltResult) -> None:
    assert type(a.state) is type(b.state) and (a.trace is None) == (b.trace is None)
    for x, y in zip(tensors(a), tensors(b), strict=True):
        assert type(x) is type(y) and x.dtype == y.dtype and x.requires_grad == y.requires_grad
        assert same_bits(x, y)


def gradients(halt: ac.AdaptiveHalt, state: Any, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    result = halt(state, x)
    loss = result.output.double().square().sum()
    if result.cost.requires_grad:
        loss = loss + result.cost.double().sum()
    return list(torch.autograd.grad(loss, [x, *halt.step.parameters()], allow_unused=True))


@pytest.mark.parametrize("step", [Step, PairStep], ids=["tensor", "tuple"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_known_call_gives_the_same(policy, mode, step, known):
    if step is PairStep and policy != "fixed":
        pytest.skip("heads and readouts here read a tensor")
    halt = make(policy, step)
    with mode():
        for seed in range(3):
            h, x = rows(seed=seed)
            state = h if step is Step else (h, torch.zeros(ROWS, 1))
            assert_same(halt(state, x), copy.deepcopy(halt)(state, x))
    assert known == [True, True]


@pytest.mark.parametrize("policy", ["act", "confidence", "fixed"])
def test_gradients(policy, known):
    halt = make(policy)
    for seed in range(3):
        h, x = rows(seed=seed)
        ours, fresh = gradients(halt, h, x), gradients(copy.deepcopy(halt), h, x)
        assert all(same_bits(a, b) for a, b in zip(ours, fresh, strict=True))
    assert known == [True, True]


@pytest.mark.parametrize("count", [1, 2, 40])
def test_other_numbers_of_rows(count, known):
    halt = make("act")
    with torch.no_grad():
        halt(*rows())
        assert_same(halt(*rows(count)), copy.deepcopy(halt)(*rows(count)))
    assert known == [True]


def test_a_single_row_does_not_stand_for_a_check_of_the_rows(known):
    class Mixing(Step):
        def forward(self, state: Tensor, x: Tensor) -> Tensor:
            return super().forward(state, x) + x.mean(dim=0)

    halt = make("act", Mixing)
    with torch.no_grad():
        halt(*rows(1))
        halt(*rows(1))
        with pytest.raises(ValueError, match="depend on"):
            halt(*rows())
    assert known == [True, False]


CHANGES: dict[str, tuple[str, Callable[[ac.AdaptiveHalt], Any]]] = {
    "a threshold": ("act", lambda h: setattr(h.policy, "threshold", 0.5)),
    "the head": ("act", lambda h: setattr(h.policy, "head", head(bias=1.0))),
    "the head's weights": ("act", lambda h: nn.init.constant_(h.policy.head.bias, 2.0)),
    "max_steps": ("act", lambda h: setattr(h, "max_steps", 2)),
    "min_steps": ("act", lambda h: setattr(h, "min_steps", 4)),
    "compact": ("act", lambda h: setattr(h, "compact", False)),
    "the step": ("act", lambda h: setattr(h, "step", Step())),
    "the readout": ("act", lambda h: setattr(h, "readout", head(3))),
    "the readout's width": ("confidence", lambda h: setattr(h, "readout", head(5))),
    "the policy": ("act", lambda h: setattr(h, "policy", ac.FixedSteps(3))),
    "the numbers of steps": ("fixed", lambda h: setattr(h.policy, "n", torch.full((ROWS,), 6))),
    "a number of steps": ("fixed", lambda h: h.policy.n.fill_(2)),
    "one number for all rows": ("fixed", lambda h: setattr(h, "policy", ac.FixedSteps(4))),
    "the measure": ("confidence", lambda h: setattr(h.policy, "measure", "margin")),
    "the seed": ("ponder", lambda h: setattr(h.policy, "seed", 4)),
    "the mode": ("act", lambda h: h.eval()),
    "the policy's mode": ("ponder", lambda h: h.policy.train()),
    "the step's mode": ("act", lambda h: h.step.eval()),
    "the dtype": ("act", lambda h: h.double()),
    "a method of the policy": (
        "act",
        lambda h: setattr(
            h.policy, "decide", lambda view: ac.Decision(view.row >= 0, weight=torch.ones(len(view.row)))
        ),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_between_two_calls(name, known):
    policy, change = CHANGES[name]
    halt = make(policy)
    with torch.no_grad():
        halt(*rows())
        halt(*rows())
        assert known == [True]
        change(halt)
        dtype = next(halt.step.parameters()).dtype
        assert_same(halt(*rows(dtype=dtype)), copy.deepcopy(halt)(*rows(dtype=dtype)))


@pytest.mark.parametrize(
    "arguments",
    [
        lambda: (rows()[0].bfloat16(), rows()[1]),
        lambda: (rows()[0][:, :3], rows()[1]),
        lambda: (rows()[0], rows(ROWS + 1)[1]),
        lambda: (rows()[0],),
        lambda: (*rows(), rows()[1]),
        lambda: ([rows()[0]], rows()[1]),
        lambda: (torch.tensor(1.0), rows()[1]),
        lambda: (3, rows()[1]),
        lambda: (rows()[0], None),
        lambda: ((), rows()[1]),
    ],
)
def test_arguments_of_another_form_get_the_first_calls_error(arguments):
    halt = make("act")
    with torch.no_grad():
        halt(*rows())
        fresh = copy.deepcopy(halt)
        with pytest.raises(Exception) as expected:
            fresh(*arguments())
        with pytest.raises(type(expected.value)) as came:
            halt(*arguments())
    assert str(came.value) == str(expected.value)


@pytest.mark.parametrize(
    "form",
    [
        lambda t: t.t().contiguous().t(),
        lambda t: torch.cat([t, t])[::2],
        lambda t: t[:0],
        lambda t: t.as_subclass(Rows),
        lambda t: nn.Parameter(t),
    ],
    ids=["transposed", "strided", "no rows", "subclass", "parameter"],
)
def test_tensors_of_another_kind(form):
    halt = make("act")
    h, x = rows()
    with torch.no_grad():
        halt(h, x)
        assert_same(halt(form(h), form(x)), copy.deepcopy(halt)(form(h), form(x)))


def test_wrong_numbers_of_steps_are_refused_in_a_known_call():
    halt = make("fixed")
    with torch.no_grad():
        halt(*rows())
        halt.policy.n[3] = 0
        with pytest.raises(ValueError, match="at least 1 step"):
            halt(*rows())
        with pytest.raises(ValueError, match=r"expected shape \[4\]"):
            halt(*rows(4))


class Switch(nn.Module):
    """A function whose results can be made unusual from a step on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.change: Callable[[Any], Any] | None = None
        self.at = 0
        self.calls = 0

    def forward(self, *arguments: Any) -> Any:
        self.calls += 1
        value = self.inner(*arguments)
        return self.change(value) if self.change is not None and self.calls >= self.at else value

    def start(self, at: int, change: Callable[[Any], Any] | None) -> None:
        self.at, self.change, self.calls = at, change, 0


UNUSUAL: dict[str, Callable[[Tensor], Any]] = {
    "not contiguous": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "subclass": lambda t: t.as_subclass(Rows),
    "float64": lambda t: t.double(),
    "a row more": lambda t: torch.cat([t, t[:1]]),
    "no tensor": lambda t: 3,
    "nothing": lambda t: None,
    "NaN": lambda t: torch.where(torch.arange(t.shape[0])[:, None] == 0, torch.nan, t),
}


@pytest.mark.parametrize("mode", [torch.no_grad, nullcontext])
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("role", ["step", "readout", "head"])
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_results_in_a_known_call(name, role, at, mode, known):
    torch.manual_seed(0)
    policy = ac.ACT(Switch(head()))
    halt = ac.AdaptiveHalt(Switch(Step()), policy, max_steps=4, readout=Switch(head(3)))
    part = {"step": halt.step, "readout": halt.readout, "head": policy.head}[role]

    def run(module: ac.AdaptiveHalt) -> ac.HaltResult | Exception:
        for inner in (module.step, module.readout, module.policy.head):
            inner.calls = 0
        try:
            return module(*rows())
        except (TypeError, ValueError) as error:
            return error

    with mode():
        run(halt)
        run(halt)
        assert known == [True]
        part.start(at, UNUSUAL[name])
        fresh = copy.deepcopy(halt)
        fresh.check_rows = False  # its check would count as calls
        ours, expected = run(halt), run(fresh)
    if isinstance(expected, Exception):
        assert type(ours) is type(expected) and str(ours) == str(expected)
    else:
        assert not isinstance(ours, Exception), ours
        assert_same(ours, expected)


def test_a_row_that_breaks_in_training_passes_no_gradient(known):
    class Breaking(Step):
        def forward(self, state: Tensor, x: Tensor) -> Tensor:
            return super().forward(state, x) + torch.where(x[:, :1] > 2, torch.nan, 0.0)

    halt = make("act", Breaking)
    for seed in range(2):
        h, x = rows(seed=seed)
        x[2, 0] = 3
        assert halt(h, x).status[2] == ac.Status.NONFINITE
        ours, fresh = gradients(halt, h, x), gradients(copy.deepcopy(halt), h, x)
        assert all(bool(g.isfinite().all()) for g in ours)
        assert all(same_bits(a, b) for a, b in zip(ours, fresh, strict=True))
    assert known == [True, True, True]


def test_a_step_that_writes_to_its_state_is_told_in_a_known_call():
    class InPlace(Step):
        writes = False

        def forward(self, state: Tensor, x: Tensor) -> Tensor:
            return super().forward(state.mul_(0.5) if self.writes else state, x)

    halt = make("act", InPlace)
    halt(*rows())
    halt.step.writes = True
    with pytest.raises(RuntimeError, match=r"change in place|modified by an inplace"):
        halt(*rows()).output.sum().backward()


def test_modes_are_asked_for_at_each_call(known):
    halt = make("act")
    with torch.no_grad():
        expected = halt(*rows())
    assert halt(*rows()).output.requires_grad
    with torch.no_grad():
        assert_same(halt(*rows()), expected)
        with ac.reference_kernels():
            torch.testing.assert_close(halt(*rows()).output, expected.output)
    h, x = rows()
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda h, x: halt(h, x).output)(h[None], x[None])
    assert known == [True, False]  # vmap raises


def test_copies_and_pickles_know_no_loop():
    halt = make("act")
    with torch.no_grad():
        expected = halt(*rows())
        assert halt._learned.loops[False] is not None
        for other in (copy.deepcopy(halt), pickle.loads(pickle.dumps(halt))):
            assert other._learned is None or other._learned.loops.get(False) is None
            assert_same(other(*rows()), expected)


def test_a_module_that_has_run_is_freed():
    halt = make("act")
    with torch.no_grad():
        halt(*rows())
        halt(*rows())
    gone = weakref.ref(halt)
    gc.collect()
    gc.disable()
    try:
        del halt
        assert gone() is None
    finally:
        gc.enable()


def test_memory_of_the_first_call_is_not_held():
    halt = make("act")
    h, x = rows()
    with torch.no_grad():
        result = halt(h, x)
    seen = [weakref.ref(t) for t in (h, x, *tensors(result))]
    del h, x, result
    assert all(ref() is None for ref in seen)
