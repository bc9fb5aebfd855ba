"""Batch normalisation in the step, with ``check_rows=False``: halted rows stay, and a message says so."""

import warnings

import pytest
import torch
from torch import nn

import adaptcomp_ext as ac

B = 6
N = torch.tensor([1, 2, 3, 4, 4, 2])


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, h):
        return h + torch.tanh(self.norm(h))


def norms():
    return {
        "BatchNorm1d": nn.BatchNorm1d(3),
        "SyncBatchNorm": nn.SyncBatchNorm(3),
        "LazyBatchNorm1d": nn.LazyBatchNorm1d(),
        "BatchNorm1d, without running statistics": nn.BatchNorm1d(3, track_running_stats=False).eval(),
    }


X = torch.randn(B, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", norms())
def test_halted_rows_stay_and_a_sentence_says_so(name, grad):
    if name == "SyncBatchNorm":
        pytest.skip("needs a process group to run; see the test of the search")
    kind = name.split(",")[0].replace("Lazy", "")
    n = torch.tensor([1, 2, 2, 2, 2, 4])  # one row alone from step 3 on
    found = []
    with torch.set_grad_enabled(grad):
        for compact in ("auto", False):
            torch.manual_seed(0)
            step = Block(norms()[name])
            step.norm(X)  # lazy ones settle
            halt = ac.AdaptiveHalt(step, ac.FixedSteps(n), 4, compact=compact, check_rows=False)
            if compact == "auto":
                with pytest.warns(UserWarning, match=rf"^{kind} takes its statistics .* halted rows stay"):
                    found.append(halt(X))
            else:
                found.append(halt(X))
        auto, masked = found
        assert torch.equal(auto.output, masked.output)
        with pytest.raises(ValueError, match=rf"^compact: expected False where .* since {kind} .*got True"):
            ac.AdaptiveHalt(step, ac.FixedSteps(n), 4, compact=True, check_rows=False)(X)


@pytest.mark.parametrize("name", norms())
@pytest.mark.parametrize("where", ["step", "layer", "readout", "head"])
def test_it_is_found_wherever_it_is(where, name):
    layer = norms()[name]
    quiet = nn.Linear(3, 3)
    step = nn.ModuleList([Block(layer) if where == "layer" else quiet for _ in range(3)])
    halt = ac.AdaptiveHalt(
        Block(layer) if where == "step" else step,
        ac.ACT(nn.Sequential(layer, nn.Linear(3, 1))) if where == "head" else ac.FixedSteps(2),
        3,
        readout=layer if where == "readout" else None,
        compact=True,
        check_rows=False,
    )
    with pytest.raises(ValueError, match=r"^compact: expected False"):
        halt(X)
    halt.check_rows = True
    place = {
        "step": r"step\.norm",
        "layer": r"step\.0\.norm",
        "readout": "readout",
        "head": r"policy\.head\.0",
    }
    for compact in (True, "auto"):
        halt.compact = compact
        with pytest.raises(ValueError, match=rf"^{place[where]}: expected .* row alone, .*compact=False"):
            halt(X)


def test_what_depends_on_no_other_row_is_quiet():
    for norm in (nn.BatchNorm1d(3).eval(), nn.LayerNorm(3), nn.GroupNorm(1, 3)):
        for compact in (True, "auto"):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                ac.AdaptiveHalt(Block(norm), ac.FixedSteps(N), 4, compact=compact)(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ac.AdaptiveHalt(Block(nn.InstanceNorm1d(3)), ac.FixedSteps(N), 4, compact=True)(torch.randn(B, 3, 2))


def test_the_mode_is_asked_at_every_call():
    step = Block(nn.BatchNorm1d(3))
    halt = ac.AdaptiveHalt(step, ac.FixedSteps(N), 4, compact=True)
    with pytest.raises(ValueError, match="BatchNorm1d"):
        halt(X)
    step.eval()
    halt(X)
    halt.step = Block(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="BatchNorm1d"):
        halt(X)


def test_a_layer_that_cannot_be_seen_is_named_when_one_row_is_left():
    step = Block(nn.BatchNorm1d(3))
    policy = ac.FixedSteps(torch.tensor([1, 1, 1, 1, 1, 3]))
    halt = ac.AdaptiveHalt(lambda h: step(h), policy, 4, check_rows=False)
    with pytest.raises(
        ValueError, match=r"^step: expected one row to be enough, got a layer .*use compact=False"
    ):
        halt(X)
    halt.compact = False
    assert halt(X).steps.tolist() == [1, 1, 1, 1, 1, 3]
    with pytest.raises(ValueError, match=r"^Expected more than 1 value per channel"):
        halt.policy = ac.FixedSteps(1)
        halt(X[:1])
