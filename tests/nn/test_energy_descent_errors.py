"""Bad input to EnergyDescent: TypeError or ValueError with the argument, the expectation and what came."""

from __future__ import annotations

import math
import textwrap

import pytest
import torch

import adaptcomp_ext as ac
from tests.helpers.energies import DIM, Wells
from tests.helpers.processes import run_cases

Y = torch.randn(5, DIM)


def square(y, *_):
    return (y * y).sum(1)


BAD_OPTIONS = [
    ({"energy": 3}, TypeError, "energy: expected a callable or nn.Module, got int 3"),
    ({"energy": None}, TypeError, "energy: expected a callable.*got NoneType"),
    ({"step_size": 0.0}, ValueError, r"step_size: expected a number in \(0, inf\), got 0.0"),
    ({"step_size": -1}, ValueError, "step_size: .*got -1"),
    ({"step_size": math.nan}, ValueError, "step_size: .*got nan"),
    ({"step_size": math.inf}, ValueError, "step_size: .*got inf"),
    ({"step_size": "0.1"}, TypeError, "step_size: expected a number, got str"),
    ({"step_size": True}, TypeError, "step_size: expected a number, got bool"),
    ({"step_size": torch.tensor(1)}, TypeError, "step_size: expected a floating-point tensor"),
    (
        {"step_size": torch.tensor(-0.5)},
        ValueError,
        "step_size: expected positive finite numbers, got a minimum of -0.5",
    ),
    (
        {"step_size": torch.tensor([0.1, 0.0, 0.1, 0.1, 0.1])},
        ValueError,
        "step_size: expected positive finite numbers",
    ),
    (
        {"step_size": torch.tensor([0.1, math.nan, 0.1, 0.1, 0.1])},
        ValueError,
        "step_size: expected positive finite numbers",
    ),
    (
        {"step_size": torch.ones(5).to(torch.float8_e4m3fn)},
        TypeError,
        "step_size: expected a floating-point tensor .*got .*float8",
    ),
    (
        {"step_size": torch.ones(2, 2)},
        ValueError,
        r"step_size: expected a number or a tensor of shape \[\] or \[B\]",
    ),
    (
        {"step_size": torch.tensor(0.1, device="meta")},
        TypeError,
        "step_size: expected a dense tensor with data",
    ),
    ({"max_steps": 0}, ValueError, "max_steps: expected an int >= 1, got 0"),
    ({"max_steps": 2.0}, TypeError, "max_steps: expected an int, got float"),
    ({"max_steps": True}, TypeError, "max_steps: expected an int, got bool"),
    ({"tol": -1e-9}, ValueError, r"tol: expected a number in \[0, inf\), got -1e-09"),
    ({"tol": None}, TypeError, "tol: expected a number, got NoneType"),
    ({"tol": math.inf}, ValueError, "tol: .*got inf"),
    ({"stop": "never"}, ValueError, "stop: expected one of 'energy', 'gradient', got 'never'"),
    ({"accept": True}, ValueError, "accept: expected one of 'always', 'if_lower', got True"),
    ({"noise": -0.1}, ValueError, r"noise: expected a number in \[0, inf\), got -0.1"),
    ({"noise": "some"}, TypeError, "noise: expected a number, got str"),
    ({"noise": torch.zeros(5)}, ValueError, "noise: expected a number or a tensor without dimensions"),
    ({"noise": torch.tensor(-1.0)}, ValueError, "noise: expected a finite number >= 0, got -1.0"),
    ({"noise": torch.tensor(1)}, TypeError, "noise: expected a floating-point tensor"),
    ({"momentum": 1.0}, ValueError, r"momentum: expected a number in \[0, 1\), got 1.0"),
    ({"momentum": -0.1}, ValueError, "momentum: .*got -0.1"),
    ({"momentum": torch.tensor(0.5)}, TypeError, "momentum: expected a number, got a tensor"),
    ({"clip": 0.0}, ValueError, r"clip: expected a number in \(0, inf\), got 0.0"),
    ({"clip": math.inf}, ValueError, "clip: .*got inf"),
    ({"clip": False}, TypeError, "clip: expected a number, got bool"),
    ({"clamp": (1.0, 0.0)}, ValueError, r"clamp: expected low < high, got \(1.0, 0.0\)"),
    ({"clamp": (0.0, 0.0)}, ValueError, "clamp: expected low < high"),
    ({"clamp": (math.nan, 1.0)}, ValueError, "clamp: expected low < high"),
    ({"clamp": 1.0}, TypeError, r"clamp: expected None or a pair \(low, high\), got float 1.0"),
    ({"clamp": (0.0, 1.0, 2.0)}, TypeError, "clamp: expected None or a pair"),
    ({"clamp": ("0", 1.0)}, TypeError, "clamp: expected a pair of numbers"),
    ({"gradient": "unroled"}, ValueError, "gradient: expected one of 'unrolled', .*got 'unroled'"),
    ({"gradient": None}, ValueError, "gradient: .*got None"),
    ({"gradient": ("truncated",)}, ValueError, r'gradient: expected \("truncated", k\)'),
    ({"gradient": ("unrolled", 2)}, ValueError, r'gradient: expected \("truncated", k\)'),
    ({"gradient": ("truncated", 0)}, ValueError, "gradient: k of .* expected an int >= 1, got 0"),
    ({"gradient": ("truncated", 1.5)}, TypeError, "gradient: k of .* expected an int, got float"),
    ({"keep_trace": 1}, TypeError, "keep_trace: expected a bool, got int 1"),
    ({"backtracking": 0.5}, ValueError, 'backtracking: expected None unless accept="if_lower", got 0.5'),
    (
        {"backtracking": 1.0, "accept": "if_lower"},
        ValueError,
        r"backtracking: expected a number in \(0, 1\), got 1.0",
    ),
    ({"backtracking": 0, "accept": "if_lower"}, ValueError, "backtracking: .*got 0"),
    ({"backtracking": "half", "accept": "if_lower"}, TypeError, "backtracking: expected a number, got str"),
    ({"seed": -1}, ValueError, "seed: expected an int >= 0, got -1"),
    ({"seed": 2**63}, ValueError, r"seed: expected an int < 2\*\*63"),
    ({"seed": 1.0}, TypeError, "seed: expected an int, got float"),
]


