"""`VariationalDropout` with parents that read weights, half precision, saved state, hooks and layouts."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import adaptcomp_ext as ac
from adaptcomp_ext.nn import description_length, sparsity, variational

HALVES = [torch.float16, torch.bfloat16]


# Parents that read a weight.


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_transformer_layers_evaluate_as_their_pruned_dense_layers(masked: bool, grad: bool) -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), 2)
    noisy = variational(encoder).eval()
    layers = [part for part in noisy.modules() if isinstance(part, ac.VariationalDropout)]
    assert len(layers) == 4  # not the products of the attention, which are never called
    for layer in layers:
        layer.prune(0.3)
    dense = copy.deepcopy(encoder).eval()
    for ours, theirs in zip(noisy.layers, dense.layers, strict=True):
        theirs.linear1, theirs.linear2 = ours.linear1.dense(), ours.linear2.dense()
    x = torch.randn(3, 5, 16)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [4]]) if masked else None
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        torch.testing.assert_close(
            noisy(x, src_key_padding_mask=mask), dense(x, src_key_padding_mask=mask), rtol=0, atol=0
        )
    noisy.train()
    assert not torch.equal(noisy(x), noisy(x))


def test_pair_with_a_transformer_habit() -> None:
    class Habit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
            self.out = nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.encode(x).mean(1))

    pair = ac.models.ACC(nn.Identity(), Habit(), Habit(), classes=3)
    x = torch.randn(3, 5, 16)
    pair.loss(x, torch.tensor([0, 1, 2]), rows=3).total.backward()
    with torch.no_grad():
        assert pair.eval()(x).default.isfinite().all()


def test_attention_that_never_calls_its_output_product() -> None:
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(
        TypeError, match=r"layer: expected one that is called, got NonDynamicallyQuantizableLinear"
    ):
        ac.VariationalDropout(attention.out_proj)
    with pytest.raises(ValueError, match="expected a network with linear or convolution layers"):
        variational(attention)
    attention.out_proj = ac.VariationalDropout(
        nn.Linear(8, 8)
    )  # a plain one is read all the same, and says so
    x = torch.randn(5, 2, 8)
    torch.testing.assert_close(attention(x, x, x)[0], attention(x, x, x)[0], rtol=0, atol=0)
    with pytest.warns(
        UserWarning, match="the weight of its Linear was read in training, but the layer was never called"
    ):
        description_length(attention)
    attention.out_proj.prune(0.5)
    dense = copy.deepcopy(attention).eval()
    dense.out_proj = attention.out_proj.dense()
    torch.testing.assert_close(attention.eval()(x, x, x)[0], dense(x, x, x)[0], rtol=0, atol=0)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.tanh(self.encode(x))
        return F.linear(hidden, self.encode.weight.t()), self.encode.weight.square().sum()


def test_a_forward_that_reads_the_weight() -> None:
    torch.manual_seed(0)
    net = variational(Tied())
    net.encode.prune(0.5)
    x = torch.randn(4, 6)
    decoded, penalty = net.train()(x)
    torch.testing.assert_close(
        penalty, net.encode.layer.weight.square().sum(), rtol=0, atol=0
    )  # θ, without noise
    (decoded.sum() + penalty).backward()
    assert net.encode.layer.weight.grad.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        description_length(net)  # it was called too: nothing to warn of
    dense = Tied().eval()
    dense.encode = net.encode.dense()
    for ours, theirs in zip(net.eval()(x), dense(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_geometry_is_the_layers() -> None:
    layer = ac.VariationalDropout(nn.Conv2d(2, 6, (3, 1), stride=2, padding=1, groups=2, bias=False))
    assert (layer.in_channels, layer.out_channels, layer.groups) == (2, 6, 2)
    assert (layer.kernel_size, layer.stride, layer.padding, layer.dilation) == (
        (3, 1),
        (2, 2),
        (1, 1),
        (1, 1),
    )
    assert layer.bias is None and layer.weight is layer.layer.weight
    with pytest.raises(AttributeError):
        layer.in_features  # noqa: B018


@pytest.mark.parametrize("after", [False, True])
def test_tied_embedding(after: bool) -> None:
    embedding, out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    net = nn.Sequential(embedding, out)
    if not after:
        out.weight = embedding.weight
    net = variational(net)
    if after:
        net[1].weight = net[0].weight
    assert net[1].layer.weight is net[0].weight and "weight" not in net[1]._parameters
    net[1].prune(0.5)
    x = torch.tensor([0, 3])
    torch.testing.assert_close(net.eval()(x), net[1].dense()(net[0](x)), rtol=0, atol=0)


@pytest.mark.parametrize("per", ["weight", "unit"])
def test_layers_that_share_a_weight_share_its_noise(per: str) -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    net = variational(nn.Sequential(first, nn.ReLU(), second), per=per)
    assert net[0].layer.weight is net[2].layer.weight and net[0].layer.bias is not net[2].layer.bias
    torch.testing.assert_close(description_length(net), net[0].kl(), rtol=0, atol=0)
    nn.init.normal_(net[0].log_noise if per == "unit" else net[0].log_variance)
    net[0].prune(0.5)
    net[2].prune(0.5)
    assert sparsity(net) == 0.5 and torch.equal(net[0].kept, net[2].kept)


# Half precision.


def layers() -> list[tuple[nn.Module, torch.Tensor]]:
    black = torch.zeros(4, 1, 8, 8)
    black[:, :, 3:5, 3:5] = 1
    return [
        (nn.Conv2d(1, 4, 3), black),
        (nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"), black),
        (nn.Linear(6, 4), torch.tensor([[0.0] * 6, [1.0] * 6])),
        (nn.Linear(6, 4), torch.full((2, 6), 1e-3)),
        (nn.Linear(6, 4), torch.full((2, 3, 6), 300.0)),  # the square is infinite in float16
    ]


@pytest.mark.parametrize(
    "inside", [False, True]
)  # whether the backward pass runs in the autocast block, as it does in many
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("per", ["weight", "unit"])
def test_gradients_under_autocast_are_those_of_float32(
    case: int, dtype: torch.dtype, per: str, inside: bool
) -> None:
    torch.manual_seed(case)
    layer, x = layers()[case]
    noisy = ac.VariationalDropout(layer, per=per)
    gradients = []
    for enabled in (False, True):
        noisy.zero_grad()
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype, enabled=enabled):
            out = noisy(x)
            assert out.dtype == (dtype if enabled else torch.float32)
            loss = out.float().mean()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        gradients.append((noisy.log_variance if per == "weight" else noisy.log_noise).grad.clone())
    exact, half = gradients
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0.02 * float(exact.abs().max()))
    if case == 2 and per == "weight":
        assert bool((exact != 0).all())  # of the row of ones alone


def test_no_effect_of_noise_on_zeros() -> None:
    noisy = ac.VariationalDropout(nn.Linear(6, 4))
    for dtype in (torch.float32, *HALVES):
        noisy.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            noisy(torch.zeros(3, 6)).float().square().sum().backward()
        assert torch.equal(noisy.log_variance.grad, torch.zeros_like(noisy.log_variance))


def test_scaler_takes_steps() -> None:
    torch.manual_seed(0)
    net = variational(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)))
    before = [p.detach().clone() for p in net.parameters()]
    optimizer, scaler = torch.optim.Adam(net.parameters(), 1e-2), torch.amp.GradScaler("cpu")
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(net(layers()[0][1]), torch.arange(4) % 3)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 65536.0
    assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_double_backward_under_autocast() -> None:
    noisy = ac.VariationalDropout(nn.Linear(3, 2))
    x = torch.randn(4, 3, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        (slope,) = torch.autograd.grad(noisy(x).float().square().sum(), x, create_graph=True)
    slope.square().sum().backward()
    assert noisy.log_variance.grad.isfinite().all() and bool((noisy.log_variance.grad != 0).all())


@pytest.mark.parametrize("per", ["weight", "unit"])
def test_transforms_under_autocast(per: str) -> None:
    noisy = ac.VariationalDropout(nn.Linear(3, 2), per=per)
    parameters = {name: p.detach() for name, p in noisy.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.func.functional_call(noisy, parameters, (x,)).float().square().sum()

    x = torch.randn(4, 1, 3)
    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")(parameters, x)
    assert all(
        value.shape == (4, *parameters[name].shape) and value.isfinite().all() for name, value in each.items()
    )
    _, tangent = torch.func.jvp(lambda x: loss(parameters, x), (x,), (torch.ones_like(x),))
    assert tangent.isfinite()
    noisy(x.requires_grad_()).sum().backward()
    with torch.autocast("cpu", torch.float16):
        torch.utils.checkpoint.checkpoint(noisy, x, use_reentrant=False).sum().backward()
        torch.compile(noisy, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in noisy.parameters())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("per", ["weight", "unit"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(64, 64), lambda: nn.Conv2d(8, 8, 3)])
def test_half_modules(make, per: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    noisy = ac.VariationalDropout(make(), per=per)
    if per == "unit":
        nn.init.normal_(noisy.log_noise)
    exact = float(noisy.kl().detach())
    noisy.prune(0.5)
    half = copy.deepcopy(noisy).to(dtype)
    kl = half.kl()
    assert kl.dtype == torch.float32 and float(kl.detach()) == pytest.approx(
        exact, rel=2e-3 if dtype == torch.float16 else 2e-2
    )
    assert half.sparsity() == pytest.approx(0.5, abs=0.02)
    x = torch.rand(2, *((64,) if isinstance(noisy.layer, nn.Linear) else (8, 5, 5)))
    x[0] = 0
    out = half(x.to(dtype))
    assert out.dtype == dtype and half.eval()(x.to(dtype)).dtype == dtype
    (out.float().square().sum() + kl).backward()
    assert all(p.grad.isfinite().all() for p in half.parameters())


def test_gaussian_keeps_the_dtype() -> None:
    noisy = ac.VariationalDropout(nn.LayerNorm(4))
    assert noisy(torch.randn(3, 4)).dtype == torch.float32
    for dtype in HALVES:
        half = copy.deepcopy(noisy).to(dtype)
        assert half(torch.randn(3, 4, dtype=dtype)).dtype == dtype and half.kl().dtype == torch.float32


# What is saved.


def loaded(how: str, saved: dict[str, torch.Tensor]) -> nn.Module:
    with torch.device("meta" if "meta" in how else "cpu"):
        other = ac.VariationalDropout(nn.Linear(16, 4))
    if "empty" in how:
        other.to_empty(device="cpu")
    other.load_state_dict(saved, assign="assign" in how, strict="loose" not in how)
    return other


@pytest.mark.parametrize("how", ["plain", "assign", "meta, assign", "meta, empty", "empty", "loose"])
def test_the_threshold_is_saved(how: str) -> None:
    torch.manual_seed(0)
    layer = ac.VariationalDropout(nn.Linear(16, 4)).eval()
    layer.prune(0.5)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = loaded(how, torch.load(file)).eval()
    x = torch.randn(3, 16)
    assert other.sparsity() == 0.5 and other.threshold.dtype == torch.float32
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("how", ["plain", "assign", "meta, assign", "meta, empty", "loose"])
def test_a_state_of_an_older_version_loads(how: str) -> None:
    saved = ac.VariationalDropout(nn.Linear(16, 4)).state_dict()
    del saved["threshold"]
    other = loaded(how, saved)
    assert other.threshold.is_meta or float(other.threshold) == 3.0
    with pytest.raises(RuntimeError, match="Missing key"):
        del saved["log_variance"]
        loaded("plain", saved)


def test_the_threshold_is_not_rounded() -> None:
    layer = ac.VariationalDropout(nn.Linear(16, 4), threshold=0.1)
    first = float(layer.threshold)
    assert first == pytest.approx(0.1, rel=1e-7)
    for moved in (
        layer.half(),
        layer.bfloat16(),
        layer.float(),
        layer.to("meta"),
        layer.to_empty(device="cpu"),
    ):
        assert moved.threshold.dtype == torch.float32  # there are devices without float64
    assert layer.double().threshold.dtype == torch.float64
    assert float(layer.threshold) == first
    layer.threshold = 2
    assert layer.threshold == 2 and "threshold=2" in repr(layer)
    with pytest.raises(TypeError, match="threshold: expected a number, got str 'x'"):
        layer.threshold = "x"
    assert "threshold=meta" in repr(layer.to("meta"))


def test_functional_call_with_a_state() -> None:
    layer = ac.VariationalDropout(nn.Linear(16, 4)).eval()
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    x = torch.randn(3, 16)
    state["threshold"].fill_(-100.0)  # prunes everything
    torch.testing.assert_close(torch.func.functional_call(layer, state, x), layer.bias.expand(3, 4))


def test_prune_with_ties_and_values_that_are_not_numbers() -> None:
    layer = ac.VariationalDropout(nn.Linear(3, 5), per="unit")
    with torch.no_grad():
        layer.log_noise.copy_(torch.tensor([1.0, float("nan"), 1.0, -1.0, 2.0]))
    layer.prune(0.4)  # two of five, but the second and the third noisiest are alike
    assert layer.kept.all(dim=1).tolist() == [True, True, True, True, False]
    layer.prune(0.8)
    assert layer.kept.all(dim=1).tolist() == [False, True, False, False, False]
    one, two = 1.0, float(torch.tensor(1.0).nextafter(torch.tensor(2.0)))  # no float32 lies between
    with torch.no_grad():
        layer.log_noise.copy_(torch.tensor([one, two, two, two, two]))
    layer.prune(0.8)
    assert layer.kept.all(dim=1).tolist() == [True, False, False, False, False]


# Layers that are more than a product.


class LowRank(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.a, self.b = nn.Parameter(torch.randn(inputs, 2)), nn.Parameter(torch.randn(2, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x @ self.a @ self.b


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / weight.std(), bias)


def doubled(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


def shifted(layer: nn.Module) -> nn.Module:
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    return layer


def rebound(layer: nn.Module) -> nn.Module:
    layer.forward = lambda x: x[:, :4] * 3
    return layer


def watched(layer: nn.Module) -> nn.Module:
    layer.register_full_backward_hook(lambda module, before, after: None)
    return layer


OPAQUE = {
    "subclass": lambda: LowRank(6, 4),
    "convolution": lambda: Standardised(2, 4, 3),
    "forward hook": lambda: doubled(nn.Linear(6, 4)),
    "pre-hook": lambda: shifted(nn.Linear(6, 4)),
    "forward of an instance": lambda: rebound(nn.Linear(6, 4)),
    "backward hook": lambda: watched(nn.Linear(6, 4)),
    "older weight_norm": lambda: nn.utils.weight_norm(nn.Linear(6, 4)),
    "older spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(6, 4)),
    "pruning": lambda: prune.l1_unstructured(nn.Linear(6, 4), "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", OPAQUE)
def test_what_the_noise_would_replace_has_gaussian_noise(name: str) -> None:
    torch.manual_seed(0)
    layer = OPAQUE[name]()
    x = torch.randn(3, 2, 5, 5) if isinstance(layer, nn.Conv2d) else torch.randn(3, 6)
    expected = layer.eval()(x)
    noisy = ac.VariationalDropout(layer)
    assert noisy.form == "gaussian"
    torch.testing.assert_close(noisy.eval()(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(noisy.dense().eval()(x), expected)
    net = variational(nn.Sequential(layer)).eval()
    torch.testing.assert_close(net(x), expected)
    assert noisy.train()(x).shape == expected.shape
    with pytest.raises(TypeError, match=r"layer: form='sparse' expects a layer "):
        ac.VariationalDropout(layer, form="sparse")
    with pytest.raises(TypeError, match=r"module, at 0: layer: form='sparse' expects"):
        variational(nn.Sequential(layer), form="sparse")


class Plain(nn.Linear):
    """A subclass with torch's own forward."""


