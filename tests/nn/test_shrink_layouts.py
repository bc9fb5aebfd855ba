"""`shrink` in all layouts, dtypes and modes: constants, batches over tokens or rows, random networks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import adaptcomp_ext as ac
from tests.helpers.shrinking import Control, D, Net
from tests.helpers.tensors import values


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["linear", "convolution", "flattened"])
def test_constants_become_a_bias(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    if kind == "linear":
        module = nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 2, bias=bias))
    elif kind == "convolution":
        module = nn.Sequential(nn.Conv1d(6, 5, 3), nn.Sigmoid(), nn.Conv1d(5, 2, 2, bias=bias))
    else:
        module = nn.Sequential(nn.Conv1d(6, 5, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(20, 2, bias=bias))
    module = module.double().eval()
    with torch.no_grad():
        module[0].weight[1] = 0
        module[0].bias[1] = 0.7
    module[-1].weight.requires_grad_(False)
    small = ac.shrink(module)
    x = values((3, 6), D) if kind == "linear" else values((3, 6, 6), D)
    torch.testing.assert_close(small(x), module(x))
    assert len(small[0].weight) == 4 and small[-1].bias is not None
    assert small[-1].bias.requires_grad == bias and not small[-1].weight.requires_grad
    again = ac.shrink(small)
    assert [p.shape for p in again.parameters()] == [p.shape for p in small.parameters()]


def batch_over_tokens() -> tuple[nn.Module, torch.Tensor, int]:
    module = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        module[3].weight[:, 1] = 0
    return module, values((3, 4, 6), D), 4


def batch_over_rows() -> tuple[nn.Module, torch.Tensor, int]:
    return batch_over_tokens()[0], values((3, 6), D), 3


def flattened(shape: tuple[int, ...], inputs: int, units: int) -> tuple[nn.Module, torch.Tensor, int]:
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(inputs, 2))
    with torch.no_grad():
        module[0].weight[1] = 0
        module[0].bias[1] = -1
    return module, values(shape, D), units


def unbatched() -> tuple[nn.Module, torch.Tensor, int]:
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Conv2d(3, 2, 2))
    with torch.no_grad():
        module[0].weight[1] = 0
    return module, values((2, 6, 6), D), 2


@pytest.mark.parametrize(
    "make",
    [
        batch_over_tokens,
        batch_over_rows,
        lambda: flattened((2, 5, 5), 9, 3),  # [3, 9]: the channels are the linear layer's rows
        lambda: flattened((4, 2, 5, 5), 27, 2),
        unbatched,
    ],
)
def test_layouts_with_an_example(make) -> None:
    torch.manual_seed(0)
    module, x, units = make()
    module = module.double().eval()
    small = ac.shrink(module, x)
    torch.testing.assert_close(small(x), module(x))
    assert len(small[0].weight) == units


def test_an_example_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="inputs: expected what Sequential takes, but it failed on them"):
        ac.shrink(nn.Sequential(nn.Linear(3, 2)), torch.zeros(2, 5))
    ran = []

    class Optionals(Net):
        def forward(self, x, mask=None):
            ran.append(mask)
            return self.b(torch.relu(self.a(x)))

    assert len(ac.shrink(Optionals().eval(), torch.zeros(2, 4)).a.weight) == 2


@pytest.mark.parametrize(
    ("pool", "units"),
    [
        (lambda: nn.AvgPool2d(2), 4),
        (lambda: nn.AvgPool2d(2, ceil_mode=True), 5),
        (lambda: nn.AvgPool2d(2, divisor_override=3), 5),
        (lambda: nn.AvgPool2d(3, padding=1), 5),
        (lambda: nn.AvgPool2d(3, padding=1, count_include_pad=False), 5),
        (lambda: nn.MaxPool2d(3, padding=1), 4),
        (lambda: nn.MaxPool2d(2, ceil_mode=True, dilation=2), 4),
        (lambda: nn.LPPool2d(2, 2), 5),
        (lambda: nn.AdaptiveMaxPool2d(3), 4),
        (lambda: nn.ZeroPad2d(1), 5),
        (lambda: nn.Upsample(scale_factor=2), 5),
        (lambda: nn.Dropout2d(), 4),
        (lambda: nn.InstanceNorm2d(5), 5),
        (lambda: nn.GroupNorm(5, 5), 5),
        (lambda: nn.Softmax2d(), 5),
        (lambda: nn.PReLU(5), 5),
        (lambda: nn.PReLU(), 5),
        (lambda: nn.Conv2d(5, 5, 1, groups=5), 5),
        (lambda: nn.ConvTranspose2d(5, 5, 2), 5),
        (lambda: nn.BatchNorm2d(5, affine=False), 4),
        (lambda: nn.BatchNorm2d(5, track_running_stats=False), 5),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_what_lies_between(pool, units: int, training: bool) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Sigmoid(), pool(), nn.Conv2d(5, 3, 1)).double()
    with torch.no_grad():
        module[0].weight[1] = 0
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
    module.train(training)
    x = values((2, 2, 9, 9), D)
    small = ac.shrink(module)
    assert small.training == training == small[2].training
    torch.testing.assert_close(small.eval()(x), module.eval()(x))
    assert len(small[0].weight) == units


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
def test_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype).eval()
    with torch.no_grad():
        module[0].weight[1] = 0
    small = ac.shrink(module)
    x = torch.randn(5, 4).to(dtype)
    torch.testing.assert_close(small(x), module(x), atol=1e-2, rtol=1e-2)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert len(small[0].weight) == (4 if dtype.is_complex else 3)  # complex constants are left alone


def test_nothing_of_the_tracing_stays() -> None:
    class Counts(Net):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.scale = 2 * torch.ones(())

        def forward(self, x):
            self.calls += 1
            return self.b(torch.relu(self.a(x))) * (self.scale + 1)

    module = Counts().eval()
    small = ac.shrink(module)
    assert (
        module.calls == 0 == small.calls
        and set(vars(small)) == set(vars(module))
        and len(small.a.weight) == 2
    )
    copy.deepcopy(small)


def test_modes_of_parts_are_kept() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).train()
    module[1].eval()
    small = ac.shrink(module)
    assert small.training and small[0].training and not small[1].training


@pytest.mark.parametrize("hook", [True, False])
def test_variational_layers_with_hooks_or_inside_each_other(hook: bool) -> None:
    torch.manual_seed(0)
    inner = ac.VariationalDropout(nn.Linear(4, 4), per="unit")
    module = nn.Sequential(
        inner,
        nn.ReLU(),
        ac.VariationalDropout(nn.Sequential(ac.VariationalDropout(nn.Linear(4, 3))), features=3),
    )
    module = module.double().eval()
    with torch.no_grad():
        inner.log_noise[1] = 40
    if hook:
        inner.register_forward_hook(lambda m, i, o: o + 1)
    small = ac.shrink(module)
    assert not any(isinstance(part, ac.VariationalDropout) for part in small.modules())
    x = values((5, 4), D)
    torch.testing.assert_close(small(x), module(x))
    assert len(small[0].weight) == 4 - (not hook)


def test_a_transformer_is_left_whole() -> None:
    torch.manual_seed(0)
    layer = (
        ac.nn.variational(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)).double().eval()
    )
    layer.linear1.prune(0.5)
    x = values((2, 3, 8), D)
    for module in (layer, nn.Sequential(layer, nn.Linear(8, 2).double())):
        small = ac.shrink(module)
        assert not any(isinstance(part, ac.VariationalDropout) for part in small.modules())
        with torch.no_grad():
            torch.testing.assert_close(small(x), module(x))


def test_inference_mode_makes_parameters_that_train() -> None:
    with torch.inference_mode():
        small = ac.shrink(Control().eval())
    small(torch.zeros(2, 4)).sum().backward()
    assert small.a.weight.grad is not None


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_refused_by_name() -> None:
    with pytest.raises(
        ValueError,
        match=r"module: expected parameters and buffers with values, got 0.weight on the meta device",
    ):
        ac.shrink(nn.Sequential(nn.Linear(3, 2, device="meta")))
    for compiled in (
        torch.compile(Control(), backend="eager"),
        torch.jit.trace(Control(), torch.zeros(2, 4)),
    ):
        with pytest.raises(
            TypeError, match="module: expected a network in Python, as it was before it was compiled, got "
        ):
            ac.shrink(compiled)
    own = Control()
    own.forward = lambda x: x
    with pytest.raises(ValueError, match="module: expected the forward of Control, got another one"):
        ac.shrink(own)
    with pytest.raises(ValueError, match="tracing ModuleList failed"):
        ac.shrink(nn.ModuleList([nn.Linear(3, 2)]))

    class Locked(nn.Linear):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies")

    with pytest.raises(
        TypeError, match=r"module: expected a module that copy.deepcopy can copy, got Locked: no copies"
    ):
        ac.shrink(Locked(3, 2))

    class InTraining(Net):
        def forward(self, x):
            if self.training and x.sum() > 0:
                return self.a(x)
            return self.b(self.a(x))

    with pytest.raises(ValueError, match="tracing InTraining failed in training mode"):
        ac.shrink(InTraining().eval())


class Random(nn.Module):
    """A sequence of layers with random properties: residual, tied, read, kept, doubled, hooked, in place."""

    def __init__(self, habits: list[str], width: int) -> None:
        super().__init__()
        self.habits = habits
        self.layers = nn.ModuleList(
            [nn.Linear(width, width, bias=i % 3 != 2) for i in range(len(habits) + 1)]
        )
        self.norms = nn.ModuleList([nn.BatchNorm1d(width) for _ in habits])
        self.act = nn.ReLU(inplace=True)
        for habit, layer in zip(habits, self.layers, strict=False):
            if habit == "hooked":
                layer.register_forward_hook(lambda module, inputs, output: output.flip(1))
            if habit == "parametrised":
                nn.utils.parametrizations.weight_norm(layer)

    def forward(self, x):
        extra = 0
        for habit, layer, norm in zip(self.habits, self.layers, self.norms, strict=False):
            h = layer(x)
            match habit:
                case "residual":
                    x = x + torch.tanh(h)
                case "tied":
                    x = F.linear(torch.tanh(h), layer.weight.t())
                case "penalty":
                    x, extra = torch.sigmoid(h), extra + layer.weight.square().sum()
                case "doubled":
                    x = torch.sigmoid(layer(F.elu(h)))
                case "in place":
                    self.act(h)
                    x = h
                case "normed":
                    x = F.softplus(norm(h))
                case "branch":
                    x = torch.cos(h) + h
                case _:
                    x = torch.sigmoid(h)
        return self.layers[-1](x) + extra


HABITS = [
    "plain",
    "plain",
    "normed",
    "residual",
    "tied",
    "penalty",
    "doubled",
    "in place",
    "branch",
    "hooked",
    "parametrised",
]


@given(
    st.lists(st.sampled_from(HABITS), min_size=1, max_size=5),
    st.integers(0, 9999),
    st.sampled_from([0.3, 0.7, 0.95]),
)
@settings(max_examples=60, deadline=None)
def test_random_habits(habits: list[str], seed: int, share: float) -> None:
    torch.manual_seed(seed)
    module = Random(habits, 4).double()
    with torch.no_grad():
        for norm in module.norms:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        for layer in module.layers:
            weight = (
                layer.weight
                if not nn.utils.parametrize.is_parametrized(layer)
                else layer.parametrizations.weight.original1
            )
            weight[torch.rand(4) < share] = 0
            weight[:, torch.rand(4) < share] = 0
            if weight is not layer.weight:
                weight += 1e-3  # a direction needs a length
    small = ac.shrink(module)
    x = values((5, 4), D)
    torch.testing.assert_close(small.eval()(x), module.eval()(x), rtol=1e-9, atol=1e-9)
    assert sum(p.numel() for p in small.parameters()) <= sum(
        p.numel() for p in module.parameters()
    ) + 4 * len(module.layers)
    small.train()(x).sum().backward()