@pytest.mark.promise("bad input")
@pytest.mark.parametrize(
    ("options", "error", "message"), BAD_OPTIONS, ids=[str(i) for i in range(len(BAD_OPTIONS))]
)
def test_options(options, error, message):
    with pytest.raises(error, match=message):
        ac.EnergyDescent(**{"energy": square, **options})
    # Options that are plain attributes are checked again at a call.
    if "energy" not in options and not any(
        isinstance(v, torch.Tensor) and v.is_meta for v in options.values()
    ):
        descend = ac.EnergyDescent(square)
        for name, value in options.items():
            setattr(descend, name, value)
        with pytest.raises(error, match=message.replace("[B", "[5").replace(r"\[B", r"\[5")):
            descend(Y)


BAD_ARGUMENTS = [
    (None, (), {}, TypeError, "y0: expected a Tensor, got NoneType"),
    ([1.0], (), {}, TypeError, "y0: expected a Tensor"),
    ((Y, Y), (), {}, TypeError, "y0: expected a Tensor"),
    (Y.long(), (), {}, TypeError, "y0: expected float32, float64, bfloat16 or float16, got torch.int64"),
    (Y.to(torch.complex64), (), {}, TypeError, "y0: expected a real dtype"),
    (torch.tensor(1.0), (), {}, ValueError, "y0: expected a batch dimension"),
    (Y.to_sparse(), (), {}, TypeError, "y0: expected a dense tensor"),
    (Y.to("meta"), (), {}, ValueError, "y0: .*meta"),
    (Y, (None,), {}, TypeError, r"context\[0\]: expected a Tensor, got NoneType"),
    (Y, (Y, 3.0), {}, TypeError, r"context\[1\]: expected a Tensor, got float 3.0"),
    (Y, (Y[:4],), {}, ValueError, r"context\[0\]: expected 5 rows like .*, got shape \[4, 4\]"),
    (Y, (Y, torch.tensor(1.0)), {}, ValueError, r"context\[1\]: expected a batch dimension"),
    (Y, (Y.to("meta"),), {}, ValueError, r"context\[0\]: .*meta"),
    (Y, (), {"sample_ids": torch.arange(4)}, ValueError, "sample_ids: expected 5 rows"),
    (Y, (), {"sample_ids": torch.arange(5.0)}, TypeError, r"sample_ids: expected int64 of shape \[B\]"),
    (Y, (), {"sample_ids": list(range(5))}, TypeError, "sample_ids: expected int64"),
    (Y, (), {"step_size": 0.0}, ValueError, "step_size: .*got 0.0"),
    (
        Y,
        (),
        {"step_size": torch.ones(4)},
        ValueError,
        r"step_size: expected a number or a tensor of shape \[\] or \[5\], got .*\[4\]",
    ),
    (
        Y,
        (),
        {"step_size": torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0])},
        ValueError,
        "step_size: expected positive finite",
    ),
    (Y, (), {"seed": -3}, ValueError, "seed: expected an int >= 0, got -3"),
    (Y, (), {"seed": "x"}, TypeError, "seed: expected an int"),
]


