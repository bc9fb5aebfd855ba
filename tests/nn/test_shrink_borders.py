"""`shrink` where `forward` does more with layers than call them once: units that other code reads stay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import adaptcomp_ext as ac
from tests.helpers.shrinking import Control, D, Net
from tests.helpers.tensors import values


class TiedDecoder(Net):
    def forward(self, x):
        return F.linear(self.b(torch.relu(self.a(x))).sum(1, keepdim=True).expand(-1, 4), self.a.weight.t())


class Penalty(Net):
    def forward(self, x):
        return self.b(torch.relu(self.a(x))), self.a.weight.abs().sum()


class PenaltyOnAll(Net):
    def forward(self, x):
        return self.b(torch.relu(self.a(x))), sum(p.square().sum() for p in self.parameters())


class FrozenPenalty(Net):
    def forward(self, x):
        return self.b(torch.relu(self.a(x))) + self.a._parameters["weight"].detach().norm()


class ReadersWeight(Net):
    def forward(self, x):
        return self.b(torch.relu(self.a(x))) * self.b.weight.abs().mean()


class Data(Net):
    def forward(self, x):
        return self.b(torch.relu(self.a(x))) + self.a.bias.data.max()


class Aside(Net):
    """The weight is in a plain list of the module, which registers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = [self.a.weight]

    def forward(self, x):
        return self.b(torch.relu(self.a(x))) + self.aside[0].sum()


class Shape(Net):
    def forward(self, x):
        return self.b(torch.relu(self.a(x))) / self.a.weight.shape[0]


class Sizes(Net):
    def forward(self, x):
        return self.b(torch.relu(self.a(x))) / self.a.out_features


class ReadersSize(Net):
    def forward(self, x):
        return self.b(torch.relu(self.a(x))) * self.b.in_features**-0.5


class NormsSize(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, affine=False, track_running_stats=False)

    def forward(self, x):
        return self.b(self.norm(self.a(x))) + self.norm.num_features


class OneParameter(Net):
    def __init__(self) -> None:
        super().__init__(4, 4, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


class TrainingHead(Net):
    """Another layer reads the units in training mode."""

    def forward(self, x):
        h = torch.relu(self.a(x))
        return (self.b(h), self.c(h)) if self.training else self.b(h)


class OtherHead(Net):
    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.c(h) if self.training else self.b(h)


class Optional(Net):
    """Another layer reads the units where an argument is left out."""

    def forward(self, x, scale=None):
        h = torch.relu(self.a(x))
        return self.c(h) if scale is None else self.b(h) * scale


class Keeps(Net):
    def forward(self, x):
        self.hidden = torch.relu(self.a(x))
        return self.b(self.hidden)


class KeepsInList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = []

    def forward(self, x):
        h = self.a(x)
        self.hidden.append(h)
        return self.b(torch.relu(h))


class WritesInPlace(Net):
    """The reader sees what the activation wrote."""

    def forward(self, x):
        h = self.a(x)
        F.relu(h, inplace=True)
        return self.b(h)


class WritesThroughAlias(Net):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.act = nn.Dropout(0.5), nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.a(x)
        self.act(self.drop(h))
        return self.b(h)


class SamplesInEvaluation(Net):
    """Dropout is on in evaluation mode, so that no unit is constant."""

    def forward(self, x):
        torch.manual_seed(3)
        return self.b(F.dropout(torch.sigmoid(self.a(x)), 0.5))


class Twice(Net):
    def forward(self, x):
        return self.b(torch.relu(self.a(x))) + self.b(torch.relu(self.a(x + 1)))


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


class Slope(Net):
    """A slope for each unit."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.PReLU(4)

    def forward(self, x):
        return self.b(self.act(self.a(x)))


class Statistics(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.b(self.norm(self.a(x))) + self.norm.running_mean.sum()


class Gate(Net):
    def forward(self, x):
        h = self.a(x)
        return self.b(h * torch.sigmoid(h))


class Concatenated(Net):
    def forward(self, x):
        h = torch.relu(self.a(x))
        return torch.cat((self.b(h), h.mean(1, keepdim=True)), 1)


class Keyword(Net):
    def forward(self, x):
        return self.b(input=torch.relu(self.a(x)))


class Inside(nn.Module):
    """A layer of a leaf module is also called outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True)
        with torch.no_grad():
            self.encode.linear1.weight[1] = 0
            self.encode.linear2.weight[:, 2] = 0

    def forward(self, x):
        return self.encode.linear2(torch.relu(self.encode.linear1(x))) + self.encode(x[:, None])[:, 0]


def altered(change) -> nn.Module:
    """Return the control network with one layer changed."""
    module = Control()
    change(module)
    return module


def weight_standardised(module: nn.Module) -> None:
    class Standardised(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight - self.weight.mean(), self.bias)

    layer = Standardised(4, 4)
    layer.load_state_dict(module.a.state_dict())
    module.a = layer


