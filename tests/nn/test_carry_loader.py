"""Training that carries states across optimiser steps loses no sample and mixes no rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import adaptcomp_ext as ac
from adaptcomp_ext.nn import BadSampleError


def samples_of(count: int) -> list[tuple[Any, ...]]:
    """Samples whose state counts from their index."""
    return [
        ((torch.tensor(100.0 * i), torch.full((2,), i)), {"x": torch.full((3,), float(i))})
        for i in range(count)
    ]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), max_size=40),
    slots=st.integers(1, 9),
)
def test_every_sample_is_in_as_many_blocks_as_it_takes(lengths, slots):
    seen: dict[int, int] = {}
    ended: list[int] = []
    places: dict[int, int] = {}
    full = True
    for block in ac.CarryLoader(samples_of(len(lengths)), slots):
        index = block.index.tolist()
        assert len(index) == len(set(index)) <= slots
        started = max(seen.keys() | set(index), default=-1) + 1
        full = full and len(index) == slots
        assert full or started == len(lengths), "a block is smaller only once all samples have started"
        value, count = block.state
        for place, i in enumerate(index):
            assert int(block.step[place]) == seen.get(i, 0)
            seen[i] = seen.get(i, 0) + 1
            assert float(value[place]) == 100.0 * i + seen[i] - 1
            assert count[place].tolist() == [i, i] and block.inputs[0]["x"][place].tolist() == [float(i)] * 3
            if started < len(lengths):
                assert places.setdefault(i, place) == place
        halted = torch.tensor([seen[i] >= lengths[i] for i in index])
        ended += [i for i, h in zip(index, halted.tolist(), strict=True) if h]
        block.update((value + 1, count), halted)
    assert seen == dict(enumerate(lengths))
    assert sorted(ended) == list(range(len(lengths)))


def test_a_network_trains_and_no_gradient_crosses_an_optimiser_step():
    torch.manual_seed(0)
    cell, head = nn.GRUCell(4, 8), nn.Linear(8, 1)
    optimiser = torch.optim.Adam([*cell.parameters(), *head.parameters()], 1e-2)
    x = torch.randn(400, 4)
    targets = x.sum(1)
    losses = []
    done = torch.zeros(400, dtype=torch.int64)
    for block in ac.CarryLoader(((torch.zeros(8), row) for row in x), slots=32):
        assert not block.state.requires_grad
        state = cell(block.inputs[0], block.state)
        loss = (head(state)[:, 0] - targets[block.index]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        halted = block.step + 1 >= 3
        done[block.index[halted]] += 1
        block.update(state, halted)
    assert bool((done == 1).all())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_each_iteration_begins_anew():
    loader = ac.CarryLoader(samples_of(5), slots=2)
    for _ in range(2):
        count = 0
        for block in loader:
            count += len(block.index)
            block.update(block.state, torch.ones(len(block.index), dtype=torch.bool))
        assert count == 5


def test_a_stream_that_raises_ends_when_its_rows_have_halted():
    def stream():
        yield from samples_of(3)
        raise OSError("the stream broke")

    blocks = iter(ac.CarryLoader(stream(), slots=2))
    seen = []
    with pytest.raises(OSError, match="the stream broke"):
        for block in blocks:
            seen += block.index.tolist()
            block.update(block.state, torch.ones(len(block.index), dtype=torch.bool))
    assert seen == [0, 1, 2]


@pytest.mark.promise("bad input")
def test_bad_samples_and_wrong_use():
    samples = samples_of(4)
    samples[1] = (samples[1][0], {"x": torch.zeros(4)})
    blocks = iter(ac.CarryLoader(samples, slots=2))
    with pytest.raises(BadSampleError, match=r"sample 1: inputs\[0\]: expected shape \[3\]"):
        next(blocks)
    block = next(blocks)
    assert block.index.tolist() == [0, 2]
    with pytest.raises(RuntimeError, match=r"expected block.update\(state, halted\) before the next block"):
        next(blocks)
    halted = torch.tensor([True, False])
    with pytest.raises(TypeError, match="state: expected the structure"):
        block.update(block.state[0], halted)
    with pytest.raises(ValueError, match=r"state: expected shape \[2\]"):
        block.update((block.state[0][:1], block.state[1]), halted)
    with pytest.raises(TypeError, match=r"state: expected a tensor of torch\.float32"):
        block.update((block.state[0].double(), block.state[1]), halted)
    with pytest.raises(TypeError, match=r"halted: expected a bool tensor of shape \[2\], got a tensor"):
        block.update(block.state, halted.int())
    with pytest.raises(ValueError, match=r"halted: expected shape \[2\], got \[1\]"):
        block.update(block.state, halted[:1])
    block.update(block.state, halted)
    with pytest.raises(RuntimeError, match="expected the last block, once"):
        block.update(block.state, halted)
    assert next(blocks).index.tolist() == [3, 2]
    with pytest.raises(TypeError, match="samples: expected an iterable"):
        ac.CarryLoader(3)
    with pytest.raises(ValueError, match="slots: expected an int >= 1, got 0"):
        ac.CarryLoader([], slots=0)
