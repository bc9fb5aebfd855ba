"""The compiled module's view of a tensor: by DLPack's interface, or by attributes where torch has none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import adaptcomp_ext as ac
from adaptcomp_ext import _C
from adaptcomp_ext.ops import _backend
from tests.helpers.tensors import assert_bitwise

REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16)
REAL = (*REAL, torch.int8, torch.uint8, torch.bool)
OTHERS = (torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32)


@pytest.fixture(params=["dlpack", "attributes"])
def facts(request):
    if request.param == "dlpack" and _backend.EXCHANGE is None:
        pytest.skip("torch has no exchange interface")
    _backend.introduce_torch(_backend.EXCHANGE if request.param == "dlpack" else None)
    yield request.param
    _backend.introduce_torch(_backend.EXCHANGE)


def released():
    tensor = torch.ones(2, 3)
    tensor.untyped_storage().resize_(0)
    return tensor


class Image(torch.Tensor):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_an_ordinary_tensor_is_known(facts, dtype):
    tensor = torch.ones(2, 3, dtype=dtype)
    for same in (tensor, nn.Parameter(tensor), tensor[1:]):
        assert _C.ordinary_rows(same) == same.shape[0]
        assert _C.is_ordinary(same, tuple(same.shape))
        assert _C.is_ordinary(same, same.shape)
        assert not _C.is_ordinary(same, (3, 2))
    assert _C.is_ordinary(tensor.sum(), ())
    assert _C.ordinary_rows(tensor.sum()) == -1
    several, shapes = [tensor, nn.Parameter(tensor[0])], [(2, 3), (3,)]
    assert _C.are_ordinary(several, shapes)
    assert not _C.are_ordinary(several, shapes[::-1])
    other = torch.ones(3, dtype=torch.float64 if dtype != torch.float64 else torch.float32)
    assert not _C.are_ordinary([*several, other], [*shapes, (3,)])


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        lambda: [[1.0] * 3] * 2,
        lambda: torch.ones(3, 2).t(),
        lambda: torch.ones(2, 3, dtype=torch.int64),
        lambda: torch.ones(2, 3, dtype=torch.complex64),
        lambda: torch.ones(2, 3, dtype=torch.float8_e4m3fn),
        lambda: torch.ones(2, 3, device="meta"),
        lambda: torch.ones(2, 3).to_sparse(),
        lambda: torch.ones(2, 3).to_sparse_csr(),
        lambda: torch.ones(2, 3).to_mkldnn(),
        lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(3)]),
        lambda: torch.quantize_per_tensor(torch.ones(2, 3), 1.0, 0, torch.quint8),
        lambda: torch._neg_view(torch.ones(2, 3)),
        lambda: torch._efficientzerotensor((2, 3)),
        lambda: torch.ones(2, 3).as_subclass(Image),
        lambda: nn.UninitializedParameter(),
        released,
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_needs_a_longer_look_is_not_ordinary(facts, make):
    tensor = make()
    assert _C.ordinary_rows(tensor) == -1
    assert not _C.is_ordinary(tensor, (2, 3))
    assert not _C.are_ordinary([torch.ones(2, 3), tensor], [(2, 3), (2, 3)])
    if getattr(tensor, "dtype", None) is not torch.int64:  # which is moved, if not computed with
        assert not _C.are_ordinary_rows([tensor], [])


def test_a_wrapper_of_a_transform_is_not_ordinary(facts):
    def look(x):
        assert _C.ordinary_rows(x) == -1
        return x

    torch.vmap(look)(torch.ones(2, 3))
    torch.func.grad(lambda x: look(x).sum())(torch.ones(2, 3))


@pytest.mark.parametrize("dtype", REAL + OTHERS)
def test_states_may_have_the_real_dtypes(facts, dtype):
    tensor = torch.empty(2, 3, dtype=dtype)
    assert _C.are_ordinary_rows([tensor], [torch.ones(2)]) is (dtype in REAL)
    assert not _C.are_ordinary_rows([tensor], [torch.ones(3)])
    assert not _C.are_ordinary_rows([], [tensor])


def test_of_rows_side_by_side_only_whole_blocks_are_ordinary(facts):
    whole = torch.ones(4, 6)
    for part in (
        whole[1:],
        whole[:, :3],
        whole[:1, :3],  # of one row the stride means nothing
        whole[:, 2:3],
        whole[:, None].transpose(0, 1),
        whole[:, None].transpose(1, 2),
        whole.expand(3, 4, 6),
        whole.as_strided((1, 6), (3, 1)),
        whole.as_strided((4, 2), (2, 1)),
    ):
        assert _C.are_ordinary_rows([part], []) is part.is_contiguous()
    assert not _C.are_ordinary_rows([whole[:0]], [])  # it has no address


def test_runs_are_the_same(facts):
    torch.manual_seed(0)
    state = (torch.randn(33, 5), torch.arange(33), torch.randn(33, 2, 3).double())
    x = torch.randn(33, 10)[:, ::2]
    logits = nn.Linear(5, 1)
    n = torch.arange(33) % 7 + 1

    def run(how, policy, readout=None):
        _backend.introduce_torch(how)

        def step(state, x):
            return (torch.tanh(state[0] + x), state[1] + 1, state[2] * 1.5)

        return ac.AdaptiveHalt(step, policy, max_steps=6, readout=readout)(state, x)

    for policy in (ac.FixedSteps(n), ac.ACT(lambda s: logits(s[0])), ac.Confidence(0.4)):
        for readout in (None, lambda s: s[0][:, :3].contiguous(), lambda s: s[0][:, 1:4]):
            with torch.no_grad():
                first, second = (run(how, policy, readout) for how in (_backend.EXCHANGE, None))
            assert_bitwise(first.output, second.output)
            assert_bitwise(first.steps, second.steps)
            for a, b in zip(first.state, second.state, strict=True):
                assert_bitwise(a, b)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.resize_(2, 3),
        lambda t: t.untyped_storage().resize_(0),
        lambda t: setattr(t, "data", torch.ones(4, 3, dtype=torch.float64)),
        lambda t: setattr(t, "data", torch.ones(3, 4).t()),
    ],
)
@pytest.mark.parametrize("where", ["readout", "head"])
def test_a_state_that_is_changed_between_two_looks_is_refused(facts, where, change):
    def look(state):
        change(state)
        return torch.zeros(4)

    policy = ac.ACT(look) if where == "head" else ac.FixedSteps(3)
    halt = ac.AdaptiveHalt(lambda s: s + 1, policy, 3, readout=look if where == "readout" else None)
    message = "step: expected the state that it returned, got one that readout or head resized or replaced"
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        halt(torch.zeros(4, 3))
