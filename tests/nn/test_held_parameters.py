"""Parameters that a plain function uses and the module around it does not hold: one warning names them."""

import copy
import functools
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import adaptcomp_ext as ac

B, D = 5, 4
X = torch.randn(B, D, generator=torch.Generator().manual_seed(0))
HIDDEN = (
    r"^AdaptiveHalt: {} is a plain function that uses parameters which this AdaptiveHalt does not hold: {}\."
)
LINEAR = nn.Linear(D, D)


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, h, x=0.0):
        return torch.tanh(self.linear(h) + x)

    def step(self, h, x=0.0):
        return self(h, x)


class Caller:
    def __init__(self, cell):
        self.cell = cell

    def __call__(self, h, x=0.0):
        return self.cell(h, x)


def functions(cell):
    """Kinds of plain functions that use the cell, with the names under which they see its parameters."""
    weight = cell.linear.weight
    return {
        "lambda": (lambda h, x=0.0: cell(h, x), r"cell\.linear\.\w+, cell\.linear\.\w+"),
        "partial": (functools.partial(cell, x=0.0), r"step\.linear\.\w+, step\.linear\.\w+"),
        "bound method": (cell.step, r"step\.linear\.\w+, step\.linear\.\w+"),
        "callable object": (Caller(cell), r"step\.cell\.linear\.\w+, step\.cell\.linear\.\w+"),
        "parameter": (lambda h, x=0.0: h @ weight.T, "weight"),
        "global": (lambda h, x=0.0: LINEAR(h), r"LINEAR\.\w+, LINEAR\.\w+"),
        "default value": (lambda h, x=0.0, weight=weight: h @ weight, r"a parameter of shape \[4, 4\]"),
    }


def halting(step=None, policy=None, **options):
    return ac.AdaptiveHalt(step or nn.Linear(D, D), policy or ac.FixedSteps(2), 3, **options)


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.promise("held")
@pytest.mark.parametrize("kind", functions(Cell()))
@pytest.mark.parametrize("backend", ["kernels", "reference", "weighted"])
def test_a_function_s_parameters_are_named_once(kind, backend, quiet):
    function, names = functions(Cell())[kind]
    policy = ac.ACT(nn.Linear(D, 1)) if backend == "weighted" else None
    halt = halting(function, policy)
    with ac.reference_kernels() if backend == "reference" else torch.enable_grad():
        with pytest.warns(UserWarning, match=HIDDEN.format("step", names)) as caught:
            halt(X)
        assert caught[0].filename == __file__
        for way in ("parameters(), state_dict() and to()", "optimiser", "nn.Module"):
            assert way in str(caught[0].message)
        for _ in range(2):
            halt(X)
            halt.eval()
        halt.step = functions(Cell())["lambda"][0]
        halt(X)


@pytest.mark.promise("held")
def test_all_parts_are_searched():
    linear, head = nn.Linear(D, D), nn.Linear(D, 1)
    for policy in (ac.ACT, ac.PonderNet):
        with pytest.warns(UserWarning, match=HIDDEN.format("head", r"head\.\w+, head\.\w+")):
            halting(policy=policy(lambda h: head(h)))(X)
    for policy in (None, ac.ACT(nn.Linear(D, 1))):
        with pytest.warns(UserWarning, match=HIDDEN.format("readout", r"linear\.\w+, linear\.\w+")):
            halting(policy=policy, readout=lambda h: linear(h))(X)
    with pytest.warns(
        UserWarning, match=r"^EnergyDescent: energy is a plain function .* hold: linear\.\w+, "
    ):
        ac.EnergyDescent(lambda y: linear(y).square().sum(1), max_steps=2)(X)


@pytest.mark.promise("held")
@pytest.mark.parametrize("gradient", ["unrolled", "stepwise", "implicit", "detached"])
def test_an_energy_s_parameters_are_named_once(gradient, quiet):
    linear = nn.Linear(D, D)
    descend = ac.EnergyDescent(lambda y, c: linear(y - c).square().sum(1), max_steps=2, gradient=gradient)
    encoder = nn.Linear(D, D)
    with torch.no_grad():
        descend(X, X)
    with pytest.warns(UserWarning, match=r"hold: linear\.\w+, linear\.\w+\."):
        descend(encoder(X), encoder(X))
    descend(X, X)
    ac.EnergyDescent(lambda y, c: (y - c).square().sum(1), max_steps=2, gradient=gradient)(
        encoder(X), encoder(X)
    )


@pytest.mark.promise("held")
def test_modules_are_held(quiet):
    cell = Cell()
    halt = halting(cell, ac.ACT(nn.Linear(D, 1)), readout=nn.Linear(D, 2))
    halt(X, X).output.sum().backward()
    assert all(p.grad is not None for p in halt.parameters() if p.shape != (1,))
    # A function around a module that the AdaptiveHalt holds elsewhere.
    halting(cell, readout=lambda h: cell.linear(h))(X)


@pytest.mark.promise("held")
def test_an_encoder_s_parameters_are_not_meant(quiet):
    encoder, start = nn.Linear(D, D), nn.Parameter(torch.randn(B, D))
    for step in (lambda h, x: torch.tanh(h + x), lambda h, x: h * x):
        for policy in (None, ac.ACT(lambda h: h.sum(1))):
            halting(step, policy, readout=lambda h: h * 2)(encoder(X), encoder(X) * 2).output.sum().backward()
            halting(step, policy)(start, encoder(X))
            halting(step, policy)(encoder(X).view(B, D), start)
    captured = encoder(X.mean(0, keepdim=True))
    halting(lambda h: h + captured)(X)
    halting(lambda h: h + captured, ac.ACT(lambda h: h.sum(1)), readout=lambda h: h * 2)(X)
    # Through a function of its own, an encoder is meant.
    with pytest.warns(UserWarning, match=r"hold: encoder\."):
        halting(lambda h: h + encoder(h))(encoder(X))