def test_a_subclass_without_a_forward_of_its_own_is_sparse() -> None:
    assert ac.VariationalDropout(Plain(3, 2)).form == "sparse"


def test_hooks_that_come_later() -> None:
    seen = []
    noisy = ac.VariationalDropout(nn.Linear(6, 4))
    noisy.layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    noisy.prune(0.5)
    x = torch.randn(3, 6)
    with pytest.raises(
        TypeError, match=r"layer: form='sparse' expects a layer without hooks, .* got Linear with hooks"
    ):
        noisy.train()(x)
    out = noisy.eval()(x)  # the hook sees the pruned layer
    assert len(seen) == 1 and seen[0] is out
    torch.testing.assert_close(out, F.linear(x, noisy.weight, noisy.bias), rtol=0, atol=0)
    noisy.layer = LowRank(6, 4)
    for mode in (True, False):
        with pytest.raises(
            TypeError, match=r"expects a layer with the forward of nn.Linear, .* got LowRank with its own"
        ):
            noisy.train(mode)(x)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: nn.Conv2d(2, 4, 3)])
@pytest.mark.parametrize("per", ["weight", "unit"])
def test_parametrised_layers(name: str, make, per: str) -> None:
    torch.manual_seed(0)
    how = getattr(nn.utils.parametrizations, name)
    noisy = ac.VariationalDropout(how(make()), per=per, form="sparse")
    nn.init.normal_(noisy.log_noise if per == "unit" else noisy.log_variance)
    noisy.prune(0.5)
    x = torch.randn(3, 6) if isinstance(noisy.layer, nn.Linear) else torch.randn(3, 2, 5, 5)
    noisy.train()(x).sum().backward()
    assert all(p.grad is not None for p in noisy.layer.parametrizations.parameters() if p.requires_grad)
    dense = noisy.eval().dense()
    assert type(dense) in (nn.Linear, nn.Conv2d) and list(dense.state_dict()) == ["weight", "bias"]
    torch.testing.assert_close(dense(x), noisy(x), rtol=0, atol=0)
    assert noisy.sparsity() == 0.5 == float((dense.weight == 0).double().mean())
    noisy.train()(x).sum().backward()  # what was copied still works
    assert nn.utils.parametrize.is_parametrized(noisy.layer)