@pytest.mark.promise("bad input")
@pytest.mark.parametrize(
    ("y0", "context", "options", "error", "message"),
    BAD_ARGUMENTS,
    ids=[str(i) for i in range(len(BAD_ARGUMENTS))],
)
@pytest.mark.parametrize("reference", [False, True])
def test_arguments(y0, context, options, error, message, reference):
    called = False

    def energy(y, *_):
        nonlocal called
        called = True
        return square(y)

    descend = ac.EnergyDescent(energy)
    with pytest.raises(error, match=message):
        if reference:
            with ac.reference_kernels():
                descend(y0, *context, **options)
        else:
            descend(y0, *context, **options)
    assert not called


def test_other_devices(device):
    if device == "cpu":
        pytest.skip("takes two devices")
    y0 = Y.to(device)
    with pytest.raises(ValueError, match=r"context\[0\]: expected a tensor on cuda"):
        ac.EnergyDescent(square)(y0, Y)
    with pytest.raises(ValueError, match="sample_ids: expected a tensor on cuda"):
        ac.EnergyDescent(square)(y0, sample_ids=torch.arange(5))
    with pytest.raises(ValueError, match="step_size: expected a tensor on cuda"):
        ac.EnergyDescent(square)(y0, step_size=torch.ones(5))
    with pytest.raises(ValueError, match="energy: expected it to return a tensor on cuda"):
        ac.EnergyDescent(lambda y: square(y.cpu()))(y0)


WEIGHT = torch.ones(DIM, requires_grad=True)
BAD_ENERGIES = [
    (
        lambda y: y.square().sum(),
        ValueError,
        r"energy: expected it to return shape \[5\]; one energy for each row.*got \[\]",
    ),
    (
        lambda y: y.square().sum(1, keepdim=True),
        ValueError,
        r"energy: expected it to return shape \[5\], got \[5, 1\]",
    ),
    (lambda y: y.square().sum(1)[:4], ValueError, r"energy: expected it to return shape \[5\], got \[4\]"),
    (lambda y: y.square().sum(1).long(), TypeError, "energy: expected it to return float32.*got torch.int64"),
    (lambda y: y.sum(1).to(torch.complex64), TypeError, "energy: .*got torch.complex64"),
    (lambda y: None, TypeError, "energy: expected it to return a Tensor, got NoneType"),
    (lambda y: (y.sum(1), y), TypeError, "energy: expected it to return a Tensor, got tuple"),
    (lambda y: y.sum(1).to_sparse(), TypeError, "energy: expected it to return a dense tensor"),
    (lambda y: torch.zeros(5), ValueError, "energy: expected it to depend on y, got .* without a graph"),
    (lambda y: y.detach().sum(1), ValueError, "energy: expected it to depend on y"),
    (
        lambda y: (y.detach() * WEIGHT).sum(1),
        ValueError,
        "energy: expected it to depend on y, .*does not reach y",
    ),
    (
        lambda y: y.square().mean().expand(5),
        ValueError,
        "energy: expected each row's energy to depend on that row alone",
    ),
    (
        lambda y: (y - y.mean(0)).square().sum(1),
        ValueError,
        "energy: expected each row's energy to depend on that row alone",
    ),
]


