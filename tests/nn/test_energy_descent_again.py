"""The backward pass evaluates the energy again: an energy that has changed since raises an error.

Right gradients come from the descent by hand, differentiated by plain autograd while everything is still as
it was."""

from __future__ import annotations

import functools
import gc
import types
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import adaptcomp_ext as ac

ALPHA, STEPS = 0.1, 4
X = torch.tensor([[1.0, -0.5], [2.0, 0.3], [-1.0, 0.7]], dtype=torch.float64)
Y0 = torch.tensor([[0.3, 0.1], [-0.2, 0.4], [0.5, 0.9]], dtype=torch.float64)
MODES = ("unrolled", ("truncated", 2), "implicit", "detached")


def unrolled(energy, y0=Y0, *context, steps=STEPS, last=None):
    """Return y after the steps, differentiable through the last ones."""
    y = y0
    for k in range(steps):
        y = y.detach() if last is not None and steps - last == k else y
        here = y if y.requires_grad else y.detach().requires_grad_()
        (slope,) = torch.autograd.grad(energy(here, *context).sum(), here, create_graph=True)
        y = y - ALPHA * slope
    return y


def descent(energy, gradient="unrolled", max_steps=STEPS, **options):
    return ac.EnergyDescent(
        energy, step_size=ALPHA, max_steps=max_steps, tol=0.0, gradient=gradient, **options
    )


def right(energy, mode, *context):
    """Compute the outputs of a gradient mode by hand: y and its energy."""
    if mode == "detached":
        return None, energy(unrolled(energy, Y0, *context).detach(), *context)
    last = mode[1] if isinstance(mode, tuple) else None
    steps = (
        400 if mode == "implicit" else STEPS
    )  # long enough to be at the minimum, where both gradients are one
    y = unrolled(energy, Y0, *context, steps=steps, last=last)
    return y, energy(y, *context)


def loss(y, energy):
    return energy.sin().sum() + (0.0 if y is None else (y * torch.tensor([1.0, -0.7], dtype=y.dtype)).sum())


def run(energy, mode, *context):
    steps = 400 if mode == "implicit" else STEPS
    result = descent(energy, mode, steps)(Y0, *context)
    return (None if mode == "detached" else result.y), result.energy


class Layered(nn.Module):
    """An energy with parameters, a buffer, a tied weight, attributes, a submodule and a mode."""

    def __init__(self, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.rand(2, generator=g, dtype=torch.float64) + 0.5)
        self.net = nn.Linear(2, 2, dtype=torch.float64)
        self.tied = self.net.weight
        with torch.no_grad():
            self.net.weight.copy_(torch.rand(2, 2, generator=g, dtype=torch.float64))
            self.net.bias.copy_(torch.rand(2, generator=g, dtype=torch.float64))
        self.register_buffer("shift", torch.rand(2, generator=g, dtype=torch.float64))
        self.level, self.scales, self.config = 1.0, [1.0, 0.5], {"ridge": 0.4}
        self.other = types.SimpleNamespace(power=1.0)

    def forward(self, y, x):
        z = torch.tanh(self.net(y + self.shift)) @ self.tied
        quadratic = (self.w * (y - x) ** 2).sum(1) * self.level * self.scales[1] + self.config["ridge"] * (
            y * y
        ).sum(1)
        return (quadratic + 0.3 * z.sum(1) * self.other.power) * (1.0 if self.training else 1.3)


