from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adaptcomp_ext as ac
from adaptcomp_ext.nn import description_length, sparsity, variational
from adaptcomp_ext.nn.variational.kl import kingma_kl, molchanov_kl
from tests.helpers.tensors import generator, values

integrate = pytest.importorskip("scipy.integrate")

D = torch.float64


def exact_kl(log_alpha: float) -> float:
    """−½ log α + E log|1 + √α ε| + (γ + log 2)/2 by quadrature, without the pole of the logarithm."""
    integrate = pytest.importorskip("scipy.integrate")
    spread = math.exp(log_alpha / 2)
    pole = -1 / spread
    density = lambda e: math.exp(-e * e / 2) / math.sqrt(2 * math.pi)  # noqa: E731
    total = 0.0
    edges = sorted({-12.0, min(max(pole, -12.0), 12.0), 12.0})
    for low, high in itertools.pairwise(edges):
        total += integrate.quad(
            lambda e: math.log(abs(1 + spread * e) + 1e-300) * density(e), low, high, limit=400
        )[0]
    return -log_alpha / 2 + total + (0.57721566490153286 + math.log(2)) / 2


@pytest.mark.parametrize("log_alpha", [-8.0, -5.0, -3.0, -1.0, 0.0, 0.7, 2.0, 3.0, 6.0])
def test_molchanov_kl_is_the_integral(log_alpha: float) -> None:
    assert float(molchanov_kl(torch.tensor(log_alpha, dtype=D))) == pytest.approx(
        exact_kl(log_alpha), abs=0.01
    )


@pytest.mark.parametrize("log_alpha", [-8.0, -5.0, -3.0, -1.0, 0.0])
def test_kingma_kl_is_the_integral_up_to_one(log_alpha: float) -> None:
    assert float(kingma_kl(torch.tensor(log_alpha, dtype=D))) == pytest.approx(exact_kl(log_alpha), abs=0.05)


def test_kl_is_what_samples_say() -> None:
    epsilon = torch.randn(2_000_000, dtype=D, generator=generator(0))
    for log_alpha in (-2.0, 0.0):
        sampled = -log_alpha / 2 + (1 + math.exp(log_alpha / 2) * epsilon).abs().log().mean() + 0.635181
        assert float(molchanov_kl(torch.tensor(log_alpha, dtype=D))) == pytest.approx(
            float(sampled), abs=0.012
        )


def test_kl_falls_to_nothing() -> None:
    log_alpha = torch.linspace(-30, 40, 1001, dtype=D, requires_grad=True)
    kl = molchanov_kl(log_alpha)
    assert bool((kl.diff() < 0).all()) and float(kl[-1].detach()) < 1e-15
    (slope,) = torch.autograd.grad(kl.sum(), log_alpha)
    assert bool((slope < 0).all())  # no clamp stops a weight from being pruned, or from coming back


def layers() -> list[tuple[nn.Module, tuple[int, ...]]]:
    return [
        (nn.Linear(5, 4), (7, 5)),
        (nn.Linear(5, 4, bias=False), (3, 2, 5)),
        (nn.Conv1d(3, 4, 3, padding=1), (2, 3, 6)),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="circular"), (2, 3, 6, 5)),
        (nn.Conv3d(2, 3, 2), (2, 2, 3, 4, 3)),
    ]


@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("per", ["weight", "unit"])
def test_evaluation_prunes_and_is_dense(case: int, per: str) -> None:
    torch.manual_seed(case)
    layer, shape = layers()[case]
    noisy = ac.VariationalDropout(layer.double(), per=per).eval()
    x = values(shape, D)
    with torch.no_grad():
        noise = noisy.log_variance if per == "weight" else noisy.log_noise
        noise.copy_(torch.where(torch.arange(noise.numel()).view(noise.shape) % 2 == 0, 30.0, -30.0))
    dense = noisy.dense()
    assert type(dense) is type(layer)
    torch.testing.assert_close(noisy(x), dense(x), rtol=0, atol=0)
    pruned = (dense.weight == 0).double().mean()
    assert noisy.sparsity() == pytest.approx(float(pruned)) and 0.4 < noisy.sparsity() < 0.7
    kept = dense.weight != 0
    torch.testing.assert_close(dense.weight[kept], layer.weight[kept], rtol=0, atol=0)
    if per == "unit":
        assert bool((dense.weight[::2] == 0).all()) and bool((dense.weight[1::2] != 0).all())