@pytest.mark.promise("step's result")
@pytest.mark.parametrize(
    ("energy", "error", "message"), BAD_ENERGIES, ids=[str(i) for i in range(len(BAD_ENERGIES))]
)
@pytest.mark.parametrize("gradient", ["unrolled", "stepwise", "implicit", "detached"])
def test_what_an_energy_returns(energy, error, message, gradient):
    descend = ac.EnergyDescent(energy, gradient=gradient)
    for _ in range(2):  # not only at the first call
        with pytest.raises(error, match=message):
            descend(Y)


def test_an_energy_that_goes_wrong_later():
    def energy(y):
        return square(y) if y.shape[0] == 5 else square(y)[:, None]

    with pytest.raises(ValueError, match=r"energy: expected it to return shape \[4\], got \[4, 1\]"):
        ac.EnergyDescent(energy, torch.tensor([0.5, 0.1, 0.1, 0.1, 0.1]), 9, 1e-9, "gradient")(Y)


def test_mixed_rows_cost_one_backward_pass_of_the_first_call():
    calls = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            ctx.save_for_backward(y)
            return y.square().sum(1)

        @staticmethod
        def backward(ctx, g):
            calls.append(1)
            return 2 * ctx.saved_tensors[0] * g[:, None]

    descend = ac.EnergyDescent(Watched.apply, 0.1, 1, 0.0, gradient="detached")
    counts = []
    for _ in range(3):
        calls.clear()
        descend(Y)
        counts.append(len(calls))
    assert counts == [2, 1, 1]
    descend.energy = lambda y: Watched.apply(y) + y.sum() * 0.1
    with pytest.raises(ValueError, match="depend on that row alone"):
        descend(Y)


def test_a_nan_is_no_sign_of_mixed_rows():
    y0 = torch.tensor([[1.0], [-1.0], [0.0]])
    result = ac.EnergyDescent(lambda y: (y.sqrt() + y).sum(1), 0.01, 2, 0.0)(y0)
    assert result.steps.tolist()[:2] == [2, 0]


def test_errors_of_the_energy_itself_come_through():
    def energy(y):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        ac.EnergyDescent(energy)(Y)
    with pytest.raises(TypeError):
        ac.EnergyDescent(Wells())(Y)  # without its context


def test_the_tests_of_options_cover_each_of_them():
    arguments = ac.EnergyDescent.__init__.__annotations__.keys() - {"return"}
    assert arguments == {name for options, *_ in BAD_OPTIONS for name in options}


RELEASED = """
    def released(*shape, **options):
        tensor = torch.ones(*shape, **options)
        tensor.untyped_storage().resize_(0)
        return tensor
    Y, A = torch.ones(6, 3), torch.eye(3)
    function, quadratic = (lambda y: (y * y).sum(1)), ac.QuadraticEnergy(A, torch.ones(3))
    network = ac.MLPEnergy(3, 2, 4)
    def with_own(module, name):
        module = copy.deepcopy(module)
        setattr(module, name, nn.Parameter(released(getattr(module, name).shape)))
        return module
"""


def test_tensors_whose_storage_was_released_are_named():
    cases = {
        "step_size": "ac.EnergyDescent(ENERGY)(Y, step_size=released(6))",
        "step_size later": "setattr(d := ac.EnergyDescent(ENERGY), 'step_size', released(())) or d(Y)",
        "noise": "setattr(d := ac.EnergyDescent(ENERGY), 'noise', released(())) or d(Y)",
        "sample_ids": "ac.EnergyDescent(ENERGY, noise=0.1)(Y, sample_ids=released(6, dtype=torch.int64))",
        "y0": "ac.EnergyDescent(ENERGY)(released(6, 3))",
    }
    lines = [
        f"{n} {e}: {c.replace('ENERGY', e)}" for n, c in cases.items() for e in ("function", "quadratic")
    ]
    own = ("weight_y", "weight_x", "bias1", "out", "out_bias")
    lines += [f"{n} own: ac.EnergyDescent(with_own(network, {n!r}))(Y, torch.ones(6, 2))" for n in own]
    said = run_cases("\n".join(lines), "import copy\n" + textwrap.dedent(RELEASED))
    for case, text in said.items():
        assert text.startswith("TypeError: " + case.split()[0]), (case, text)


def test_an_energy_that_is_no_longer_one():
    descend = ac.EnergyDescent(square)
    descend.energy = None
    with pytest.raises(TypeError, match=r"energy: expected a callable or nn\.Module, got NoneType"):
        descend(Y)