def test_compiled_layers_have_noise() -> None:
    layer = torch.compile(nn.Linear(3, 2), backend="eager")
    x = torch.randn(4, 3)
    for module in (
        layer,
        nn.Sequential(layer),
        torch.compile(nn.Sequential(nn.Linear(3, 2)), backend="eager"),
    ):
        noisy = variational(module)
        assert not torch.equal(noisy(x), noisy(x))
        torch.testing.assert_close(noisy.eval()(x), module(x))


def test_lazy_and_complex_layers() -> None:
    with pytest.raises(ValueError, match="layer: expected initialised parameters, got LazyLinear"):
        ac.VariationalDropout(nn.LazyLinear(3))
    with pytest.raises(TypeError, match=r"expects real floating-point weights, got torch.complex64"):
        ac.VariationalDropout(nn.Linear(3, 2, dtype=torch.complex64), form="sparse")
    with pytest.raises(TypeError, match="layer: expected it to return one real floating-point Tensor"):
        ac.VariationalDropout(nn.Linear(3, 2, dtype=torch.complex64))(
            torch.zeros(1, 3, dtype=torch.complex64)
        )
    with pytest.raises(TypeError, match="inputs: expected one, as Linear takes, got 2"):
        ac.VariationalDropout(nn.Linear(3, 2))(torch.zeros(1, 3), torch.zeros(1, 3))