@pytest.mark.parametrize("case", range(5))
def test_local_reparametrisation_has_the_moments_of_sampled_weights(case: int) -> None:
    torch.manual_seed(case)
    layer, shape = layers()[case]
    noisy = ac.VariationalDropout(layer.double(), log_alpha=0.0).train()
    x = values(shape, D)
    samples = 3000
    with torch.no_grad():
        out = torch.stack([noisy(x) for _ in range(samples)])
        alpha = noisy.log_alpha.exp()
        plain = copy.deepcopy(layer)
        drawn = []
        for _ in range(samples):
            plain.weight.copy_(
                layer.weight + alpha.sqrt() * layer.weight.abs() * torch.randn_like(layer.weight)
            )
            drawn.append(plain(x))
        weights = torch.stack(drawn)
    spread = weights.std(dim=0)
    error = 5 * spread / samples**0.5
    assert bool(((out.mean(dim=0) - weights.mean(dim=0)).abs() < 2 * error + 1e-9).all())
    torch.testing.assert_close(out.std(dim=0), spread, rtol=0.12, atol=1e-6)


@pytest.mark.parametrize("case", range(5))
def test_a_unit_has_one_draw_for_each_row(case: int) -> None:
    torch.manual_seed(case)
    layer, shape = layers()[case]
    noisy = ac.VariationalDropout(layer.double(), per="unit", log_alpha=-1.0).train()
    x = values(shape, D)
    with torch.no_grad():
        bias = 0 if layer.bias is None else layer.bias.view(-1, *(1 for _ in layer.weight.shape[2:]))
        clean = layer(x) - bias
        factor = (noisy(x) - bias) / clean
    if layer.weight.dim() > 2:  # all positions of a channel alike, no two channels or rows
        flat = factor.flatten(2)
        torch.testing.assert_close(flat, flat[:, :, :1].expand_as(flat), rtol=1e-6, atol=1e-6)
        factor = flat[:, :, 0]
    assert len(factor.flatten().unique()) == factor.numel()


def test_gaussian_multiplies_outputs() -> None:
    torch.manual_seed(0)
    cell = ac.VariationalDropout(nn.GRUCell(3, 4).double(), log_alpha=-1.0)
    assert cell.form == "gaussian" and cell.log_alpha.shape == (4,)
    x, h = values((5, 3), D), values((5, 4), D, seed=1)
    with torch.no_grad():
        clean = cell.eval()(x, h)
        torch.testing.assert_close(clean, cell.layer(x, h), rtol=0, atol=0)
        noise = torch.stack([cell.train()(x, h) for _ in range(4000)]) / clean
    assert float(noise.mean()) == pytest.approx(1, abs=0.02)
    assert float(noise.var()) == pytest.approx(math.exp(-1.0), rel=0.05)
    assert cell.sparsity() == 0
    torch.testing.assert_close(cell.kl(), kingma_kl(torch.full((4,), -1.0, dtype=D)).sum())
    convolution = ac.VariationalDropout(nn.Conv2d(2, 3, 3), form="gaussian")
    assert convolution(torch.randn(2, 2, 5, 5)).shape == (2, 3, 3, 3)
    with torch.no_grad():
        convolution.log_noise.fill_(2.0)
    assert float(convolution.log_alpha.detach().max()) == 0  # α ≤ 1


@pytest.mark.parametrize("per", ["weight", "unit"])
def test_gradients(per: str) -> None:
    torch.manual_seed(0)
    noisy = ac.VariationalDropout(nn.Linear(3, 2).double(), per=per, log_alpha=-1.0)
    x = values((4, 3), D)
    names = [name for name, _ in noisy.named_parameters()]

    def run(*parameters: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        out = torch.func.functional_call(noisy, dict(zip(names, parameters, strict=True)), (x,))
        return out.square().sum()

    assert torch.autograd.gradcheck(run, [p.detach().clone().requires_grad_() for p in noisy.parameters()])


@pytest.mark.parametrize("per", ["weight", "unit"])
def test_description_length_counts_every_weight(per: str) -> None:
    net = variational(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), per=per)
    expected = sum(
        float(molchanov_kl(part.log_alpha.detach()).mean()) * part.layer.weight.numel()
        for part in (net[0], net[2])
    )
    assert float(description_length(net).detach()) == pytest.approx(expected, rel=1e-5)
    assert float(description_length(nn.Linear(2, 2))) == 0
    assert sparsity(nn.Linear(2, 2)) == 0
    with torch.no_grad():
        (net[0].log_variance if per == "weight" else net[0].log_noise).fill_(20.0)
    assert sparsity(net) == pytest.approx(12 / 20)