def names(module):
    return dict(module.named_parameters())


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_functional_call(mode):
    module, given = Layered(), names(Layered(1))
    tensors = {k: v.detach().clone().requires_grad_() for k, v in given.items()}
    expected = torch.autograd.grad(
        loss(*right(lambda y, x: functional_call(module, tensors, (y, x)), mode, X)), list(tensors.values())
    )
    result = functional_call(
        descent(module, mode, 400 if mode == "implicit" else STEPS),
        {f"energy.{k}": v for k, v in tensors.items()},
        (Y0, X),
    )
    outputs = (None if mode == "detached" else result.y), result.energy
    got = torch.autograd.grad(loss(*outputs), list(tensors.values()))
    for name, a, b in zip(tensors, got, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
    assert all(p.grad is None for p in module.parameters())


def test_one_inner_update_differentiated_twice():
    module, names_ = Layered(), list(names(Layered()))
    descend = descent(module)

    def outer(run):
        tensors = list(module.parameters())
        for _ in range(2):
            inner = run(tensors).square().sum()
            grads = torch.autograd.grad(inner, tensors, create_graph=True)
            tensors = [t - 0.2 * g for t, g in zip(tensors, grads, strict=True)]
        return run(tensors).cos().sum()

    def by_hand(tensors):
        given = dict(zip(names_, tensors, strict=True))
        return unrolled(lambda y, x: functional_call(module, given, (y, x)), Y0, X)

    def ours(tensors):
        return functional_call(
            descend, {f"energy.{k}": t for k, t in zip(names_, tensors, strict=True)}, (Y0, X)
        ).y

    expected = torch.autograd.grad(outer(by_hand), list(module.parameters()))
    for a, b in zip(torch.autograd.grad(outer(ours), list(module.parameters())), expected, strict=True):
        torch.testing.assert_close(a, b)


def swap_parameter(m):
    m.w = nn.Parameter(m.w.detach() + 1.0)


def swap_tied(m):
    m.tied = nn.Parameter(m.tied.detach() + 1.0)


def swap_module(m):
    m.net = nn.Linear(2, 2, dtype=torch.float64)


def swap_buffer(m):
    m.shift = m.shift + 1.0


def write_buffer(m):
    m.shift.add_(1.0)


CHANGES = {
    "parameter": swap_parameter,
    "tied parameter": swap_tied,
    "submodule": swap_module,
    "buffer": swap_buffer,
    "buffer in place": write_buffer,
    "buffer in place, a little": lambda m: m.shift.add_(1e-7),
    "attribute": lambda m: setattr(m, "level", 3.0),
    "attribute deleted": lambda m: delattr(m, "level"),
    "list": lambda m: m.scales.__setitem__(1, 2.0),
    "dict": lambda m: m.config.update(ridge=2.0),
    "object": lambda m: setattr(m.other, "power", 3.0),
    "mode": lambda m: m.eval(),
    "all": lambda m: [swap_parameter(m), swap_module(m), swap_buffer(m), m.eval(), setattr(m, "level", 2.0)],
}
WAYS = {
    "module": lambda m: m,
    "lambda": lambda m: lambda y, x: m(y, x),
    "method": lambda m: m.forward,
    "partial": lambda m: functools.partial(lambda module, y, x: module(y, x), m),
    "keyword": lambda m: functools.partial(lambda y, x, module: module(y, x), module=m),
    "default": lambda m: lambda y, x, module=m: module(y, x),
    "object": lambda m: _Calls(m),
    "in a list": lambda m: (lambda modules: lambda y, x: modules[0](y, x))([m]),
}


class _Calls:
    def __init__(self, module):
        self.module = module

    def __call__(self, y, x):
        return self.module(y, x)


@pytest.mark.covering(2)
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(("change", "way"), [(c, "module") for c in CHANGES] + [("all", w) for w in WAYS])
def test_what_changes_between_call_and_backward_pass(change, way, mode):
    module = Layered()
    energy, parameters = WAYS[way](module), list(module.parameters())
    expected = torch.autograd.grad(loss(*right(energy, mode, X)), parameters)
    outputs = run(energy, mode, X)
    CHANGES[change](module)
    before = (
        {k: id(v) for k, v in [*module.named_parameters(), *module.named_buffers(), *module.named_modules()]},
        module.training,
    )
    got = torch.autograd.grad(loss(*outputs), parameters)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    after = (
        {k: id(v) for k, v in [*module.named_parameters(), *module.named_buffers(), *module.named_modules()]},
        module.training,
    )
    assert before == after  # and what it was changed to is left as it is


SCALE = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)


def of_a_global(y, x):
    return _helper(y, x)


def _helper(y, x):
    return (SCALE * (y - x) ** 2).sum(1)


def test_variables_of_functions(monkeypatch):
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    computed = scale.exp()

    def of_a_variable(y, x):
        return (computed * (y - x) ** 2).sum(1) + scale * (y**2).sum(1)

    first, leaf = scale, SCALE
    for energy, source in ((of_a_variable, first), (of_a_global, leaf)):
        (expected,) = torch.autograd.grad(loss(*right(energy, "unrolled", X)), source, retain_graph=True)
        outputs = run(energy, "unrolled", X)
        with monkeypatch.context() as changed:
            scale = computed = torch.tensor(9.0, dtype=torch.float64)
            changed.setitem(globals(), "SCALE", scale)
            (got,) = torch.autograd.grad(loss(*outputs), source)
            assert SCALE is scale and computed is scale
        torch.testing.assert_close(got, expected)


def test_levels_of_one_energy():
    """Each call descends the energy of its own level, and one backward pass goes through all of them."""
    module = Layered()
    y = hand = Y0
    for module.level in (1.0, 2.0, 3.0):
        y, hand = descent(module)(y, X).y, unrolled(module, hand, X)
    (expected,) = torch.autograd.grad(hand.sum(), module.w)
    module.level = 7.0
    torch.testing.assert_close(torch.autograd.grad(y.sum(), module.w)[0], expected)