def test_frozen_parameters_are_not_meant(quiet):
    cell = Cell().requires_grad_(False)
    halt = halting(lambda h: cell(h))
    halt(X)
    halt(X.clone().requires_grad_())
    cell.linear.bias.requires_grad_()
    halt = halting(lambda h: cell(h))
    with pytest.warns(UserWarning, match=r"hold: cell\.linear\.bias\."):
        halt(X)


def test_the_first_call_with_a_graph_warns(quiet):
    cell = Cell()
    halt = halting(lambda h: cell(h))
    with torch.no_grad():
        halt(X)
    with torch.inference_mode():
        halt(X)
    with pytest.warns(UserWarning, match="hold"):
        halt(X)


def test_a_part_without_a_graph_is_looked_at_again(quiet):
    linear, trained = nn.Linear(D, D), []
    halt = halting(readout=lambda h: linear(h) if trained else h.detach())
    halt(X)
    trained.append(True)
    with pytest.warns(UserWarning, match=r"readout .* hold: linear\."):
        halt(X)


@pytest.mark.parametrize("options", [{"check_rows": False}, {"compact": False}], ids=["unchecked", "masked"])
def test_it_needs_no_check_of_the_rows(options):
    cell = Cell()
    with pytest.warns(UserWarning, match="hold"):
        halting(lambda h: cell(h), **options)(X)
    with pytest.warns(UserWarning, match="hold"):
        halting(lambda h: cell(h))(X[:1])


class Model(nn.Module):
    """Holds the cell and the AdaptiveHalt that uses it."""

    def __init__(self, bound: bool, other: nn.Module | None = None):
        super().__init__()
        self.cell = Cell()
        if other is not None:
            step = lambda h: other(self.cell(h))  # noqa: E731
        else:
            step = self.step if bound else lambda h: self.cell(h)
        self.halt = halting(step)

    def step(self, h):
        return self.cell(h)

    def forward(self, x):
        return self.halt(x).output


@pytest.mark.parametrize("bound", [True, False])
def test_a_module_around_it_holds_its_own(bound, quiet):
    model = Model(bound)
    model(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    if bound:
        copy.deepcopy(model)(X)
    else:  # a copy of a function is the function itself, which calls the cell of the model that was copied
        with pytest.warns(UserWarning, match=r"hold: self\.cell\."):
            copy.deepcopy(Model(bound))(X)
    other = nn.Linear(D, D)
    with pytest.warns(UserWarning, match=r"hold: other\.\w+, other\.\w+\."):
        Model(bound, other)(X)


def test_a_copy_that_a_module_around_it_has_made_is_not_meant(quiet):
    """It may be gathered from parts, and stand where nobody looks for its name."""
    store = np.empty(1, dtype=object)

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(D, D))
            self.halt = halting(self.step)

        def step(self, h):
            return h @ store[0]

        def forward(self, x):
            store[0] = nn.Parameter(self.weight.detach().clone())
            return self.halt(x).output

    Around()(X)


def test_parameters_given_by_functional_call_are_not_meant(quiet):
    model = Model(bound=False)
    fast = {name: p * 0.5 for name, p in model.named_parameters()}
    torch.func.functional_call(model, fast, (X,)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_run(reentrant):
    cell = Cell()
    halt = halting(lambda h: cell(h))
    with pytest.warns(UserWarning, match=r"hold: cell\.") as caught:
        checkpoint(
            lambda x: halt(x).output, X.clone().requires_grad_(), use_reentrant=reentrant
        ).sum().backward()
    assert sum("hold" in str(w.message) for w in caught) == 1


def test_checkpointed_and_compiled_steps_are_searched():
    cell = Cell()
    with pytest.warns(UserWarning, match=r"hold: cell\."):
        halting(lambda h: checkpoint(cell, h, use_reentrant=False))(X)
    compiled = torch.compile(lambda h: cell(h), backend="eager")
    with pytest.warns(UserWarning, match=r"hold: "):
        halting(compiled)(X)


def test_functions_of_autograd_are_searched():
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h, weight):
            ctx.save_for_backward(h, weight)
            return h * weight

        @staticmethod
        def backward(ctx, gradient):
            h, weight = ctx.saved_tensors
            return gradient * weight, (gradient * h).sum(0)

    scale = nn.Parameter(torch.ones(D))
    with pytest.warns(UserWarning, match=r"hold: scale\."):
        halting(lambda h: Scale.apply(h, scale))(X)


def test_an_error_instead_of_the_warning_comes_once():
    cell = Cell()
    halt = halting(lambda h: cell(h))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="hold"):
            halt(X)
        halt(X)


def test_many_names_are_cut_off():
    cells = nn.ModuleList(Cell() for _ in range(5))
    with pytest.warns(
        UserWarning, match=r"hold: (cells\.\d\.linear\.\w+, ){5}cells\.\d\.linear\.\w+ and 4 more\."
    ):
        halting(lambda h: functools.reduce(lambda h, cell: cell(h), cells, h))(X)