def test_prune_drops_the_noisiest() -> None:
    for share, kept in ((0.0, 5), (0.3, 4), (0.5, 3), (0.99, 1)):
        layer = ac.VariationalDropout(nn.Linear(3, 5), per="unit")
        with torch.no_grad():
            layer.log_noise.copy_(torch.tensor([0.3, -2.0, 1.0, -1.0, 0.5]))
        layer.prune(share)
        alive = layer.kept.all(dim=1)
        assert int(alive.sum()) == kept
        assert set(alive.nonzero()[:, 0].tolist()) == set(layer.log_noise.argsort()[:kept].tolist())
    weights = ac.VariationalDropout(nn.Linear(10, 10))
    weights.prune(0.9)
    assert weights.sparsity() == pytest.approx(0.9)
    with pytest.raises(ValueError, match=r"share: expected a share below 1"):
        weights.prune(1.0)
    with pytest.raises(ValueError, match=r"share"):
        ac.VariationalDropout(nn.GRUCell(2, 2)).prune(0.5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_prunes_what_does_not_matter(seed: int) -> None:
    """Three of twelve inputs matter; the weights of the other nine are pruned without loss."""
    torch.manual_seed(seed)
    x = torch.randn(400, 12)
    y = x[:, :3] @ torch.tensor([1.0, -2.0, 1.5]) + 0.1 * torch.randn(400)
    layer = ac.VariationalDropout(nn.Linear(12, 1))
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    for step in range(1500):
        loss = 50 * F.mse_loss(layer(x)[:, 0], y) + min(1.0, step / 500) * layer.kl() / 400
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    log_alpha = layer.log_alpha.detach()[0]
    assert float(log_alpha[3:].min()) > float(log_alpha[:3].max()) + 4
    layer.prune(0.75)
    assert layer.kept[0].tolist() == [True] * 3 + [False] * 9
    assert float(F.mse_loss(layer.eval()(x)[:, 0], y).detach()) < 0.02


def test_lives_like_a_module() -> None:
    torch.manual_seed(0)
    net = variational(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(18, 3)))
    x = torch.randn(4, 1, 5, 5)
    expected = net.eval()(x)
    again = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    torch.testing.assert_close(again(x), expected, rtol=0, atol=0)
    other = variational(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(18, 3))).eval()
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert net.train()(x).dtype == torch.bfloat16
    noise = net.train()(x)
    assert not torch.equal(noise, net(x))


def test_variational_copies_and_wraps() -> None:
    shared = nn.Linear(3, 3)
    inner = ac.VariationalDropout(nn.Linear(3, 3), per="unit")
    net = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU(), inner), "c": nn.GRUCell(3, 3)})
    wrapped = variational(net, threshold=1.0)
    assert type(net["a"]) is nn.Linear and net["a"] is shared  # the original is left as it was
    assert isinstance(wrapped["a"], ac.VariationalDropout) and wrapped["a"] is wrapped["b"][0]
    assert wrapped["a"].threshold == 1.0
    assert isinstance(wrapped["b"][2], ac.VariationalDropout) and wrapped["b"][2].per == "unit"
    assert not isinstance(wrapped["b"][2].layer, ac.VariationalDropout)
    assert type(wrapped["c"]) is nn.GRUCell
    assert isinstance(variational(nn.Linear(2, 2)), ac.VariationalDropout)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ac.VariationalDropout("x"), TypeError, "layer: expected an nn.Module"),
        (
            lambda: ac.VariationalDropout(ac.VariationalDropout(nn.Linear(2, 2))),
            TypeError,
            "layer: expected one without",
        ),
        (lambda: ac.VariationalDropout(nn.Linear(2, 2), form="dense"), ValueError, "form: expected one of"),
        (lambda: ac.VariationalDropout(nn.Linear(2, 2), per="layer"), ValueError, "per: expected one of"),
        (
            lambda: ac.VariationalDropout(nn.GRUCell(2, 2), form="sparse"),
            TypeError,
            "form='sparse' expects a linear",
        ),
        (
            lambda: ac.VariationalDropout(nn.Linear(2, 2), threshold="3"),
            TypeError,
            "threshold: expected a number",
        ),
        (
            lambda: ac.VariationalDropout(nn.GRUCell(2, 2), log_alpha=0.5),
            ValueError,
            "log_alpha: expected a number",
        ),
        (lambda: ac.VariationalDropout(nn.Identity()), ValueError, "features: expected the number of units"),
        (
            lambda: ac.VariationalDropout(nn.Identity(), features=0),
            ValueError,
            "features: expected an int >= 1",
        ),
        (lambda: ac.VariationalDropout(nn.Linear(2, 3), features=2), ValueError, "features: expected 3"),
        (lambda: ac.VariationalDropout(nn.GRUCell(2, 2)).kept, ValueError, "kept: expected form"),
        (
            lambda: ac.VariationalDropout(nn.LSTMCell(2, 2))(torch.zeros(1, 2)),
            TypeError,
            "layer: expected it to return one",
        ),
        (
            lambda: ac.VariationalDropout(nn.Identity(), features=3)(torch.zeros(1, 2)),
            ValueError,
            "expected 3 units",
        ),
        (lambda: variational(3), TypeError, "module: expected an nn.Module"),
        (lambda: variational(nn.ReLU()), ValueError, "expected a network with linear or convolution layers"),
        (lambda: description_length(3), TypeError, "module: expected an nn.Module"),
    ],
)
def test_bad_input(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