def rebound(module: nn.Module) -> None:
    module.a.forward = lambda x: F.linear(x, torch.ones(4, 4, dtype=x.dtype))


CHANGES = {
    "forward hook": lambda m: m.a.register_forward_hook(lambda module, inputs, output: output + 1),
    "hook of the reader": lambda m: m.b.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,)),
    "backward hook": lambda m: m.a.register_full_backward_hook(lambda module, before, after: None),
    "subclass": weight_standardised,
    "forward of an instance": rebound,
    "weight_norm": lambda m: nn.utils.parametrizations.weight_norm(m.b),
    "spectral_norm": lambda m: nn.utils.parametrizations.spectral_norm(m.a),
    "older weight_norm": lambda m: nn.utils.weight_norm(m.b),
    "pruning": lambda m: prune.l1_unstructured(m.a, "weight", 4),
}
FORWARDS = [
    TiedDecoder,
    Penalty,
    PenaltyOnAll,
    FrozenPenalty,
    ReadersWeight,
    Data,
    Aside,
    Shape,
    Sizes,
    ReadersSize,
    NormsSize,
    OneParameter,
    TrainingHead,
    OtherHead,
    Optional,
    Keeps,
    KeepsInList,
    WritesInPlace,
    WritesThroughAlias,
    Twice,
    Normed,
    Slope,
    Statistics,
    Gate,
    Concatenated,
    Keyword,
    Inside,
]


def whole(module: nn.Module, *others: torch.Tensor) -> None:
    torch.manual_seed(0)
    module = module.double().eval()
    small = ac.shrink(module)
    x = values((5, 4), D)
    torch.testing.assert_close(small(x, *others), module(x, *others))
    assert {k: v.shape for k, v in small.named_parameters()} == {
        k: v.shape for k, v in module.named_parameters()
    }
    assert set(vars(small)) == set(vars(module)) - {"hidden"} | ({"hidden"} & set(vars(small)))
    small.train()(x, *others)


def test_the_control_shrinks() -> None:
    module = Control().double().eval()
    small = ac.shrink(module)
    assert len(small.a.weight) == 2
    x = values((5, 4), D)
    torch.testing.assert_close(small(x), module(x))


@pytest.mark.parametrize("forward", FORWARDS)
def test_what_forward_does_besides_leaves_layers_whole(forward) -> None:
    whole(forward())
    if forward is Optional:
        whole(forward(), torch.tensor(2.0, dtype=D))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_changed_layers_stay_whole(name: str) -> None:
    whole(altered(CHANGES[name]))


@pytest.mark.parametrize("place", ["act", "body"])
def test_hooks_on_what_units_pass(place: str) -> None:
    torch.manual_seed(0)
    seen = []
    inner = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
    module = nn.Sequential(inner, nn.Linear(4, 3)).double().eval()
    with torch.no_grad():
        inner[0].weight[1] = 0
    (inner[1] if place == "act" else inner).register_forward_hook(lambda m, i, o: seen.append(o) or 2 * o)
    small = ac.shrink(module)
    assert not seen  # nothing ran
    x = values((5, 4), D)
    torch.testing.assert_close(small(x), module(x))
    assert len(small[0][0].weight) == 4 and seen[0].shape == seen[1].shape


def test_reads_that_do_not_matter() -> None:
    class Moves(Net):
        def forward(self, x):
            x = x.to(self.a.weight.device).to(next(self.parameters()).dtype)
            return self.b(torch.relu(self.a(x)))

    module = Moves().eval()
    assert len(ac.shrink(module).a.weight) == 2


def test_dropout_in_evaluation() -> None:
    torch.manual_seed(0)
    module = SamplesInEvaluation().double().eval()
    small = ac.shrink(module)
    assert len(small.a.weight) == 3  # without what nobody reads; the constant stays
    with torch.no_grad():
        module.a.bias[1] = small.a.bias[1] = -1e9  # σ → 0
    assert len(ac.shrink(module).a.weight) == 2


def test_branches_of_layers_shrink_together() -> None:
    class Two(Net):
        def forward(self, x):
            h = torch.sigmoid(self.a(x))
            return self.b(h) * self.c(F.dropout(h, 0.5, self.training))

    module = Two().double().eval()
    small = ac.shrink(module)
    x = values((5, 4), D)
    torch.testing.assert_close(small(x), module(x))
    assert len(small.a.weight) == 2


def test_constants_that_differ_with_optional_arguments() -> None:
    class Either(Net):
        def forward(self, x, hard=None):
            h = self.a(x)
            return self.b(torch.sigmoid(h) if hard is None else torch.relu(h))

    module = Either().double().eval()
    with torch.no_grad():
        module.a.bias[1] = 1
    small = ac.shrink(module)
    x = values((5, 4), D)
    torch.testing.assert_close(small(x), module(x))
    torch.testing.assert_close(small(x, torch.tensor(True)), module(x, torch.tensor(True)))
    assert len(small.a.weight) == 3