@pytest.mark.parametrize("gradient", ["unrolled", "detached", "implicit"])
def test_parameters_changed_in_place_are_noticed(gradient):
    module = Layered()
    result = descent(module, gradient)(Y0, X)
    torch.optim.SGD(module.parameters(), 0.1).step()  # no gradients yet: nothing happens
    module.w.grad = torch.ones_like(module.w)
    torch.optim.SGD(module.parameters(), 0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.energy.sum().backward()


NOT_FOLLOWED = types.ModuleType("not_followed")


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_parameter_that_is_trained_only_later_is_a_constant(mode):
    module = Layered()
    module.net.requires_grad_(False)
    (expected,) = torch.autograd.grad(loss(*right(module, mode, X)), module.w)
    outputs = run(module, mode, X)
    module.requires_grad_(True)
    loss(*outputs).backward()
    torch.testing.assert_close(module.w.grad, expected)
    assert module.net.weight.grad is None


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_parameters_may_be_frozen_afterwards(mode):
    module = Layered()
    (expected,) = torch.autograd.grad(loss(*right(module, mode, X)), module.w)
    outputs = run(module, mode, X)
    module.net.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(loss(*outputs), module.w)[0], expected)


def test_tensors_of_a_function_that_are_changed_in_place():
    scale, w = torch.ones(2, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64, requires_grad=True)

    def energy(y, x):
        return (scale * w * (y - x) ** 2).sum(1)

    (expected,) = torch.autograd.grad(unrolled(energy, Y0, X).sum(), w)
    y = descent(energy)(Y0, X).y
    scale.mul_(2.0)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), w)[0], expected)


@pytest.mark.parametrize("closed", [False, True])
def test_sample_ids_may_be_changed_afterwards(closed):
    sigma, ids = torch.tensor(0.1, dtype=torch.float64, requires_grad=True), torch.arange(3)
    energy = ac.QuadraticEnergy(torch.eye(2, dtype=torch.float64)) if closed else Layered()
    y = descent(energy, noise=sigma)(Y0, X, sample_ids=ids).y
    (expected,) = torch.autograd.grad(y.sum(), sigma, retain_graph=True)
    ids.add_(5)
    assert torch.equal(torch.autograd.grad(y.sum(), sigma)[0], expected)


@pytest.mark.parametrize("gradient", ["unrolled", "detached", "implicit"])
def test_what_cannot_be_put_back_is_found_out(gradient):
    frozen = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)
    w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    many = [1.0] * 1000

    def in_place(y, x):
        return (frozen * w * (y - x) ** 2).sum(1)

    def in_a_long_list(y, x):
        return (many[999] * w * (y - x) ** 2).sum(1)

    NOT_FOLLOWED.w = w

    def in_a_python_module(y, x):
        return (NOT_FOLLOWED.w * (y - x) ** 2).sum(1)

    def another():
        # The same values: nothing but the graph shows that it is another tensor.
        NOT_FOLLOWED.w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    for energy, change, words in (
        (
            in_place,
            lambda: frozen.mul_(2.0),
            r"energy: expected the same energies in the backward pass.*frozen \(in place\)",
        ),
        (
            in_a_long_list,
            lambda: many.__setitem__(999, 2.0),
            "energy: expected the same energies in the backward pass",
        ),
        (
            in_a_python_module,
            another,
            "energy: expected the backward pass to find the tensors that the call had found",
        ),
    ):
        result = descent(energy, gradient)(Y0, X)
        change()
        with pytest.raises(RuntimeError, match=words):
            (result.y.sum() if result.y.requires_grad else result.energy.sum()).backward()


# --- hooks --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("hook", [lambda g: -g, lambda g: g.clamp(-0.01, 0.02)], ids=["minus", "clamp"])
def test_hooks_see_the_whole_gradient_once(mode, hook):
    module = Layered()
    plain = {k: p.detach().clone().requires_grad_() for k, p in names(module).items()}
    expected = torch.autograd.grad(
        loss(*right(lambda y, x: functional_call(module, plain, (y, x)), mode, X)), list(plain.values())
    )
    calls = []
    for p in module.parameters():
        p.register_hook(lambda g: calls.append(1) or hook(g))
    loss(*run(module, mode, X)).backward()
    for p, g in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, hook(g))
    assert len(calls) == len(expected)


def test_hooks_of_tensors_in_a_function():
    leaf = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    middle = leaf.exp()

    def energy(y, x):
        return (middle * (y - x) ** 2).sum(1)

    (expected,) = torch.autograd.grad(unrolled(energy, Y0, X).sum(), leaf, retain_graph=True)
    calls = []
    middle.register_hook(lambda g: calls.append(1) or 2 * g)
    leaf.register_hook(lambda g: calls.append(1) or -g)
    descent(energy)(Y0, X).y.sum().backward()
    torch.testing.assert_close(leaf.grad, -2 * expected)
    assert len(calls) == 2