# Layouts. Every size other than the batch is 4, so that a wrong dimension does not show by its size.


@pytest.mark.parametrize(
    ("make", "shape", "dim"),
    [
        (lambda: nn.Conv1d(4, 4, 1), (5, 4, 4), 1),
        (lambda: nn.Conv2d(4, 4, 1), (5, 4, 4, 4), 1),
        (lambda: nn.Conv2d(4, 4, 1), (4, 4, 4), 0),
        (lambda: nn.ConvTranspose1d(4, 4, 1), (4, 4), 0),
        (lambda: nn.ConvTranspose1d(4, 4, 1), (5, 4, 4), 1),
        (lambda: nn.ConvTranspose2d(4, 4, 1), (5, 4, 4, 4), 1),
        (lambda: nn.ConvTranspose3d(4, 4, 1), (4, 4, 4, 4), 0),
        (lambda: nn.InstanceNorm1d(4), (4, 4), 0),
        (lambda: nn.InstanceNorm2d(4), (5, 4, 4, 4), 1),
        (lambda: nn.BatchNorm1d(4), (5, 4), 1),
        (lambda: nn.BatchNorm1d(4), (5, 4, 4), 1),
        (lambda: nn.BatchNorm2d(4), (5, 4, 4, 4), 1),
        (lambda: nn.GroupNorm(2, 4), (5, 4, 4), 1),
        (lambda: nn.MaxPool2d(1), (5, 4, 4, 4), 1),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), (5, 4, 4, 4), 1),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (5, 4, 4, 4), 3),
        (lambda: nn.LayerNorm(4), (5, 4, 4), 2),
        (lambda: nn.Linear(4, 4), (4,), 0),
        (lambda: nn.Linear(4, 4), (5, 4, 4), 2),
    ],
)
def test_gaussian_noise_goes_to_its_unit(make, shape: tuple[int, ...], dim: int) -> None:
    torch.manual_seed(0)
    layer = make()
    noisy = ac.VariationalDropout(layer, form="gaussian", log_alpha=0.0, features=4)
    with torch.no_grad():
        noisy.log_noise.fill_(-40.0)
        noisy.log_noise[2] = 0.0
    x = torch.randn(shape)
    change = (noisy(x) - layer(x)).abs().movedim(dim, 0).reshape(4, -1).sum(dim=1)
    assert float(change[2].detach()) > 1e-3
    torch.testing.assert_close(change[[0, 1, 3]], torch.zeros(3), atol=1e-4, rtol=0)


