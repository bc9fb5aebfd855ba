"""The energies in closed form as modules: formulas, errors, and copies, dtypes and devices."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import adaptcomp_ext as ac
from adaptcomp_ext import reference
from adaptcomp_ext.nn.energies import ClosedFormEnergy
from adaptcomp_ext.ops._fused_descent import ClosedForm
from adaptcomp_ext.ops.quadratic_energy import KERNELS
from tests.helpers.closed_forms import ACTIVATIONS, KINDS, SHORT, contexts, energy, points
from tests.helpers.tensors import values

FUNCTIONS = {"softplus": F.softplus, "silu": F.silu, "tanh": torch.tanh, "gelu": F.gelu}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_network_is_an_ordinary_one(activation):
    network = ac.MLPEnergy(4, 3, (6, 5), activation, ridge=0.5, dtype=torch.float64)
    y, x = values((7, 4), torch.float64), values((7, 3), torch.float64, seed=1)
    hidden = F.linear(torch.cat([y, x], 1), torch.cat([network.weight_y, network.weight_x], 1), network.bias1)
    hidden = FUNCTIONS[activation](F.linear(FUNCTIONS[activation](hidden), network.weight2, network.bias2))
    expected = F.linear(hidden, network.out[None], network.out_bias)[:, 0] + 0.25 * y.square().sum(1)
    torch.testing.assert_close(network(y, x), expected)


def test_a_network_without_context():
    network = ac.MLPEnergy(4, 0, 6)
    assert network.weight_x is None and set(dict(network.named_parameters())) == {
        "weight_y",
        "bias1",
        "out",
        "out_bias",
    }
    assert network(values((3, 4))).shape == (3,)
    result = ac.EnergyDescent(network, max_steps=3)(values((3, 4)).requires_grad_())
    result.y.sum().backward()
    assert network.bias1.grad.shape == (6,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["hopfield", "quadratic", "linear rows", "mlp-silu", "deep-softplus"])
def test_energies_of_half_precision_are_computed_in_float32(kind, dtype):
    """The kernels do so: in half precision a sum has a larger error than any tolerance of a descent."""
    network, y, context = (
        energy(kind, context=0, dtype=dtype),
        3 * points(9, dtype=dtype),
        contexts(kind, 9, context=0, dtype=dtype),
    )
    exact = energy(kind, context=0, dtype=dtype).double()
    y.requires_grad_()
    got = network(y, *context)
    want = exact(y.detach().double(), *(c.double() for c in context))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(got.sum(), y)[0].dtype == dtype
    options = dict(step_size=0.1, max_steps=30, tol=1e-3)
    with torch.no_grad():
        kernel = ac.EnergyDescent(network, **options)(y, *context)
        with ac.reference_kernels():
            reference = ac.EnergyDescent(network, **options)(y, *context)
    assert (kernel.steps - reference.steps).abs().max() <= (2 if dtype == torch.float16 else 8)
    torch.testing.assert_close(
        reference.energy, kernel.energy, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
    )


def test_networks_start_like_linear_layers():
    torch.manual_seed(0)
    network = ac.MLPEnergy(60, 40, (500, 20))
    for parameter, inputs in ((network.weight_y, 100), (network.weight_x, 100), (network.weight2, 500)):
        bound = inputs**-0.5
        assert parameter.abs().max() <= bound and parameter.abs().max() > 0.95 * bound


def test_one_hopfield_step_is_attention():
    patterns, queries = values((50, 16), torch.float64), values((9, 16), torch.float64, seed=1)
    for beta in (0.25, 4.0):
        one = ac.EnergyDescent(ac.HopfieldEnergy(patterns, beta), step_size=1.0, max_steps=1)(queries)
        attention = F.scaled_dot_product_attention(queries[None], patterns[None], patterns[None], scale=beta)[
            0
        ]
        torch.testing.assert_close(one.y, attention)


def test_a_sharp_hopfield_network_retrieves_its_patterns():
    patterns = F.normalize(values((20, 64), torch.float64), dim=1) * 8
    noisy = patterns + 0.3 * values((20, 64), torch.float64, seed=1)
    result = ac.EnergyDescent(ac.HopfieldEnergy(patterns, 2.0), step_size=1.0, max_steps=10, tol=1e-10)(noisy)
    torch.testing.assert_close(result.y, patterns, atol=1e-6, rtol=0)
    assert bool((result.status == ac.Status.HALTED).all())


def test_the_minimum_of_a_quadratic_energy_solves_the_system():
    a = values((6, 6), torch.float64)
    a = a @ a.T / 6 + torch.eye(6)
    b = values((9, 6), torch.float64, seed=1)
    solve = ac.EnergyDescent(ac.QuadraticEnergy(a), step_size=0.3, max_steps=2000, tol=1e-12, stop="gradient")
    torch.testing.assert_close(
        solve(torch.zeros(9, 6, dtype=torch.float64), b).y, torch.linalg.solve(a, b.T).T
    )


@pytest.mark.parametrize("kind", KINDS)
def test_differentiable_to_the_second_order(kind):
    module = energy(kind, dim=3, width=4, context=2)
    inputs = [t.requires_grad_() for t in (points(3, 3), *contexts(kind, 3, 3, 2))]
    assert gradcheck(module, inputs) and gradgradcheck(module, inputs)


@pytest.mark.parametrize("kind", SHORT)
def test_copies_and_states(kind):
    module = energy(kind)
    y, context = points(4), contexts(kind, 4)
    expected = module(y, *context)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(y, *context), expected, rtol=0, atol=0)
    fresh = energy(kind, seed=33)
    fresh.load_state_dict(module.state_dict())
    torch.testing.assert_close(fresh(y, *context), expected, rtol=0, atol=0)
    assert next(module.float().parameters()).dtype == torch.float32


def test_buffers_pass_gradients_on():
    source = values((12, 5), torch.float64).requires_grad_()
    energy = ac.HopfieldEnergy(source * 2.0, 1.0)
    assert not list(energy.parameters())
    result = ac.EnergyDescent(energy, step_size=0.5, max_steps=3)(values((4, 5), torch.float64, seed=1))
    result.y.sum().backward()
    assert source.grad is not None and bool((source.grad != 0).any())


class _Tempered(ac.MLPEnergy):
    def forward(self, y, *context):
        return 2.0 * super().forward(y, *context)


def test_the_kernels_stay_away_from_what_they_do_not_know():
    torch.manual_seed(1)
    plain = ac.MLPEnergy(4, 0, 6)
    tempered = _Tempered(4, 0, 6)
    tempered.load_state_dict(plain.state_dict())
    hooked = copy.deepcopy(plain)
    hooked.register_forward_hook(lambda module, inputs, output: 2.0 * output)
    y0 = values((3, 4))
    expected = ac.EnergyDescent(lambda y: 2.0 * plain(y), max_steps=3, tol=0.0)(y0).y
    for changed in (tempered, hooked):
        torch.testing.assert_close(ac.EnergyDescent(changed, max_steps=3, tol=0.0)(y0).y, expected)


def test_under_autocast_the_kernels_keep_their_precision():
    module = energy("mlp-silu", dtype=torch.float32)
    y0, (x,) = points(4, dtype=torch.float32), contexts("mlp-silu", 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = ac.EnergyDescent(module, max_steps=3)(y0, x)
    assert result.y.dtype == torch.float32
    torch.testing.assert_close(result.y, ac.EnergyDescent(module, max_steps=3)(y0, x).y, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ac.MLPEnergy(0, 1, 4), ValueError, "dim_y: expected an int >= 1"),
        (lambda: ac.MLPEnergy(4, -1, 4), ValueError, "dim_context: expected an int >= 0"),
        (lambda: ac.MLPEnergy(4, 1, 0), ValueError, "hidden: expected an int >= 1"),
        (lambda: ac.MLPEnergy(4, 1, (4, 4, 4)), TypeError, "hidden: expected an int or a pair of ints"),
        (lambda: ac.MLPEnergy(4, 1, 4.0), TypeError, "hidden: expected an int or a pair of ints"),
        (lambda: ac.MLPEnergy(4, 1, 4, "relu"), ValueError, "activation: expected one of 'softplus'"),
        (lambda: ac.MLPEnergy(4, 1, 4, ridge=-1.0), ValueError, "ridge: expected a number in"),
        (lambda: ac.HopfieldEnergy(torch.zeros(3), 1.0), ValueError, "patterns: expected shape"),
        (lambda: ac.HopfieldEnergy(torch.zeros(0, 3), 1.0), ValueError, "patterns: expected shape"),
        (
            lambda: ac.HopfieldEnergy(torch.zeros(2, 3, dtype=torch.int64), 1.0),
            TypeError,
            "patterns: expected float32",
        ),
        (lambda: ac.HopfieldEnergy(torch.zeros(2, 3), 0.0), ValueError, "beta: expected a number in"),
        (lambda: ac.HopfieldEnergy(torch.zeros(2, 3), torch.ones(1)), TypeError, "beta: expected a float"),
        (lambda: ac.QuadraticEnergy(torch.zeros(2, 3), torch.zeros(2)), ValueError, "A: expected shape"),
        (lambda: ac.QuadraticEnergy(torch.eye(2), torch.zeros(3)), ValueError, "b: expected shape"),
        (
            lambda: ac.QuadraticEnergy(torch.eye(2), torch.zeros(2).double()),
            TypeError,
            "b: expected torch.float32",
        ),
    ],
)
def test_bad_energies(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("y", "context", "error", "words"),
    [
        (torch.zeros(3, 5), [torch.zeros(3, 3)], ValueError, r"y: expected shape \[rows, 4\]"),
        (torch.zeros(3, 4, 1), [torch.zeros(3, 3)], ValueError, r"y: expected shape \[rows, 4\]"),
        (torch.zeros(3, 4).double(), [torch.zeros(3, 3)], TypeError, "y: expected torch.float32"),
        (torch.zeros(3, 4), [], ValueError, "context: expected 1 tensor"),
        (torch.zeros(3, 4), [torch.zeros(3, 2)], ValueError, r"context: expected shape \[3, 3\]"),
    ],
)
def test_bad_calls(y, context, error, words):
    network = ac.MLPEnergy(4, 3, 6)
    for call in (network, ac.EnergyDescent(network)):
        with pytest.raises(error, match=words):
            call(y, *context)


MAKE = {
    "network": lambda: ac.MLPEnergy(4, 3, (6, 5)),
    "hopfield": lambda: ac.HopfieldEnergy(nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.tensor(1.0))),
    "quadratic": lambda: ac.QuadraticEnergy(nn.Parameter(torch.eye(4)), nn.Parameter(torch.ones(4))),
}
SPOILT = {
    "on meta": (
        lambda p: nn.Parameter(p.detach().to("meta")),
        ValueError,
        "expected a tensor on cpu like y, got one on meta",
    ),
    "of integers": (
        lambda p: nn.Parameter(p.detach().int(), requires_grad=False),
        TypeError,
        "expected .*float32.*got .*torch.int32",
    ),
    "of another shape": (
        lambda p: nn.Parameter(torch.ones(7, 7, 7)),
        ValueError,
        r"expected .*got .*\[7, 7.*\]",
    ),
    "sparse": (
        lambda p: nn.Parameter(p.detach().view(1, -1).to_sparse()),
        TypeError,
        "expected a dense tensor",
    ),
    "missing": (lambda p: None, TypeError, "expected a .*got NoneType"),
}
OWN = [(kind, name) for kind, make in MAKE.items() for name, _ in make().named_parameters()]


@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize(("kind", "name"), OWN)
def test_what_is_assigned_to_an_energy_later_is_checked_by_name(kind, name, spoilt):
    change, error, words = SPOILT[spoilt]
    module = MAKE[kind]()
    replacement = change(getattr(module, name))
    if spoilt == "missing" and (kind, name) == ("quadratic", "b"):
        error, name, words = ValueError, "context", "expected 1 tensor"  # every row is then to bring its own
        module.b = None
    else:
        setattr(module, name, replacement)
    y0, context = torch.zeros(3, 4), [torch.ones(3, 3)] if kind == "network" else []
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(error, match=rf"^{name}: .*{words}"):
            ac.EnergyDescent(module)(y0, *context)


@pytest.mark.parametrize("kind", MAKE)
def test_tensors_of_any_layout_and_width_may_be_assigned(kind):
    module, same = MAKE[kind](), MAKE[kind]()
    same.load_state_dict(module.state_dict())
    for name, p in list(module.named_parameters()):
        wide = torch.full((*p.shape, 3), 7.0)
        wide[..., 1] = p.detach()
        setattr(module, name, nn.Parameter(wide[..., 1]))
    y0, context = torch.ones(3, 4), [torch.ones(3, 3)] if kind == "network" else []
    assert torch.equal(ac.EnergyDescent(module)(y0, *context).y, ac.EnergyDescent(same)(y0, *context).y)


def test_constants_of_a_network_are_checked_at_every_call():
    network = ac.MLPEnergy(4, 0, 6)
    for name, value, error in (
        ("activation", "relu", ValueError),
        ("ridge", -1.0, ValueError),
        ("ridge", "no", TypeError),
    ):
        before = getattr(network, name)
        setattr(network, name, value)
        with pytest.raises(error, match=f"{name}: expected"):
            ac.EnergyDescent(network)(torch.zeros(3, 4))
        setattr(network, name, before)


def test_bad_calls_of_a_quadratic_energy():
    with pytest.raises(ValueError, match="context: expected 1 tensor"):
        ac.EnergyDescent(ac.QuadraticEnergy(torch.eye(2)))(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"context: expected shape \[3, 2\]"):
        ac.EnergyDescent(ac.QuadraticEnergy(torch.eye(2)))(torch.zeros(3, 2), torch.zeros(3, 1))
    assert isinstance(ac.QuadraticEnergy(nn.Parameter(torch.eye(2))).A, nn.Parameter)


class Bowl(ClosedFormEnergy):
    """½‖y − c‖² up to a constant, with a c for each row. It runs on the kernels of another family."""

    def closed_form(self, y, *context, dtype, kernels=False):
        (centre,) = context
        matrix = torch.eye(y.shape[1], dtype=dtype, device=y.device)
        return ClosedForm(KERNELS, reference.quadratic_energy, (matrix, centre.to(dtype)))


def test_an_energy_that_the_package_does_not_know_brings_its_kernels(device, monkeypatch):
    monkeypatch.setattr("adaptcomp_ext.nn.descent.energy_descent.run_kernels", None)  # the other way
    y0, centre = (values((5, 3), torch.float64, device, seed).requires_grad_() for seed in (0, 1))
    result = ac.EnergyDescent(Bowl(), step_size=0.5, max_steps=2, tol=0.0)(y0, centre)
    torch.testing.assert_close(result.y, 0.25 * y0 + 0.75 * centre)
    torch.testing.assert_close(
        result.energy, 0.5 * (result.y - centre).square().sum(1) - 0.5 * centre.square().sum(1)
    )
    for grad, factor in zip(torch.autograd.grad(result.y.sum(), (y0, centre)), (0.25, 0.75), strict=True):
        torch.testing.assert_close(grad, torch.full_like(grad, factor))