def test_a_hook_on_a_leaf_out_of_reach_is_refused():
    NOT_FOLLOWED.w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    NOT_FOLLOWED.w.register_hook(lambda g: -g)
    result = descent(lambda y, x: (NOT_FOLLOWED.w * (y - x) ** 2).sum(1))(Y0, X)
    with pytest.raises(RuntimeError, match="energy: expected tensors with hooks to be parameters"):
        result.y.sum().backward()


# --- energies that change from evaluation to evaluation -----------------------------------------------------
class Changing(nn.Module):
    """The energies have dropout, a spectral norm that each call estimates further, or a counter."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(3)
        linear = nn.Linear(2, 6, dtype=torch.float64)
        if kind == "spectral norm":
            linear = nn.utils.parametrizations.spectral_norm(linear)
        if kind == "old spectral norm":
            linear = nn.utils.spectral_norm(linear)
        self.net = nn.Sequential(linear, nn.Dropout(0.4) if kind == "dropout" else nn.Identity())
        self.kind, self.count = kind, 0

    def forward(self, y, x):
        self.count += 1
        scale = self.count if self.kind == "counter" else 1.0
        return scale * torch.tanh(self.net(y)).sum(1) + ((y - x) ** 2).sum(1)


@pytest.mark.parametrize("kind", ["dropout", "spectral norm", "old spectral norm", "counter"])
def test_evaluations_that_differ_from_step_to_step(kind):
    def gradients(run):
        module = Changing(kind)
        torch.manual_seed(5)
        y = run(module)
        state, count = {k: v.clone() for k, v in module.state_dict().items()}, module.count
        torch.manual_seed(9)
        found = torch.autograd.grad(y.sum(), [p for p in module.parameters() if p.requires_grad])
        assert all(
            torch.equal(v, state[k]) for k, v in module.state_dict().items()
        )  # the backward pass changes nothing
        return y, found, module.count == count, torch.rand(1)

    y, got, same_count, drawn = gradients(lambda m: descent(m)(Y0, X).y)
    hand, expected, _, drawn_by_hand = gradients(lambda m: unrolled(m, Y0, X))
    torch.testing.assert_close(y, hand)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert same_count and torch.equal(drawn, drawn_by_hand)


@pytest.mark.parametrize("kind", ["spectral norm", "counter"])
def test_the_energy_is_that_of_the_evaluation_that_found_it(kind):
    module = Changing(kind)
    result = descent(module)(Y0, X)
    hand = Changing(kind)
    expected = hand(unrolled(hand, Y0, X), X)
    torch.testing.assert_close(result.energy, expected)
    got = torch.autograd.grad(result.energy.sum(), list(module.parameters()))
    for a, b in zip(got, torch.autograd.grad(expected.sum(), list(hand.parameters())), strict=True):
        torch.testing.assert_close(a, b)


def test_random_numbers_are_refused_where_the_rows_differ():
    module = Changing("dropout")
    uneven = ac.EnergyDescent(module, step_size=ALPHA, max_steps=6, tol=0.3)(Y0, X)
    assert len(uneven.steps.unique()) > 1
    with pytest.raises(
        RuntimeError, match=r"energy: expected one that gives the same values.*draws random numbers"
    ):
        uneven.y.sum().backward()
    for options in ({"gradient": "implicit"}, {"accept": "if_lower"}):
        with pytest.raises(RuntimeError, match=r"energy: expected .*the same values at every evaluation"):
            descent(module, **options)(Y0, X).y.sum().backward()
    with pytest.raises(RuntimeError, match=r"result\.energy: expected an energy that gives the same values"):
        descent(module)(Y0, X).energy.sum().backward()
    module.eval()
    descent(module)(Y0, X).energy.sum().backward()


# --- what is kept -------------------------------------------------------------------------------------------
def test_an_earlier_result_in_an_attribute_is_let_go():
    class Keeper(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2, dtype=torch.float64))
            self.last: Tensor | None = None
            self.results: list[Tensor] = []
            self.descend = descent(lambda y, x: self.energy(y, x))

        def energy(self, y, x):
            return (self.w * (y - x) ** 2).sum(1)

    keeper, gone = Keeper(), []
    for _ in range(3):
        y = keeper.descend(Y0, X).y
        keeper.last, keeper.results = y, [y]
        gone.append(weakref.ref(y.grad_fn))
    del y
    gc.collect()
    assert [r() is None for r in gone] == [True, True, False]
    keeper.last.sum().backward()


def test_compiled_and_checkpointed_energies_go_on_working():
    module = Layered()

    def checkpointed(y, x):
        return torch.utils.checkpoint.checkpoint(module, y, x, use_reentrant=False)

    expected = torch.autograd.grad(unrolled(module, Y0, X).sum(), module.w)
    torch.testing.assert_close(torch.autograd.grad(descent(checkpointed)(Y0, X).y.sum(), module.w), expected)
