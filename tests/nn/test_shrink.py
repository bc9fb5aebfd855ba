from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import adaptcomp_ext as ac
from tests.helpers.tensors import values

D = torch.float64


def kill_rows(layer: nn.Module, *units: int) -> None:
    with torch.no_grad():
        layer.weight[list(units)] = 0


def kill_columns(layer: nn.Module, *columns: int) -> None:
    with torch.no_grad():
        layer.weight[:, list(columns)] = 0


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def same(module: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Shrink in float64; check the outputs, and that the original has not changed."""
    module = module.double().eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    small = ac.shrink(module)
    x = values(shape, D)
    torch.testing.assert_close(small(x), module(x), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in before.items())
    return small


def cnn(activation: type[nn.Module] = nn.ReLU, **options) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, **options),
        activation(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, **options),
        activation(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
        activation(),
        nn.Linear(10, 4),
    )


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.SiLU])
def test_cnn(activation: type[nn.Module]) -> None:
    net = cnn(activation)
    kill_rows(net[0], 0, 4)
    kill_rows(net[3], 1, 2, 7)
    kill_columns(net[3], 3)
    kill_rows(net[7], 5)
    kill_columns(net[9], 6, 9)
    small = same(net, (3, 3, 14, 14))
    assert [len(small[i].weight) for i in (0, 3, 7, 9)] == [3, 5, 7, 4]
    assert small[7].in_features == 5 * 4 and small[3].in_channels == 3
    assert count(small) < count(net)
    assert all(type(a) is type(b) for a, b in zip(small, net, strict=True))


def test_nothing_dead_changes_nothing() -> None:
    net = cnn()
    small = same(net, (2, 3, 14, 14))
    assert [p.shape for p in small.parameters()] == [p.shape for p in net.parameters()]


def test_a_removal_leaves_others_dead() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 2)
    )
    with torch.no_grad():
        # Unit 2 of the third layer is read by nobody. It alone reads units 0 and 1 of the second, which alone
        # read unit 4 of the first.
        net[6].weight[:, 2] = 0
        net[4].weight[:, :2] = 0
        net[4].weight[2, :2] = 1
        net[2].weight[:, 4] = 0
        net[2].weight[:2, 4] = 1
    small = same(net, (5, 4))
    assert [len(small[i].weight) for i in (0, 2, 4, 6)] == [4, 4, 6, 2]
    # Downstream: a layer that reads nothing but zeros is itself a constant.
    with torch.no_grad():
        net[2].weight[3:] = 0
        net[4].weight[5] = 0
        net[4].weight[5, 3:] = 1
    small = same(net, (5, 4))
    assert [len(small[i].weight) for i in (0, 2, 4, 6)] == [4, 1, 5, 2]


def test_all_units_dead_leaves_one() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    kill_rows(net[0], 0, 1, 2, 3)
    small = same(net, (6, 3))
    assert [len(small[i].weight) for i in (0, 2, 4)] == [1, 1, 2]


def test_is_done_once() -> None:
    net = cnn()
    kill_rows(net[0], 1)
    kill_columns(net[9], 0)
    small = same(net, (2, 3, 14, 14))
    again = ac.shrink(small)
    assert [p.shape for p in again.parameters()] == [p.shape for p in small.parameters()]


@pytest.mark.parametrize("dimensions", [1, 2])
def test_batch_normalisation(dimensions: int) -> None:
    torch.manual_seed(0)
    if dimensions == 1:
        net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
        shape = (5, 4)
    else:
        net = nn.Sequential(
            nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 3, bias=False)
        )
        shape = (5, 4, 7, 7)
    norm = net[1]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    kill_rows(net[0], 0, 3)
    kill_columns(net[3], 5)
    small = same(net, shape)
    assert small[1].num_features == 3 and len(small[1].running_var) == 3
    small.train()(values(shape, D)).sum().backward()


@pytest.mark.parametrize(
    ("padding", "mode", "units"),
    [
        (1, "zeros", 6),
        ("same", "zeros", 6),
        (1, "circular", 5),
        (1, "replicate", 5),
        (0, "zeros", 5),
        ("valid", "zeros", 5),
    ],
)
def test_constants_are_folded_only_where_that_is_exact(padding, mode: str, units: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.Sigmoid(), nn.Conv2d(6, 3, 3, padding=padding, padding_mode=mode)
    )
    kill_rows(net[0], 2)  # from then on σ(bias), not 0
    assert len(same(net, (2, 2, 9, 9))[0].weight) == units


def test_a_constant_zero_passes_any_padding() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.ReLU(),
        nn.AvgPool2d(3, stride=1, padding=1),
        nn.Conv2d(6, 3, 3, padding=1, bias=False),
    )
    kill_rows(net[0], 2, 3)
    with torch.no_grad():
        net[0].bias[2], net[0].bias[3] = (
            -1.0,
            1.0,
        )  # the second is a constant 1, which the average changes at the border
    assert len(same(net, (2, 2, 9, 9))[0].weight) == 5


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (
            nn.Conv2d(1, 4, 3),
            nn.Conv2d(4, 5, 3),
            nn.Linear(5, 6),
            nn.Linear(6, 2),
        )

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.a(x)), 2)
        x = torch.tanh(self.b(x))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        x = F.dropout(F.leaky_relu(self.c(x), 0.2), 0.5, self.training)
        return self.d(x.sigmoid())


def test_functions_and_methods() -> None:
    torch.manual_seed(0)
    net = Functional()
    kill_rows(net.a, 0)
    kill_rows(net.b, 1, 2)
    kill_rows(net.c, 3)
    small = same(net, (3, 1, 9, 9))
    assert [len(m.weight) for m in (small.a, small.b, small.c, small.d)] == [3, 3, 5, 2]
    assert type(small) is Functional


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = x + torch.relu(self.a(x))
        return self.c(torch.softmax(self.b(x), dim=1))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(torch.relu(self.a(torch.relu(self.a(x)))))


class Seen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        hidden = torch.relu(self.a(x))
        return torch.cat((self.b(hidden), hidden), dim=1)


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3), nn.Linear(4 * 9, 2)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)).view(-1, 36))


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    net[2].weight = net[0].weight
    return net


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2))


def parametrised() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.utils.parametrizations.weight_norm(net[2])
    return net


def hooked() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    net[0].register_forward_hook(lambda module, inputs, output: output * 2)
    return net


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (Residual, (3, 4)),
        (Twice, (3, 4)),
        (Seen, (3, 4)),
        (Written, (3, 2, 5, 5)),
        (tied, (3, 4)),
        (grouped, (3, 2, 7, 7)),
        (parametrised, (3, 4)),
        (hooked, (3, 4)),
    ],
)
def test_what_else_is_seen_stays(make, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = make()
    for layer in net.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and not nn.utils.parametrize.is_parametrized(layer):
            kill_rows(layer, 1)
            break
    small = same(net, shape)
    assert [p.shape for p in small.parameters()] == [p.shape for p in net.parameters()]


def test_linear_over_more_dimensions() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))
    kill_rows(net[0], 1, 5)
    assert len(same(net, (2, 5, 4))[0].weight) == 4
    flat = nn.Sequential(
        nn.Linear(4, 6), nn.Flatten(), nn.Linear(30, 3)
    )  # units and positions are mixed by the flattening
    kill_rows(flat[0], 1)
    assert len(same(flat, (2, 5, 4))[0].weight) == 6


@pytest.mark.parametrize("per", ["weight", "unit"])
def test_variational_layers_become_dense_and_small(per: str) -> None:
    net = ac.nn.variational(cnn(), per=per).double().eval()
    for layer in (net[0], net[3], net[7]):
        noise = layer.log_variance if per == "weight" else layer.log_noise
        with torch.no_grad():
            noise[::2] = 40.0
    small = same(net, (3, 3, 14, 14))
    assert not any(isinstance(part, ac.VariationalDropout) for part in small.modules())
    assert [len(small[i].weight) for i in (0, 3, 7, 9)] == [3, 4, 5, 4]
    alone = ac.VariationalDropout(nn.Linear(3, 3))
    assert type(ac.shrink(alone)) is nn.Linear


def test_trains_on_and_travels() -> None:
    net = cnn()
    kill_rows(net[0], 0, 1)
    net[0].weight.requires_grad_(False)
    small = ac.shrink(net.train())
    assert small.training and not small[0].weight.requires_grad and small[3].weight.requires_grad
    x = torch.randn(4, 3, 14, 14)
    small(x).square().mean().backward()
    optimizer = torch.optim.SGD([p for p in small.parameters() if p.requires_grad], 0.1)
    before = small(x).detach()
    optimizer.step()
    assert not torch.equal(small(x), before)
    again = pickle.loads(pickle.dumps(copy.deepcopy(small)))
    again.load_state_dict(small.state_dict())
    torch.testing.assert_close(again.eval()(x), small.eval()(x), rtol=0, atol=0)
    assert all(p.is_contiguous() for p in small.parameters())


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"module: expected an nn.Module, got str"):
        ac.shrink("net")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"module: expected a network that torch.fx can trace, but tracing Branching failed"
    ):
        ac.shrink(Branching())


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_random_nets_and_masks(data) -> None:
    seed = data.draw(st.integers(0, 10_000))
    torch.manual_seed(seed)
    widths = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    activation = data.draw(st.sampled_from([nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Identity]))
    convolutional = data.draw(st.booleans())
    padding = data.draw(st.integers(0, 1))
    layers: list[nn.Module] = []
    before = 2
    for width in widths:
        layers.append(
            nn.Conv2d(before, width, 3, padding=padding) if convolutional else nn.Linear(before, width)
        )
        if convolutional and data.draw(st.booleans()):
            layers.append(nn.BatchNorm2d(width))
        layers.append(activation())
        before = width
    side = 11
    left = side - 2 * len(widths) * (1 - padding)
    layers += [nn.Flatten(), nn.Linear(before * left**2 if convolutional else before, 3)]
    net = nn.Sequential(*layers)
    share = data.draw(st.sampled_from([0.3, 0.7, 0.95]))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(torch.rand_like(p) >= share)
    small = same(net, (2, 2, side, side) if convolutional else (4, 2))
    assert count(small) <= count(net)