def test_gaussian_units_of_other_layers() -> None:
    for layer in (nn.Embedding(9, 4), nn.Bilinear(3, 3, 4), nn.GroupNorm(2, 4), nn.RMSNorm(4)):
        assert ac.VariationalDropout(layer, form="gaussian").units == 4
    with pytest.raises(ValueError, match=r"expected 4 units in dimension -3 of its output, got \[4, 2\]"):
        ac.VariationalDropout(nn.Conv2d(1, 4, 1), form="gaussian")._multiplied(torch.zeros(4, 2))


@pytest.mark.parametrize("per", ["weight", "unit"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(4, 4), (4,)),
        (lambda: nn.Linear(4, 4), (5, 4, 4)),
        (lambda: nn.Conv1d(4, 4, 1), (4, 4)),
        (lambda: nn.Conv2d(4, 4, 1, groups=2), (4, 4, 4)),
        (lambda: nn.Conv3d(4, 4, 1), (4, 4, 4, 4)),
        (lambda: nn.Conv2d(4, 4, 1), (0, 4, 4, 4)),
    ],
)
def test_sparse_noise_goes_to_its_unit(make, shape: tuple[int, ...], per: str) -> None:
    torch.manual_seed(0)
    noisy = ac.VariationalDropout(make(), per=per)
    noise = noisy.log_noise if per == "unit" else noisy.log_variance
    with torch.no_grad():
        noise.fill_(-40.0)
        noise[2] = 0.0
    x = torch.randn(shape)
    dim = (
        len(shape) - 1 if isinstance(noisy.layer, nn.Linear) else len(shape) - (noisy.layer.weight.dim() - 1)
    )
    change = (noisy(x) - noisy.layer(x)).abs()
    assert change.shape == noisy.layer(x).shape
    if x.numel():
        change = change.movedim(dim, 0).reshape(4, -1).sum(dim=1)
        assert float(change[2].detach()) > 1e-3
        torch.testing.assert_close(change[[0, 1, 3]], torch.zeros(3), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "form, per, layer",
    [
        ("sparse", "weight", nn.Linear(3, 4)),
        ("sparse", "unit", nn.Linear(3, 4)),
        ("sparse", "weight", nn.Conv1d(3, 4, 2)),
        ("sparse", "unit", nn.Conv2d(3, 4, (2, 1), bias=False)),
        ("sparse", "weight", nn.Linear(3, 4).bfloat16()),
        ("gaussian", "unit", nn.Linear(3, 4)),
    ],
)
def test_fx_records_an_evaluation(form, per, layer):
    dropout = ac.VariationalDropout(layer, form, per).eval()
    noise = dropout.log_variance if form == "sparse" and per == "weight" else dropout.log_noise
    with torch.no_grad():
        noise.flatten()[::2] = 5.0
    shape = {nn.Linear: (5, 3), nn.Conv1d: (5, 3, 6), nn.Conv2d: (5, 3, 6, 6)}[type(layer)]
    x = torch.randn(shape, dtype=layer.weight.dtype)
    model = nn.Sequential(dropout, nn.Tanh())
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
    if form == "sparse":
        assert torch.equal(torch.fx.symbolic_trace(dropout)(x), dropout(x))
